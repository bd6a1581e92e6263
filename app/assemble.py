"""Settings and a package become a warm EngineCore, in whichever process owns the engine."""

from __future__ import annotations

from dataclasses import dataclass

from app.backends.base import Backend, BackendInfo
from app.backends.select import select_backend
from app.cpu import cpu_limit
from app.engine.base import GoldenCheck, Profile
from app.engine.core import BatchObserver, EngineCore
from app.engine.loading import check_golden, warm_up
from app.engine.timing import ServiceTimes
from app.engine.window import BatchWindow
from app.settings import Settings
from models.package import Package


@dataclass(frozen=True)
class WarmCore:
    """A core that answers, and what is known of it.

    Attributes:
        core: with its threads started; closing it closes the backend.
        backend: what runs the network.
        golden: how this machine's answers differ from torch in float32; None for a fake.
        profile: what warm-up measured.
    """

    core: EngineCore
    backend: BackendInfo
    golden: GoldenCheck | None
    profile: Profile


def open_core(settings: Settings, package: Package, observer: BatchObserver) -> WarmCore:
    """Check the package's files, start the backend, reproduce the golden outputs, warm up.

    Raises:
        StartupError: the backend cannot run here.
        PackageError: the package is damaged, or its numbers are not reproduced.
    """
    package.check_files()
    # Read now, so that a wrong file stops the start and not a request.
    _ = package.labels, package.wordnet_ids
    backend = select_backend(settings, package, settings.threads or cpu_limit())
    try:
        golden = check_golden(backend, package) if backend.info.runs_package else None
        limit = min(settings.max_batch_size, backend.info.max_batch_size or settings.max_batch_size)
        times = warm_up(backend, limit)
    except BaseException:
        backend.close()
        raise
    profile = Profile(times.as_dict(), times.largest_useful(), backend.info.batches_in_flight)
    return start_core(settings, backend, times, profile, golden, observer)


def start_core(
    settings: Settings,
    backend: Backend,
    times: ServiceTimes,
    profile: Profile,
    golden: GoldenCheck | None,
    observer: BatchObserver,
) -> WarmCore:
    """Start a core over a warm backend."""
    window = BatchWindow(profile.max_batch_size, settings.max_wait_ms / 1000)
    core = EngineCore(backend, window, times, settings.queue_budget_ms / 1000, observer)
    return WarmCore(core, backend.info, golden, profile)
