"""Probes and metrics: what orchestrators and Prometheus ask."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.errors import BackendUnavailable
from app.http import schemas
from app.http.deps import StateDep

router = APIRouter()
metrics_router = APIRouter()


@router.head("/livez", include_in_schema=False)
@router.get("/livez", response_model=schemas.Health, responses={503: {"model": schemas.Error}})
async def livez(state: StateDep) -> schemas.Health:
    """Fail only when work is pending and nothing has completed for too long."""
    status = state.stalled()
    if status is not None:
        last = f"; its last error: {status.last_error}" if status.last_error else ""
        raise BackendUnavailable(
            f"work is pending and nothing completed for {status.stalled_seconds:.0f} s{last}"
        )
    return schemas.Health(status="alive")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=schemas.Health, responses={503: {"model": schemas.Error}})
async def readyz(state: StateDep) -> schemas.Health:
    """Succeed from the end of warm-up until SIGTERM; overload does not change it."""
    state.check_ready()
    return schemas.Health(status="ready")


@router.head("/startupz", include_in_schema=False)
@router.get("/startupz", response_model=schemas.Health, responses={503: {"model": schemas.Error}})
async def startupz(state: StateDep) -> schemas.Health:
    """Succeed once the model is loaded, proven and warm."""
    state.model()
    return schemas.Health(status="started")


@metrics_router.get("/metrics", response_class=Response)
async def metrics(state: StateDep) -> Response:
    """Return every metric in Prometheus' text format."""
    return Response(state.metrics.render(), media_type=CONTENT_TYPE_LATEST)
