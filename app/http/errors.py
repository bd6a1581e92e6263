"""The one table from errors to statuses, and the one JSON shape they are told in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from app.errors import (
    BackendUnavailable,
    BadAspect,
    BadRequest,
    BodyTooLarge,
    DeadlineExceeded,
    Draining,
    ImageTooLarge,
    InferenceFailed,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Overloaded,
    ReceiveTimeout,
    Refused,
    ServiceError,
    Unauthenticated,
    UndecodableImage,
    UnsupportedFormat,
)
from app.http.context import PROBES, context_of
from app.http.state import ServiceState

STATUSES: dict[type[ServiceError], int] = {
    BadRequest: 400,
    Unauthenticated: 401,
    NotFound: 404,
    MethodNotAllowed: 405,
    ReceiveTimeout: 408,
    BodyTooLarge: 413,
    UnsupportedFormat: 415,
    UndecodableImage: 422,
    ImageTooLarge: 422,
    BadAspect: 422,
    InferenceFailed: 500,
    Overloaded: 503,
    NotReady: 503,
    Draining: 503,
    BackendUnavailable: 503,
    DeadlineExceeded: 504,
}

_FRAMEWORK_ERRORS: dict[int, type[ServiceError]] = {404: NotFound, 405: MethodNotAllowed}


def error_object(error: ServiceError) -> dict[str, str]:
    """Return the `{"code", "message"}` that stands under `error` everywhere."""
    return {"code": error.code, "message": error.message}


def error_body(error: ServiceError, request_id: str) -> bytes:
    """Return the JSON of an error reply."""
    return orjson.dumps({"error": error_object(error), "request_id": request_id})


def error_response(
    error: ServiceError,
    request_id: str,
    overload_status: int = 503,
    headers: Mapping[str, str] = {},
) -> Response:
    """Turn an error into its reply; classes outside the table are faults of ours, 500."""
    status = STATUSES.get(type(error), 500)
    sent = dict(headers)
    if isinstance(error, Overloaded):
        status = overload_status
    if isinstance(error, Refused):
        sent["retry-after"] = str(math.ceil(error.retry_after_seconds))
    if isinstance(error, Unauthenticated):
        sent["www-authenticate"] = "Bearer"
    if isinstance(error, ReceiveTimeout):
        sent["connection"] = "close"  # the rest of the body may never come
    return Response(error_body(error, request_id), status, sent, "application/json")


def answer_error(state: ServiceState, scope: Scope, error: ServiceError) -> Response:
    """Note and count what a request is answered with instead of a result; return its reply."""
    context = context_of(scope)
    context.error_code = error.code
    if scope["path"] not in PROBES:  # a service that is not ready refuses nobody's image
        state.metrics.count_error(error)
    return error_response(error, context.request_id, state.settings.overload_status)


def answer_fault(state: ServiceState, scope: Scope, fault: Exception) -> Response:
    """Return the reply to a request that hit a fault of ours; the log says more than it."""
    error: ServiceError
    if isinstance(fault, MemoryError):
        error = Overloaded("the service is short of memory; send the request again later")
    else:
        error = ServiceError("this is a fault of the service; its log says more")
    context = context_of(scope)
    context.error_code = error.code
    return error_response(error, context.request_id, state.settings.overload_status)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the family, and the framework's own, in the one shape."""

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        return answer_error(request.app.state.service, request.scope, error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = _FRAMEWORK_ERRORS.get(error.status_code, BadRequest)
        context = context_of(request.scope)
        context.error_code = kind.code
        message = str(error.detail)
        path = request.scope["raw_path"].decode("ascii")[:200]  # one line, whatever was sent
        if kind is NotFound:
            message = f"there is nothing at {path}; /docs lists the routes"
        elif kind is MethodNotAllowed:
            message = f"{request.method} is not what {path} takes"
        return error_response(kind(message), context.request_id, headers=error.headers or {})

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await on_service_error(request, BadRequest(fault_in_words(error.errors()[0])))

    async def on_fault(request: Request, fault: Exception) -> Response:
        return answer_fault(request.app.state.service, request.scope, fault)

    app.add_exception_handler(Exception, on_fault)  # the middleware sees the fault as well
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)


def fault_in_words(fault: Mapping[str, Any]) -> str:
    """Return one fault of a validation error as a sentence; its place begins with `query`."""
    if fault["type"] == "extra_forbidden":
        return f"there is no parameter {str(fault['loc'][-1])[:80]!r}"
    where = " ".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
