"""The catalogue: every architecture and every named checkpoint, as data; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

Mixer = Literal["identity", "pooling", "random", "conv", "attention"]
Activation = Literal["relu", "gelu", "squared_relu", "star_relu"]
ResidualScaling = Literal["none", "layer_scale", "res_scale", "branch_scale"]
BlockNorm = Literal["position", "image"]
Head = Literal["linear", "mlp"]


@dataclass(frozen=True)
class Architecture:
    """One network of the MetaFormer family, complete enough to build it.

    Source: "MetaFormer Baselines for Vision", sections 2 and 3, tables 1 to 4.

    Attributes:
        name: as in the paper, lower case.
        depths: blocks in each of the four stages.
        dims: channels in each of the four stages.
        mixers: the token mixer of each of the four stages.
        norm: what a block's norms take their statistics over: the channels of one `position`,
            or the whole `image` (channels, height and width together).
        head: a `linear` classifier or the paper's `mlp` one.
        activation: between the two layers of the MLP, and after SepConv's first layer.
        residual_scaling: how the two branches of a block's residuals are weighted.
        scaled_stages: the stages where residual scaling applies.
        block_bias: whether norms, linear layers and depthwise convolutions in blocks have biases.
        head_dim: channels of one attention head.
        input_size: side in pixels that the network was made for. Random mixing ties the network
            to it; all others accept any size.
    """

    name: str
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    mixers: tuple[Mixer, Mixer, Mixer, Mixer]
    norm: BlockNorm
    head: Head
    activation: Activation = "star_relu"
    residual_scaling: ResidualScaling = "res_scale"
    scaled_stages: tuple[int, ...] = (2, 3)
    block_bias: bool = False
    head_dim: int = 32
    input_size: int = 224

    def __post_init__(self) -> None:
        for dim, mixer in zip(self.dims, self.mixers, strict=True):
            if mixer == "attention" and dim % self.head_dim:
                raise ValueError(
                    f"{self.name}: {dim} channels do not divide into heads of {self.head_dim}"
                )

    @property
    def embedding_dim(self) -> int:
        """Length of the pooled embedding."""
        return self.dims[-1]

    def grid(self, stage: int, input_size: int) -> int:
        """Return the side of a stage's token grid for a square input of `input_size` pixels.

        Source: the stem is 7x7, stride 4, padding 2; each downsampling 3x3, stride 2, padding 1.
        """
        side = (input_size - 3) // 4 + 1
        for _ in range(stage):
            side = (side - 1) // 2 + 1
        return side

    def check_input_size(self, input_size: int) -> None:
        """Refuse an input size that this network cannot be served at.

        Raises:
            ValueError: one sentence that says why.
        """
        if input_size < 16:
            raise ValueError(f"{self.name} needs images of at least 16 px; {input_size} was asked")
        if "random" in self.mixers and input_size != self.input_size:
            raise ValueError(
                f"{self.name} mixes tokens with fixed matrices and runs only at "
                f"{self.input_size} px; {input_size} px was asked"
            )


def _basic(name: str, mixers: tuple[Mixer, Mixer, Mixer, Mixer]) -> list[Architecture]:
    narrow, wide = (64, 128, 320, 512), (96, 192, 384, 768)
    sizes = {
        "s12": ((2, 2, 6, 2), narrow),
        "s24": ((4, 4, 12, 4), narrow),
        "s36": ((6, 6, 18, 6), narrow),
        "m36": ((6, 6, 18, 6), wide),
        "m48": ((8, 8, 24, 8), wide),
    }
    return [
        Architecture(f"{name}_{size}", depths, dims, mixers, norm="image", head="linear")
        for size, (depths, dims) in sizes.items()
    ]


def _strong(name: str, mixers: tuple[Mixer, Mixer, Mixer, Mixer]) -> list[Architecture]:
    sizes = {
        "s18": ((3, 3, 9, 3), (64, 128, 320, 512)),
        "s36": ((3, 12, 18, 3), (64, 128, 320, 512)),
        "m36": ((3, 12, 18, 3), (96, 192, 384, 576)),
        "b36": ((3, 12, 18, 3), (128, 256, 512, 768)),
    }
    return [
        Architecture(f"{name}_{size}", depths, dims, mixers, norm="position", head="mlp")
        for size, (depths, dims) in sizes.items()
    ]


PAPER_ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        *_basic("identityformer", ("identity", "identity", "identity", "identity")),
        *_basic("randformer", ("identity", "identity", "random", "random")),
        *_basic("poolformerv2", ("pooling", "pooling", "pooling", "pooling")),
        *_strong("convformer", ("conv", "conv", "conv", "conv")),
        *_strong("caformer", ("conv", "conv", "attention", "attention")),
    )
}

# The embedded model: small enough to ship, the same building blocks as every CAFormer.
CAFORMER_DIGITS = Architecture(
    name="caformer_digits",
    depths=(2, 2, 1, 1),
    dims=(32, 48, 64, 64),
    mixers=("conv", "conv", "attention", "attention"),
    norm="position",
    head="mlp",
    input_size=32,
)

ARCHITECTURES: dict[str, Architecture] = {
    **PAPER_ARCHITECTURES,
    CAFORMER_DIGITS.name: CAFORMER_DIGITS,
}


@dataclass(frozen=True)
class CheckpointEntry:
    """One published checkpoint: where it is and what it expects.

    Attributes:
        name: the official name, for example `caformer_s18_384_in21ft1k`.
        architecture: key of `ARCHITECTURES`.
        file: path inside the Hugging Face repository `sail/dl`.
        hub_id: the timm model on the hub without the `timm/`, or None where there is none.
        classes: outputs of the classifier.
        input_size: side in pixels.
        top1: ImageNet-1K top-1 in percent as the paper reports it, None for 21841 classes.
    """

    name: str
    architecture: str
    file: str
    hub_id: str | None
    classes: int
    input_size: int
    top1: float | None


# Source: table of results in the README of sail-sg/metaformer, commit 64c534a.
_BASIC_TOP1 = {
    "identityformer": {"s12": 74.6, "s24": 78.2, "s36": 79.3, "m36": 80.0, "m48": 80.4},
    "randformer": {"s12": 76.6, "s24": 78.2, "s36": 79.5, "m36": 81.2, "m48": 81.4},
    "poolformerv2": {"s12": 78.0, "s24": 80.7, "s36": 81.6, "m36": 82.2, "m48": 82.6},
}
_STRONG_TOP1: dict[str, dict[str, dict[str, float | None]]] = {
    "convformer": {
        "": {"s18": 83.0, "s36": 84.1, "m36": 84.5, "b36": 84.8},
        "_384": {"s18": 84.4, "s36": 85.4, "m36": 85.6, "b36": 85.7},
        "_in21ft1k": {"s18": 83.7, "s36": 85.4, "m36": 86.1, "b36": 87.0},
        "_384_in21ft1k": {"s18": 85.0, "s36": 86.4, "m36": 86.9, "b36": 87.6},
        "_in21k": {"s18": None, "s36": None, "m36": None, "b36": None},
    },
    "caformer": {
        "": {"s18": 83.6, "s36": 84.5, "m36": 85.2, "b36": 85.5},
        "_384": {"s18": 85.0, "s36": 85.7, "m36": 86.2, "b36": 86.4},
        "_in21ft1k": {"s18": 84.1, "s36": 85.8, "m36": 86.6, "b36": 87.4},
        "_384_in21ft1k": {"s18": 85.4, "s36": 86.9, "m36": 87.5, "b36": 88.1},
        "_in21k": {"s18": None, "s36": None, "m36": None, "b36": None},
    },
}
# The same training recipes under the names the timm repositories use.
_HUB_TAGS = {
    "": "sail_in1k",
    "_384": "sail_in1k_384",
    "_in21ft1k": "sail_in22k_ft_in1k",
    "_384_in21ft1k": "sail_in22k_ft_in1k_384",
    "_in21k": "sail_in22k",
}


def _entry(family: str, size: str, recipe: str, top1: float | None) -> CheckpointEntry:
    architecture = f"{family}_{size}"
    on_hub = family not in ("identityformer", "randformer")
    return CheckpointEntry(
        name=architecture + recipe,
        architecture=architecture,
        file=f"{family}/{architecture}{recipe}.pth",
        hub_id=f"{architecture}.{_HUB_TAGS[recipe]}" if on_hub else None,
        classes=21841 if recipe == "_in21k" else 1000,
        input_size=384 if "_384" in recipe else 224,
        top1=top1,
    )


CHECKPOINTS: dict[str, CheckpointEntry] = {
    entry.name: entry
    for entry in (
        *(
            _entry(family, size, "", top1)
            for family, sizes in _BASIC_TOP1.items()
            for size, top1 in sizes.items()
        ),
        *(
            _entry(family, size, recipe, top1)
            for family, recipes in _STRONG_TOP1.items()
            for recipe, sizes in recipes.items()
            for size, top1 in sizes.items()
        ),
    )
}


LICENCES = (
    "The hub marks these weights Apache-2.0; the images they were trained on are under ImageNet's "
    "terms (https://image-net.org/download)."
)


def find_variant(name: str) -> tuple[Architecture, CheckpointEntry | None]:
    """Look a name up among architectures, official checkpoint names and timm hub ids.

    Returns:
        The architecture at the named checkpoint's input size, and the catalogue's entry where
        the name is one.

    Raises:
        ValueError: no such name; the message is one sentence with the nearest names.
    """
    hub_ids = {entry.hub_id: entry for entry in CHECKPOINTS.values() if entry.hub_id}
    entry = CHECKPOINTS.get(name) or hub_ids.get(name.removeprefix("timm/"))
    if entry is not None:
        return replace(ARCHITECTURES[entry.architecture], input_size=entry.input_size), entry
    if name in ARCHITECTURES:
        return ARCHITECTURES[name], None
    nearest = get_close_matches(name, [*ARCHITECTURES, *CHECKPOINTS, *hub_ids], n=3)
    hint = f"the nearest are {', '.join(nearest)}" if nearest else "`metaserve models` lists all"
    raise ValueError(f"there is no variant {name!r}; {hint}")
