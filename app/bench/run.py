"""A run in one process or several, each with its share of the load."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait

from app.bench.generator import Progress, generate
from app.bench.plan import Plan, Target
from app.bench.recording import Recording
from app.errors import StartupError

# Several begin together: importing numpy and uvloop in fresh interpreters takes half of this.
START_SECONDS = 1.0


def check_target(target: Target) -> None:
    """Open a connection and close it.

    Raises:
        StartupError: nothing listens there.
    """
    try:
        socket.create_connection((target.host, target.port), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise StartupError(
            f"nothing answers at {target.host}:{target.port} ({reason}); check the URL, or start "
            "the service with `metaserve serve`"
        ) from error


def measure(plan: Plan, processes: int = 1, progress: Progress | None = None) -> Recording:
    """Run a plan in processes of its own and return what they saw together.

    They share nothing with the caller, whose other threads cannot delay them. SIGINT ends the run
    early; what was measured until then is returned, and `Recording.wall_seconds` tells.

    Args:
        plan: the whole load.
        processes: how many share it.
        progress: told about once a second.
    """
    context = multiprocessing.get_context("spawn")
    start_at = None if processes == 1 else time.monotonic() + START_SECONDS
    pipes: list[Pipe] = []
    children = []
    for index in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        share = _share(plan, index, processes)
        child = context.Process(target=_generate, args=(share, start_at, theirs), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)

    def interrupt() -> None:
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, signal.SIGINT)

    try:
        return _collect(pipes, progress, interrupt)
    except BaseException:
        interrupt()  # a signal that became another exception
        raise
    finally:
        for child in children:
            child.join(5)
            child.kill()


def _collect(
    pipes: list[Pipe], progress: Progress | None, interrupt: Callable[[], None]
) -> Recording:
    """Read the generators' messages: (seconds, ended, good) while they run, then a Recording."""
    whole = Recording()
    tallies = dict.fromkeys(pipes, (0.0, 0, 0))
    left = list(pipes)
    while left:
        try:
            for pipe in wait(left):
                assert isinstance(pipe, Pipe)
                try:
                    message = pipe.recv()
                except EOFError:
                    raise RuntimeError("a load generator ended without a word") from None
                if isinstance(message, Recording):
                    whole.merge(message)
                    left.remove(pipe)
                else:
                    tallies[pipe] = message
                    if progress is not None:
                        _, ended, good = map(sum, zip(*tallies.values(), strict=True))
                        progress(message[0], int(ended), int(good))
        except KeyboardInterrupt:
            interrupt()
    return whole


def _generate(plan: Plan, start_at: float | None, pipe: Pipe) -> None:
    last = 0.0

    def tell(seconds: float, ended: int, good: int) -> None:
        nonlocal last
        if seconds - last >= 0.5:
            last = seconds
            pipe.send((seconds, ended, good))

    pipe.send(generate(plan, start_at, tell))
    pipe.close()


def _share(plan: Plan, index: int, processes: int) -> Plan:
    """Return a process's part of a plan: the rates, or the connections, divided."""
    connections = len(range(index, plan.connections, processes))
    first = index % len(plan.requests)
    return replace(
        plan,
        rates=tuple(rate / processes for rate in plan.rates),
        connections=connections,
        max_connections=max(1, plan.max_connections // processes),
        seed=plan.seed * 1009 + index,
        requests=plan.requests[first:] + plan.requests[:first],
    )
