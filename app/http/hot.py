"""HotRoutes: the routes that answer images, straight from the server to their functions.

FastAPI documents these routes, refuses other methods, and would answer them too, with the same
functions and at three times the cost. Here a request meets neither its router nor its dependencies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Depends, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import BadRequest, ServiceError
from app.http.context import RequestContext, context_of
from app.http.deps import StateDep, check_api_key, set_deadline
from app.http.errors import answer_error, fault_in_words
from app.http.state import ServiceState

Q = TypeVar("Q", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request with images in its body, which nobody has read; its deadline is known.

    Attributes:
        state: the service's.
        context: the request's.
        scope: as the server made it.
        receive: gives the body.
    """

    state: ServiceState
    context: RequestContext
    scope: Scope
    receive: Receive


async def image_request(request: Request, state: StateDep) -> ImageRequest:
    """Make of FastAPI's request what the functions of these routes take."""
    context = context_of(request.scope)
    set_deadline(state, context)
    return ImageRequest(state, context, request.scope, request.receive)


ImageRequestDep = Annotated[ImageRequest, Depends(image_request)]


@dataclass(frozen=True)
class HotRoute:
    """One of the routes.

    Attributes:
        path: where it is; also its label in metrics.
        answer: the function, as it is documented.
        query: what its parameters are.
    """

    path: str
    answer: Callable[[ImageRequest, Any], Awaitable[Response]]
    query: type[BaseModel]


class HotRoutes:
    """Answers POST requests to some paths; all others go on."""

    def __init__(self, app: ASGIApp, state: ServiceState, routes: Mapping[str, HotRoute]) -> None:
        self._app = app
        self._state = state
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        route = self._routes.get(scope["path"]) if is_post else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        try:
            reply = await self._answer(route, scope, receive)
        except ServiceError as error:
            reply = answer_error(self._state, scope, error)
        await reply(scope, receive, send)

    async def _answer(self, route: HotRoute, scope: Scope, receive: Receive) -> Response:
        state, context = self._state, context_of(scope)
        check_api_key(state, context)
        set_deadline(state, context)
        query = read_query(route.query, scope["query_string"])
        return await route.answer(ImageRequest(state, context, scope, receive), query)


@lru_cache(maxsize=64)
def read_query(model: type[Q], query_string: bytes) -> Q:
    """Read the parameters of a query; of several with one name the last counts.

    Raises:
        BadRequest: as FastAPI would say it.
    """
    given = dict(parse_qsl(query_string.decode("latin-1"), keep_blank_values=True))
    try:
        return model.model_validate(given)
    except ValidationError as error:
        fault = error.errors()[0]
        raise BadRequest(fault_in_words({**fault, "loc": ("query", *fault["loc"])})) from None
