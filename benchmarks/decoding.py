"""What reading an image costs in each mode, and how far each is from reading it exactly.

python -m benchmarks.decoding [--seconds 2] [--package DIR ...] [--photographs FILE ...]

Prints the tables of docs/decoding.md. The yardstick is what one writes by hand: Pillow decodes,
resizes and crops, NumPy makes normalised floats. Chains take turns, so that whatever else the
machine does hits them alike.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from app.backends.ort import OnnxRuntimeBackend
from app.cpu import cpu_limit
from app.images.read import Decode, read_image
from examples.digits.drawings import drawings
from models.package import IMAGENET_MEAN, IMAGENET_STD, PRETRAINED, InputSpec, open_package
from tests.images.files import photographs
from tests.reference import randomise, timm_model

MODES: tuple[Decode, ...] = ("exact", "scaled", "fast")
BICUBIC = Image.Resampling.BICUBIC
Floats = NDArray[np.float32]
Network = Callable[[NDArray[np.uint8]], Floats]
MEAN, STD = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)


def by_hand(data: bytes, spec: InputSpec) -> Floats:
    """Do it as most servers do: float32 (3, S, S), normalised."""
    image = Image.open(BytesIO(data)).convert("RGB")
    scale = spec.size / min(image.size)
    width, height = (max(spec.size, int(side * scale)) for side in image.size)
    left, top = (width - spec.size) // 2, (height - spec.size) // 2
    resized = image.resize((width, height), BICUBIC)
    crop = resized.crop((left, top, left + spec.size, top + spec.size))
    values = (np.asarray(crop, dtype=np.float32) / 255 - MEAN) / STD
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def read(data: bytes, spec: InputSpec, mode: Decode) -> NDArray[np.uint8]:
    return read_image(data, spec, max_pixels=100_000_000, exif_orientation=True, decode=mode)


def saved(image: Image.Image, format: str = "JPEG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, quality=90)
    return buffer.getvalue()


# -- costs -----------------------------------------------------------------------------------------


def files(photo: Image.Image) -> dict[str, tuple[bytes, int]]:
    """Return the files to time, by what they are, and the side of the network's input."""
    whole = photo.crop((35, 0, 604, 427))  # 4:3
    phone = whole.resize((4000, 3000), BICUBIC)
    grain = np.random.default_rng(0).normal(0, 4, (3000, 4000, 1))
    noisy = Image.fromarray(np.clip(np.asarray(phone) + grain, 0, 255).astype(np.uint8))
    small = whole.resize((500, 375), BICUBIC)
    return {
        "500x375": (saved(small), 224),
        "375x500": (saved(small.transpose(Image.Transpose.ROTATE_90)), 224),
        "500x375 grey": (saved(small.convert("L")), 224),
        "1920x1080": (saved(photo.crop((0, 30, 640, 390)).resize((1920, 1080), BICUBIC)), 224),
        "4000x3000": (saved(phone), 224),
        "4000x3000, grainy": (saved(noisy), 224),
        "32x32 PNG, network of 32": (saved(whole.resize((32, 32)), "PNG"), 32),
    }


def rate(work: Callable[[], object], threads: int, seconds: float) -> float:
    """Return how often a second `work` is done by some threads, each for itself."""
    counts = [0] * threads
    end = time.perf_counter() + seconds

    def repeat(index: int) -> None:
        while time.perf_counter() < end:
            work()
            counts[index] += 1

    started = time.perf_counter()
    crew = [threading.Thread(target=repeat, args=(index,)) for index in range(threads)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def rates(
    chains: Sequence[Callable[[], object]], threads: int, seconds: float, turns: int = 5
) -> list[float]:
    """Return the rate of each chain: the best of its turns."""
    for chain in chains:
        chain()
    measured = [[rate(chain, threads, seconds / turns) for chain in chains] for _ in range(turns)]
    return [max(turn) for turn in zip(*measured, strict=True)]


def print_costs(photo: Image.Image, seconds: float) -> None:
    most = max(2, cpu_limit())
    print(f"| file | kB | chain | ms | images/s, 1 thread | {most} threads | times by hand |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name, (data, side) in files(photo).items():
        spec = InputSpec(size=side)
        chains = {"by hand": partial(by_hand, data, spec)} | {
            mode: partial(read, data, spec, mode) for mode in MODES
        }
        alone = rates(list(chains.values()), 1, seconds)
        together = rates(list(chains.values()), most, seconds)
        for chain, one, all_threads in zip(chains, alone, together, strict=True):
            print(
                f"| {name} | {len(data) / 1000:.1f} | {chain} | {1000 / one:.2f} | {one:.0f} "
                f"| {all_threads:.0f} | {one / alone[0]:.2f} / {all_threads / together[0]:.2f} |"
            )


# -- deviations ------------------------------------------------------------------------------------


def variations(photos: Iterable[Image.Image]) -> list[Image.Image]:
    """Return each photograph, its four corners, and the mirror image of each of these."""
    found = []
    for photo in photos:
        width, height = photo.size
        w, h = width * 3 // 4, height * 3 // 4
        corners = product((0, width - w), (0, height - h))
        parts = [photo, *(photo.crop((x, y, x + w, y + h)) for x, y in corners)]
        found += parts + [part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in parts]
    return found


def enlarged(photo: Image.Image, short: int) -> Image.Image:
    scale = short / min(photo.size)
    width, height = (round(side * scale) for side in photo.size)
    return photo.resize((width, height), BICUBIC)


def print_levels(photos: list[Image.Image]) -> None:
    cut = variations(photos)
    cases: dict[str, list[tuple[bytes, InputSpec]]] = {
        "as they are, to 224": [(saved(image), InputSpec(size=224)) for image in cut],
        "as they are, to 224, bilinear": [
            (saved(image), InputSpec(size=224, interpolation="bilinear")) for image in cut
        ],
        "as they are, to 32": [(saved(image), InputSpec(size=32)) for image in cut],
        "as they are, to 26 .. 106": [
            (saved(image), InputSpec(size=size)) for image in photos for size in range(26, 107, 4)
        ],
        "enlarged to 3000 rows or columns, to 224": [
            (saved(enlarged(image, 3000)), InputSpec(size=224)) for image in photos
        ],
        "enlarged to 897 .. 1500, to 224": [
            (saved(enlarged(image, short)), InputSpec(size=224))
            for image in photos for short in range(897, 1501, 67)
        ],
    }  # fmt: skip
    print("| photographs | files | mode | equal | 1 level | more | max | mean |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, case in cases.items():
        for mode in MODES[1:]:
            difference = np.concatenate(
                [np.abs(read(*one, mode).astype(int) - read(*one, "exact")).ravel() for one in case]
            )
            shares = (difference == 0).mean(), (difference == 1).mean(), (difference > 1).mean()
            print(
                f"| {name} | {len(case)} | {mode} | "
                + " | ".join(f"{100 * share:.2f} %" for share in shares)
                + f" | {difference.max()} | {difference.mean():.3f} |"
            )


def random_caformer(batch: NDArray[np.uint8]) -> Floats:
    """Return what CAFormer-S18 with random weights makes of uint8 (N, S, S, 3)."""
    values = torch.from_numpy((batch / np.float32(255) - MEAN) / STD).permute(0, 3, 1, 2)
    with torch.inference_mode():
        found: Floats = CAFORMER(values).numpy()
    return found


CAFORMER = randomise(timm_model("caformer_s18"), seed=0)


def of_package(path: Path) -> tuple[str, InputSpec, Network]:
    package = open_package(path)
    backend = OnnxRuntimeBackend(package, "cpu", threads=cpu_limit())
    spec = package.manifest.input
    return package.manifest.name, spec, lambda batch: backend.run(batch).logits


def print_networks(photos: list[Image.Image], packages: list[Path]) -> None:
    print("| network | files | mode | largest change | mean | between files | same top-1 | right |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    digits = of_package(PRETRAINED / "caformer_digits")
    drawn = list(drawings())[::4]
    sent, truth = [saved(one.image) for one in drawn], [one.label for one in drawn]
    print_network(*digits, f"{len(drawn)} drawn digits, 280x280", sent, truth)
    cut = variations(photos)
    networks = [of_package(path) for path in packages]
    networks += [("caformer_s18, random weights", InputSpec(size=224), random_caformer)]
    for network, (name, data) in product(
        networks,
        {
            f"{len(cut)} photographs": [saved(image) for image in cut],
            f"{len(cut)} photographs, enlarged to 1501": [
                saved(enlarged(image, 1501)) for image in cut
            ],
        }.items(),
    ):
        print_network(*network, name, data)


def print_network(
    name: str,
    spec: InputSpec,
    network: Network,
    files: str,
    data: Sequence[bytes],
    truth: Sequence[int] | None = None,
) -> None:
    answers = {}
    for mode in MODES:
        pixels = [read(one, spec, mode) for one in data]
        starts = range(0, len(pixels), 8)
        answers[mode] = np.concatenate([network(np.stack(pixels[at : at + 8])) for at in starts])
    exact = answers["exact"]
    for mode, logits in answers.items():
        change, same = np.abs(logits - exact), (logits.argmax(1) == exact.argmax(1)).sum()
        right = "-" if truth is None else f"{(logits.argmax(1) == np.array(truth)).sum()}"
        print(
            f"| {name} | {files} | {mode} | {change.max():.4f} | {change.mean():.4f} "
            f"| {exact.std(axis=0).mean():.3f} | {same} of {len(data)} | {right} |"
        )


def described() -> str:
    names = ("pillow", "cykooz-resizer", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    python = platform.python_version()
    return f"{cpu}, {cpu_limit()} cores; Python {python}, {versions}; {datetime.now(UTC).date()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell of the costs")
    parser.add_argument("--package", type=Path, nargs="*", default=[], help="networks to ask, too")
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], help="files to add")
    arguments = parser.parse_args()
    known = [path for path in photographs() if path.suffix == ".jpg"]
    photos = [Image.open(path).convert("RGB") for path in [*known, *arguments.photographs]]
    china = Image.open(next(path for path in known if path.name == "china.jpg"))
    print(described())
    print()
    print_costs(china, arguments.seconds)
    print()
    print_levels(photos)
    print()
    print_networks(photos, arguments.package)


if __name__ == "__main__":
    main()
