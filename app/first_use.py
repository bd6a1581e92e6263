"""A published checkpoint that there is no package of yet: exported on first use.

A child process fetches, exports and proves, so that torch is never loaded here. It works in a
hidden folder of the store, and one rename puts the finished package into its place: of two
services that start at once, one rename wins and the other service takes that package.
"""

from __future__ import annotations

import errno
import importlib.util
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.errors import StartupError
from app.settings import Settings
from app.signals import ending_by_exception
from models.cache import user_cache
from models.package import MANIFEST, PackageNotFound, find_package
from models.variants import find_variant

# From SIGTERM to SIGKILL: time for the child to remove what it had half downloaded.
END_SECONDS = 5.0
# Much longer than an export takes.
LEFT_SECONDS = 24 * 3600.0
# Looked for, never imported here.
EXPORTER = ("torch", "onnx", "onnxscript", "huggingface_hub")

Say = Callable[[str], None]


def locate_package(settings: Settings, say: Say, relay: bool) -> Path:
    """Find the package that `METASERVE_MODEL` names, exporting a published checkpoint if need be.

    Args:
        settings: which model, and where packages are.
        say: told in a line what is going on.
        relay: whether `say` gets the export's own lines too; else they go to standard error as
            they are, with its progress bar.

    Raises:
        PackageError: there is no such package, and no published checkpoint of that name.
        StartupError: there is no exporter, or the export cannot be stored, or it failed and `say`
            was given its lines.
        SystemExit: the export failed and has said why (2), or SIGTERM came (143).
    """
    try:
        return find_package(settings.model, settings.model_store)
    except PackageNotFound:
        variant = settings.model.removeprefix("timm/")
        if not _is_published(variant):
            raise
    try:
        return find_package(variant, settings.model_store)
    except PackageNotFound:
        pass
    _check_exporter(variant)
    store = _store(settings)
    if (store / variant).exists() and not (store / variant / MANIFEST).is_file():
        raise StartupError(
            f"{store / variant} is there and is no model package; move it away, or set "
            "METASERVE_MODEL_STORE to another directory"
        )
    remove_leftovers(store)
    try:
        with tempfile.TemporaryDirectory(prefix=".first_use.", dir=store) as folder:
            say(f"there is no package {variant} yet: fetching and exporting it into {store}, once")
            new = Path(folder) / variant
            _export(variant, new, store / variant, say if relay else None)
            _publish(Path(folder) / variant, store / variant)
    except OSError as error:
        raise StartupError(
            f"{variant} cannot be exported into {store} ({error.strerror}); "
            "set METASERVE_MODEL_STORE to a directory that can be written"
        ) from error
    return find_package(variant, store)


def remove_leftovers(store: Path) -> None:
    """Remove what services that were killed left in the store; younger folders may be in use."""
    for folder in store.glob(".first_use.*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _check_exporter(variant: str) -> None:
    """Refuse where only packages can be served: a place to store one would not help."""
    absent = [name for name in EXPORTER if importlib.util.find_spec(name) is None]
    if absent:
        raise StartupError(
            f"there is no package {variant} yet, and nothing to export it with here "
            f"(no {', '.join(absent)}); install metaserve[export,cpu], or export it elsewhere "
            "and put it into METASERVE_MODEL_STORE"
        )


def _is_published(variant: str) -> bool:
    try:
        return find_variant(variant)[1] is not None
    except ValueError:
        return False


def _store(settings: Settings) -> Path:
    store = settings.model_store or user_cache("models")
    if store is None:
        raise StartupError(
            f"there is no home directory to export {settings.model} into; set METASERVE_MODEL_STORE"
        )
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"{store} cannot be made for {settings.model} ({error.strerror}); "
            "set METASERVE_MODEL_STORE to a directory that can be written"
        ) from error
    return store


def _publish(package: Path, place: Path) -> None:
    try:
        package.rename(place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # Another service was faster; its package is as good.


def _export(variant: str, out: Path, place: Path, heard: Say | None) -> None:
    """Run `metaserve export` to its end.

    Raises:
        StartupError: it failed, and its sentence went to `heard`.
        SystemExit: it failed and said why on standard error.
    """
    # -P: a folder `app` or `models` in the working directory is not ours.
    command = [sys.executable, "-P", "-m", "app", "export", variant, "--out", str(out)]
    command += ["--place", str(place)]
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        if heard is not None and not line.startswith("metaserve: "):
            heard(line)

    code = _run(command, hear if heard is not None else None)
    if code == 0:
        return
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        raise StartupError(
            f"exporting {variant} was ended by {signal.Signals(number).name}; it needs about 2 GB "
            "of memory, and can be done elsewhere with `metaserve export`"
        )
    if heard is None:
        raise SystemExit(code)
    sentences = [line for line in lines if line.startswith("metaserve: ")]
    said = sentences[-1].removeprefix("metaserve: ") if sentences else f"exit code {code}"
    raise StartupError(f"{variant} cannot be exported on first use: {said}")


def _run(command: list[str], hear: Say | None) -> int:
    """Run a process to its end, or end it when we are told to stop; returns the exit code."""
    with ending_by_exception():
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closes with us, which ends the child
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if hear is not None else None,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C comes to us alone, and we pass it on once
        )
        try:
            if child.stderr is not None and hear is not None:
                for line in child.stderr:
                    hear(line.rstrip("\n"))
            return child.wait()
        finally:
            _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for pipe in (child.stdin, child.stderr):
        if pipe is not None:
            pipe.close()
