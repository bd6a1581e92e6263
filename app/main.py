"""The composition root: settings -> package -> backend -> engine -> application -> server."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from app.assemble import WarmCore, open_core
from app.backends.base import BackendInfo
from app.cpu import cpu_limit
from app.ending import end_in_spite_of_threads
from app.engine.local import LocalEngine
from app.engine.shelf import ProfileShelf
from app.errors import StartupError
from app.first_use import locate_package
from app.garbage import keep_all_for_good
from app.http.app import create_app
from app.http.pool import CpuPool
from app.http.state import LoadedModel, ServiceState
from app.images.read import check_decoder
from app.listener import bind, url_of, what_to_type
from app.logs import is_text
from app.metrics import Metrics
from app.processes.metrics_port import serve_metrics_apart
from app.server import Server
from app.settings import Settings
from models.package import PackageError, open_package

log = logging.getLogger("metaserve")


def serve_alone(settings: Settings) -> int:
    """Serve from this process until a signal comes; returns the exit code.

    Raises:
        StartupError: what can be known to be wrong before the model is loaded.
        PackageError: there is no such package.
    """
    state = build_state(settings)
    app = create_app(state)
    with serve_metrics_apart(settings, state.metrics.registry):
        listener = bind(settings.host, settings.port)
        url = url_of(listener)
        server = Server(app, state)
        changed = settings.model_dump(mode="json", exclude_defaults=True)
        log.info("listening on %s, loading %s", url, state.package.path, extra={"fields": changed})
        load_and_run(
            server,
            listener,
            lambda: load_model(state),
            lambda: log.info("ready: %s", what_to_type(settings, url)),
        )
    end_in_spite_of_threads()
    return 0


def load_and_run(
    server: Server,
    listener: socket.socket,
    load: Callable[[], LoadedModel],
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal comes, while a thread loads the model.

    Args:
        server: with its state.
        listener: what it accepts from.
        load: loads the model.
        announce: called once it is loaded.

    Raises:
        StartupError: the model cannot be loaded.
    """
    failures: list[str] = []

    def load_then_announce() -> None:
        try:
            loaded = load()
            keep_all_for_good()
            server.state.loaded = loaded
        except (StartupError, PackageError) as error:
            failures.append(str(error))
        except Exception as error:
            log.exception("loading the model hit a fault of ours")
            failures.append(f"the model cannot be loaded: {error}")
        else:
            announce()
            return
        server.stop()

    # A daemon: SIGTERM while a large model loads does not wait for it.
    threading.Thread(target=load_then_announce, name="load", daemon=True).start()
    server.run(sockets=[listener])
    if failures:
        raise StartupError(failures[0])


def build_state(settings: Settings, metrics: Metrics | None = None) -> ServiceState:
    """Find the package and put a service's state together; the model is not loaded yet.

    Raises:
        StartupError: a setting cannot be met.
        PackageError: there is no such package.
        SystemExit: it was to be exported on first use, and that failed or was ended.
    """
    check_decoder(settings.decode)
    relay = not is_text(settings.log_format, sys.stderr)
    package = open_package(locate_package(settings, log.info, relay))
    threads = settings.threads or cpu_limit()
    return ServiceState(
        settings=settings,
        package=package,
        metrics=metrics or Metrics(),
        pool=CpuPool(threads, settings.queue_budget_ms / 1000),
        api_keys=read_api_keys(settings.api_keys_file),
    )


def load_model(state: ServiceState, shelf: ProfileShelf | None = None) -> LoadedModel:
    """Load the package into an engine of this process.

    Args:
        state: of this process.
        shelf: where the processes of a service hand on what they measured.

    Raises:
        StartupError: the backend cannot run here.
        PackageError: the package is damaged, or its numbers are not reproduced.
    """
    observer = state.metrics.batch_observer(state.settings.backend)
    return wire_model(state, open_core(state.settings, state.package, observer, shelf))


def wire_model(state: ServiceState, warm: WarmCore) -> LoadedModel:
    """Put an engine around a core and show it in the metrics."""
    engine = LocalEngine(warm.core)
    state.metrics.watch(engine.status, state.pool.wait_seconds, lambda: state.is_ready)
    show_model(state, warm.backend)
    return LoadedModel(engine, warm.backend, warm.golden, warm.profile)


def show_model(state: ServiceState, info: BackendInfo) -> None:
    """Say in metrics and log what is served, and on what."""
    manifest = state.package.manifest
    labels = manifest.name, manifest.version, manifest.variant
    state.metrics.model_info.labels(*labels, info.name, info.precision, info.device).set(1)
    log.info("%s %s on %s", manifest.name, manifest.version, info.runtime)


def read_api_keys(path: Path | None) -> frozenset[str] | None:
    """Read one key a line; empty lines and lines that start with # do not count.

    Raises:
        StartupError: the file cannot be read, or holds no key.
    """
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"METASERVE_API_KEYS_FILE {path} cannot be read: {error}") from error
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise StartupError(f"METASERVE_API_KEYS_FILE {path} holds no key; put one on a line")
    return keys
