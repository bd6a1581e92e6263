"""Networks small enough to build hundreds of times, and images for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoints import Checkpoint, load_checkpoint
from models.metaformer import MetaFormer
from models.variants import Architecture
from tests.reference import randomise, timm_caformer

CLASSES = 5

CAFORMER = Architecture(
    name="tiny_caformer",
    depths=(1, 2, 2, 1),
    dims=(8, 16, 32, 64),
    mixers=("conv", "conv", "attention", "attention"),
    norm="position",
    head="mlp",
    input_size=32,
)
# Heads of 8 channels fit every stage, so that any mixer can stand anywhere.
ABLATED = replace(CAFORMER, name="tiny_ablated", depths=(1, 1, 1, 1), head_dim=8)
POOLFORMERV2 = replace(
    CAFORMER,
    name="tiny_poolformerv2",
    mixers=("pooling", "pooling", "pooling", "pooling"),
    norm="image",
    head="linear",
)


def images(count: int = 2, size: int = 32, seed: int = 7) -> Tensor:
    """Return normalised images (count, size, size, 3)."""
    return torch.randn(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def network(architecture: Architecture, classes: int = CLASSES, seed: int = 1) -> MetaFormer:
    """Return a network of ours with random weights, for evaluation."""
    return randomise(MetaFormer(architecture, classes), seed).eval()


def timm_twin(classes: int = CLASSES, seed: int = 1) -> nn.Module:
    """Return timm's CAFormer of the tiny size, with random weights."""
    return randomise(timm_caformer(CAFORMER.depths, CAFORMER.dims, classes), seed)


@torch.inference_mode()
def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and embedding."""
    logits, embedding = model(x)
    return logits, embedding


def save_and_load(state: dict[str, Tensor], folder: Path) -> Checkpoint:
    """Send a state dict through a safetensors file."""
    path = folder / "weights.safetensors"
    save_file(state, path)
    return load_checkpoint(path)
