"""Rows -> the bytes of a reply."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
from fastapi import Response

from app.errors import ServiceError
from app.http.context import RequestContext
from app.http.errors import error_object
from app.http.pipeline import Answered, Outcome, milliseconds
from app.http.schemas import EmbedQuery
from app.http.state import ServiceState
from app.images.rank import normalise, rank
from app.types import Vector

Fields = dict[str, Any]

_JSON_TYPE = ((b"content-type", b"application/json"),)


class BytesReply(Response):
    """A reply whose headers are bytes already; nothing of them is encoded or looked for."""

    def __init__(self, body: bytes, headers: Sequence[tuple[bytes, bytes]] = _JSON_TYPE) -> None:
        self.status_code = 200
        self.body = body
        self.background = None
        self.raw_headers = [*headers, (b"content-length", b"%d" % len(body))]


def classify_fields(state: ServiceState, answered: Answered, top_k: int) -> Fields:
    """Rank an image's classes."""
    started_at = time.monotonic()
    package = state.package
    predictions = rank(answered.row.logits, package.labels, top_k, package.wordnet_ids)
    state.metrics.stage_duration["rank"].observe(time.monotonic() - started_at)
    return {"predictions": predictions}


def embed_fields(answered: Answered, query: EmbedQuery) -> Fields:
    """Put an image's vector into the form asked for."""
    vector = embedding_of(answered, query)
    encoded = vector if query.encoding == "float" else base64.b64encode(vector.tobytes()).decode()
    return {"embedding": encoded, "dim": len(vector), "normalized": query.normalize}


def embedding_of(answered: Answered, query: EmbedQuery) -> Vector:
    """Return the vector, float32 little-endian (D,), C-contiguous."""
    vector = answered.row.embedding
    wanted = normalise(vector) if query.normalize else vector
    return np.ascontiguousarray(wanted, "<f4")


def json_reply(
    state: ServiceState,
    context: RequestContext,
    outcomes: Sequence[Outcome],
    several: bool,
    fields_of: Callable[[Answered], Fields],
) -> Response:
    """Answer with one result, or with the list of them."""
    if several:
        for outcome in outcomes:  # an error that is raised is counted where it is handled
            if isinstance(outcome, ServiceError):
                state.metrics.count_error(outcome)
        items = [_item(context, outcome, fields_of) for outcome in outcomes]
        return BytesReply(b'%b"results":%b}' % (state.reply_head, _json(items)))
    (outcome,) = outcomes
    if isinstance(outcome, ServiceError):
        raise outcome
    return BytesReply(state.reply_head + _json(_item(context, outcome, fields_of))[1:])


def octet_reply(state: ServiceState, outcomes: Sequence[Outcome], query: EmbedQuery) -> Response:
    """Answer with the vectors' bytes, one after the other.

    Raises:
        ServiceError: an image could not be answered; there is no place for it among the bytes.
    """
    vectors = []
    for outcome in outcomes:
        if isinstance(outcome, ServiceError):
            raise outcome
        vectors.append(embedding_of(outcome, query).tobytes())
    manifest = state.package.manifest
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"x-model", manifest.name.encode()),
        (b"x-model-version", manifest.version.encode()),
        (b"x-embedding-dim", b"%d" % manifest.embedding_dim),
    ]
    return BytesReply(b"".join(vectors), headers)


def _json(content: object) -> bytes:
    # float32 is written with the fewest digits that give the same float32 back.
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _item(
    context: RequestContext, outcome: Outcome, fields_of: Callable[[Answered], Fields]
) -> Fields:
    if isinstance(outcome, ServiceError):
        return {"error": error_object(outcome)}
    fields = fields_of(outcome)
    timing = {
        "decode": milliseconds(outcome.decode_seconds),
        "queue": milliseconds(outcome.row.queue_seconds),
        "inference": milliseconds(outcome.row.inference_seconds),
        "total": milliseconds(time.monotonic() - context.started_at),
    }
    fields["timing_ms"] = timing
    return fields
