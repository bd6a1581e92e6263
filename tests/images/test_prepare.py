"""Preparing: the same bytes as timm's evaluation transform, for every size and config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.images.prepare import layout, needed_size, prepare_image
from app.types import RGBImage
from models.package import InputSpec
from tests.images.files import decode, encode, noise, photographs
from tests.reference import timm_pixels

CONFIGS = [
    InputSpec(size=224),
    InputSpec(size=384),
    InputSpec(size=224, crop_pct=0.95),
    InputSpec(size=224, crop_pct=0.875),
    InputSpec(size=384, crop_pct=0.9),
    InputSpec(size=32),
    InputSpec(size=224, crop_pct=0.9, interpolation="bilinear"),
]


def name_of(spec: InputSpec) -> str:
    return f"{spec.size}-{spec.crop_pct}-{spec.interpolation}"


def assert_equals_timm(image: Image.Image, spec: InputSpec) -> None:
    found = prepare_image(RGBImage(image), spec)
    expected = timm_pixels(image, spec.size, spec.crop_pct, spec.interpolation)
    np.testing.assert_array_equal(found, expected, err_msg=f"{image.size} for {name_of(spec)}")


@pytest.mark.parametrize("spec", CONFIGS, ids=name_of)
def test_random_sizes_equal_timm(spec: InputSpec) -> None:
    draw = np.random.default_rng([spec.size, int(spec.crop_pct * 1000), len(spec.interpolation)])
    for seed in range(40):
        width, height = (int(side) for side in draw.integers(30, 900, 2))
        assert_equals_timm(Image.fromarray(noise(width, height, seed=seed)), spec)


@pytest.mark.parametrize("spec", CONFIGS, ids=name_of)
def test_exact_sizes_and_small_excesses_equal_timm(spec: InputSpec) -> None:
    short = needed_size(spec)
    for excess in range(10):
        picture = noise(short + excess, short, seed=excess)
        assert_equals_timm(Image.fromarray(picture), spec)
        assert_equals_timm(Image.fromarray(picture.transpose(1, 0, 2).copy()), spec)
        assert_equals_timm(Image.fromarray(noise(short + excess, short + excess)), spec)


@pytest.mark.parametrize("spec", CONFIGS, ids=name_of)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (7, 5), (31, 33), (50, 1), (13, 200)])
def test_enlargements_equal_timm(size: tuple[int, int], spec: InputSpec) -> None:
    assert_equals_timm(Image.fromarray(noise(*size)), spec)


@pytest.mark.parametrize("spec", CONFIGS, ids=name_of)
@pytest.mark.parametrize("path", photographs(), ids=lambda path: path.name)
def test_photographs_equal_timm(path: Path, spec: InputSpec) -> None:
    image = decode(path.read_bytes())
    assert_equals_timm(image, spec)


@pytest.mark.parametrize(
    ("excess", "left"),
    [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (8, 4), (9, 4)],
)
def test_the_crop_rounds_half_to_even(excess: int, left: int) -> None:
    picture = noise(32 + excess, 32)
    found = prepare_image(RGBImage(Image.fromarray(picture)), InputSpec(size=32))
    np.testing.assert_array_equal(found, picture[:, left : left + 32])


@pytest.mark.parametrize(
    ("size", "crop_pct", "expected"),
    [(224, 1.0, 224), (384, 1.0, 384), (224, 0.95, 235), (224, 0.9, 248), (384, 0.9, 426)],
)
def test_needed_size(size: int, crop_pct: float, expected: int) -> None:
    assert needed_size(InputSpec(size=size, crop_pct=crop_pct)) == expected


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.integers(1, 120),
    crop_pct=st.floats(0.3, 1.0),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
def test_pixels_are_square_and_packed(
    width: int, height: int, size: int, crop_pct: float, interpolation: str
) -> None:
    spec = InputSpec.model_validate(
        {"size": size, "crop_pct": crop_pct, "interpolation": interpolation}
    )
    found = prepare_image(RGBImage(Image.new("RGB", (width, height), (1, 2, 3))), spec)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert not found.flags.writeable  # it is a view of the packed bytes, not a copy
    assert (found == (1, 2, 3)).all()


@settings(max_examples=400, deadline=None)
@given(
    short=st.integers(1, 160),
    excess=st.floats(1, 6),
    landscape=st.booleans(),
    channels=st.sampled_from([1, 3]),
    size=st.integers(1, 96),
    crop_pct=st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.5]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 9),
)
def test_leaving_out_what_is_cut_off_changes_no_pixel(
    short: int,
    excess: float,
    landscape: bool,
    channels: int,
    size: int,
    crop_pct: float,
    interpolation: str,
    seed: int,
) -> None:
    long = int(short * excess)
    width, height = (long, short) if landscape else (short, long)
    image = Image.fromarray(noise(width, height, channels, seed))
    spec = InputSpec.model_validate(
        {"size": size, "crop_pct": crop_pct, "interpolation": interpolation}
    )
    resized, (left, top) = layout(image.size, spec)
    everything = image.resize(resized, Image.Resampling[interpolation.upper()])
    expected = everything.crop((left, top, left + size, top + size)).convert("RGB")
    np.testing.assert_array_equal(prepare_image(RGBImage(image), spec), np.asarray(expected))


@pytest.mark.parametrize("spec", CONFIGS, ids=name_of)
@pytest.mark.parametrize("size", [(640, 480), (1600, 1200), (2000, 3000), (4000, 3000)])
def test_scaled_decoding_stays_within_a_few_levels(spec: InputSpec, size: tuple[int, int]) -> None:
    photo = decode(next(path for path in photographs() if path.name == "china.jpg").read_bytes())
    data = encode(photo.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)
    needed = needed_size(spec)
    exact = prepare_image(decode(data), spec).astype(int)
    scaled = prepare_image(decode(data, draft_size=needed), spec).astype(int)
    difference = np.abs(exact - scaled)
    if min(size) < 4 * needed:
        assert difference.max() == 0
    else:
        # Worst just above twice the needed size: 7 levels bicubic, 9 bilinear; 12 Mpx: 3 and 4.
        assert 0 < difference.max() <= 10
        assert difference.mean() < 0.6
