"""Every Prometheus metric: its name, help and buckets; nothing else registers one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.engine.base import EngineStatus
from app.errors import (
    BackendUnavailable,
    BadAspect,
    Draining,
    ImageTooLarge,
    NotReady,
    Overloaded,
    Refused,
    ServiceError,
    UndecodableImage,
    UnsupportedFormat,
)

SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
IDLE = EngineStatus(0, 0, 0, 0.0, 0.0, None)
STAGES = ("decode", "queue", "inference", "rank")
REFUSALS = (Overloaded, NotReady, Draining, BackendUnavailable)
REJECTIONS = (UnsupportedFormat, UndecodableImage, ImageTooLarge, BadAspect)


class ServiceGauges(Collector):
    """How the service and its engine fare, asked when somebody looks.

    Args:
        status: of the engines of the whole service.
        is_ready: whether `/readyz` succeeds.
    """

    def __init__(self, status: Callable[[], EngineStatus], is_ready: Callable[[], bool]) -> None:
        self._status = status
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        """Return the gauges."""
        status = self._status()
        yield GaugeMetricFamily(
            "metaserve_ready", "1 while /readyz succeeds, 0 otherwise.", float(self._is_ready())
        )
        yield GaugeMetricFamily(
            "metaserve_stalled_seconds",
            "How long work has been pending without anything completing; /livez looks at it.",
            status.stalled_seconds,
        )
        yield GaugeMetricFamily(
            "metaserve_queue_depth", "Images waiting for a batch.", status.queue_depth
        )
        yield GaugeMetricFamily(
            "metaserve_queue_wait_estimate_seconds",
            "How long an image that came now would wait, for a decoding thread and for its batch.",
            status.predicted_wait_seconds,
        )
        yield GaugeMetricFamily(
            "metaserve_inflight_batches",
            "Batches the backend is running.",
            status.running_batches,
        )


@dataclass(frozen=True)
class BatchMetrics:
    """Hears of every batch of one backend."""

    size: Histogram
    errors: Counter

    def batch_done(self, size: int) -> None:
        """A batch was answered."""
        self.size.observe(size)

    def batch_failed(self) -> None:
        """The backend failed on a batch."""
        self.errors.inc()


class Metrics:
    """The service's metrics in a registry of their own.

    Args:
        whole: shows what all processes of the service have put into their files, this one too; None
            where there is one process, which keeps its values in memory.
    """

    def __init__(self, whole: CollectorRegistry | None = None) -> None:
        # A second time series for each metric, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._status: Callable[[], EngineStatus] = lambda: IDLE
        self._is_ready: Callable[[], bool] = lambda: False
        self.registry = whole or _registry_of_one_process()
        registry = None if whole else self.registry
        if registry is not None:
            registry.register(ServiceGauges(lambda: self._status(), lambda: self._is_ready()))
        self.request_duration = Histogram(
            "metaserve_request_duration_seconds",
            "Time from a request's head to the end of its reply, by route template and status.",
            ("route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self._requests: dict[tuple[str, int], Histogram] = {}
        stage_duration = Histogram(
            "metaserve_stage_duration_seconds",
            "Time an image spends in each stage.",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        # Resolved once: a label lookup costs more than the observation.
        self.stage_duration = {stage: stage_duration.labels(stage) for stage in STAGES}
        self.batch_size = Histogram(
            "metaserve_batch_size",
            "Images in each batch the backend ran.",
            buckets=BATCH_SIZES,
            registry=registry,
        )
        self.requests_refused = Counter(
            "metaserve_requests_refused_total",
            "Requests, or images among several, refused for now, by error code.",
            ("reason",),
            registry=registry,
        )
        # There from the start: a rate begins to count only at a series' second sample.
        for refusal in REFUSALS:
            self.requests_refused.labels(refusal.code)
        self.requests_cancelled = Counter(
            "metaserve_requests_cancelled_total",
            "Requests whose caller left before the reply.",
            registry=registry,
        )
        self.images_rejected = Counter(
            "metaserve_images_rejected_total",
            "Images that could not be used, by error code.",
            ("code",),
            registry=registry,
        )
        for rejection in REJECTIONS:
            self.images_rejected.labels(rejection.code)
        self.backend_errors = Counter(
            "metaserve_backend_errors_total",
            "Batches the backend failed on, by backend.",
            ("backend",),
            registry=registry,
        )
        self.model_info = Gauge(
            "metaserve_model_info",
            "The loaded model; always 1.",
            ("name", "version", "variant", "backend", "precision", "device"),
            multiprocess_mode="max",
            registry=registry,
        )

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request under its route template and status."""
        child = self._requests.get((route, status))
        if child is None:  # a lookup by labels costs more than the observation
            child = self.request_duration.labels(route, str(status))
            self._requests[route, status] = child
        child.observe(seconds)

    def count_error(self, error: ServiceError) -> None:
        """Count a refusal, or an image that could not be used."""
        if isinstance(error, Refused):
            self.requests_refused.labels(error.code).inc()
        elif isinstance(error, REJECTIONS):
            self.images_rejected.labels(error.code).inc()

    def watch(
        self,
        status: Callable[[], EngineStatus],
        decode_wait_seconds: Callable[[], float],
        is_ready: Callable[[], bool],
    ) -> None:
        """Read the gauges when they are scraped, at no cost to requests."""
        self._status = lambda: with_wait(status(), decode_wait_seconds())
        self._is_ready = is_ready

    def batch_observer(self, backend: str) -> BatchMetrics:
        """Return what tells these metrics of a backend's batches."""
        return BatchMetrics(self.batch_size, self.backend_errors.labels(backend))

    def render(self) -> bytes:
        """Return the text exposition format."""
        return generate_latest(self.registry)


def _registry_of_one_process() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def with_wait(status: EngineStatus, seconds: float) -> EngineStatus:
    """Return a status whose predicted wait holds that for a decoding thread too."""
    return replace(status, predicted_wait_seconds=status.predicted_wait_seconds + seconds)
