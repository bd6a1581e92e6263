"""Answering: one batch on one backend becomes one answer a request.

A batch that fails is run again in halves, until the image that breaks it stands alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np

from app.backends.base import Backend
from app.engine.window import Request, answer_together
from app.errors import InferenceFailed, ServiceError
from app.types import Batch, Row, Rows

log = logging.getLogger("metaserve.engine")

FAILED = "the model failed on this image"


class Answering:
    """Runs batches and answers each request exactly once; called from engine threads.

    Args:
        backend: runs the batches.
        clock: absolute seconds; the clock of deadlines.
        done: hears of the size and the seconds of every batch that was run.
        failed: hears of every batch that was not, or not to the end.
    """

    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float],
        done: Callable[[int, float], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._done = done
        self._failed = failed

    def answer(self, batch: list[Request]) -> None:
        """Run a batch and answer those who still wait."""
        try:
            self._answer(batch)
        except Exception:  # a fault of ours: it must cost neither the thread nor an answer
            log.exception("answering a batch failed")
            failure = InferenceFailed(FAILED)
            answer_together((request, failure) for request in batch if not request.gone)

    def _answer(self, requests: list[Request]) -> None:
        """Run a batch and answer it; what fails in company is run again in halves."""
        requests = [request for request in requests if not request.gone]
        if not requests:
            return
        started_at = self._clock()
        try:
            rows = self._run(requests)
        except ServiceError as error:  # the backend speaks for itself, to all
            self._failed(error)
            answer_together((request, error) for request in requests)
            return
        except Exception as error:
            self._failed(error)
            unanswered = requests
        else:
            seconds = self._clock() - started_at
            self._done(len(requests), seconds)
            unanswered = self._reply(requests, rows, started_at, seconds)
        if len(requests) == 1:
            answer_together((request, InferenceFailed(FAILED)) for request in unanswered)
        elif unanswered:
            middle = (len(unanswered) + 1) // 2
            self._answer(unanswered[:middle])
            self._answer(unanswered[middle:])

    def _run(self, requests: list[Request]) -> Rows:
        # Of the latest: until then somebody waits for an answer of this batch.
        deadline = max(request.deadline for request in requests)
        rows = self._backend.run(stack(requests), deadline)
        info = self._backend.info
        widths = {"logits": info.classes, "embedding": info.embedding_dim}
        for name, width in widths.items():
            array, expected = getattr(rows, name), (len(requests), width)
            if array.shape != expected or array.dtype != np.float32:
                raise RuntimeError(
                    f"the backend answered {name} {array.dtype} {array.shape}, "
                    f"not float32 {expected}"
                )
        return rows

    def _reply(
        self, requests: list[Request], rows: Rows, started_at: float, seconds: float
    ) -> list[Request]:
        """Give each request its row; return those whose row is no use."""
        is_finite = finite_rows(rows)
        answers = zip(requests, rows.logits, rows.embedding, is_finite, strict=True)
        answer_together(
            (request, Row(logits, embedding, started_at - request.enqueued_at, seconds))
            for request, logits, embedding, ok in answers
            if ok
        )
        unanswered = [request for request, ok in zip(requests, is_finite, strict=True) if not ok]
        if unanswered:
            self._failed(ArithmeticError(f"{len(unanswered)} rows hold values that are not finite"))
        return unanswered


def stack(requests: list[Request]) -> Batch:
    """Return one batch of the requests' pixels: the engine's one copy, none for one alone.

    Outside of the engine `to_pixels` packs them, and a shared engine's callers put them in a slot.
    """
    if len(requests) == 1:
        return np.ascontiguousarray(requests[0].pixels)[np.newaxis]
    batch = np.empty((len(requests), *requests[0].pixels.shape), np.uint8)
    for index, request in enumerate(requests):  # np.stack takes twice as long for small images
        batch[index] = request.pixels
    return batch


def finite_rows(rows: Rows) -> list[bool]:
    """Tell for each row whether all of its values are finite."""
    # One that is not makes the sum so too, and a sum is one pass without an array of its own.
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(rows.logits.sum()) + float(rows.embedding.sum())
    if math.isfinite(total):
        return [True] * len(rows.logits)
    return [
        bool(np.isfinite(logits).all() and np.isfinite(embedding).all())
        for logits, embedding in zip(rows.logits, rows.embedding, strict=True)
    ]
