"""The benchmark of decoding: its yardstick does the same work, its counts are counts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks import decoding
from models.package import InputSpec
from tests.images.files import encode, ramp
from tests.reference import timm_transform


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (90, 1000)])
def test_the_chain_by_hand_makes_what_timm_makes(size: tuple[int, int]) -> None:
    data = encode(ramp(*size), "PNG")
    expected = timm_transform(224)(ramp(*size)).numpy()
    found = decoding.by_hand(data, InputSpec(size=224))
    assert found.dtype == np.float32
    # One column of the crop may differ where half a pixel is rounded the other way.
    assert np.abs(found - expected).mean() < 0.02


def test_a_rate_counts_what_every_thread_did() -> None:
    done = []

    def work() -> None:
        done.append(1)

    found = decoding.rate(work, threads=2, seconds=0.05)
    assert found > 0
    assert len(done) / 60 < found <= len(done) / 0.05


def test_the_tables_are_printed_for_every_mode(capsys: pytest.CaptureFixture[str]) -> None:
    decoding.print_levels([Image.new("RGB", (64, 48), "red")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6 * 2
    assert all("| 100.00 % | 0.00 % | 0.00 % | 0 | 0.000 |" in line for line in lines[2:])
