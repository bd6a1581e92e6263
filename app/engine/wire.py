"""What an HTTP process and the engine process say to each other, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass

from app.backends.base import BackendInfo
from app.engine.base import GoldenCheck, Profile


@dataclass(frozen=True)
class Greeting:
    """What a host says of itself.

    Attributes:
        info: what runs the network.
        profile: what warm-up measured.
        golden: how this machine's answers differ from torch in float32; None for a fake.
    """

    info: BackendInfo
    profile: Profile
    golden: GoldenCheck | None
