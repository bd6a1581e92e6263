"""A package is built beside its place and renamed into it when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.package import MANIFEST, PackageError


def check_place(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that is taken, before any work is done.

    Raises:
        PackageError: something is there that may not or must not be replaced.
    """
    if out.exists() and not overwrite:
        raise PackageError(f"{out} exists already; choose another --out or add --overwrite")
    if out.exists() and not (out / MANIFEST).is_file():
        raise PackageError(f"{out} is no model package and stays; choose another --out")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give an empty folder to fill; what is in it at the end becomes `out`.

    Nothing appears at `out` before, and an error leaves what was there as it was. A package that
    is replaced is absent for the moment between two renames.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the rename stays within one file system.
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step: who reads it sees the old one or the new one.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # a service runs as another user
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _publish(staging: Path, out: Path) -> None:
    """Move a finished folder to its place; a package that was there goes only then."""
    for path in (*staging.rglob("*"), staging):
        # A service runs as another user; folders and scripts have this bit.
        path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
        _sync(path)
    replaced = staging.with_name(staging.name + ".replaced")
    if out.exists():
        out.rename(replaced)
    try:
        staging.rename(out)
    except BaseException:
        if replaced.exists():
            replaced.rename(out)
        raise
    _sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have what was written survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
