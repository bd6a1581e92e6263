"""The network as it is served: pixels in, float32 logits and embedding out.

This is the graph that every backend runs; scale, mean and standard deviation are inside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a network needs none of what packages need
    from models.package import InputSpec


class ServedModel(nn.Module):
    """A network behind the normalisation of its input."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, input_spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        mean, std = torch.tensor(input_spec.mean), torch.tensor(input_spec.std)
        # (x / 255 - mean) / std as one multiplication and one addition: at most 2.4e-7 apart.
        self.register_buffer("scale", 1.0 / (255.0 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: uint8 (B, H, W, 3), RGB, 0..255.

        Returns:
            `logits` float32 (B, classes) and `embedding` float32 (B, dim).
        """
        logits, embedding = self.network(images.to(self.scale.dtype) * self.scale + self.shift)
        return logits.float(), embedding.float()
