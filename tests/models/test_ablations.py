"""The ablations of the paper's section 4: each builds, has its parameters, and computes them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from models.build import build_network
from models.layers import ACTIVATIONS, ImageNorm, PositionNorm, StarReLU
from models.metaformer import Block, MetaFormer
from models.variants import Activation, Architecture, Mixer, ResidualScaling
from tests.models import tiny
from tests.reference import randomise

Shapes = dict[str, tuple[int, ...]]

ACTIVATION_NAMES: tuple[Activation, ...] = get_args(Activation)
SCALINGS: tuple[ResidualScaling, ...] = get_args(ResidualScaling)
MIXERS: tuple[Mixer, ...] = get_args(Mixer)

ABLATIONS = {
    **{f"{name}": replace(tiny.ABLATED, activation=name) for name in ACTIVATION_NAMES},
    **{f"{name}": replace(tiny.ABLATED, residual_scaling=name) for name in SCALINGS},
    "bias": replace(tiny.ABLATED, block_bias=True),
    "image_norm": replace(tiny.ABLATED, norm="image"),
    "image_norm_bias": replace(tiny.ABLATED, norm="image", block_bias=True),
    "linear_head": replace(tiny.ABLATED, head="linear"),
    "all_stages_scaled": replace(tiny.ABLATED, scaled_stages=(0, 1, 2, 3)),
    "layer_scale_everywhere": replace(
        tiny.ABLATED, residual_scaling="layer_scale", scaled_stages=(0, 1, 2, 3)
    ),
}
BASELINE = ("star_relu", "res_scale")  # the paper's choice: no change


def shapes(architecture: Architecture) -> Shapes:
    state = MetaFormer(architecture, tiny.CLASSES).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


BASE = shapes(tiny.ABLATED)
BLOCK_LAYERS = ("norm1", "norm2", "fc1", "fc2", "pwconv1", "dwconv", "pwconv2", "qkv", "proj")


@pytest.mark.parametrize("architecture", ABLATIONS.values(), ids=ABLATIONS)
def test_an_ablation_survives_a_checkpoint_file(architecture: Architecture, tmp_path: Path) -> None:
    network = tiny.network(architecture)

    loaded = build_network(architecture, tiny.save_and_load(network.state_dict(), tmp_path))

    before, after = (tiny.outputs(each, tiny.images()) for each in (network, loaded))
    assert before[0].shape == (2, tiny.CLASSES)
    assert before[1].shape == (2, 64)
    assert torch.isfinite(before[0]).all()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", sorted(ABLATIONS.keys() - set(BASELINE)))
def test_an_ablation_answers_otherwise_than_the_baseline(name: str) -> None:
    baseline = tiny.network(tiny.ABLATED)
    ablated = tiny.network(ABLATIONS[name], seed=2)
    # Everything both have in common is equal, so only the ablation can tell them apart.
    fits = {key: value for key, value in baseline.state_dict().items() if shape_in(ablated, key)}
    ablated.load_state_dict({**ablated.state_dict(), **fits})

    (ours, embedding), (theirs, other) = (
        tiny.outputs(each, tiny.images()) for each in (baseline, ablated)
    )

    # The head comes after the embedding.
    different = (ours - theirs) if name == "linear_head" else (embedding - other)
    assert different.abs().max() > 1e-2


def shape_in(network: MetaFormer, key: str) -> bool:
    return shapes_of(network).get(key) == BASE[key]


def shapes_of(network: MetaFormer) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", ["relu", "gelu", "squared_relu"])
def test_only_star_relu_has_parameters_of_its_own(name: str) -> None:
    starred = {key for key in BASE if ".act." in key or ".act1." in key}
    assert len(starred) == 2 * (4 + 2)  # two scalars for each MLP and each SepConv

    assert shapes(ABLATIONS[name]) == {k: v for k, v in BASE.items() if k not in starred}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("stages", [(2, 3), (0, 1, 2, 3), (1,)])
def test_a_residual_scaling_has_two_scales_a_block_where_it_applies(
    scaling: ResidualScaling, stages: tuple[int, ...]
) -> None:
    architecture = replace(tiny.ABLATED, residual_scaling=scaling, scaled_stages=stages)
    unscaled = {key: shape for key, shape in BASE.items() if "res_scale" not in key}
    expected = {
        f"stages.{stage}.blocks.0.{scaling}{branch}.scale": (
            (1,) if scaling == "branch_scale" else (tiny.ABLATED.dims[stage],)
        )
        for stage, branch in product(stages, (1, 2))
    }

    assert shapes(architecture) == unscaled | ({} if scaling == "none" else expected)


def test_block_bias_adds_one_bias_to_each_layer_and_norm_of_a_block_and_nothing_else() -> None:
    layers = {
        key.removesuffix(".weight"): shape
        for key, shape in BASE.items()
        if ".blocks." in key and key.split(".")[-2] in BLOCK_LAYERS
    }
    assert len(layers) == 4 * 4 + 2 * 3 + 2 * 2  # norms and MLPs, SepConvs, attentions

    biases = {f"{layer}.bias": shape[:1] for layer, shape in layers.items()}

    assert not BASE.keys() & biases.keys()
    assert shapes(ABLATIONS["bias"]) == BASE | biases


def test_without_block_bias_only_strided_convolutions_star_relu_and_the_head_have_biases() -> None:
    biases = {key for key in BASE if key.endswith(".bias")}

    elsewhere = {key for key in biases if not key.startswith("head.") and ".act" not in key}

    assert elsewhere == {
        "stem.conv.bias",
        "stages.1.downsample.conv.bias",
        "stages.2.downsample.conv.bias",
        "stages.3.downsample.conv.bias",
    }


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("stage", range(4))
def test_any_mixer_can_stand_in_any_stage(
    stage: int, mixer: Mixer, bias: bool, tmp_path: Path
) -> None:
    mixers: list[Mixer] = ["identity"] * 4
    mixers[stage] = mixer
    architecture = replace(
        tiny.ABLATED, mixers=(mixers[0], mixers[1], mixers[2], mixers[3]), block_bias=bias
    )
    dim, tokens = architecture.dims[stage], (8, 4, 2, 1)[stage] ** 2
    per_mixer: dict[Mixer, Shapes] = {
        "identity": {},
        "pooling": {},
        "random": {"random_matrix": (tokens, tokens)},
        "conv": {
            "pwconv1.weight": (2 * dim, dim),
            "act1.scale": (1,),
            "act1.bias": (1,),
            "dwconv.weight": (2 * dim, 1, 7, 7),
            "pwconv2.weight": (dim, 2 * dim),
        },
        "attention": {"qkv.weight": (3 * dim, dim), "proj.weight": (dim, dim)},
    }
    weights = per_mixer[mixer]
    if bias:
        biased = {key: shape for key, shape in weights.items() if key.endswith(".weight")}
        weights |= {key.replace("weight", "bias"): shape[:1] for key, shape in biased.items()}

    network = tiny.network(architecture)
    loaded = build_network(architecture, tiny.save_and_load(network.state_dict(), tmp_path))

    found = {key: shape for key, shape in shapes_of(network).items() if "token_mixer" in key}
    assert found == {f"stages.{stage}.blocks.0.token_mixer.{k}": v for k, v in weights.items()}
    logits, _ = tiny.outputs(network, tiny.images())
    assert logits.std() > 0.1
    assert torch.equal(tiny.outputs(loaded, tiny.images())[0], logits)


def test_star_relu_is_a_scaled_and_shifted_square_of_what_is_positive() -> None:
    star_relu = StarReLU()
    x = torch.tensor([-2.0, -0.0, 0.5, 3.0])
    assert star_relu(x).tolist() == [0.0, 0.0, 0.25, 9.0]  # it starts as the plain square

    with torch.no_grad():
        star_relu.scale.fill_(0.5)
        star_relu.bias.fill_(-0.25)

    assert star_relu(x).tolist() == [-0.25, -0.25, -0.125, 4.25]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", [0.0, 0.0, 0.5, 3.0]),
        ("squared_relu", [0.0, 0.0, 0.25, 9.0]),
        # x times the normal distribution function of x, to five decimals
        ("gelu", [-0.04550, 0.0, 0.34573, 2.99595]),
    ],
)
def test_the_other_activations_are_the_known_functions(name: str, expected: list[float]) -> None:
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])

    torch.testing.assert_close(ACTIVATIONS[name]()(x), torch.tensor(expected), rtol=0, atol=1e-5)


class Doubling(torch.nn.Module):
    """A mixer that a test can compute in its head."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("scaling", "skip", "branch", "initial", "width"),
    [
        ("none", False, False, None, 0),
        ("res_scale", True, False, 1.0, 16),
        ("layer_scale", False, True, 1e-5, 16),
        ("branch_scale", False, True, 1.0, 1),
    ],
)
def test_a_block_adds_scaled_skip_and_scaled_branch(
    scaling: ResidualScaling, skip: bool, branch: bool, initial: float | None, width: int
) -> None:
    architecture = replace(tiny.ABLATED, residual_scaling=scaling, scaled_stages=(1,))
    block = Block(Doubling(), architecture, stage=1)
    scales = [parameter for name, parameter in block.named_parameters() if f"{scaling}" in name]
    assert [scale.tolist() for scale in scales] == (
        [] if initial is None else [pytest.approx([initial] * width)] * 2
    )

    randomise(block, seed=6)
    x = torch.randn(2, 3, 3, 16)
    with torch.inference_mode():
        one: Tensor = torch.ones(())
        first, second = scales or (one, one)
        middle = x * (first if skip else one) + 2 * block.norm1(x) * (first if branch else one)
        widened = block.mlp(block.norm2(middle))
        expected = middle * (second if skip else one) + widened * (second if branch else one)
        torch.testing.assert_close(block(x), expected)


def test_a_position_norm_looks_at_one_position_and_an_image_norm_at_one_image() -> None:
    x = torch.randn(2, 4, 5, 6) * 3 + 1
    weight, bias = torch.randn(6), torch.randn(6)

    def standardised(axes: tuple[int, ...]) -> Tensor:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * weight + bias

    for norm, axes in ((PositionNorm(6, bias=True), (3,)), (ImageNorm(6, bias=True), (1, 2, 3))):
        norm.load_state_dict({"weight": weight, "bias": bias})
        with torch.inference_mode():
            torch.testing.assert_close(norm(x), standardised(axes), rtol=0, atol=1e-5)
