"""A network from a seed, what it costs, and graphs of it; nothing is fetched."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.golden import golden_images
from models.metaformer import MetaFormer
from models.precision import cast_network
from models.serving import ServedModel
from models.tolerances import Precision
from models.variants import Architecture, find_variant

IMAGES = 5
"""Golden images that every backend is checked on."""

ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Subject:
    """A variant under measurement.

    Attributes:
        variant: its name.
        input_size: S.
        widths: classes and embedding dim.
        network: random weights in float32, on the CPU; copied before each use.
        logits: float32 (5, C), what torch in float32 answers to the golden images on the CPU.
        embedding: float32 (5, D), likewise.
        flops: floating-point operations for one image, two for each multiplication and addition.
        elements: that all convolutions and linear layers read and write for one image.
        weights: how many the network has.
    """

    variant: str
    input_size: int
    widths: tuple[int, int]
    network: MetaFormer
    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]
    flops: int
    elements: int
    weights: int

    def served(self) -> ServedModel:
        """Return a fresh copy behind its normalisation."""
        return _served(deepcopy(self.network))

    def traffic_bytes(self, precision: Precision, bucket: int) -> float:
        """Return bytes to and from memory for one image of a batch.

        Only what convolutions and linear layers take in and give out, and the weights once a
        batch: what a runtime moves that fuses everything else into them.
        """
        return ELEMENT_BYTES[precision] * (self.elements + self.weights / bucket)

    def export(self, precision: Precision, folder: Path) -> Path:
        """Write the ONNX graph of a precision, once.

        Raises:
            ImportError: the exporter's libraries are missing.
        """
        from export.onnx import export_onnx

        path = folder / f"{self.variant}_{precision}.onnx"
        if not path.exists():
            model = _served(cast_network(deepcopy(self.network), precision))
            export_onnx(model, self.input_size, path)
        return path


def build_subject(variant: str, seed: int) -> Subject:
    """Build a variant with random weights and measure what it costs on paper.

    Raises:
        ValueError: there is no such variant.
    """
    architecture, entry = find_variant(variant)
    classes = entry.classes if entry else 1000
    network = _randomised(MetaFormer(architecture, classes), seed)
    size = architecture.input_size
    model = _served(network)
    with torch.inference_mode():
        logits, embedding = model(torch.from_numpy(golden_images(size, IMAGES)))
    flops, elements = count_cost(architecture, classes)
    return Subject(
        variant,
        size,
        (classes, architecture.embedding_dim),
        network,
        logits.numpy(),
        embedding.numpy(),
        flops,
        elements,
        sum(parameter.numel() for parameter in network.parameters()),
    )


def _served(network: nn.Module) -> ServedModel:
    # Not `InputSpec`: its library may be missing where only GPUs are measured.
    spec: Any = SimpleNamespace(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return ServedModel(network, spec).eval()


def count_cost(architecture: Architecture, classes: int) -> tuple[int, int]:
    """Count what one image costs, on a device without memory.

    Returns:
        Floating-point operations, and elements in and out of the heavy layers.
    """
    elements, size = 0, architecture.input_size

    def count(module: nn.Module, given: tuple[Tensor, ...], answered: Tensor) -> None:
        nonlocal elements
        elements += given[0].numel() + answered.numel()

    with torch.device("meta"):
        model = _served(MetaFormer(architecture, classes))
        image = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.register_forward_hook(count)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops(), elements


@torch.no_grad()
def _randomised(network: MetaFormer, seed: int) -> MetaFormer:
    """Draw every parameter, with unit gain: fresh ones would leave all branches near zero."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        normal = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim > 1:
            parameter.copy_(normal / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * normal)
        else:
            parameter.copy_(1.0 + 0.2 * normal.clamp(-3, 3))
    return network.eval().requires_grad_(False)
