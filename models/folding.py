"""A trained network -> the same function in the form that ONNX Runtime's CPU provider runs fastest.

Exact to rounding: trained constants move into neighbouring matrices, and pointwise layers become
1x1 convolutions. What each step gains is in docs/benchmarks.md. A folded network is for inference;
checkpoints, and the reference of every proof, stay with the trained one.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import (
    Attention,
    ImageNorm,
    Mlp,
    Scale,
    SepConv,
    SquaredReLU,
    StarReLU,
)
from models.metaformer import Block, MetaFormer
from models.serving import ServedModel


class ConvChain(nn.Sequential):
    """Layers that keep (B, C, H, W), behind a door that takes and gives (B, H, W, C).

    ONNX Runtime runs a chain of convolutions in a blocked layout of its own: the permutations
    become part of its reordering at both ends, a ReLU or a bias costs nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C')."""
        x = x.permute(0, 3, 1, 2)
        for layer in self:
            x = layer(x)
        return x.permute(0, 2, 3, 1)


class ChannelStarReLU(nn.Conv2d):
    """StarReLU of (B, C, H, W), its two scalars repeated for each channel.

    They are a depthwise 1x1 convolution, since a product or a sum with a constant would leave the
    blocked layout of a chain: two reorderings of the widest tensor there is.
    """

    def __init__(self, activation: StarReLU, channels: int) -> None:
        super().__init__(channels, channels, 1, groups=channels, dtype=activation.scale.dtype)
        nn.init.constant_(self.weight, activation.scale.item())
        nn.init.constant_(cast(Tensor, self.bias), activation.bias.item())

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every element."""
        positive = F.relu(x)
        return super().forward(positive * positive)


class FoldedAttention(nn.Module):
    """Attention whose queries, keys and values come out of a 1x1 convolution each.

    Their (B, C, H, W) is (B, heads, head_dim, N) as it lies in memory, and products read either
    operand transposed at no cost: nothing is split, only the result is transposed.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        weights: tuple[Tensor, ...] = attention.qkv.weight.double().chunk(3)
        biases: tuple[Tensor | None, ...] = (None,) * 3
        if attention.qkv.bias is not None:
            biases = attention.qkv.bias.double().chunk(3)
        dtype, scale = attention.qkv.weight.dtype, attention.scale
        self.query = _pointwise(weights[0], biases[0], dtype, scale)
        self.key = _pointwise(weights[1], biases[1], dtype)
        self.value = _pointwise(weights[2], biases[2], dtype)
        self.proj = attention.proj

    def forward(self, x: Tensor) -> Tensor:
        """Mix (B, H, W, C)."""
        batch, height, width, channels = x.shape
        x = x.permute(0, 3, 1, 2)
        query, key, value = (
            layer(x).reshape(batch, self.heads, -1, height * width)  # (B, heads, head_dim, N)
            for layer in (self.query, self.key, self.value)
        )
        weights = (query.transpose(-2, -1) @ key).softmax(-1)  # (B, heads, N, N)
        mixed = (weights @ value.transpose(-2, -1)).transpose(1, 2)  # (B, N, heads, head_dim)
        return self.proj(mixed.reshape(batch, height, width, channels))  # type: ignore[no-any-return]


class BareImageNorm(ImageNorm):
    """An ImageNorm whose weight and bias have gone into the layer after it."""

    def __init__(self, norm: ImageNorm) -> None:
        super().__init__(len(norm.weight), bias=False, eps=norm.eps)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, H, W, C) image by image."""
        return self.standardise(x)


class FoldedServedModel(nn.Module):
    """A folded network behind what is left of the normalisation: one subtraction."""

    mean: Tensor

    def __init__(self, network: MetaFormer, mean: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network; takes and gives what `ServedModel` does."""
        # Subtracting runs along rows of one channel: from (B, H, W, 3) it takes ten times as long.
        # The cast comes first because TensorRT permutes no bytes.
        centred = images.to(self.mean.dtype).permute(0, 3, 1, 2) - self.mean
        logits, embedding = self.network(centred.permute(0, 2, 3, 1))
        return logits.float(), embedding.float()


def fold_served_model(model: ServedModel) -> FoldedServedModel:
    """Return a folded copy of a served model in evaluation mode.

    The scale of the pixels goes into the stem. The mean cannot: the stem pads with zeros after
    the normalisation, which stand for the mean and not for black.
    """
    network = fold_network(cast(MetaFormer, model.network))
    stem = network.stem.conv
    with torch.no_grad():
        stem.weight.copy_(stem.weight.double() * model.scale.double().view(-1, 1, 1))
    mean = (-model.shift.double() / model.scale.double()).to(model.shift.dtype)
    return FoldedServedModel(network, mean.view(-1, 1, 1)).eval()


@torch.no_grad()
def fold_network(network: MetaFormer) -> MetaFormer:
    """Return a folded copy of a trained network; it runs on the same inputs."""
    folded = copy.deepcopy(network)
    for block in [module for module in folded.modules() if isinstance(module, Block)]:
        _fold_block(block)
    return folded.eval().requires_grad_(False)


def _fold_block(block: Block) -> None:
    """Rewrite the branches of a block in place, each from its norm to its scale."""
    mixer = block.token_mixer
    if isinstance(mixer, SepConv):
        _fold_norm(block, "norm1", mixer.pwconv1)
        _fold_scales(block, "1", mixer.pwconv2)
        block.token_mixer = _fold_sep_conv(mixer)
    elif isinstance(mixer, Attention):
        _fold_norm(block, "norm1", mixer.qkv)
        _fold_scales(block, "1", mixer.proj)
        block.token_mixer = FoldedAttention(mixer)
    _fold_norm(block, "norm2", block.mlp.fc1)
    _fold_scales(block, "2", block.mlp.fc2)
    block.add_module("mlp", _fold_mlp(block.mlp))


def _fold_norm(block: Block, name: str, following: nn.Linear) -> None:
    """Move weight and bias of an ImageNorm into the linear layer that follows.

    A PositionNorm keeps them: its operator multiplies with a weight in any case.
    """
    norm = block.get_submodule(name)
    if isinstance(norm, ImageNorm):
        if norm.bias is not None:
            _add_to_bias(following, following.weight.double() @ norm.bias.double())
        following.weight.copy_(following.weight.double() * norm.weight.double())
        block.add_module(name, BareImageNorm(norm))


def _fold_scales(block: Block, branch: str, last: nn.Linear) -> None:
    """Move the scales of a branch into its last linear layer."""
    for name in (f"layer_scale{branch}", f"branch_scale{branch}"):
        scale = getattr(block, name)
        if isinstance(scale, Scale):
            factor = scale.scale.double()
            last.weight.copy_(last.weight.double() * factor.view(-1, 1))
            if last.bias is not None:
                last.bias.copy_(last.bias.double() * factor)
            setattr(block, name, nn.Identity())


def _fold_sep_conv(mixer: SepConv) -> ConvChain:
    """Return the chain of a SepConv.

    The constants of its StarReLU stay before the depthwise convolution, whose zero padding comes
    after them: folded into it they would be wrong along the border.
    """
    channels = mixer.dwconv.in_channels
    depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
    depthwise.weight, depthwise.bias = mixer.dwconv.weight, mixer.dwconv.bias
    activation = mixer.act1
    if isinstance(activation, StarReLU):
        activation = ChannelStarReLU(activation, channels)
    return ConvChain(_as_conv(mixer.pwconv1), activation, depthwise, _as_conv(mixer.pwconv2))


def _fold_mlp(mlp: Mlp) -> ConvChain:
    """Return the chain of an MLP; the constants of a StarReLU go into its second layer."""
    activation = mlp.act
    if isinstance(activation, StarReLU):
        weight = mlp.fc2.weight.double()
        _add_to_bias(mlp.fc2, weight.sum(1) * activation.bias.double())
        mlp.fc2.weight.copy_(weight * activation.scale.double())
        activation = SquaredReLU()
    return ConvChain(_as_conv(mlp.fc1), activation, _as_conv(mlp.fc2))


def _add_to_bias(linear: nn.Linear, summand: Tensor) -> None:
    """Add to the bias of a linear layer, which gets one where it has none."""
    total = summand if linear.bias is None else linear.bias.double() + summand
    linear.bias = nn.Parameter(total.to(linear.weight.dtype))


def _as_conv(linear: nn.Linear) -> nn.Conv2d:
    """Return a linear layer as a 1x1 convolution."""
    return _pointwise(linear.weight, linear.bias, linear.weight.dtype)


def _pointwise(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, factor: float = 1.0
) -> nn.Conv2d:
    """Return a 1x1 convolution with a matrix (out, in) and a bias (out), both times a factor."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None, dtype=dtype)
    conv.weight.copy_((weight * factor)[:, :, None, None])
    if bias is not None:
        cast(Tensor, conv.bias).copy_(bias * factor)
    return conv
