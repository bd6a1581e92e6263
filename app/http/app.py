"""create_app: middleware, routers and handlers around a service's state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from app.http import health, routes
from app.http.body import LimitBody
from app.http.errors import install_error_handlers
from app.http.hot import HotRoutes
from app.http.middleware import ObserveRequests
from app.http.state import ServiceState


def create_app(state: ServiceState) -> ASGIApp:
    """Return the ASGI application of a service.

    The model may be loaded before or after; until `state.loaded` is set, routes that need it
    answer 503 `not_ready`. When the application shuts down it closes the engine.
    """
    # Outside of FastAPI: its own layers would cost the image routes half as much as ours.
    routed = HotRoutes(create_api(state), state, routes.HOT)
    return ObserveRequests(LimitBody(routed, state), state)


def create_api(state: ServiceState) -> FastAPI:
    """Return what documents every route, and answers those that are not hot."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if state.loaded is not None:
            await state.loaded.engine.aclose()
        await asyncio.to_thread(state.pool.close)

    # The documentation's scripts come from the package, not from a CDN: it works without network.
    app = FastAPIOffline(
        title="metaserve",
        version=version("metaserve"),
        summary="MetaFormer vision models behind HTTP: labels and vectors from images.",
        redoc_url=None,
        # A redirect would name http:// behind a proxy that speaks https to the caller.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = state
    install_error_handlers(app)
    app.include_router(routes.router)
    app.include_router(health.router)
    if state.settings.metrics_port is None:
        app.include_router(health.metrics_router)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")

    return app
