"""Files from the Hugging Face hub: downloaded once, checked against the hash the hub announces."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from models.package import sha256_file

SHA256 = re.compile("[0-9a-f]{64}")
# Statuses that say nothing of the file: the cache may be asked instead.
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)


class HubError(Exception):
    """A file that cannot be had; the message is half a sentence that says why."""


class NoSuchFile(HubError):
    """The repository is there and holds no such file."""


@dataclass(frozen=True)
class HubFile:
    """A file in the library's cache, with what is known of where it came from.

    Attributes:
        path: where it is.
        repository: on the hub, for example `timm/caformer_s18.sail_in1k`.
        commit: of the repository, 40 hexadecimal digits.
        was_reachable: whether the hub answered; else the file was in the cache before.
        was_announced: whether the hub told its SHA-256, which it then has.
    """

    path: Path
    repository: str
    commit: str
    was_reachable: bool
    was_announced: bool


def fetch(repository: str, file: str, revision: str | None = None) -> HubFile:
    """Return a file of a model repository, from the cache where the hub's is the same.

    The cache, the endpoint, the token and the offline mode are the library's (`HF_HOME`,
    `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`); so is the progress bar, on a terminal only.

    Raises:
        HubError: it is not there, cannot be reached or stored, or is not what was announced.
    """
    with _quiet():
        try:
            etag = _ask(repository, file, revision)
            found = hf_hub_download(
                repository, file, revision=revision, local_files_only=etag is None
            )
        except Exception as error:  # the library lets errors of its transports through
            is_absent = isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError)
            kind = NoSuchFile if is_absent else HubError
            raise kind(_reason(error, revision)) from error
    path = Path(found)
    announced = _check(path, etag)
    commit = path.parents[file.count("/")].name  # snapshots/COMMIT/FILE
    return HubFile(
        path, repository, commit, was_reachable=etag is not None, was_announced=announced
    )


def page_of(repository: str, file: str, revision: str | None = None) -> str:
    """Return the address that a browser downloads a file from."""
    return f"{constants.ENDPOINT}/{repository}/resolve/{revision or 'main'}/{file}"


def _ask(repository: str, file: str, revision: str | None) -> str | None:
    """Return the etag of a file on the hub, or None where the hub cannot be asked now.

    The library would try for half a minute before it says that there is no network.

    Raises:
        Exception: the hub cannot be asked and the file is not in the cache either.
    """
    try:
        etag = get_hf_file_metadata(hf_hub_url(repository, file, revision=revision)).etag
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, HFValidationError) or status not in (None, *PASSING_STATUSES):
            raise
        try:
            hf_hub_download(repository, file, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
        return None
    if etag and not re.fullmatch(r"[\w-]+", etag):  # it becomes the name of a file
        raise OSError(f"an etag that is none, {etag[:40]!r}")
    return etag or ""


def _check(path: Path, etag: str | None) -> bool:
    """Compare a file with the SHA-256 that the hub knows it by; a file that differs is removed.

    Returns:
        Whether the hub told one.
    """
    # The cache keeps a file under its etag, and what stands in a snapshot is a link to it.
    is_link = path.is_symlink()
    announced = os.readlink(path).rpartition("/")[2] if is_link else etag or ""
    if not SHA256.fullmatch(announced):  # small files have no hash of their content's kind
        return False
    actual = sha256_file(path)
    if actual != announced:
        if is_link:
            (path.parent / os.readlink(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HubError(
            f"what arrived is damaged (sha256 {actual[:12]}..., the hub announces "
            f"{announced[:12]}...) and was removed; try again"
        )
    return True


def _reason(error: Exception, revision: str | None) -> str:
    """Return why a file cannot be had, as half a sentence."""
    for kind, reason in (
        (GatedRepoError, "its owner wants to be asked first, on its page, and then HF_TOKEN set"),
        (
            RepositoryNotFoundError,
            "there is no such repository, or it is private and wants HF_TOKEN",
        ),
        (RevisionNotFoundError, f"the repository has no revision {revision!r}"),
        (LocalEntryNotFoundError, "the hub cannot be reached and it is not in the cache"),
        (EntryNotFoundError, "the repository holds no such file"),
        (HFValidationError, "that is no name of a repository"),
    ):
        if isinstance(error, kind):
            return reason
    if isinstance(error, HfHubHTTPError):
        return f"the hub answers with status {error.response.status_code}"
    detail = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return (
            f"it cannot be stored: {error.strerror} ({error.filename or 'the cache, see HF_HOME'})"
        )
    if "offline mode" in detail:
        return "HF_HUB_OFFLINE is set and it is not in the cache"
    host = urlsplit(constants.ENDPOINT).netloc
    if not isinstance(error, ConnectionError) and not _is_of_transport(error):
        return f"what {host} sends is no file of a hub ({detail})"
    return f"{host} cannot be reached ({detail}); try again when it can"


def _is_of_transport(error: Exception) -> bool:
    """Tell whether the library's HTTP client, which is not ours to import, had no connection."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings about single attempts back: errors are raised, and said once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
