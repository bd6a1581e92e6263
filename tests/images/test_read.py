"""The modes of reading: which equal timm, how far the fast one is off, and who refuses what."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from app.errors import InvalidInput, StartupError
from app.images import fast
from app.images.decode import decode_image
from app.images.fast import prepare_fast
from app.images.prepare import needed_size, prepare_image
from app.images.read import Decode, check_decoder, read_image
from app.settings import Settings
from app.types import Pixels, RGBImage
from models.package import InputSpec
from tests.images.files import encode, jpeg_of_scans, noise, photographs, ramp, tiff
from tests.reference import timm_pixels

MODES: tuple[Decode, ...] = get_args(Decode)
ORIENTATION = 0x0112
PHOTOGRAPHS = [path for path in photographs() if path.suffix == ".jpg"]


def read(data: bytes, spec: InputSpec, decode: Decode, max_pixels: int = 10_000_000) -> Pixels:
    return read_image(data, spec, max_pixels=max_pixels, exif_orientation=True, decode=decode)


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(image, "JPEG", exif=exif, quality=85)


def as_a_person_sees_it(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


ENCODERS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: encode(image, "JPEG", quality=85),
    "jpeg 4:4:4": lambda image: encode(image, "JPEG", subsampling=0),
    "progressive jpeg": lambda image: encode(image, "JPEG", progressive=True),
    "grey jpeg": lambda image: encode(image.convert("L"), "JPEG"),
    "cmyk jpeg": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "png": lambda image: encode(image, "PNG"),
    "grey png": lambda image: encode(image.convert("L"), "PNG"),
    "bilevel png": lambda image: encode(image.convert("1"), "PNG"),
    "palette png": lambda image: encode(image.quantize(30), "PNG"),
    "webp": lambda image: encode(image, "WEBP"),
    "bmp": lambda image: encode(image, "BMP"),
    "gif": lambda image: encode(image, "GIF"),
}


SPECS = st.builds(
    lambda size, crop_pct, interpolation: InputSpec.model_validate(
        {"size": size, "crop_pct": crop_pct, "interpolation": interpolation}
    ),
    st.integers(16, 100),
    st.sampled_from([1.0, 0.95, 0.9, 0.875]),
    st.sampled_from(["bicubic", "bilinear"]),
)


@settings(max_examples=250, deadline=None)
@given(
    encoder=st.sampled_from(sorted(ENCODERS)),
    width=st.integers(2, 390),
    height=st.integers(2, 390),
    spec=SPECS,
)
@example("jpeg", 4 * 32 - 1, 150, InputSpec(size=32))
@example("jpeg", 150, 4 * 32 - 1, InputSpec(size=32))
@example("jpeg", 4 * 32, 150, InputSpec(size=32))
def test_scaled_equals_timm_wherever_no_dct_scaling_happens(
    encoder: str, width: int, height: int, spec: InputSpec
) -> None:
    data = ENCODERS[encoder](ramp(min(width, 40 * height), min(height, 40 * width)))
    image = as_a_person_sees_it(data)
    scales = "jpeg" in encoder and min(image.size) >= 4 * needed_size(spec)
    found = read(data, spec, "exact" if scales else "scaled")
    expected = timm_pixels(image, spec.size, spec.crop_pct, spec.interpolation)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("short", "scales"), [(4 * 32 - 1, False), (4 * 32, True)])
def test_scaling_begins_where_the_shorter_side_is_four_times_the_needed(
    short: int, scales: bool
) -> None:
    spec = InputSpec(size=32)
    for size in ((short, 150), (150, short)):
        data = encode(ramp(*size), "JPEG", quality=85)
        is_exact = np.array_equal(read(data, spec, "scaled"), read(data, spec, "exact"))
        assert is_exact is not scales


@settings(max_examples=60, deadline=None)
@given(
    orientation=st.integers(1, 8),
    grey=st.booleans(),
    width=st.integers(20, 250),
    height=st.integers(20, 250),
    spec=SPECS,
)
def test_a_turned_photograph_is_what_timm_makes_of_the_upright_one(
    orientation: int, grey: bool, width: int, height: int, spec: InputSpec
) -> None:
    picture = ramp(width, height)
    data = turned(picture.convert("L") if grey else picture, orientation)
    expected = timm_pixels(as_a_person_sees_it(data), spec.size, spec.crop_pct, spec.interpolation)
    np.testing.assert_array_equal(read(data, spec, "exact"), expected)


def test_exact_equals_timm_where_scaled_does_not() -> None:
    data = encode(ramp(2000, 1500), "JPEG", quality=90)
    spec = InputSpec(size=224)
    expected = timm_pixels(as_a_person_sees_it(data), 224)
    np.testing.assert_array_equal(read(data, spec, "exact"), expected)
    assert (read(data, spec, "scaled") != expected).any()


@pytest.mark.parametrize("encoder", ["grey jpeg", "grey png"])
def test_a_grey_file_stays_one_channel_until_it_is_resized(encoder: str) -> None:
    data = ENCODERS[encoder](ramp(90, 60))
    image, _ = decode_image(data, max_pixels=10_000, exif_orientation=True, draft_size=None)
    assert image.mode == "L"
    assert read(data, InputSpec(size=32), "exact").shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["scaled", "fast"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1345, 897), (1351, 901), (899, 1201)])
def test_a_reduced_size_that_was_rounded_up_moves_nothing(
    size: tuple[int, int], orientation: int, mode: Decode
) -> None:
    # 897 rows at 1/2 are 449, the last one half padding. Taken for 449 whole rows, the picture is
    # stretched by up to a quarter of a pixel: 45 levels at the edges of this photograph.
    china = next(path for path in PHOTOGRAPHS if path.name == "china.jpg").read_bytes()
    photo = as_a_person_sees_it(china).resize(size, Image.Resampling.BICUBIC)
    data = turned(photo, orientation)
    spec = InputSpec(size=224)
    difference = np.abs(read(data, spec, mode).astype(int) - read(data, spec, "exact"))
    assert 0 < difference.max() <= 14
    assert difference.mean() < 0.7


# -- fast ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 224, 384])
@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_fast_is_a_few_levels_from_timm_on_photographs(
    path: Path, size: int, interpolation: str
) -> None:
    spec = InputSpec.model_validate({"size": size, "interpolation": interpolation})
    with Image.open(path) as image:
        rgb = RGBImage(image.convert("RGB"))
    expected = timm_pixels(rgb, size, 1.0, interpolation).astype(int)
    difference = np.abs(prepare_fast(rgb, spec) - expected)
    assert 0 < difference.max() <= (12 if interpolation == "bicubic" else 1)
    assert difference.mean() < 0.35
    # Nothing is special at the border of the crop: the filter sees the image beyond it.
    border = [difference[0], difference[-1], difference[:, 0], difference[:, -1]]
    assert max(edge.mean() for edge in border) < 1.0


@settings(max_examples=200, deadline=None)
@given(
    short=st.integers(1, 200),
    excess=st.floats(1, 6),
    landscape=st.booleans(),
    grey=st.booleans(),
    spec=SPECS,
)
def test_fast_keeps_the_grid_of_the_whole_image(
    short: int, excess: float, landscape: bool, grey: bool, spec: InputSpec
) -> None:
    long = int(short * excess)
    picture = ramp(*((long, short) if landscape else (short, long)))
    image = RGBImage(picture.convert("L") if grey else picture)
    found = prepare_fast(image, spec).astype(int)
    assert found.shape == (spec.size, spec.size, 3)
    difference = np.abs(found - prepare_image(image, spec))
    assert difference.max() <= 6
    assert difference.mean() < 1


def test_fast_reads_turned_grey_and_cmyk_photographs_as_the_other_modes_do() -> None:
    photo = as_a_person_sees_it(PHOTOGRAPHS[0].read_bytes())
    spec = InputSpec(size=96)
    files = [turned(photo, orientation) for orientation in range(1, 9)]
    files += [encode(photo.convert("L"), "JPEG"), encode(photo.convert("CMYK"), "JPEG")]
    files += [encode(photo, "PNG"), encode(photo.resize((2000, 1400)), "JPEG")]
    for data in files:
        difference = np.abs(read(data, spec, "fast").astype(int) - read(data, spec, "scaled"))
        assert difference.max() <= 20  # the last file is decoded at 1/8 here, at 1/4 there
        assert difference.mean() < 1.5


def test_fast_gives_the_exact_pixels_where_nothing_is_resized() -> None:
    picture = noise(40, 32)
    found = prepare_fast(RGBImage(Image.fromarray(picture)), InputSpec(size=32))
    np.testing.assert_array_equal(found, picture[:, 4:36])


@pytest.mark.parametrize(
    ("size", "spec"),
    [
        ((275, 160), InputSpec(size=224)),  # ended the process
        ((43, 17), InputSpec(size=81, crop_pct=0.95)),
        ((22, 15), InputSpec(size=92, crop_pct=0.875)),
    ],
)
def test_fast_leaves_enlarging_to_pillow(size: tuple[int, int], spec: InputSpec) -> None:
    image = RGBImage(Image.fromarray(noise(*size)))
    np.testing.assert_array_equal(prepare_fast(image, spec), prepare_image(image, spec))


def test_fast_in_several_threads_gives_each_its_own_image() -> None:
    spec = InputSpec(size=64)
    images = [RGBImage(Image.fromarray(noise(200, 150, seed=seed))) for seed in range(4)]
    alone = [prepare_fast(image, spec) for image in images]
    start, wrong = threading.Barrier(4, timeout=10), list[int]()

    def work(index: int) -> None:
        start.wait()
        found = [prepare_fast(images[index], spec) for _ in range(100)]
        wrong.extend(index for one in found if not np.array_equal(one, alone[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a thread still resizes after 30 s"
    assert wrong == []


# -- refusals --------------------------------------------------------------------------------------

PHOTO = encode(ramp(640, 480), "JPEG", quality=90)
REFUSED = {
    "empty": b"",
    "text": b"hello",
    "cut jpeg": PHOTO[: len(PHOTO) // 2],
    "jpeg without its last bytes": PHOTO[:-40],
    "cut progressive jpeg": encode(ramp(640, 480), "JPEG", progressive=True)[:-3000],
    "too many scans": jpeg_of_scans(ramp(64, 64), 200),
    "cut png": encode(ramp(64, 64), "PNG")[:-60],
    "too large": encode(Image.new("RGB", (4000, 3000)), "JPEG"),
    "too thin": encode(Image.new("RGB", (600, 2)), "PNG"),
    "32 bits": tiff((1, 1), (32,), b"\0" * 4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_mode_refuses_the_same_in_the_same_words(name: str) -> None:
    words = set()
    for mode in MODES:
        with pytest.raises(InvalidInput) as refusal:
            read(REFUSED[name], InputSpec(size=32), mode, max_pixels=1_000_000)
        words.add((refusal.value.code, refusal.value.message))
    assert len(words) == 1


# -- the start -------------------------------------------------------------------------------------


def test_every_mode_is_a_setting_and_can_be_used_here() -> None:
    for mode in MODES:
        assert Settings.model_validate({"decode": mode}).decode == mode
        check_decoder(mode)
    assert set(get_args(Settings.model_fields["decode"].annotation)) == set(MODES)


def test_fast_without_its_library_stops_the_start_in_one_sentence() -> None:
    script = (
        "import sys; sys.modules['cykooz_resizer'] = None\n"
        "from app.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    env = {**os.environ, "METASERVE_DECODE": "fast"}
    for command in (["serve", "--port", "0"], ["classify", __file__]):
        child = subprocess.run(
            [sys.executable, "-c", script, *command],
            env=env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert child.returncode == 2, child.stderr
        assert "install metaserve[fast]" in child.stderr
        assert "Traceback" not in child.stderr


def test_a_resampler_that_misreads_pillows_images_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shifted(image: RGBImage, spec: InputSpec) -> Pixels:
        return np.roll(prepare_image(image, spec), 1, axis=2) if image.mode == "RGB" else black

    black = np.zeros((24, 24, 3), np.uint8)
    monkeypatch.setattr(fast, "prepare_fast", shifted)
    with pytest.raises(StartupError, match="cannot read the installed Pillow"):
        check_decoder("fast")


def test_the_other_modes_do_not_import_the_resampler() -> None:
    script = (
        "import sys; from app.images.read import check_decoder; check_decoder('scaled')\n"
        "sys.exit('cykooz_resizer' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
