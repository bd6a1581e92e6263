"""The MetaFormer of the paper's figure: stem, four stages of blocks, pooling, head.

The module tree follows timm's names, so that the state dicts of timm load as they are.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import (
    NORMS,
    Attention,
    ChannelsLastConv2d,
    Mlp,
    MlpHead,
    Pooling,
    PositionNorm,
    RandomMixing,
    Scale,
    SepConv,
)
from models.variants import Architecture


class Stem(nn.Module):
    """7x7 convolution with stride 4, then a norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = ChannelsLastConv2d(3, dim, 7, stride=4, padding=2)
        self.norm = PositionNorm(dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, H/4, W/4, dim)."""
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Downsampling(nn.Module):
    """A norm, then a 3x3 convolution with stride 2."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm = PositionNorm(dim_in, bias=False)
        self.conv = ChannelsLastConv2d(dim_in, dim_out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim_in) -> (B, H/2, W/2, dim_out)."""
        return self.conv(self.norm(x))  # type: ignore[no-any-return]


def _scale(architecture: Architecture, stage: int, kind: str) -> nn.Module:
    """Return the scale of one kind for a block of a stage: identity where it has none."""
    if architecture.residual_scaling != kind or stage not in architecture.scaled_stages:
        return nn.Identity()
    if kind == "branch_scale":
        return Scale(1)
    # 1e-5 is the usual start of a LayerScale (Touvron et al., 2021); ResScale starts neutral.
    return Scale(architecture.dims[stage], 1e-5 if kind == "layer_scale" else 1.0)


class Block(nn.Module):
    """Two pre-norm residual branches: a token mixer passed in, then an MLP.

    ResScale weighs the skip path with a vector; LayerScale weighs the branch with a vector,
    BranchScale with a scalar. At most one of them is in use, the others are identities.
    Stochastic depth is identity at inference and left out.
    """

    def __init__(self, mixer: nn.Module, architecture: Architecture, stage: int) -> None:
        super().__init__()
        dim, bias = architecture.dims[stage], architecture.block_bias
        norm = NORMS[architecture.norm]
        self.norm1 = norm(dim, bias=bias)
        self.token_mixer = mixer
        self.res_scale1 = _scale(architecture, stage, "res_scale")
        self.layer_scale1 = _scale(architecture, stage, "layer_scale")
        self.branch_scale1 = _scale(architecture, stage, "branch_scale")
        self.norm2 = norm(dim, bias=bias)
        self.mlp = Mlp(dim, architecture.activation, bias=bias)
        self.res_scale2 = _scale(architecture, stage, "res_scale")
        self.layer_scale2 = _scale(architecture, stage, "layer_scale")
        self.branch_scale2 = _scale(architecture, stage, "branch_scale")

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        mixed = self.token_mixer(self.norm1(x))
        x = self.res_scale1(x) + self.branch_scale1(self.layer_scale1(mixed))
        widened = self.mlp(self.norm2(x))
        return self.res_scale2(x) + self.branch_scale2(self.layer_scale2(widened))  # type: ignore[no-any-return]


def _mixer(architecture: Architecture, stage: int) -> nn.Module:
    """Return a new token mixer for a block of a stage."""
    dim, bias = architecture.dims[stage], architecture.block_bias
    match architecture.mixers[stage]:
        case "identity":
            return nn.Identity()
        case "pooling":
            return Pooling()
        case "random":
            return RandomMixing(architecture.grid(stage, architecture.input_size) ** 2)
        case "conv":
            return SepConv(dim, architecture.activation, bias=bias)
        case "attention":
            return Attention(dim, architecture.head_dim, bias=bias)


class Stage(nn.Module):
    """A downsampling (identity in the first stage), then the blocks."""

    def __init__(self, architecture: Architecture, stage: int) -> None:
        super().__init__()
        dims = architecture.dims
        self.downsample = Downsampling(dims[stage - 1], dims[stage]) if stage else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                Block(_mixer(architecture, stage), architecture, stage)
                for _ in range(architecture.depths[stage])
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, 2C) or so; the first stage keeps the grid."""
        return self.blocks(self.downsample(x))  # type: ignore[no-any-return]


class Head(nn.Module):
    """Mean over positions, final norm (together: the embedding), classifier."""

    def __init__(self, architecture: Architecture, classes: int, head_norm_eps: float) -> None:
        super().__init__()
        dim = architecture.embedding_dim
        self.norm = PositionNorm(dim, bias=True)
        self.fc = (
            MlpHead(dim, classes, head_norm_eps)
            if architecture.head == "mlp"
            else nn.Linear(dim, classes)
        )

    def embed(self, feature_map: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, C). Pool, then norm: the other order gives another vector."""
        # Not `mean((1, 2))`: ONNX Runtime sums a single image in another order than a batch, and
        # the answer for an image would depend on its company.
        feature_map = feature_map.to(self.norm.weight.dtype)  # the head stays in float32
        pooled = F.avg_pool2d(feature_map.permute(0, 3, 1, 2), feature_map.shape[1:3]).flatten(1)
        return self.norm(pooled)  # type: ignore[no-any-return]


class MetaFormer(nn.Module):
    """A whole network: normalised images in, logits and embeddings out.

    Args:
        architecture: what to build.
        classes: outputs of the classifier.
        head_norm_eps: epsilon of the norm inside an `mlp` head; see `layers.MlpHead`.
    """

    def __init__(
        self, architecture: Architecture, classes: int, head_norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.stem = Stem(architecture.dims[0])
        self.stages = nn.Sequential(*(Stage(architecture, stage) for stage in range(4)))
        self.head = Head(architecture, classes, head_norm_eps)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            x: float (B, H, W, 3), RGB, normalised.

        Returns:
            Logits (B, classes) and embedding (B, embedding_dim): pooled, after the final norm.
        """
        embedding = self.head.embed(self.stages(self.stem(x)))
        return self.head.fc(embedding), embedding


def _initialise(module: nn.Module) -> None:
    """Truncated normal weights and zero biases, as the paper trains from."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
