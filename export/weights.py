"""Weights on this machine, with all that is known of them; what an export starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.classes import ClassNames
from models.variants import Architecture


@dataclass(frozen=True)
class Weights:
    """Weights on this machine and what belongs to them.

    Attributes:
        variant: the name they were asked for by.
        architecture: the network.
        checkpoint: the weights' file.
        file: its name, or its path in the repository.
        classes: outputs that the classifier must have, or None where nobody says.
        names: of the classes, or None.
        preprocessing: fields of `InputSpec` that belong to these weights.
        repository: on the hub, or None.
        commit: of the repository, or None.
    """

    variant: str
    architecture: Architecture
    checkpoint: Path
    file: str
    classes: int | None = None
    names: ClassNames | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    repository: str | None = None
    commit: str | None = None
