"""A name on the command line -> weights on this machine, with all that is known of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from export.hub import HubError, NoSuchFile, fetch, page_of
from export.timm_config import TimmConfig, read_timm_config
from export.weights import Weights
from models.classes import SHIPPED, SHIPPED_CLASSES, ClassNames, read_names, shipped_names
from models.package import PackageError, sha256_file
from models.variants import Architecture, find_variant

HUB_PREFIX = "hf-hub:"
OFFICIAL_REPOSITORY = "sail/dl"
CONFIG = "config.json"
# What timm saves; the pickle is what older versions of it left alone on the hub.
SAFE_WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"

Progress = Callable[[str], None]


class SourceError(Exception):
    """Weights that cannot be had or fit nothing; the message is one sentence."""


@dataclass(frozen=True)
class Wanted:
    """What the command line says about the weights.

    Attributes:
        variant: an architecture, a published checkpoint, a timm hub id or `hf-hub:USER/REPOSITORY`.
        checkpoint: a local file; downloaded when None.
        config: timm's `config.json` of a local file.
        labels: a file of labels, or the name of a list that ships.
        revision: branch, tag or commit of the repository to download from.
        sha256: what the weights' file must have, 64 hexadecimal digits.
        place: of the package, for the sentence that says how to do without a download.
    """

    variant: str
    checkpoint: Path | None = None
    config: Path | None = None
    labels: str | None = None
    revision: str | None = None
    sha256: str | None = None
    place: str | None = None


def find_source(wanted: Wanted, progress: Progress) -> Weights:
    """Find the weights, downloading them where no file is given.

    Args:
        wanted: what to find.
        progress: told of each step before it starts.

    Raises:
        SourceError: the weights cannot be had, or are not those that were pinned.
        PackageError: labels or configuration cannot be used.
        ValueError: there is no such variant.
    """
    pin = wanted.sha256 and wanted.sha256.lower()
    if pin is not None and not re.fullmatch("[0-9a-f]{64}", pin):
        raise SourceError("--sha256 takes the 64 hexadecimal digits of the weights' file")
    if wanted.revision is not None and wanted.checkpoint is not None:
        raise SourceError("--revision belongs to a download, and --checkpoint is a file here")
    if wanted.config is not None and wanted.checkpoint is None:
        raise SourceError("--config belongs to --checkpoint FILE; downloads bring their own")
    if wanted.variant.startswith(HUB_PREFIX):
        source = _of_a_user(wanted, progress)
    else:
        source = _of_the_catalogue(wanted, progress)
    if pin is not None and sha256_file(source.checkpoint) != pin:
        actual = sha256_file(source.checkpoint)
        raise SourceError(
            f"{source.file} has sha256 {actual}, not {pin} as --sha256 wants; nothing was exported"
        )
    if wanted.labels is not None:
        source = replace(source, names=_given_names(wanted.labels))
    return source


def _of_the_catalogue(wanted: Wanted, progress: Progress) -> Weights:
    architecture, entry = find_variant(wanted.variant)
    variant = wanted.variant.removeprefix("timm/")
    if wanted.checkpoint is not None:
        return _of_a_file(variant, architecture, wanted.checkpoint, wanted.config)
    if entry is None:
        raise SourceError(f"give the weights for {variant} with --checkpoint FILE")
    repository, file = OFFICIAL_REPOSITORY, entry.file
    if variant == entry.hub_id:
        repository, file = f"timm/{entry.hub_id}", SAFE_WEIGHTS
    labels = SHIPPED_CLASSES[entry.classes]
    return _download(
        Weights(
            variant=variant,
            architecture=architecture,
            checkpoint=Path(),
            file=file,
            classes=entry.classes,
            names=shipped_names(labels),
            repository=repository,
        ),
        wanted.revision,
        progress,
        instead=f"{variant} --checkpoint FILE --labels {labels}"
        + (f" --out {wanted.place}" if wanted.place else ""),
    )


def _of_a_file(
    variant: str, architecture: Architecture, checkpoint: Path, config_path: Path | None
) -> Weights:
    """Return a user's own weights; nothing is guessed about their classes."""
    source = Weights(variant, architecture, checkpoint, checkpoint.name)
    if config_path is None:
        return source
    config = read_timm_config(config_path)
    if config.architecture not in (None, architecture.name):
        raise PackageError(
            f"{config_path} is of {config.architecture}, and {architecture.name} was asked for"
        )
    return _described(source, config)


def _of_a_user(wanted: Wanted, progress: Progress) -> Weights:
    """Return a user's fine-tune on the hub, as timm pushed it."""
    repository, _, at = wanted.variant.removeprefix(HUB_PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise SourceError(f"{HUB_PREFIX} wants USER/REPOSITORY after it, not {repository!r}")
    if wanted.checkpoint is not None:
        raise SourceError(f"{wanted.variant} is a download, and --checkpoint is a file here")
    if at and wanted.revision:
        raise SourceError("the revision is given twice, after the @ and with --revision")
    revision = wanted.revision or at or None
    progress(f"asking for {repository}")
    try:
        described = fetch(repository, CONFIG, revision)
    except HubError as error:
        _cannot(repository, CONFIG, revision, error, "ARCHITECTURE --checkpoint FILE --config FILE")
    config = read_timm_config(described.path)
    if config.architecture is None:
        raise PackageError(f"{CONFIG} of {repository} names no architecture, so it is not timm's")
    architecture, _ = find_variant(config.architecture)
    variant = repository.rpartition("/")[2]
    source = Weights(variant, architecture, Path(), SAFE_WEIGHTS, repository=repository)
    instead = f"{architecture.name} --checkpoint FILE --config FILE"
    # Both files of one commit, whatever is pushed in between.
    return _described(
        _download(source, described.commit, progress, instead, fallback=PICKLED_WEIGHTS), config
    )


def _described(source: Weights, config: TimmConfig) -> Weights:
    return replace(
        source,
        classes=config.classes,
        names=config.names,
        preprocessing=config.preprocessing,
    )


def _download(
    source: Weights,
    revision: str | None,
    progress: Progress,
    instead: str,
    fallback: str | None = None,
) -> Weights:
    """Return the source with its file on this machine."""
    assert source.repository is not None
    progress(f"fetching {source.file} of {source.repository}")
    try:
        found = fetch(source.repository, source.file, revision)
    except NoSuchFile as error:
        if fallback is None:
            _cannot(source.repository, source.file, revision, error, instead)
        progress(f"it holds no {source.file}, so {fallback} is taken")
        return _download(replace(source, file=fallback), revision, progress, instead)
    except HubError as error:
        _cannot(source.repository, source.file, revision, error, instead)
    if not found.was_announced:
        progress(f"the hub announces no hash of {source.file}; --sha256 would pin it")
    if not found.was_reachable:
        progress("the hub cannot be reached, so the file in the cache is taken")
    return replace(source, checkpoint=found.path, commit=found.commit)


def _cannot(
    repository: str, file: str, revision: str | None, error: Exception, instead: str
) -> NoReturn:
    page = page_of(repository, file, revision)
    raise SourceError(
        f"{file} of {repository} cannot be fetched: {error}; you can download {page} and run "
        f"`metaserve export {instead}`"
    ) from error


def _given_names(labels: str) -> ClassNames:
    if labels in SHIPPED:
        return shipped_names(labels)
    path = Path(labels)
    if path.suffix != ".json":
        return read_names(path)
    names = read_timm_config(path).names
    if names is None:
        raise PackageError(f"{path} holds no label_names")
    return names
