"""Make the images of `examples/images`: `python -m examples.make_images`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image

from examples.digits.data import encode_png, held_out_scans, render_scan
from examples.digits.drawings import COLOURS, drawings

FOLDER = Path(__file__).parent / "images"
NAMES = (Path(__file__).parent / "digits" / "labels.txt").read_text("utf-8").split()
SCANNED = (0, 2, 3, 5)
DRAWN = {"glyph": "4 open", "pen": "medium", "size": "middle", "place": "centred"}
PHOTO, PHOTO_WIDTH = "china.jpg", 500


def save_scans() -> None:
    """Save the first held-out scan of some digits, enlarged."""
    scans = held_out_scans()
    for digit in SCANNED:
        ink = scans.ink[scans.labels == digit][0]
        path = FOLDER / f"scan_{NAMES[digit]}.png"
        path.write_bytes(encode_png(render_scan(ink, 128)))


def save_drawing() -> None:
    """Save one of the drawings."""
    wanted = {**DRAWN, "colours": next(iter(COLOURS))}
    drawing = next(drawing for drawing in drawings() if drawing.conditions == wanted)
    path = FOLDER / f"drawing_{NAMES[drawing.label]}.png"
    path.write_bytes(encode_png(drawing.image))


def save_photo() -> None:
    """Save one of the photographs that scikit-learn ships, smaller."""
    photo = Image.fromarray(load_sample_image(PHOTO))
    photo.thumbnail((PHOTO_WIDTH, PHOTO_WIDTH), Image.Resampling.LANCZOS)
    photo.save(FOLDER / PHOTO, quality=85)


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    save_scans()
    save_drawing()
    save_photo()


if __name__ == "__main__":
    main()
