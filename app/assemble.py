"""Settings and a package become a warm EngineCore, in whichever process owns the engine."""

from __future__ import annotations

import hashlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass

from app.backends.base import Backend, BackendInfo
from app.backends.select import select_backend
from app.cpu import cpu_limit
from app.engine.base import GoldenCheck, Profile
from app.engine.core import BatchObserver, EngineCore
from app.engine.lanes import Learned, NarrowLanes, learn_lanes, recall
from app.engine.loading import check_golden, warm_up
from app.engine.shelf import ProfileShelf
from app.engine.timing import ServiceTimes, padding_pays_from
from app.engine.window import BatchWindow
from app.settings import Settings
from models.package import Package

log = logging.getLogger("metaserve.engine")


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


def open_core(
    settings: Settings,
    package: Package,
    observer: BatchObserver,
    shelf: ProfileShelf | None = None,
) -> WarmCore:
    """Check the package's files, start the backend, reproduce the golden outputs, warm up.

    Args:
        settings: of this process.
        package: to serve.
        observer: hears of batches.
        shelf: that the processes of the service share; None where there is one.

    Raises:
        StartupError: the backend cannot run here.
        PackageError: the package is damaged, or its numbers are not reproduced.
    """
    package.check_files()
    # Read now, so that a wrong file stops the start and not a request.
    _ = package.labels, package.wordnet_ids
    learned, golden = _warm_backend(settings, package, shelf)
    profile = profile_of(learned)
    log.info("%s", profile)
    return start_core(
        settings, learned.backend, learned.times, profile, golden, observer, learned.narrow
    )


def start_core(
    settings: Settings,
    backend: Backend,
    times: ServiceTimes,
    profile: Profile,
    golden: GoldenCheck | None,
    observer: BatchObserver,
    narrow: NarrowLanes | None = None,
) -> WarmCore:
    """Start a core over a warm backend."""
    budget_seconds = settings.queue_budget_ms / 1000
    window = BatchWindow(
        profile.max_batch_size,
        settings.max_wait_ms / 1000,
        budget_seconds=budget_seconds,
        pads_from=profile.pads_from,
    )
    core = EngineCore(backend, window, times, budget_seconds, observer, narrow=narrow)
    return WarmCore(core, backend.info, golden, profile)


def profile_of(learned: Learned) -> Profile:
    """Put into words and numbers what warm-up found, before serving moves the times."""
    info, times, narrow = learned.backend.info, learned.times, learned.narrow
    return Profile(
        times.as_dict(),
        times.largest_useful(),
        lanes=narrow.lanes if narrow else info.batches_in_flight,
        threads=info.threads,
        lane_batch_seconds=narrow.times.as_dict() if narrow else {},
        lane_batch_size=narrow.max_batch_size if narrow else 0,
        wide_up_to=narrow.wide_up_to if narrow else 0,
        pads_from=padding_pays_from(times.as_dict(), info.prepared_sizes or ()),
    )


def _warm_backend(
    settings: Settings, package: Package, shelf: ProfileShelf | None
) -> tuple[Learned, GoldenCheck | None]:
    """Open the backend, check its answers, and learn its batch sizes and lanes."""
    threads = settings.threads or cpu_limit()

    def open_backend(threads: int) -> tuple[Backend, GoldenCheck | None]:
        backend = select_backend(settings, package, threads)
        try:
            return backend, check_golden(backend, package) if backend.info.runs_package else None
        except BaseException:
            backend.close()
            raise

    def open_narrow() -> Backend:
        return open_backend(1)[0]

    def learn() -> Learned:
        limit = min(settings.max_batch_size, backend.info.max_batch_size or settings.max_batch_size)
        times = warm_up(backend, limit)
        lanes = settings.lanes or threads
        if backend.info.threads in (None, 1) or lanes == 1:
            return Learned(backend, times)
        return learn_lanes(backend, times, open_narrow, lanes, limit)

    key = _key(settings, package)
    known = shelf.take(key) if shelf else None
    with shelf.loading() if shelf else nullcontext():
        backend, golden = open_backend((known and known.threads) or threads)
    try:
        if shelf is None:
            return learn(), golden
        if known is None:
            with shelf.turn():
                known = shelf.take(key)
                if known is None:
                    learned = learn()
                    shelf.put(key, profile_of(learned))
                    return learned, golden
        return recall(known, backend, open_narrow), golden
    except BaseException:
        backend.close()
        raise


def _key(settings: Settings, package: Package) -> str:
    """Name what a profile depends on: the package and the settings."""
    text = package.manifest.key + settings.model_dump_json()
    return hashlib.sha256(text.encode()).hexdigest()[:16]
