"""The routes that answer images, and the one that says what answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse

from app.http import schemas
from app.http.deps import StateDep, require_api_key
from app.http.hot import HotRoute, ImageRequest, ImageRequestDep
from app.http.inputs import read_inputs
from app.http.pipeline import (
    Answered,
    Outcome,
    Pipeline,
    milliseconds,
    note_outcomes,
)
from app.http.replies import Fields, classify_fields, embed_fields, json_reply, octet_reply

# A reply larger than this is put together in a thread: it would hold up the loop for a millisecond
# or more.
MANY_PREDICTIONS = 500
MANY_VECTORS = 16

router = APIRouter(dependencies=[Depends(require_api_key)])

_BINARY = {"type": "string", "format": "binary"}
_TEXT = {"type": "string", "description": "base64, or a data: URI"}
_IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "array", "items": _BINARY}},
                }
            },
            "application/json": {
                "schema": {
                    "oneOf": [
                        {
                            "type": "object",
                            "required": ["image"],
                            "properties": {"image": _TEXT},
                            "additionalProperties": False,
                        },
                        {
                            "type": "object",
                            "required": ["images"],
                            "properties": {"images": {"type": "array", "items": _TEXT}},
                            "additionalProperties": False,
                        },
                    ]
                }
            },
        },
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Error, "description": description}
    for status, description in {
        400: "`bad_request`: the request is not shaped as this route wants it",
        401: "`unauthenticated`: an API key is needed",
        408: "`receive_timeout`: the body did not arrive in time",
        413: "`payload_too_large`: too many bytes or images",
        415: "`unsupported_format`: no image format that is read here",
        422: "`image_decode_failed`, `image_too_large` or `image_bad_aspect`",
        500: "`inference_failed`: the model failed on this image",
        503: "`overloaded`, `not_ready`, `draining` or `backend_unavailable`; see `Retry-After`",
        504: "`deadline_exceeded`: the caller's or the server's deadline passed",
    }.items()
}


@router.post(
    "/classify",
    response_model=schemas.ClassifyOne | schemas.ClassifySeveral,
    responses=_ERRORS,
    openapi_extra=_IMAGE_BODY,
)
async def classify(
    request: ImageRequestDep, query: Annotated[schemas.ClassifyQuery, Query()]
) -> Response:
    """Name what an image shows: the `top_k` most probable classes."""
    outcomes, several = await _answer(request)
    state, context = request.state, request.context

    def fields(one: Answered) -> Fields:
        return classify_fields(state, one, query.top_k)

    if len(outcomes) * query.top_k > MANY_PREDICTIONS:
        return await state.pool.run(json_reply, state, context, outcomes, several, fields)
    return json_reply(state, context, outcomes, several, fields)


@router.post(
    "/embed",
    response_model=schemas.EmbedOne | schemas.EmbedSeveral,
    responses=_ERRORS | {200: {"content": {"application/octet-stream": {"schema": _BINARY}}}},
    openapi_extra=_IMAGE_BODY,
)
async def embed(
    request: ImageRequestDep, query: Annotated[schemas.EmbedQuery, Query()]
) -> Response:
    """Turn an image into a vector: pooled, after the network's final norm.

    With `Accept: application/octet-stream` the reply is the little-endian float32 bytes alone,
    one vector after the other; an image that cannot be used then fails the whole request.
    """
    outcomes, several = await _answer(request)
    state, context = request.state, request.context
    if _wants_bytes(context.header(b"accept")):
        return octet_reply(state, outcomes, query)

    def fields(one: Answered) -> Fields:
        return embed_fields(one, query)

    if len(outcomes) > MANY_VECTORS:
        return await state.pool.run(json_reply, state, context, outcomes, several, fields)
    return json_reply(state, context, outcomes, several, fields)


HOT = {
    route.path: route
    for route in (
        HotRoute("/classify", classify, schemas.ClassifyQuery),
        HotRoute("/embed", embed, schemas.EmbedQuery),
    )
}
"""The routes that requests reach without FastAPI."""


@router.get(
    "/models",
    response_model=schemas.ModelInfo,
    responses={status: _ERRORS[status] for status in (401, 503)},
)
async def models(state: StateDep) -> Response:
    """Say which package is loaded and what runs it."""
    model, manifest = state.model(), state.package.manifest
    proof, golden, evaluation = manifest.verification, model.golden, manifest.evaluation
    info = schemas.ModelInfo(
        name=manifest.name,
        version=manifest.version,
        variant=manifest.variant,
        input_size=manifest.input.size,
        classes=manifest.classes,
        dim=manifest.embedding_dim,
        labels=state.package.labels is not None,
        backend=model.backend.name,
        precision=model.backend.precision,
        device=model.backend.device,
        runtime=model.backend.runtime,
        max_batch_size=model.profile.max_batch_size,
        batch_ms={
            str(size): milliseconds(seconds)
            for size, seconds in model.profile.batch_seconds.items()
        },
        profile=schemas.EngineProfile.of(model.profile),
        proof=schemas.Proof(
            export_max_abs_logit_difference=proof.max_abs_logit_difference,
            export_max_embedding_cosine_distance=proof.max_embedding_cosine_distance,
            export_top1_agreement=proof.top1_agreement,
            max_abs_logit_difference=golden.max_abs_logit_difference if golden else None,
            batch_dependence=golden.batch_dependence if golden else None,
        ),
        proofs=[
            schemas.BackendProof.model_validate(one, from_attributes=True)
            for one in manifest.proofs
        ],
        evaluation=evaluation.model_dump() if evaluation else None,
    )
    return JSONResponse(info.model_dump())


def _wants_bytes(accept: str) -> bool:
    """Tell whether an Accept header names application/octet-stream, and not to exclude it."""
    for choice in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in choice.split(";"))
        if kind == "application/octet-stream":
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


async def _answer(request: ImageRequest) -> tuple[Sequence[Outcome], bool]:
    """Read a request's images and answer them; tell whether the reply is a list."""
    state, context = request.state, request.context
    pipeline = Pipeline(state, state.model(), context.deadline, context.lag_seconds)
    pipeline.check_admission()  # what cannot be answered need not be sent
    inputs = await read_inputs(request, state.pool)
    context.images = len(inputs.items)
    if inputs.several:
        outcomes = await pipeline.answer_all(inputs.items)
    else:
        outcomes = [await pipeline.answer_one(*inputs.items)]
    note_outcomes(context, outcomes)
    return outcomes, inputs.several
