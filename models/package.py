"""The model package: a directory with a graph, a manifest, labels and proof; no torch.

caformer_digits/
    manifest.json         what it is, the hash of every other file, the verification figures
    model.onnx            uint8 (N, S, S, 3) -> logits float32 (N, C), embedding float32 (N, D)
    model.plan            that graph as a TensorRT engine, where one was built
    weights.safetensors   for the torch backend
    labels.txt            one label a line, in class order
    wordnet_ids.txt       one WordNet id a line, in class order
    golden.npz            what torch in float32 answers to `golden_images`
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from models.cache import user_cache
from models.tolerances import Precision
from models.variants import (
    Activation,
    Architecture,
    BlockNorm,
    Head,
    Mixer,
    ResidualScaling,
)

MANIFEST = "manifest.json"
MODEL = "model.onnx"
PLAN = "model.plan"
WEIGHTS = "weights.safetensors"
LABELS = "labels.txt"
WORDNET_IDS = "wordnet_ids.txt"
GOLDEN = "golden.npz"

PRETRAINED = Path(__file__).parent / "pretrained"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_GOLDEN = 64
"""Golden images a package may hold outputs for; exports write 5."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
ModelName = Annotated[str, StringConstraints(pattern=MODEL_NAME)]
# Of pixels in 0..1: what is larger was meant for 0..255.
Mean = Annotated[float, Field(ge=-10, le=10)]
Std = Annotated[float, Field(ge=1e-3, le=10)]
# Far above every network of the paper; a manifest from elsewhere must not cost a start for ever.
Depth = Annotated[int, Field(ge=1, le=256)]
Width = Annotated[int, Field(ge=1, le=8192)]
Positive = Annotated[float, Field(gt=0)]


class PackageError(Exception):
    """A package that cannot be used; the message is one sentence that says why."""


class PackageNotFound(PackageError):
    """There is nothing of that name."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InputSpec(_Frozen):
    """How an image becomes the network's input.

    Attributes:
        size: side of the square input in pixels.
        crop_pct: share of the resized shorter side that the centre crop keeps.
        interpolation: the resampling filter, on 8-bit pixels with antialiasing.
        mean: per channel, of pixels in 0..1; inside the graph.
        std: likewise.
    """

    size: Annotated[int, Field(ge=1, le=4096)]
    crop_pct: Annotated[float, Field(ge=0.1, le=1)] = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[Mean, Mean, Mean] = IMAGENET_MEAN
    std: tuple[Std, Std, Std] = IMAGENET_STD


class ArchitectureSpec(_Frozen):
    """An `Architecture` as the manifest writes it down."""

    name: str
    depths: tuple[Depth, Depth, Depth, Depth]
    dims: tuple[Width, Width, Width, Width]
    mixers: tuple[Mixer, Mixer, Mixer, Mixer]
    norm: BlockNorm
    head: Head
    activation: Activation
    residual_scaling: ResidualScaling
    scaled_stages: tuple[int, ...]
    block_bias: bool
    head_dim: Width
    input_size: Annotated[int, Field(ge=16, le=4096)]

    def to_architecture(self) -> Architecture:
        """Return the dataclass the network is built from."""
        return Architecture(**self.model_dump())


class Source(_Frozen):
    """Where the weights came from.

    Attributes:
        file: its name, or its path in the repository.
        sha256: of the file.
        layout: how it names the weights.
        repository: on the hub, where it was downloaded from one.
        commit: of the repository.
    """

    file: str
    sha256: Sha256
    layout: Literal["timm", "official"]
    repository: str | None = None
    commit: str | None = None


class Verification(_Frozen):
    """How far answers are from the torch model in float32, over batches 1, 2 and 5.

    Attributes:
        max_abs_logit_difference: largest absolute difference of any logit.
        max_rel_logit_difference: that, relative to the largest logit of the same image.
        max_embedding_cosine_distance: 1 - cosine similarity, largest over images.
        top1_agreement: share of images with the same best class, 0..1.
        batch_dependence: largest difference of a logit of the same image between batch sizes.
        logit_tolerance: the bound that `max_abs_logit_difference` had to keep.
        embedding_tolerance: the bound of `max_embedding_cosine_distance`.
        images: how many fixed images were compared.
        runtime: what ran the graph, for example `onnxruntime 1.32.0 CPUExecutionProvider`.
    """

    max_abs_logit_difference: float
    max_rel_logit_difference: float
    max_embedding_cosine_distance: float
    top1_agreement: float
    batch_dependence: float
    logit_tolerance: Positive
    embedding_tolerance: Annotated[float, Field(gt=0, le=1)] = 1e-6
    images: int
    runtime: str


class BackendProof(Verification):
    """The same figures for a backend, by `metaserve verify --backends`.

    Attributes:
        backend: as in `METASERVE_BACKEND`.
        precision: that the backend computed in.
        device: for example `cpu` or `cuda:0`.
    """

    backend: str
    precision: Precision
    device: str


class ActivationRange(_Frozen):
    """The range of one squaring activation.

    Attributes:
        largest_input: before it; what is negative does not count.
        largest_output: after it, in absolute value.
    """

    largest_input: float
    largest_output: float


class Calibration(_Frozen):
    """The range of every squaring activation over the calibration images.

    Attributes:
        images: how many.
        real_images: how many of them a user gave; the others are the golden ones.
        activations: module -> its range.
    """

    images: int
    real_images: int = 0
    activations: dict[str, ActivationRange]

    def by_output(self) -> list[tuple[str, ActivationRange]]:
        """Return the activations, the largest output first."""
        return sorted(self.activations.items(), key=lambda item: -item[1].largest_output)


class Evaluation(_Frozen):
    """Accuracy measured on data the weights never saw.

    Attributes:
        dataset: which data, in words.
        images: how many.
        correct: how many the packaged graph classified correctly.
        top1: the same as a share, 0..1.
    """

    dataset: str
    images: int
    correct: int
    top1: float


class PlanSpec(_Frozen):
    """What `model.plan` was built by, for and from; the engine fits nothing else.

    Attributes:
        module: the library, by the name it is imported by.
        version: of the library.
        compute_capability: of the GPU, for example `9.0`; None for an engine of `tensorrt_rtx`,
            which fits every GPU that library knows.
        operating_system: and processor, for example `linux-x86_64`.
        min_batch_size: smallest batch of the optimisation profile.
        opt_batch_size: the batch it is tuned for.
        max_batch_size: largest batch.
        precision: of the graph, which decides it.
        onnx_sha256: of the `model.onnx` it was built from.
        options: of the builder, as far as they may change the engine.
    """

    module: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    compute_capability: Annotated[str, StringConstraints(pattern=r"^[0-9]+\.[0-9]+$")] | None
    operating_system: str
    min_batch_size: Annotated[int, Field(ge=1)]
    opt_batch_size: Annotated[int, Field(ge=1)]
    max_batch_size: Annotated[int, Field(ge=1)]
    precision: Literal["fp32", "fp16", "bf16"]
    onnx_sha256: Sha256
    options: dict[str, bool | int] = {}

    @property
    def key(self) -> str:
        """A name that two engines share only where they are interchangeable."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]


class Manifest(_Frozen):
    """`manifest.json`, format 1; the fields are the contract with every tool that reads it."""

    format: Literal[1] = 1
    name: ModelName
    version: ModelName
    variant: str
    architecture: ArchitectureSpec
    classes: Annotated[int, Field(ge=1)]
    embedding_dim: Annotated[int, Field(ge=1)]
    head_norm_eps: Annotated[float, Field(gt=0)]
    input: InputSpec
    precision: Precision
    opset: int
    tools: dict[str, str]
    files: dict[FileName, Sha256]
    source: Source
    verification: Verification
    proofs: tuple[BackendProof, ...] = ()
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    plan: PlanSpec | None = None

    @property
    def key(self) -> str:
        """What two packages share only where they answer alike; proofs may be added to either."""
        return hashlib.sha256(self.model_dump_json(exclude={"proofs"}).encode()).hexdigest()


@dataclass(frozen=True)
class Package:
    """A package on disk with its manifest read."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self._require(MODEL, "the onnxruntime backend")

    @property
    def plan_path(self) -> Path:
        """The TensorRT engine."""
        return self._require(PLAN, "the tensorrt backend")

    @property
    def weights_path(self) -> Path:
        """The weights for the torch backend."""
        return self._require(WEIGHTS, "the torch backend")

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """One label a class, or None where the package has none.

        Raises:
            PackageError: there are more or fewer labels than classes.
        """
        if LABELS not in self.manifest.files:
            return None
        return parse_labels(self.path / LABELS, self.manifest.classes)

    @cached_property
    def wordnet_ids(self) -> tuple[str, ...] | None:
        """One WordNet id a class, or None where the package has none.

        Raises:
            PackageError: there are more or fewer than classes, or one is no WordNet id.
        """
        if WORDNET_IDS not in self.manifest.files:
            return None
        ids = parse_labels(self.path / WORDNET_IDS, self.manifest.classes)
        if not all(WORDNET_ID.fullmatch(one) for one in ids):
            raise PackageError(f"{self.path / WORDNET_IDS} holds lines that are no WordNet ids")
        return ids

    @cached_property
    def golden(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits (N, C) and embeddings (N, D) of torch in float32 for `golden_images`.

        Raises:
            PackageError: the package holds none, or they cannot be read.
        """
        path = self._require(GOLDEN, "the check at start")
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                logits, embedding = arrays["logits"], arrays["embedding"]
        except Exception as error:  # numpy raises almost anything at files that are no archive
            raise PackageError(
                f"{path} holds no golden outputs; export the package again"
            ) from error
        count, manifest = len(logits), self.manifest
        shapes = (count, manifest.classes), (count, manifest.embedding_dim)
        is_plain = logits.dtype == embedding.dtype == np.float32 and 1 <= count <= MAX_GOLDEN
        if not is_plain or (logits.shape, embedding.shape) != shapes:
            raise PackageError(f"{path} belongs to another network; export the package again")
        return logits, embedding

    def check_files(self, names: Collection[str] | None = None) -> None:
        """Compare every file with its hash in the manifest.

        Args:
            names: of the files that count; all when None.

        Raises:
            PackageError: a file is missing, damaged or exchanged.
        """
        for name, expected in self.manifest.files.items():
            if names is not None and name not in names:
                continue
            try:
                actual = sha256_file(self.path / name)
            except OSError as error:
                raise PackageError(
                    f"package {self.path}: {name} cannot be read ({error.strerror}); copy it again"
                ) from error
            if actual != expected:
                raise PackageError(
                    f"package {self.path}: {name} is not the file the manifest describes "
                    f"(sha256 {actual[:12]}..., expected {expected[:12]}...); copy it again"
                )

    def _require(self, name: str, purpose: str) -> Path:
        if name not in self.manifest.files:
            raise PackageError(
                f"package {self.path} holds no {name}, which {purpose} needs; export it again"
            )
        return self.path / name


def open_package(path: Path) -> Package:
    """Read a package's manifest; file hashes are checked by `Package.check_files`.

    Raises:
        PackageError: no package, or a manifest this version does not understand.
    """
    manifest_path = path / MANIFEST
    try:
        manifest = Manifest.model_validate_json(manifest_path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PackageError(f"{path} is no model package: it holds no {MANIFEST}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PackageError(f"{manifest_path}: {where}: {first['msg']}") from error
    except OSError as error:
        raise PackageError(f"{manifest_path} cannot be read: {error.strerror}") from error
    return Package(path, manifest)


def find_package(model: str, store: Path | None = None) -> Path:
    """Resolve what `METASERVE_MODEL` says.

    That is a directory, or a name: in the store, embedded, or exported on first use before.

    Raises:
        PackageNotFound: nothing of that name; the sentence lists what there is.
        PackageError: the place cannot be read.
    """
    roots = [root for root in (store, PRETRAINED, user_cache("models")) if root is not None]
    candidates = [Path(model)] if "/" in model or model.startswith(".") else []
    if not candidates:
        candidates = [*(root / model for root in roots), Path(model)]
    if store is not None and not store.is_dir():
        # One that is not there yet may be made by a first use.
        kind = PackageError if store.exists() else PackageNotFound
        raise kind(f"the model store {store} is no directory that can be read")
    for candidate in candidates:
        try:
            if (candidate / MANIFEST).is_file():
                return candidate
        except OSError as error:
            raise PackageError(f"{candidate} cannot be read: {error.strerror}") from error
    manifests = [path for root in roots for path in sorted(root.glob(f"[!.]*/{MANIFEST}"))]
    known = dict.fromkeys(path.parent.name for path in manifests)
    raise PackageNotFound(
        f"there is no model package {model!r}; give a package directory or one of: "
        f"{', '.join(known) or 'none found'}"
    )


def parse_labels(path: Path, classes: int) -> tuple[str, ...]:
    """Read one label a line.

    Raises:
        PackageError: not UTF-8, or another number of lines than classes.
    """
    lines = read_lines(path)
    if len(lines) != classes:
        raise PackageError(f"{path} holds {len(lines)} labels for {classes} classes")
    return lines


def read_lines(path: Path) -> tuple[str, ...]:
    """Read the lines of a text file, without their ends.

    Raises:
        PackageError: it cannot be read, or is not UTF-8.
    """
    try:
        # Not `splitlines`, which also splits at characters that may stand in a label.
        return tuple(path.read_text("utf-8-sig").removesuffix("\n").split("\n"))
    except OSError as error:
        raise PackageError(f"labels file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PackageError(f"labels file {path} is no UTF-8 text: {error}") from error


def check_name(name: str) -> None:
    """Refuse what cannot be a package's name or version.

    Raises:
        PackageError: it holds other characters than letters, digits, dot, dash and underscore.
    """
    if not re.fullmatch(MODEL_NAME, name):
        raise PackageError(
            f"{name!r} cannot be a package's name or version: letters, digits, dots, dashes and "
            "underscores can, 128 at most; see --name and --version"
        )


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> Mapping[str, str]:
    """Return name -> SHA-256 of every file in a package folder but the manifest."""
    return {
        path.name: sha256_file(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
