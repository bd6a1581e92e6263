"""The straight line without a server: image file -> JSON, one at a time."""

from __future__ import annotations

import sys

import numpy as np
import orjson

from app.backends.select import select_backend
from app.cpu import cpu_limit
from app.engine.loading import check_golden
from app.first_use import locate_package
from app.images.rank import normalise, rank
from app.images.read import check_decoder, read_image
from app.settings import Settings
from app.types import Rows
from models.package import open_package


class OfflineModel:
    """A checked model in this process.

    Args:
        settings: as the server's; those about HTTP and queues do not count here.

    Raises:
        StartupError: the backend cannot run here.
        PackageError: there is no such package, or it is damaged.
        SystemExit: it was to be exported on first use, and that failed or was ended.
    """

    def __init__(self, settings: Settings) -> None:
        check_decoder(settings.decode)
        self._settings = settings
        self._package = open_package(locate_package(settings, _say, relay=False))
        self._package.check_files()
        self._backend = select_backend(settings, self._package, settings.threads or cpu_limit())
        if self._backend.info.runs_package:
            check_golden(self._backend, self._package)

    def classify(self, data: bytes, top_k: int) -> bytes:
        """Return what `/classify` answers to an image, without timings.

        Raises:
            InvalidInput: the image cannot be used.
        """
        logits = self._run(data).logits[0]
        labels, wordnet_ids = self._package.labels, self._package.wordnet_ids
        return self._json({"predictions": rank(logits, labels, top_k, wordnet_ids)})

    def embed(self, data: bytes, normalize: bool) -> bytes:
        """Return what `/embed` answers to an image, without timings.

        Raises:
            InvalidInput: the image cannot be used.
        """
        vector = self._run(data).embedding[0]
        vector = normalise(vector) if normalize else vector
        return self._json({"embedding": vector, "dim": len(vector), "normalized": normalize})

    def _run(self, data: bytes) -> Rows:
        spec = self._package.manifest.input
        pixels = read_image(
            data,
            spec,
            max_pixels=self._settings.max_pixels,
            exif_orientation=self._settings.exif_orientation,
            decode=self._settings.decode,
        )
        return self._backend.run(np.stack([pixels]))

    def _json(self, fields: dict[str, object]) -> bytes:
        manifest = self._package.manifest
        head = {"model": manifest.name, "version": manifest.version}
        return orjson.dumps(head | fields, option=orjson.OPT_SERIALIZE_NUMPY)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
