"""What classes are called: the two ImageNet lists that ship, and those that users bring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.package import (
    LABELS,
    WORDNET_ID,
    WORDNET_IDS,
    PackageError,
    read_lines,
)

FOLDER = Path(__file__).parent / "labels"
NOTICE = "WORDNET-LICENSE.txt"

SHIPPED = {"imagenet-1k": FOLDER / "imagenet_1k.tsv", "imagenet-21k": FOLDER / "imagenet_21k.tsv"}
"""Name of a list -> its file, lines of index, WordNet id and text; 21k is the fall11 release."""

SHIPPED_CLASSES = {1000: "imagenet-1k", 21841: "imagenet-21k"}
"""Classes of a published checkpoint -> its list. Never to be asked for a user's checkpoint."""


@dataclass(frozen=True)
class ClassNames:
    """The names of all classes of a network, in class order.

    Attributes:
        origin: where they come from, for messages.
        labels: one text a class; no line breaks.
        wordnet_ids: one `n` and eight digits a class, or None.
        notice: a licence that must stand beside the labels, or None.
    """

    origin: str
    labels: tuple[str, ...]
    wordnet_ids: tuple[str, ...] | None = None
    notice: Path | None = None

    def __post_init__(self) -> None:
        if any("\n" in label or "\r" in label for label in self.labels):
            raise PackageError(f"{self.origin} holds a label with a line break; take it out")

    def write(self, folder: Path, classes: int) -> None:
        """Write the files of a package that hold names.

        Raises:
            PackageError: there are more or fewer names than classes.
        """
        if len(self.labels) != classes:
            raise PackageError(
                f"{self.origin} holds {len(self.labels)} labels for {classes} classes"
            )
        _write_lines(folder / LABELS, self.labels)
        if self.wordnet_ids is not None:
            _write_lines(folder / WORDNET_IDS, self.wordnet_ids)
        if self.notice is not None:
            (folder / NOTICE).write_bytes(self.notice.read_bytes())


def shipped_names(name: str) -> ClassNames:
    """Read a list of `SHIPPED`."""
    rows = [line.split("\t") for line in read_lines(SHIPPED[name])]
    _, ids, labels = zip(*rows, strict=True)
    return ClassNames(name, labels, ids, FOLDER / NOTICE)


def read_names(path: Path) -> ClassNames:
    """Read a text file with one label a line.

    Raises:
        PackageError: it cannot be read as UTF-8.
    """
    return ClassNames(str(path), read_lines(path))


def described_names(
    origin: str, names: tuple[str, ...], descriptions: dict[str, str] | None
) -> ClassNames:
    """Return names as timm writes them down: short ones, and texts for some or all of them.

    Names that are WordNet ids are kept as ids; a name without a text is its own text.
    """
    texts = descriptions or {}
    are_ids = all(WORDNET_ID.fullmatch(name) for name in names)
    return ClassNames(
        origin, tuple(texts.get(name, name) for name in names), names if are_ids else None
    )


def _write_lines(path: Path, lines: tuple[str, ...]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
