"""The building blocks of a MetaFormer, one class each; tensors are (B, H, W, C) throughout.

Source of all formulas: "MetaFormer Baselines for Vision" (Yu et al., 2022), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6


class StarReLU(nn.Module):
    """s * relu(x)^2 + b with one trained scalar each, shared by all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every element."""
        positive = F.relu(x)
        # A product exports as Mul; `square()` would export as the slower Pow.
        return self.scale * (positive * positive) + self.bias


class SquaredReLU(nn.Module):
    """relu(x)^2, without trained scalars."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every element."""
        positive = F.relu(x)
        return positive * positive


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "squared_relu": SquaredReLU,
    "star_relu": StarReLU,
}


class PositionNorm(nn.LayerNorm):
    """Layer norm over the channels of each position."""

    def __init__(self, dim: int, *, bias: bool, eps: float = NORM_EPS) -> None:
        super().__init__(dim, eps=eps, bias=bias)


class ImageNorm(nn.Module):
    """Norm over channels, height and width together: a group norm with one group."""

    def __init__(self, dim: int, *, bias: bool, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, H, W, C) image by image, then scale channel by channel."""
        x = self.standardise(x) * self.weight
        return x if self.bias is None else x + self.bias

    def standardise(self, x: Tensor) -> Tensor:
        """Bring each image to mean 0 and variance 1."""
        # As one channel of H*W*C values this exports to InstanceNormalization, whose axes no
        # runtime can misread; GroupNormalization with one group has been misread as per channel.
        flat = F.group_norm(x.reshape(-1, 1, math.prod(x.shape[1:])), 1, eps=self.eps)
        return flat.reshape(x.shape)


NORMS: dict[str, type[PositionNorm] | type[ImageNorm]] = {
    "position": PositionNorm,
    "image": ImageNorm,
}


class Scale(nn.Module):
    """Multiplication with a trained vector, or with a single scalar for `dim` 1."""

    def __init__(self, dim: int, initial: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last axis."""
        return x * self.scale


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution that takes and gives (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve; weights are stored (out, in, kh, kw) as everywhere in torch."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Pooling(nn.Module):
    """3x3 average pooling minus the input, the mixer of PoolFormer."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix; padding does not count in the averages."""
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
        return pooled.permute(0, 2, 3, 1) - x


class RandomMixing(nn.Module):
    """Multiplication of the token axis with a fixed random matrix whose rows sum to one."""

    random_matrix: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        # Kept under the official key, but as a buffer: it is data, never trained.
        self.register_buffer("random_matrix", torch.rand(tokens, tokens).softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the row-major tokens of (B, H, W, C).

        Raises:
            ValueError: the input has another number of tokens than the matrix.
        """
        tokens = x.shape[1] * x.shape[2]
        if tokens != self.random_matrix.shape[0]:
            raise ValueError(
                f"random mixing was built for {self.random_matrix.shape[0]} tokens and got "
                f"{tokens}: RandFormer runs only at the input size it was built for"
            )
        return (self.random_matrix @ x.flatten(1, 2)).reshape(x.shape)


class SepConv(nn.Module):
    """Inverted separable convolution: pointwise, activation, depthwise 7x7, pointwise."""

    def __init__(self, dim: int, activation: str, *, bias: bool) -> None:
        super().__init__()
        self.pwconv1 = nn.Linear(dim, 2 * dim, bias=bias)
        self.act1 = ACTIVATIONS[activation]()
        self.dwconv = ChannelsLastConv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=bias)
        self.pwconv2 = nn.Linear(2 * dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (B, H, W, C)."""
        return self.pwconv2(self.dwconv(self.act1(self.pwconv1(x))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Softmax attention of every token to every other; no positional encoding."""

    def __init__(self, dim: int, head_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.scale = float(head_dim) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (B, H, W, C)."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, head_dim)
        # Written out: the fused operator exports to twice the nodes, and as one Attention node
        # from opset 23 on, which not every runtime builds in float32.
        weights = ((query * self.scale) @ key.transpose(-2, -1)).softmax(-1)  # (B, heads, N, N)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, height, width, channels)
        return self.proj(mixed)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with an activation between them, four times as wide inside."""

    def __init__(self, dim: int, activation: str, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim, bias=bias)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(4 * dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis."""
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class MlpHead(nn.Module):
    """The classifier of ConvFormer and CAFormer: linear, squared ReLU, norm, linear.

    `norm_eps` depends on where the weights come from: trained with 1e-5 by the official code,
    run with 1e-6 by timm.
    """

    def __init__(self, dim: int, classes: int, norm_eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = SquaredReLU()
        self.norm = nn.LayerNorm(4 * dim, eps=norm_eps)
        self.fc2 = nn.Linear(4 * dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Turn an embedding (B, C) into logits (B, classes)."""
        return self.fc2(self.norm(self.act(self.fc1(x))))  # type: ignore[no-any-return]
