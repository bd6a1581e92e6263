"""What the arguments of `metaserve bench` and `metaserve tune` are made of."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Number = TypeVar("Number", int, float)


def add_image_argument(parser: argparse.ArgumentParser, advice: str = "") -> None:
    """Add `--image`, the bodies of the requests."""
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"sent in turn{advice} [a 32x32 drawing]",
    )


def from_0(text: str) -> float:
    """Read a finite number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return value


def above_0(text: str) -> float:
    """Read a finite number above 0."""
    value = from_0(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def count_from_0(text: str) -> int:
    """Read a whole number of 0 or more."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def count(text: str) -> int:
    """Read a whole number above 0."""
    value = count_from_0(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return value


def several(kind: Callable[[str], Number]) -> Callable[[str], tuple[Number, ...]]:
    """Return what reads a list with commas."""

    def read(text: str) -> tuple[Number, ...]:
        return tuple(kind(part) for part in text.split(","))

    return read
