"""What a Triton server says of its model, against what the package says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from app.errors import StartupError
from models.package import Package

MOST_LANES = 8


@dataclass(frozen=True)
class Described:
    """A server and its model, in the client's own messages.

    Attributes:
        server_version: for example `2.51.0`.
        metadata: a `ModelMetadataResponse`: names, types and shapes with the batch.
        config: a `ModelConfig`.
    """

    server_version: str
    metadata: Any
    config: Any

    @property
    def device(self) -> str:
        """Where the model's instances run: `cuda`, `cpu`, or `unknown` where it decides itself."""
        kinds = {type(group).Kind.Name(group.kind) for group in self.config.instance_group}
        names = {"KIND_GPU": "cuda", "KIND_CPU": "cpu"}
        return names.get(kinds.pop(), "unknown") if len(kinds) == 1 else "unknown"

    @property
    def lanes(self) -> int:
        """How many batches to send at once: one an instance, and one that waits its turn.

        Without that one an instance would be idle while its answer travels and the next batch
        comes. More would wait in Triton's queue, where nobody leaves and nobody is added; ours is
        the better place.
        """
        groups = self.config.instance_group
        instances: int = sum(group.count * max(len(group.gpus), 1) for group in groups)
        return min(max(instances, 1) + 1, MOST_LANES)


def check_model(described: Described, package: Package, where: str) -> None:
    """Refuse a model that cannot be the package's.

    That it computes the same is for the golden outputs to show.

    Args:
        described: the server's words.
        package: the model that is expected.
        where: model and server, for the sentence.

    Raises:
        StartupError: an input or output differs in name, type or shape, or batches are off.
    """
    manifest = package.manifest
    side = manifest.input.size
    expected = {
        "images": ("UINT8", (-1, side, side, 3)),
        "logits": ("FP32", (-1, manifest.classes)),
        "embedding": ("FP32", (-1, manifest.embedding_dim)),
    }
    if described.config.max_batch_size < 1:
        raise StartupError(
            f"{where} takes no batches; set max_batch_size in its config.pbtxt, or write it again "
            "with `metaserve export --format triton`"
        )
    metadata = described.metadata
    inputs, outputs = _tensors(metadata.inputs), _tensors(metadata.outputs)
    found = {name: (inputs if name == "images" else outputs).get(name) for name in expected}
    # An input that is not ours to fill is named in the sentence like one that is missing.
    strays = [name for name in inputs if name != "images"]
    for name, wanted in (*expected.items(), *((name, None) for name in strays)):
        has = inputs.get(name) if wanted is None else found[name]
        if has != wanted:
            raise StartupError(
                f"{where} is not the model of {package.path}: {name} is {_shown(has)} there and "
                f"{_shown(wanted)} here; set METASERVE_TRITON_MODEL, or write it again with "
                "`metaserve export --format triton`"
            )


def _tensors(tensors: Iterable[Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {one.name: (one.datatype, tuple(one.shape)) for one in tensors}


def _shown(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    if tensor is None:
        return "missing"
    datatype, shape = tensor
    return f"{datatype} [{', '.join(map(str, shape))}]"
