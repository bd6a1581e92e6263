"""A network in half precision: everything but a named list of modules, which stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers import ImageNorm, PositionNorm, SquaredReLU, StarReLU
from models.tolerances import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

KEPT_IN_FLOAT32: tuple[type[nn.Module], ...] = (PositionNorm, ImageNorm, StarReLU, SquaredReLU)
"""Norms lose their statistics in half precision and squares their range; the head stays too."""


class InFloat32(nn.Module):
    """A module that computes in float32 between neighbours in half precision."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Cast, run, cast back."""
        return self.module(x.float()).to(self.dtype)  # type: ignore[no-any-return]


class HalfNetwork(nn.Module):
    """A network in half precision that takes and gives float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `MetaFormer.forward`."""
        return self.network(x.to(self.dtype))  # type: ignore[no-any-return]


def cast_network(network: nn.Module, precision: Precision) -> nn.Module:
    """Return the network with its weights in another precision; the given one is used up.

    Args:
        network: a MetaFormer in float32; its modules are changed and moved into the result.
        precision: `fp32` gives the network back as it is.

    Returns:
        Takes and gives what the network does, in float32 at its edges.
    """
    if precision == "fp32":
        return network
    dtype = DTYPES[precision]
    for name, module in list(network.named_modules()):
        if name.partition(".")[0] == "head":
            continue
        if isinstance(module, KEPT_IN_FLOAT32):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, InFloat32(module, dtype))
        else:
            _cast_own_tensors(module, dtype)
    return HalfNetwork(network, dtype)


def _cast_own_tensors(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module's tensors, not those of the modules in it: what is kept is never rounded."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(dtype))


def widen_network(network: nn.Module) -> nn.Module:
    """Return a cast network with the same rounded weights, computing in float32; used up.

    What it answers differs from the network's own answers by the rounding of the weights alone,
    and from the cast network's by the rounding between layers alone.
    """
    for module in network.modules():
        if isinstance(module, InFloat32 | HalfNetwork):
            module.dtype = torch.float32
    return network.float()
