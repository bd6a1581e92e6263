"""Instances are replaced one after the other, under load, and not one request is lost.

As Kubernetes does it with a surge of one: a new instance starts, enters the balancer's set when it
is ready, and only then an old one gets SIGTERM; the next start does not wait for its end. The
balancer hears of the SIGTERM three seconds late.

    start -- ready -- in the set ................. SIGTERM -- 3 s -- out of the set -- exit 0
                                                   unready, serving for 7 s, every reply: close
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.rollout.balancers import Balancer, balance_connections, balance_requests
from tests.rollout.clients import Clients, Kind, measure_capacity
from tests.servers import ServiceProcess, service_process

RESTARTS = 20
LATE_SECONDS = 3.0
"""How long the balancer goes on sending to an instance that has got SIGTERM."""
DRAIN_DELAY_SECONDS, DRAIN_TIMEOUT_SECONDS, GRACE_SECONDS = 7.0, 30.0, 5.0
SETTINGS = {
    "METASERVE_DRAIN_DELAY_S": str(DRAIN_DELAY_SECONDS),
    "METASERVE_DRAIN_TIMEOUT_S": str(DRAIN_TIMEOUT_SECONDS),
}
BUSY_CLIENTS = 16
# They rest between two requests, for less than the drain delay, and must be told to go as well.
RESTING_CLIENTS = [Kind(1.0)] * 4
# They keep nothing: the balancer sends each of their requests to any instance of the set.
FLEETING_CLIENTS = [Kind(0.1, keeps=False)] * 4


@dataclass(frozen=True)
class Life:
    """What became of an instance.

    Attributes:
        answered: its good answers.
        answered_late: those that it gave between SIGTERM and the end of its place in the set.
        exit_code: of its process.
        seconds_to_exit: from SIGTERM.
    """

    answered: int
    answered_late: int
    exit_code: int
    seconds_to_exit: float


class Rollout:
    """Two instances behind a balancer, and those that follow them."""

    def __init__(self, balancer: Balancer, stack: ExitStack, pool: ThreadPoolExecutor) -> None:
        self._balancer = balancer
        self._stack = stack
        self._pool = pool
        self._serving: deque[tuple[ServiceProcess, ExitStack]] = deque()
        self._lives: list[Future[Life]] = []

    def start_one(self) -> None:
        """Start an instance; it is in the set when this returns."""
        own = ExitStack()
        self._stack.push(own)
        service = own.enter_context(service_process(SETTINGS))
        self._balancer.enter(port_of(service))
        self._serving.append((service, own))

    def replace_one(self) -> None:
        """Start an instance, then end the oldest; its end is not waited for."""
        self.start_one()
        self.end_one()

    def end_one(self) -> None:
        """Begin to end the oldest instance."""
        service, own = self._serving.popleft()
        self._lives.append(self._pool.submit(self._end, service, own))

    def lives(self) -> list[Life]:
        """Wait until those that were told to end have ended."""
        return [life.result(timeout=60) for life in self._lives]

    def _end(self, service: ServiceProcess, own: ExitStack) -> Life:
        asked_at = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        threading.Event().wait(LATE_SECONDS)
        self._balancer.leave(port_of(service))
        in_the_set = len(service.lines)
        code = service.wait_exit()
        seconds = time.monotonic() - asked_at
        own.close()  # its log is complete
        lines = service.lines
        told = next(index for index, line in enumerate(lines) if "SIGTERM: unready" in line)
        return Life(good(lines), good(lines[told:in_the_set]), code, seconds)


def good(lines: list[str]) -> int:
    """Count the log lines of requests that were answered well."""
    return sum('"path":"/classify","status":200' in line for line in lines)


def port_of(service: ServiceProcess) -> int:
    return httpx.URL(service.url).port or 0


@contextmanager
def rollout(balancer: Balancer) -> Iterator[Rollout]:
    with ThreadPoolExecutor(RESTARTS + 2) as pool, ExitStack() as stack:
        yield Rollout(balancer, stack, pool)


def roll(balancer: Balancer) -> None:
    """Replace instances twenty times at half load; check that nothing was lost.

    Half of what one instance answers in a closed loop of these clients.
    """
    with rollout(balancer) as instances:
        instances.start_one()
        capacity, measured = measure_capacity(balancer.port)
        instances.start_one()
        busy = [Kind(BUSY_CLIENTS / (capacity / 2))] * BUSY_CLIENTS
        with Clients(balancer.port, [*busy, *RESTING_CLIENTS, *FLEETING_CLIENTS]) as clients:
            began_at = time.monotonic()
            for _ in range(RESTARTS):
                instances.replace_one()
            replaced = instances.lives()
            seconds = time.monotonic() - began_at
        instances.end_one()
        instances.end_one()
        lives = instances.lives()

    late = sum(life.answered_late for life in replaced)
    print(
        f"\n{clients.answered} requests in {seconds:.0f} s, {clients.connections} connections, "
        f"{sum(clients.failures.values())} failures; {late} answered after SIGTERM; one instance "
        f"can do {capacity:.0f} a second; a request was {clients.longest_late_seconds:.2f} s late"
    )
    assert not clients.failures, clients.failures
    assert sum(life.answered for life in lives) == clients.answered + measured, "each went once"
    # Capacity was measured beside one idle instance; here another is always starting.
    assert clients.answered / seconds > 0.3 * capacity / 2, "it was far from half load"
    assert len(replaced) == RESTARTS
    for life in lives:
        assert life.exit_code == 0
        assert life.seconds_to_exit < DRAIN_DELAY_SECONDS + DRAIN_TIMEOUT_SECONDS + GRACE_SECONDS
    for life in replaced:
        assert life.answered > life.answered_late > 0, f"no traffic was moved: {life}"


def test_twenty_restarts_behind_a_balancer_of_connections_lose_nothing() -> None:
    with balance_connections() as balancer:
        roll(balancer)


def test_twenty_restarts_behind_a_balancer_of_requests_lose_nothing(tmp_path: Path) -> None:
    with balance_requests(tmp_path) as balancer:
        roll(balancer)
        assert balancer.count("wretr") == balancer.count("wredis") == 0, "it sent nothing twice"
        assert balancer.count("reuse") > balancer.count("connect"), "it keeps its connections"
