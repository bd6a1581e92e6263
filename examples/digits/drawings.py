"""Digits drawn as with a mouse: a test set of another kind, never trained on; Pillow only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

CANVAS = 280
OVERSAMPLING = 3  # drawn larger, then reduced: the soft edges that a browser's canvas has


@dataclass(frozen=True)
class Stroke:
    """A line drawn without lifting the pen, through points in the unit square, y downwards."""

    points: tuple[Point, ...]
    is_smooth: bool = True


def _curve(*points: Point) -> Stroke:
    return Stroke(points)


def _lines(*points: Point) -> Stroke:
    return Stroke(points, is_smooth=False)


def _ellipse(x: float, y: float, rx: float, ry: float, start: float, turn: float) -> Stroke:
    """Part of an ellipse; `start` and `turn` in degrees, clockwise, 0 to the right."""
    steps = 16
    angles = [math.radians(start + turn * step / steps) for step in range(steps + 1)]
    return Stroke(tuple((x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles))


GLYPHS: dict[str, tuple[Stroke, ...]] = {
    "0 oval": (_ellipse(0.5, 0.5, 0.30, 0.5, -90, -365),),
    "0 round": (_ellipse(0.5, 0.5, 0.42, 0.48, -70, -375),),
    "0 not quite closed": (_ellipse(0.5, 0.5, 0.33, 0.5, -70, -345),),
    "1 bare": (_lines((0.5, 0), (0.5, 1)),),
    "1 slanted": (_lines((0.62, 0), (0.4, 1)),),
    "1 with flag": (_lines((0.28, 0.25), (0.55, 0), (0.55, 1)),),
    "1 with flag and base": (
        _lines((0.3, 0.22), (0.52, 0), (0.52, 1)),
        _lines((0.25, 1), (0.8, 1)),
    ),
    "2 round": (
        _curve(
            (0.2, 0.25), (0.3, 0.05), (0.52, 0), (0.75, 0.1), (0.78, 0.3), (0.6, 0.58), (0.2, 1),
        ),
        _lines((0.2, 1), (0.85, 1)),
    ),
    "2 with loop": (
        _curve(
            (0.2, 0.2), (0.45, 0), (0.72, 0.12), (0.72, 0.4), (0.5, 0.75), (0.28, 0.97),
            (0.16, 0.9), (0.28, 0.8), (0.5, 0.93), (0.7, 1), (0.88, 0.93),
        ),
    ),
    "2 like a z": (_lines((0.2, 0.12), (0.45, 0), (0.75, 0.15), (0.2, 1), (0.82, 1)),),
    "3 round": (
        _curve(
            (0.22, 0.12), (0.48, 0), (0.74, 0.12), (0.7, 0.36), (0.42, 0.47), (0.72, 0.58),
            (0.8, 0.8), (0.52, 1), (0.2, 0.88),
        ),
    ),
    "3 with flat top": (
        _lines((0.2, 0), (0.75, 0), (0.45, 0.4)),
        _curve((0.45, 0.4), (0.75, 0.52), (0.78, 0.82), (0.5, 1), (0.2, 0.9)),
    ),
    "4 open": (
        _lines((0.3, 0), (0.18, 0.55), (0.85, 0.55)),
        _lines((0.65, 0.15), (0.62, 1)),
    ),
    "4 closed": (_lines((0.66, 1), (0.66, 0), (0.14, 0.66), (0.88, 0.66)),),
    "4 with short stem": (
        _lines((0.25, 0.05), (0.22, 0.5), (0.78, 0.48)),
        _lines((0.75, 0), (0.72, 1)),
    ),
    "5 in two strokes": (
        _lines((0.78, 0), (0.3, 0), (0.26, 0.42)),
        _curve((0.26, 0.42), (0.5, 0.36), (0.76, 0.5), (0.77, 0.78), (0.5, 1), (0.2, 0.9)),
    ),
    "5 in one curve": (
        _curve(
            (0.76, 0.02), (0.45, 0.02), (0.32, 0.2), (0.34, 0.42), (0.62, 0.46), (0.76, 0.7),
            (0.6, 0.95), (0.22, 0.95),
        ),
    ),
    "6 curled": (
        _curve(
            (0.68, 0), (0.4, 0.2), (0.24, 0.55), (0.28, 0.88), (0.5, 1), (0.72, 0.86),
            (0.7, 0.62), (0.48, 0.54), (0.28, 0.68),
        ),
    ),
    "6 upright": (
        _curve((0.32, 0), (0.26, 0.4), (0.25, 0.74)),
        _ellipse(0.5, 0.75, 0.25, 0.25, 180, 370),
    ),
    "7 plain": (_lines((0.2, 0), (0.8, 0), (0.42, 1)),),
    "7 with bar": (
        _lines((0.2, 0), (0.8, 0), (0.42, 1)),
        _lines((0.35, 0.5), (0.8, 0.5)),
    ),
    "7 with bent stem": (
        _lines((0.18, 0.12), (0.2, 0), (0.78, 0)),
        _curve((0.78, 0), (0.56, 0.4), (0.46, 0.75), (0.45, 1)),
    ),
    "8 in one stroke": (
        _curve(
            (0.7, 0.12), (0.45, 0), (0.26, 0.18), (0.42, 0.42), (0.68, 0.6), (0.74, 0.85),
            (0.5, 1), (0.25, 0.86), (0.34, 0.6), (0.62, 0.38), (0.74, 0.18), (0.6, 0.03),
        ),
    ),
    "8 of two circles": (
        _ellipse(0.5, 0.24, 0.22, 0.24, 90, 365),
        _ellipse(0.5, 0.74, 0.28, 0.26, -90, 365),
    ),
    "9 with straight stem": (
        _ellipse(0.48, 0.26, 0.26, 0.26, 0, -365),
        _lines((0.74, 0.2), (0.7, 1)),
    ),
    "9 with hook": (
        _ellipse(0.48, 0.26, 0.26, 0.26, 0, -360),
        _curve((0.74, 0.26), (0.76, 0.6), (0.66, 0.92), (0.42, 1), (0.22, 0.9)),
    ),
}  # fmt: skip

PENS = {"thin": 4, "fine": 9, "medium": 16, "thick": 26}  # pixels of the canvas
SIZES = {"small": 0.45, "middle": 0.65, "large": 0.88}  # the digit's height, share of the canvas
PLACES = {"centred": 0.0, "aside": 0.8}  # share of the room around the digit
COLOURS: dict[str, tuple[Colour, Colour]] = {  # ink, ground
    "black on white": ((0, 0, 0), (255, 255, 255)),
    "white on black": ((255, 255, 255), (0, 0, 0)),
    "dark grey on grey": ((50, 50, 55), (150, 150, 150)),
    "blue on yellow": ((30, 60, 170), (250, 230, 150)),
    "light green on dark blue": ((150, 230, 140), (20, 30, 70)),
}


@dataclass(frozen=True)
class Drawing:
    """One drawing and how it was made.

    Attributes:
        image: RGB, CANVAS pixels square.
        label: the digit, 0..9.
        conditions: axis -> value, for example `pen` -> `thin`.
    """

    image: Image.Image
    label: int
    conditions: dict[str, str]


def drawings() -> Iterator[Drawing]:
    """Draw every glyph under every combination of conditions, each time by another hand."""
    axes = product(GLYPHS, PENS, SIZES, PLACES, COLOURS)
    for seed, (glyph, pen, size, place, colours) in enumerate(axes):
        hand = Random(seed)
        strokes = _place(GLYPHS[glyph], SIZES[size], PLACES[place], hand)
        yield Drawing(
            image=paint(strokes, PENS[pen], *COLOURS[colours]),
            label=int(glyph[0]),
            conditions={
                "glyph": glyph,
                "pen": pen,
                "size": size,
                "place": place,
                "colours": colours,
            },
        )


def paint(strokes: list[list[Point]], pen: int, ink: Colour, ground: Colour) -> Image.Image:
    """Paint lines with a round pen.

    Args:
        strokes: lines through points, in shares of the canvas.
        pen: width in pixels of the canvas.
        ink: RGB.
        ground: RGB.
    """
    side, width = CANVAS * OVERSAMPLING, pen * OVERSAMPLING
    image = Image.new("RGB", (side, side), ground)
    canvas = ImageDraw.Draw(image)
    for stroke in strokes:
        points = [(x * side, y * side) for x, y in stroke]
        canvas.line(points, ink, width, joint="curve")
        for end in (points[0], points[-1]):
            canvas.circle(end, width / 2, ink)
    return image.reduce(OVERSAMPLING)


def _place(
    glyph: tuple[Stroke, ...], height: float, aside: float, hand: Random
) -> list[list[Point]]:
    """Put a glyph on the canvas as a hand would: a little turned, stretched and shaky."""
    angle, slant = math.radians(hand.uniform(-8, 8)), hand.uniform(-0.15, 0.15)
    width = height * hand.uniform(0.6, 0.9)
    room = (1 - height) / 2 * aside
    centre_x = 0.5 + room * hand.choice((-1, 1)) * hand.uniform(0.5, 1)
    centre_y = 0.5 + room * hand.choice((-1, 1)) * hand.uniform(0.5, 1)

    def move(point: Point) -> Point:
        x = (point[0] - 0.5 + hand.gauss(0, 0.015)) * width
        y = (point[1] - 0.5 + hand.gauss(0, 0.015)) * height
        x -= slant * y
        return (
            centre_x + x * math.cos(angle) - y * math.sin(angle),
            centre_y + x * math.sin(angle) + y * math.cos(angle),
        )

    moved = [(tuple(move(point) for point in stroke.points), stroke.is_smooth) for stroke in glyph]
    return [_smooth(points) if is_smooth else list(points) for points, is_smooth in moved]


def _smooth(points: tuple[Point, ...], steps: int = 8) -> list[Point]:
    """Draw a curve through points.

    Source: Catmull and Rom, "A class of local interpolating splines" (1974), uniform.
    """
    padded = (points[0], *points, points[-1])
    curve = [points[0]]
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        for step in range(1, steps + 1):
            t = step / steps
            curve.append((_spline(a[0], b[0], c[0], d[0], t), _spline(a[1], b[1], c[1], d[1], t)))
    return curve


def _spline(a: float, b: float, c: float, d: float, t: float) -> float:
    """Return the value between b (t = 0) and c (t = 1)."""
    return 0.5 * (
        2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    )
