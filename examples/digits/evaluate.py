"""Measure a checkpoint on held-out scans and on drawings."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from app.images.prepare import prepare_image
from app.types import RGBImage
from examples.digits.data import held_out, held_out_scans, render_scan
from examples.digits.drawings import drawings
from models.build import build_network
from models.checkpoints import load_checkpoint
from models.package import InputSpec
from models.serving import ServedModel
from models.variants import CAFORMER_DIGITS

INPUT = InputSpec(size=CAFORMER_DIGITS.input_size)
BATCH = 256


def load_model(path: Path) -> ServedModel:
    """Load weights that `examples.digits.train` wrote."""
    network = build_network(CAFORMER_DIGITS, load_checkpoint(path))
    return ServedModel(network, INPUT).eval()


def read_digits(model: ServedModel, images: Sequence[Image.Image]) -> NDArray[np.int64]:
    """Return the best class of each image, prepared as the service does it."""
    prepared = [prepare_image(RGBImage(image.convert("RGB")), INPUT) for image in images]
    pixels = torch.from_numpy(np.stack(prepared))
    starts = range(0, len(pixels), BATCH)
    with torch.inference_mode():
        best = [model(pixels[start : start + BATCH])[0].argmax(1) for start in starts]
    return torch.cat(best).numpy()


def report_held_out(model: ServedModel) -> None:
    """Print the accuracy on the held-out scans, rendered in several ways."""
    scans = held_out_scans()
    sent = [Image.open(BytesIO(png)) for png, _ in held_out()]
    renderings: dict[str, Sequence[Image.Image]] = {
        "as held_out() gives them": sent,
        "8x8 pixels": [render_scan(ink, 8) for ink in scans.ink],
        "128x128 pixels": [render_scan(ink, 128) for ink in scans.ink],
        "light on dark": [ImageOps.invert(image) for image in sent],
    }
    print(f"held-out scans ({len(scans.labels)})")
    for name, rendered in renderings.items():
        right = read_digits(model, rendered) == scans.labels
        print(f"  {name:26} {right.mean():7.2%}  ({right.sum()} of {len(right)})")


def report_drawings(model: ServedModel) -> None:
    """Print the accuracy on drawings, for every value of every condition."""
    drawn = list(drawings())
    right = read_digits(model, [drawing.image for drawing in drawn]) == [d.label for d in drawn]
    print(f"drawings ({len(drawn)})\n  {'all':26} {right.mean():7.2%}")
    by_condition: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for drawing, is_right in zip(drawn, right, strict=True):
        for condition in drawing.conditions.items():
            by_condition[condition].append(bool(is_right))
    for (axis, value), outcomes in sorted(by_condition.items()):
        print(f"  {axis:8}{value:26} {np.mean(outcomes):7.2%}  (of {len(outcomes)})")


def main() -> None:
    """Print both reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the .safetensors file of the training")
    model = load_model(parser.parse_args().checkpoint)
    report_held_out(model)
    report_drawings(model)


if __name__ == "__main__":
    main()
