"""The catalogue against what the papers' authors and timm publish, written out by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from models.metaformer import MetaFormer
from models.variants import (
    ARCHITECTURES,
    CHECKPOINTS,
    PAPER_ARCHITECTURES,
    Architecture,
    Mixer,
    find_variant,
)
from tests.models import tiny
from tests.reference import timm_catalogue

# Millions of trained parameters with 1000 classes, and of frozen ones (random matrices), measured
# on the official code; the README prints the same, rounded.
PARAMETERS = {
    "identityformer_s12": (11.892, 0.0),
    "identityformer_s24": (21.341, 0.0),
    "identityformer_s36": (30.791, 0.0),
    "identityformer_m36": (56.077, 0.0),
    "identityformer_m48": (73.346, 0.0),
    "randformer_s12": (11.892, 0.235),
    "randformer_s24": (21.341, 0.471),
    "randformer_s36": (30.791, 0.706),
    "randformer_m36": (56.077, 0.706),
    "randformer_m48": (73.346, 0.941),
    "poolformerv2_s12": (11.892, 0.0),
    "poolformerv2_s24": (21.341, 0.0),
    "poolformerv2_s36": (30.791, 0.0),
    "poolformerv2_m36": (56.077, 0.0),
    "poolformerv2_m48": (73.346, 0.0),
    "convformer_s18": (26.774, 0.0),
    "convformer_s36": (40.012, 0.0),
    "convformer_m36": (57.052, 0.0),
    "convformer_b36": (99.883, 0.0),
    "caformer_s18": (26.342, 0.0),
    "caformer_s36": (39.297, 0.0),
    "caformer_m36": (56.205, 0.0),
    "caformer_b36": (98.754, 0.0),
}

# Millions of parameters with the 21841 classes of ImageNet-21K, measured likewise.
PARAMETERS_21K = {
    "caformer_s18": 69.0,
    "caformer_s36": 82.0,
    "caformer_m36": 104.2,
    "caformer_b36": 162.8,
    "convformer_s18": 69.5,
    "convformer_s36": 82.7,
    "convformer_m36": 105.1,
    "convformer_b36": 163.9,
}

# Official name, file in sail/dl, timm hub id, classes, input size, top-1 of the official README.
CATALOGUE: list[tuple[str, str, str | None, int, int, float | None]] = [
    ("identityformer_s12", "identityformer/identityformer_s12.pth", None, 1000, 224, 74.6),
    ("identityformer_s24", "identityformer/identityformer_s24.pth", None, 1000, 224, 78.2),
    ("identityformer_s36", "identityformer/identityformer_s36.pth", None, 1000, 224, 79.3),
    ("identityformer_m36", "identityformer/identityformer_m36.pth", None, 1000, 224, 80.0),
    ("identityformer_m48", "identityformer/identityformer_m48.pth", None, 1000, 224, 80.4),
    ("randformer_s12", "randformer/randformer_s12.pth", None, 1000, 224, 76.6),
    ("randformer_s24", "randformer/randformer_s24.pth", None, 1000, 224, 78.2),
    ("randformer_s36", "randformer/randformer_s36.pth", None, 1000, 224, 79.5),
    ("randformer_m36", "randformer/randformer_m36.pth", None, 1000, 224, 81.2),
    ("randformer_m48", "randformer/randformer_m48.pth", None, 1000, 224, 81.4),
    (
        "poolformerv2_s12",
        "poolformerv2/poolformerv2_s12.pth",
        "poolformerv2_s12.sail_in1k",
        1000,
        224,
        78.0,
    ),
    (
        "poolformerv2_s24",
        "poolformerv2/poolformerv2_s24.pth",
        "poolformerv2_s24.sail_in1k",
        1000,
        224,
        80.7,
    ),
    (
        "poolformerv2_s36",
        "poolformerv2/poolformerv2_s36.pth",
        "poolformerv2_s36.sail_in1k",
        1000,
        224,
        81.6,
    ),
    (
        "poolformerv2_m36",
        "poolformerv2/poolformerv2_m36.pth",
        "poolformerv2_m36.sail_in1k",
        1000,
        224,
        82.2,
    ),
    (
        "poolformerv2_m48",
        "poolformerv2/poolformerv2_m48.pth",
        "poolformerv2_m48.sail_in1k",
        1000,
        224,
        82.6,
    ),
    (
        "convformer_s18",
        "convformer/convformer_s18.pth",
        "convformer_s18.sail_in1k",
        1000,
        224,
        83.0,
    ),
    (
        "convformer_s18_384",
        "convformer/convformer_s18_384.pth",
        "convformer_s18.sail_in1k_384",
        1000,
        384,
        84.4,
    ),
    (
        "convformer_s36",
        "convformer/convformer_s36.pth",
        "convformer_s36.sail_in1k",
        1000,
        224,
        84.1,
    ),
    (
        "convformer_s36_384",
        "convformer/convformer_s36_384.pth",
        "convformer_s36.sail_in1k_384",
        1000,
        384,
        85.4,
    ),
    (
        "convformer_m36",
        "convformer/convformer_m36.pth",
        "convformer_m36.sail_in1k",
        1000,
        224,
        84.5,
    ),
    (
        "convformer_m36_384",
        "convformer/convformer_m36_384.pth",
        "convformer_m36.sail_in1k_384",
        1000,
        384,
        85.6,
    ),
    (
        "convformer_b36",
        "convformer/convformer_b36.pth",
        "convformer_b36.sail_in1k",
        1000,
        224,
        84.8,
    ),
    (
        "convformer_b36_384",
        "convformer/convformer_b36_384.pth",
        "convformer_b36.sail_in1k_384",
        1000,
        384,
        85.7,
    ),
    (
        "convformer_s18_in21ft1k",
        "convformer/convformer_s18_in21ft1k.pth",
        "convformer_s18.sail_in22k_ft_in1k",
        1000,
        224,
        83.7,
    ),
    (
        "convformer_s18_384_in21ft1k",
        "convformer/convformer_s18_384_in21ft1k.pth",
        "convformer_s18.sail_in22k_ft_in1k_384",
        1000,
        384,
        85.0,
    ),
    (
        "convformer_s36_in21ft1k",
        "convformer/convformer_s36_in21ft1k.pth",
        "convformer_s36.sail_in22k_ft_in1k",
        1000,
        224,
        85.4,
    ),
    (
        "convformer_s36_384_in21ft1k",
        "convformer/convformer_s36_384_in21ft1k.pth",
        "convformer_s36.sail_in22k_ft_in1k_384",
        1000,
        384,
        86.4,
    ),
    (
        "convformer_m36_in21ft1k",
        "convformer/convformer_m36_in21ft1k.pth",
        "convformer_m36.sail_in22k_ft_in1k",
        1000,
        224,
        86.1,
    ),
    (
        "convformer_m36_384_in21ft1k",
        "convformer/convformer_m36_384_in21ft1k.pth",
        "convformer_m36.sail_in22k_ft_in1k_384",
        1000,
        384,
        86.9,
    ),
    (
        "convformer_b36_in21ft1k",
        "convformer/convformer_b36_in21ft1k.pth",
        "convformer_b36.sail_in22k_ft_in1k",
        1000,
        224,
        87.0,
    ),
    (
        "convformer_b36_384_in21ft1k",
        "convformer/convformer_b36_384_in21ft1k.pth",
        "convformer_b36.sail_in22k_ft_in1k_384",
        1000,
        384,
        87.6,
    ),
    (
        "convformer_s18_in21k",
        "convformer/convformer_s18_in21k.pth",
        "convformer_s18.sail_in22k",
        21841,
        224,
        None,
    ),
    (
        "convformer_s36_in21k",
        "convformer/convformer_s36_in21k.pth",
        "convformer_s36.sail_in22k",
        21841,
        224,
        None,
    ),
    (
        "convformer_m36_in21k",
        "convformer/convformer_m36_in21k.pth",
        "convformer_m36.sail_in22k",
        21841,
        224,
        None,
    ),
    (
        "convformer_b36_in21k",
        "convformer/convformer_b36_in21k.pth",
        "convformer_b36.sail_in22k",
        21841,
        224,
        None,
    ),
    ("caformer_s18", "caformer/caformer_s18.pth", "caformer_s18.sail_in1k", 1000, 224, 83.6),
    (
        "caformer_s18_384",
        "caformer/caformer_s18_384.pth",
        "caformer_s18.sail_in1k_384",
        1000,
        384,
        85.0,
    ),
    ("caformer_s36", "caformer/caformer_s36.pth", "caformer_s36.sail_in1k", 1000, 224, 84.5),
    (
        "caformer_s36_384",
        "caformer/caformer_s36_384.pth",
        "caformer_s36.sail_in1k_384",
        1000,
        384,
        85.7,
    ),
    ("caformer_m36", "caformer/caformer_m36.pth", "caformer_m36.sail_in1k", 1000, 224, 85.2),
    (
        "caformer_m36_384",
        "caformer/caformer_m36_384.pth",
        "caformer_m36.sail_in1k_384",
        1000,
        384,
        86.2,
    ),
    ("caformer_b36", "caformer/caformer_b36.pth", "caformer_b36.sail_in1k", 1000, 224, 85.5),
    (
        "caformer_b36_384",
        "caformer/caformer_b36_384.pth",
        "caformer_b36.sail_in1k_384",
        1000,
        384,
        86.4,
    ),
    (
        "caformer_s18_in21ft1k",
        "caformer/caformer_s18_in21ft1k.pth",
        "caformer_s18.sail_in22k_ft_in1k",
        1000,
        224,
        84.1,
    ),
    (
        "caformer_s18_384_in21ft1k",
        "caformer/caformer_s18_384_in21ft1k.pth",
        "caformer_s18.sail_in22k_ft_in1k_384",
        1000,
        384,
        85.4,
    ),
    (
        "caformer_s36_in21ft1k",
        "caformer/caformer_s36_in21ft1k.pth",
        "caformer_s36.sail_in22k_ft_in1k",
        1000,
        224,
        85.8,
    ),
    (
        "caformer_s36_384_in21ft1k",
        "caformer/caformer_s36_384_in21ft1k.pth",
        "caformer_s36.sail_in22k_ft_in1k_384",
        1000,
        384,
        86.9,
    ),
    (
        "caformer_m36_in21ft1k",
        "caformer/caformer_m36_in21ft1k.pth",
        "caformer_m36.sail_in22k_ft_in1k",
        1000,
        224,
        86.6,
    ),
    (
        "caformer_m36_384_in21ft1k",
        "caformer/caformer_m36_384_in21ft1k.pth",
        "caformer_m36.sail_in22k_ft_in1k_384",
        1000,
        384,
        87.5,
    ),
    (
        "caformer_b36_in21ft1k",
        "caformer/caformer_b36_in21ft1k.pth",
        "caformer_b36.sail_in22k_ft_in1k",
        1000,
        224,
        87.4,
    ),
    (
        "caformer_b36_384_in21ft1k",
        "caformer/caformer_b36_384_in21ft1k.pth",
        "caformer_b36.sail_in22k_ft_in1k_384",
        1000,
        384,
        88.1,
    ),
    (
        "caformer_s18_in21k",
        "caformer/caformer_s18_in21k.pth",
        "caformer_s18.sail_in22k",
        21841,
        224,
        None,
    ),
    (
        "caformer_s36_in21k",
        "caformer/caformer_s36_in21k.pth",
        "caformer_s36.sail_in22k",
        21841,
        224,
        None,
    ),
    (
        "caformer_m36_in21k",
        "caformer/caformer_m36_in21k.pth",
        "caformer_m36.sail_in22k",
        21841,
        224,
        None,
    ),
    (
        "caformer_b36_in21k",
        "caformer/caformer_b36_in21k.pth",
        "caformer_b36.sail_in22k",
        21841,
        224,
        None,
    ),
]


def build_on_meta(architecture: Architecture, classes: int) -> MetaFormer:
    with torch.device("meta"):
        return MetaFormer(architecture, classes)


def count_parameters(network: MetaFormer) -> tuple[float, float]:
    """Return millions of trained and of frozen parameters."""
    trained = sum(parameter.numel() for parameter in network.parameters())
    frozen = sum(buffer.numel() for buffer in network.buffers())
    return trained / 1e6, frozen / 1e6


def refusal(name: str) -> str:
    with pytest.raises(ValueError, match="there is no variant") as caught:
        find_variant(name)
    return str(caught.value.args[0])


def test_there_are_the_23_architectures_of_the_paper_and_the_embedded_one() -> None:
    assert PAPER_ARCHITECTURES.keys() == PARAMETERS.keys()
    assert ARCHITECTURES.keys() - PAPER_ARCHITECTURES.keys() == {"caformer_digits"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_architecture_has_as_many_parameters_as_the_official_one(name: str) -> None:
    trained, frozen = count_parameters(build_on_meta(ARCHITECTURES[name], classes=1000))

    assert (round(trained, 3), round(frozen, 3)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS_21K)
def test_an_architecture_grows_as_measured_with_21841_classes(name: str) -> None:
    trained, _ = count_parameters(build_on_meta(ARCHITECTURES[name], classes=21841))

    assert round(trained, 1) == PARAMETERS_21K[name]


@pytest.mark.parametrize(
    ("family", "mixers"),
    [
        ("identityformer", ["Identity", "Identity", "Identity", "Identity"]),
        ("randformer", ["Identity", "Identity", "RandomMixing", "RandomMixing"]),
        ("poolformerv2", ["Pooling", "Pooling", "Pooling", "Pooling"]),
        ("convformer", ["SepConv", "SepConv", "SepConv", "SepConv"]),
        ("caformer", ["SepConv", "SepConv", "Attention", "Attention"]),
    ],
)
def test_every_size_of_a_family_mixes_tokens_stage_by_stage_as_the_paper_says(
    family: str, mixers: list[str]
) -> None:
    sizes = [each for each in PAPER_ARCHITECTURES.values() if each.name.startswith(f"{family}_")]

    assert len(sizes) in (4, 5)
    for architecture in sizes:
        network = build_on_meta(architecture, classes=2)
        for stage, mixer, depth in zip(network.stages, mixers, architecture.depths, strict=True):
            blocks = list(stage.get_submodule("blocks").children())
            found = [type(block.get_submodule("token_mixer")).__name__ for block in blocks]
            assert found == [mixer] * depth


def test_the_catalogue_is_the_published_one() -> None:
    rows = [
        (entry.name, entry.file, entry.hub_id, entry.classes, entry.input_size, entry.top1)
        for entry in CHECKPOINTS.values()
    ]

    assert len(CATALOGUE) == 55
    assert sorted(rows) == sorted(CATALOGUE)


def test_every_checkpoint_is_found_under_its_own_name_and_has_an_architecture() -> None:
    for name, entry in CHECKPOINTS.items():
        assert entry.name == name
        assert re.sub(r"(_384)?(_in21ft1k|_in21k)?$", "", name) == entry.architecture
        assert entry.architecture in PAPER_ARCHITECTURES


def test_hub_ids_are_exactly_those_timm_has_with_its_classes_and_input() -> None:
    timms = {
        name: (cfg["num_classes"], cfg["input_size"][1:], cfg["crop_pct"], cfg["interpolation"])
        for name, cfg in timm_catalogue(["poolformerv2", "convformer", "caformer"]).items()
    }
    ours = {
        entry.hub_id: (entry.classes, (entry.input_size, entry.input_size), 1.0, "bicubic")
        for entry in CHECKPOINTS.values()
        if entry.hub_id
    }

    assert len(timms) == 45
    assert ours == timms


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("caformer_s18", "caformer_s18"),
        ("randformer_m48", "randformer_m48"),
        ("caformer_s18_384_in21ft1k", "caformer_s18_384_in21ft1k"),
        ("caformer_s18.sail_in22k_ft_in1k_384", "caformer_s18_384_in21ft1k"),
        ("timm/caformer_s18.sail_in22k_ft_in1k_384", "caformer_s18_384_in21ft1k"),
        ("convformer_b36_in21k", "convformer_b36_in21k"),
        ("timm/convformer_b36.sail_in22k", "convformer_b36_in21k"),
        ("timm/poolformerv2_s12.sail_in1k", "poolformerv2_s12"),
    ],
)
def test_a_checkpoint_is_found_by_official_name_and_timm_id(name: str, official: str) -> None:
    architecture, entry = find_variant(name)

    assert entry is not None
    assert entry == CHECKPOINTS[official]
    assert architecture == replace(
        ARCHITECTURES[entry.architecture], input_size=384 if "384" in name else 224
    )


def test_an_architecture_without_published_weights_is_found_alone() -> None:
    assert find_variant("caformer_digits") == (ARCHITECTURES["caformer_digits"], None)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        # The first two are upstream's own slips: a constructor, and a row of the README.
        ("caformer_m364_in21k", "caformer_m36_in21k"),
        ("convformer_b36_384_in21kft1k", "convformer_b36_384_in21ft1k"),
        ("cafomer_s18", "caformer_s18"),
        ("caformer_s18.sail_in1k_348", "caformer_s18.sail_in1k_384"),
        ("timm/caformer_s18.sail_in1k_348", "caformer_s18.sail_in1k_384"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_one_that_was_meant(misspelt: str, meant: str) -> None:
    sentence = refusal(misspelt)

    assert f"there is no variant {misspelt!r}; the nearest are {meant}" in sentence
    assert "\n" not in sentence


def test_a_name_like_no_other_is_refused_with_where_to_look() -> None:
    assert refusal("zzz") == "there is no variant 'zzz'; `metaserve models` lists all"


def test_randformer_refuses_every_size_but_its_own_in_one_sentence() -> None:
    architecture = ARCHITECTURES["randformer_s12"]
    architecture.check_input_size(224)

    for size in (223, 226, 384):  # at 226 the grids would fit, the weights' meaning would not
        with pytest.raises(ValueError, match=f"^randformer_s12 .* only at 224 px; {size} px was"):
            architecture.check_input_size(size)


def test_a_random_matrix_names_both_token_counts_when_they_differ() -> None:
    network = tiny.network(
        replace(tiny.POOLFORMERV2, mixers=("random", "random", "random", "random"))
    )

    with pytest.raises(ValueError, match="built for 64 tokens and got 144"):
        tiny.outputs(network, tiny.images(size=48))


@pytest.mark.parametrize("name", ["caformer_s18", "identityformer_s12", "caformer_digits"])
def test_other_families_take_any_size_from_16_px(name: str) -> None:
    ARCHITECTURES[name].check_input_size(16)
    ARCHITECTURES[name].check_input_size(1000)

    with pytest.raises(ValueError, match=f"^{name} needs images of at least 16 px; 15 was asked"):
        ARCHITECTURES[name].check_input_size(15)


@pytest.mark.parametrize("size", [16, 33, 211, 224, 226, 227, 384])
def test_the_grid_is_what_the_convolutions_make_of_the_image(size: int) -> None:
    network = build_on_meta(tiny.CAFORMER, classes=2)
    x = network.stem(torch.empty(1, size, size, 3, device="meta"))

    for stage in range(4):
        x = network.stages[stage](x)
        side = tiny.CAFORMER.grid(stage, size)
        assert x.shape == (1, side, side, tiny.CAFORMER.dims[stage])


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    mixers: tuple[Mixer, Mixer, Mixer, Mixer] = ("conv", "conv", "conv", "attention")

    with pytest.raises(ValueError, match="48 channels do not divide into heads of 32"):
        replace(tiny.CAFORMER, mixers=mixers, dims=(8, 16, 32, 48))
