"""Training images from traced scans: any pen, any place, any colours; torch, by the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.digits.strokes import CELL, FINE_SIDE, Strokes

SIDE = 32
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Fields:
    """Traced scans as tensors.

    Attributes:
        maps: float16 (N, 1 + L, FINE_SIDE, FINE_SIDE), the enlarged scan, then the distances.
        legible: float32 (N, L), 1 where a line reads as its digit.
    """

    maps: Tensor
    legible: Tensor

    @classmethod
    def of(cls, strokes: Strokes) -> Fields:
        """Convert what `trace` returns."""
        fine = torch.from_numpy(strokes.fine).unsqueeze(1)
        maps = torch.cat((fine, torch.from_numpy(strokes.distances)), 1).half()
        return cls(maps, torch.from_numpy(strokes.legible).float())


def draw(fields: Fields, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Draw digits, each in another hand.

    Args:
        fields: all digits.
        chosen: int64 (B,), which of them to draw.
        generator: the only source of chance.

    Returns:
        float32 (B, SIDE, SIDE, 3), RGB, whole numbers 0..255.
    """
    chance = Chance(generator, len(chosen))
    legible = fields.legible[chosen]
    line = torch.multinomial(legible + 1e-3, 1, generator=generator).squeeze(1)
    maps = fields.maps[chosen]
    rows = torch.arange(len(chosen))
    pair = torch.stack((maps[:, 0], maps[rows, 1 + line]), 1).float()
    grid, size = _warp(chance)
    warped = F.grid_sample(pair, grid, padding_mode="border", align_corners=False)
    scan, distance = warped.unbind(1)  # (B, S, S) each
    # A fine pixel of a digit `size` pixels high is size / (8 * CELL) pixels wide.
    pen = _pen_stroke(distance * (size / (8 * CELL)), size, chance)
    is_scan = chance.happens(0.3) | (legible.sum(1) == 0).view(-1, 1, 1)
    ink = _press(torch.where(is_scan, _develop(scan, chance), pen), chance)
    return _expose(_colour(ink, chance), chance)


class Chance:
    """Random numbers for a batch, shaped to be multiplied with (B, S, S)."""

    def __init__(self, generator: torch.Generator, batch: int) -> None:
        self.generator = generator
        self.batch = batch

    def uniform(self, low: float, high: float) -> Tensor:
        """Return float (B, 1, 1)."""
        return low + (high - low) * torch.rand(self.batch, 1, 1, generator=self.generator)

    def happens(self, probability: float) -> Tensor:
        """Return bool (B, 1, 1)."""
        return torch.rand(self.batch, 1, 1, generator=self.generator) < probability

    def noise(self, *shape: int) -> Tensor:
        """Return normal noise (B, *shape)."""
        return torch.randn(self.batch, *shape, generator=self.generator)


def _warp(chance: Chance) -> tuple[Tensor, Tensor]:
    """Choose size, place, slant and wobble.

    Returns:
        A sampling grid (B, S, S, 2), and the digit's height in pixels (B, 1, 1).
    """
    size = chance.uniform(13, 34)
    height, width = size, size * torch.exp(chance.uniform(-0.3, 0.35))
    angle, shear = chance.uniform(-0.14, 0.14), chance.uniform(-0.15, 0.15)
    room = (SIDE + 3 - size).clamp(min=2) / 2
    left, top = room * chance.uniform(-1, 1), room * chance.uniform(-1, 1)
    axis = torch.arange(SIDE) + 0.5 - SIDE / 2
    wobble = F.interpolate(chance.noise(2, 4, 4), SIDE, mode="bicubic", align_corners=True)
    wobble = wobble * (chance.uniform(0, 0.055) * size).unsqueeze(1)
    x = axis.view(1, 1, -1) - left + wobble[:, 0]
    y = axis.view(1, -1, 1) - top + wobble[:, 1]
    turned_x, turned_y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    slanted_x = turned_x + shear * turned_y
    reach = 8 * CELL / FINE_SIDE  # the share of the fine image that the scan takes up
    grid = torch.stack((slanted_x / width, turned_y / height), -1) * 2 * reach
    return grid, torch.sqrt(width * height)


def _pen_stroke(distance: Tensor, size: Tensor, chance: Chance) -> Tensor:
    """Draw a line of random width, antialiased.

    Args:
        distance: (B, S, S), pixels to the centre line.
        size: (B, 1, 1), the digit's height in pixels; a pen too wide would fill its loops.
        chance: for the width.
    """
    widest = size * 0.21
    width = 0.4 * (widest / 0.4) ** chance.uniform(0, 1)  # as many thin pens as thick ones
    edge = chance.uniform(0.35, 0.75)  # half the width that an edge is smeared over
    nearest = torch.maximum(distance - edge, -width / 2)
    farthest = torch.minimum(distance + edge, width / 2)
    return ((farthest - nearest) / (2 * edge)).clamp(0, 1)


def _develop(scan: Tensor, chance: Chance) -> Tensor:
    """Give a scan another contrast, as far as a crisp shape."""
    level = chance.uniform(0.25, 0.5)
    steepness = torch.exp(chance.uniform(math.log(2), math.log(20)))
    crisp = ((scan - level) * steepness + 0.5).clamp(0, 1)
    return torch.where(chance.happens(0.5), crisp, scan)


def _press(ink: Tensor, chance: Chance) -> Tensor:
    """Blur or sharpen, leave a small gap, press harder or softer."""
    blurred = F.avg_pool2d(ink, 3, 1, 1)
    amount = chance.uniform(-0.3, 0.8) * chance.happens(0.5)
    ink = ink + amount * (blurred - ink)
    axis = torch.arange(SIDE).float()
    across = axis.view(1, 1, -1) - chance.uniform(4, SIDE - 4)
    along = axis.view(1, -1, 1) - chance.uniform(4, SIDE - 4)
    outside = (torch.hypot(across, along) - chance.uniform(0.2, 0.8)).clamp(0, 1)
    return torch.where(chance.happens(0.1), ink * outside, ink)


def _colour(ink: Tensor, chance: Chance) -> Tensor:
    """Put ink of one colour on ground of another, in greys half of the time.

    Returns:
        (B, S, S, 3), 0..1.
    """
    is_plain = chance.happens(0.4)
    ground_luma = torch.where(is_plain, 1.0, chance.uniform(0, 1))
    contrast = torch.where(is_plain, chance.uniform(0.6, 1.0), chance.uniform(0.25, 1.0))
    room = torch.where(ground_luma > 0.5, -ground_luma, 1 - ground_luma)
    ink_luma = ground_luma + contrast * room
    is_inverted = is_plain & chance.happens(0.5)
    ground_luma = torch.where(is_inverted, 1 - ground_luma, ground_luma)
    ink_luma = torch.where(is_inverted, 1 - ink_luma, ink_luma)
    is_coloured = ~is_plain & chance.happens(0.6)
    ground = _tint(ground_luma, is_coloured, chance)
    return ground + ink.unsqueeze(-1) * (_tint(ink_luma, is_coloured, chance) - ground)


def _tint(luma: Tensor, is_coloured: Tensor, chance: Chance) -> Tensor:
    """Return colours (B, 1, 1, 3) near some lumas (B, 1, 1)."""
    hue = chance.noise(1, 1, 3)
    hue = hue - (hue * torch.tensor(LUMA)).sum(-1, keepdim=True)  # no change of luma
    return luma.unsqueeze(-1) + 0.3 * hue * is_coloured.unsqueeze(-1)


def _expose(image: Tensor, chance: Chance) -> Tensor:
    """Add uneven light and noise to some, then round to 8 bits."""
    light = F.interpolate(chance.noise(1, 2, 2), SIDE, mode="bilinear", align_corners=True)
    shade = (light[:, 0] * 0.08 * chance.happens(0.3)).unsqueeze(-1)
    grain = (chance.uniform(0, 0.08) * chance.happens(0.35)).unsqueeze(-1)
    image = image + shade + grain * chance.noise(SIDE, SIDE, 1)
    return (image.clamp(0, 1) * 255).round()
