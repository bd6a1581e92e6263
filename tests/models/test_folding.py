"""A folded network is the trained one to rounding: module by module in double precision, and whole.

1e-12 on outputs of size one to ten is a few roundings of double precision; a constant that went
into the wrong place is off by 1e-2 and more, which `test_folding_looks_at_every_parameter` shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.folding import (
    BareImageNorm,
    ChannelStarReLU,
    ConvChain,
    fold_network,
    fold_served_model,
)
from models.layers import ImageNorm, Scale, SquaredReLU, StarReLU
from models.metaformer import Block, MetaFormer
from models.package import InputSpec
from models.serving import ServedModel
from models.variants import Architecture, Mixer
from tests.models import tiny
from tests.models.test_ablations import ABLATIONS, MIXERS

TOLERANCE = 1e-12
SPEC = InputSpec(size=32, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 1.0))

ARCHITECTURES = {
    **ABLATIONS,
    "poolformerv2": tiny.POOLFORMERV2,
    "convformer": replace(tiny.CAFORMER, mixers=("conv",) * 4),
    "identityformer": replace(tiny.POOLFORMERV2, mixers=("identity",) * 4),
    "randformer": replace(
        tiny.POOLFORMERV2, mixers=("identity", "identity", "random", "random"), block_bias=True
    ),
}


@torch.no_grad()
def wild(architecture: Architecture, scale: float | None = None) -> MetaFormer:
    """Return a network in double precision whose vectors and scalars have both signs.

    Args:
        architecture: what to build.
        scale: of every StarReLU; random when None.
    """
    network = tiny.network(architecture).double()
    draw = torch.Generator().manual_seed(11)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            signs = torch.randint(0, 2, parameter.shape, generator=draw) * 2 - 1
            parameter.mul_(signs)
    for module in network.modules():
        if isinstance(module, StarReLU):
            module.bias.add_(0.3)
            if scale is not None:
                module.scale.fill_(scale)
    return network


def images() -> Tensor:
    return tiny.images().double()


def difference(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_folded_network_is_the_trained_one(architecture: Architecture) -> None:
    network = wild(architecture)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    expected = tiny.outputs(network, images())

    folded = fold_network(network)

    assert difference(tiny.outputs(folded, images()), expected) < TOLERANCE
    # The trained network stays as it was: its weights go into the package.
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in before)
    assert difference(tiny.outputs(network, images()), expected) == 0


@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-9, 40.0])
def test_any_scale_of_a_star_relu_folds(scale: float) -> None:
    network = wild(tiny.CAFORMER, scale)

    expected = tiny.outputs(network, images())

    assert difference(tiny.outputs(fold_network(network), images()), expected) < TOLERANCE


def blocks() -> Iterator[tuple[str, Block]]:
    """Every kind of block there is, its parameters drawn anew with both signs."""
    for norm in ("position", "image"):
        for mixer in MIXERS:
            for scaling in ("none", "res_scale", "layer_scale", "branch_scale"):
                for bias in (False, True):
                    mixers: list[Mixer] = [mixer, "identity", "identity", "identity"]
                    architecture = replace(
                        tiny.ABLATED,
                        norm=norm,
                        mixers=(mixers[0], mixers[1], mixers[2], mixers[3]),
                        residual_scaling=scaling,
                        scaled_stages=(0,),
                        block_bias=bias,
                    )
                    block = wild(architecture).get_submodule("stages.0.blocks.0")
                    assert isinstance(block, Block)
                    yield f"{norm}-{mixer}-{scaling}-{'bias' if bias else 'no_bias'}", block


BLOCKS = dict(blocks())


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_folded_block_is_the_trained_one_to_the_border(block: Block) -> None:
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64) * 2 + 0.5

    folded = fold_network(around(block)).stages[0]

    with torch.inference_mode():
        error = (folded(x) - block(x)).abs()
    assert error.max() < TOLERANCE


def around(block: Block) -> MetaFormer:
    """Return a network whose first stage is the block."""
    network = wild(tiny.ABLATED)
    network.stages.add_module("0", nn.Sequential(block))
    return network


def test_folding_looks_at_every_parameter() -> None:
    # The tolerance tells a network apart whose folding had missed a change of any one parameter.
    draw = torch.Generator().manual_seed(12)
    architecture = replace(tiny.ABLATED, norm="image", block_bias=True)
    network = wild(architecture)
    folded = tiny.outputs(fold_network(network), images())
    blind = []
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=draw))
            if difference(tiny.outputs(network, images()), folded) < 1e3 * TOLERANCE:
                blind.append(name)
            parameter.copy_(kept)
    assert blind == []


def test_a_folded_network_is_made_of_chains_and_has_no_constants_left_to_multiply() -> None:
    architecture = replace(tiny.ABLATED, norm="image", residual_scaling="layer_scale")
    kinds = [type(module) for module in fold_network(wild(architecture)).modules()]

    assert StarReLU not in kinds
    assert ImageNorm not in kinds
    assert Scale not in kinds
    assert kinds.count(ConvChain) == 4 + 2  # an MLP in each block, two SepConvs
    assert kinds.count(ChannelStarReLU) == 2
    assert kinds.count(SquaredReLU) == 4 + 1  # and the head's
    assert kinds.count(BareImageNorm) == 8


@pytest.mark.parametrize("spec", [SPEC, InputSpec(size=32)], ids=["odd", "imagenet"])
def test_a_folded_served_model_is_the_trained_one(spec: InputSpec) -> None:
    served = ServedModel(wild(tiny.CAFORMER), spec).double().eval()
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), generator=draw, dtype=torch.uint8)
    # Outputs are float32 whatever the network computes in: look at the doubles before.
    folded = fold_served_model(served)
    seen = normalised_and_stemmed(served, pixels), normalised_and_stemmed(folded, pixels)

    assert (seen[0] - seen[1]).abs().max() < TOLERANCE
    for ours, theirs in zip(
        tiny.outputs(folded, pixels), tiny.outputs(served, pixels), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def normalised_and_stemmed(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return what the stem of a served model gives for an image."""
    seen: list[Tensor] = []
    hook = model.get_submodule("network.stem").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    tiny.outputs(model, pixels)
    hook.remove()
    (output,) = seen
    return output


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_folding_in_float32_stays_far_below_the_tolerance_of_the_proof(
    architecture: Architecture,
) -> None:
    network = tiny.network(architecture)

    folded = fold_network(network)

    assert {value.dtype for value in folded.state_dict().values()} == {torch.float32}
    expected = tiny.outputs(network, tiny.images())
    assert difference(tiny.outputs(folded, tiny.images()), expected) < 2e-5
