"""What is served and what is sent: packages from a seed, graphs of them, images."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from app.bench.plan import read_bodies
from benchmarks.graph import plain_export
from export.publish import ExportRequest, export_package
from export.weights import Weights
from models.build import load_served_model
from models.cache import user_cache
from models.metaformer import MetaFormer
from models.package import MANIFEST, PRETRAINED, InputSpec, Package, open_package
from models.variants import Architecture, find_variant
from tests.reference import randomise

PHOTOGRAPH = Path(__file__).parents[1] / "examples/images/china.jpg"
CLASSES = 1000


@dataclass(frozen=True)
class Load:
    """One kind of request on one kind of model.

    Attributes:
        name: for `ONLY=`.
        words: what it shows.
        package: that is served.
        image: the body of each request.
        modes: values of METASERVE_DECODE to measure.
        processes: values of METASERVE_WORKERS to measure; the last is what the hand-written
            service has, too.
        seconds: of a measurement: longer where a request takes long.
    """

    name: str
    words: str
    package: Package
    image: bytes
    modes: tuple[str, ...] = ("scaled",)
    processes: tuple[int, ...] = (1,)
    seconds: float = 2.0


class Floats(nn.Module):
    """A network as a plain export has it: normalised floats (N, 3, S, S) -> logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.permute(0, 2, 3, 1))[0]
        return logits


def cache() -> Path:
    """Return where packages are kept from one run to the next."""
    folder = (user_cache("benchmarks") or Path(".benchmarks")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_loads(cpus: int) -> list[Load]:
    """Build packages that are not there yet, and images."""
    digits = open_package(PRETRAINED / "caformer_digits")
    (tiny,) = read_bodies([])
    nothing = _package("nothing_224", _almost_nothing())
    caformer = _package("caformer_s18", find_variant("caformer_s18")[0])
    photo = _jpeg((500, 375))
    both = tuple(sorted({1, cpus}))
    fast = ("scaled", "fast")
    return [
        Load("tiny", "32x32 PNG, embedded model: overhead", digits, tiny, processes=both),
        Load("photo", "500x375 JPEG, almost no model: decoding", nothing, photo, fast, both),
        Load("phone", "12-megapixel JPEG, almost no model", nothing, _jpeg((4000, 3000)), fast,
             (cpus,), seconds=4.0),
        Load("caformer", "500x375 JPEG, caformer_s18: computing", caformer, photo, seconds=6.0),
    ]  # fmt: skip


def float_graph(package: Package) -> Path:
    """Return the hand-written service's graph of a package's network; exported once."""
    path = cache() / f"{package.manifest.name}-{package.manifest.version}-floats.onnx"
    if not path.exists():
        size = package.manifest.input.size
        # The exporter specialises an axis of length one.
        example = torch.zeros(2, 3, size, size)
        staging = path.with_suffix(".part")
        plain_export(Floats(load_served_model(package).network).eval(), example, staging)
        staging.rename(path)
    return path


def _package(name: str, architecture: Architecture) -> Package:
    folder = cache() / name
    if (folder / MANIFEST).exists():
        return open_package(folder)
    checkpoint = cache() / f"{name}.safetensors"
    save_file(randomise(MetaFormer(architecture, CLASSES), 1).state_dict(), checkpoint)
    weights = Weights(name, architecture, checkpoint, checkpoint.name)
    request = ExportRequest(
        weights, architecture, InputSpec(size=architecture.input_size), folder, overwrite=True
    )
    package = export_package(request, print)
    checkpoint.unlink()
    return package


def _almost_nothing() -> Architecture:
    """Return a network that takes 224 pixels and computes next to nothing."""
    base, _ = find_variant("caformer_digits")
    return replace(
        base,
        name="nothing_224",
        depths=(1, 1, 1, 1),
        dims=(4, 4, 4, 8),
        mixers=("identity", "identity", "identity", "identity"),
        head_dim=4,
        input_size=224,
    )


def _jpeg(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    with Image.open(PHOTOGRAPH) as image:
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
