"""Callers of a service of several processes, who know which process serves them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from examples.digits.data import held_out
from tests.servers import WAIT_SECONDS, ServiceProcess, wait_until

PNG, _ = held_out()[0]
SHAPES = {
    "one": {},
    "own": {"METASERVE_WORKERS": "2", "METASERVE_ENGINE": "own"},
    "shared": {"METASERVE_WORKERS": "2", "METASERVE_ENGINE": "shared"},
}
"""Settings of every shape that a service may have."""


def processes(service: ServiceProcess) -> dict[str, int]:
    """Return name -> process id of the supervisor's children."""
    return processes_of(service.process.pid)


def processes_of(parent: int) -> dict[str, int]:
    """Return name -> process id of a supervisor's children."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            seat = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-2]
            found[json.loads(seat)["name"]] = int(pid)
        except (FileNotFoundError, ProcessLookupError, IndexError, ValueError, KeyError, TypeError):
            continue  # it is just beginning or ending
    return found


def lives(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Caller:
    """One connection that is kept open."""

    def __init__(self, service: ServiceProcess) -> None:
        url = httpx.URL(service.url)
        self._service = service
        self._connection = http.client.HTTPConnection(url.host, url.port, timeout=WAIT_SECONDS)
        self._connection.connect()

    def get(self, path: str) -> tuple[int, Any]:
        self._connection.request("GET", path)
        return self._answer()

    def classify(self, *, request_id: str = "", **headers: str) -> tuple[int, Any]:
        headers = headers | ({"X-Request-ID": request_id} if request_id else {})
        self._connection.request("POST", "/classify", PNG, headers)
        return self._answer()

    def send_images(self, count: int) -> None:
        """Begin a request with several images; `answer` waits for it."""
        files = [("image", (f"{i}.png", PNG, "image/png")) for i in range(count)]
        request = httpx.Request("POST", self._service.url, files=files)
        self._connection.request("POST", "/classify", request.read(), dict(request.headers))

    def answer(self) -> tuple[int, Any]:
        return self._answer()

    def served_by(self) -> str:
        """Return the name of the process at the other end."""
        request_id = uuid.uuid4().hex
        assert self.classify(request_id=request_id)[0] == 200

        def names() -> list[str]:
            records = self._service.records
            return [one["process"] for one in records if one.get("request_id") == request_id]

        wait_until(lambda: bool(names()), "the request is logged")
        return names()[0]

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric as this caller's process shows it; the sum over other labels."""
        self._connection.request("GET", "/metrics")
        text = self._connection.getresponse().read().decode()
        return sample(text, name, **labels)

    def close(self) -> None:
        self._connection.close()

    def _answer(self) -> tuple[int, Any]:
        response = self._connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if body else None


def sample(text: str, name: str, **labels: str) -> float:
    """Return a metric's value, the sum over labels that are not given."""
    return sum(
        one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    )


@contextmanager
def caller_of_each(service: ServiceProcess) -> Iterator[dict[str, Caller]]:
    """Give worker's name -> a connection to it."""
    wanted = {name for name in processes(service) if name.startswith("worker")}
    found: dict[str, Caller] = {}
    all_callers = []
    try:
        for _ in range(40):
            caller = Caller(service)
            all_callers.append(caller)
            found.setdefault(caller.served_by(), caller)
            if set(found) == wanted:
                break
        assert set(found) == wanted, f"40 connections reached {set(found)} only"
        yield found
    finally:
        for caller in all_callers:
            caller.close()


class Load:
    """Threads that ask again and again, each on a connection of its own, and count the answers."""

    def __init__(self, service: ServiceProcess, threads: int = 4) -> None:
        self.answers: Counter[str] = Counter()
        self._service = service
        self._changed = threading.Condition()
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for_more(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), f"a caller hangs; so far: {self.answers}"

    def wait_for_more(self, count: int) -> None:
        """Return once so many more good answers have come."""
        with self._changed:
            wanted = self.answers["200"] + count
            came = self._changed.wait_for(lambda: self.answers["200"] >= wanted, WAIT_SECONDS)
            assert came, f"no more good answers within {WAIT_SECONDS:g} s: {self.answers}"

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                caller = Caller(self._service)
                while not self._ends.is_set():
                    self._note(self._ask(caller))
            except (ConnectionError, http.client.HTTPException):
                self._note("reset")
            except TimeoutError:
                self._note("hang")
            finally:
                caller.close()

    def _ask(self, caller: Caller) -> str:
        status, body = caller.classify()
        return "200" if status == 200 else f"{status} {body['error']['code']}"

    def _note(self, answer: str) -> None:
        with self._changed:
            self.answers[answer] += 1
            self._changed.notify_all()


def reconnect_through_sigterm(service: ServiceProcess, callers: int = 8) -> Counter[str]:
    """Ask again and again, on a new connection each time, until the port is closed.

    Returns how often each answer came; the refusals at the end are checked and left out.
    """
    answers: Counter[str] = Counter()

    def call_until_refused() -> None:
        while True:
            try:
                caller = Caller(service)
            except ConnectionRefusedError:
                answers["refused"] += 1
                return
            try:
                answers[str(caller.classify()[0])] += 1
            except OSError as error:
                answers[type(error).__name__] += 1
            finally:
                caller.close()

    threads = [threading.Thread(target=call_until_refused, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    wait_until(lambda: answers["200"] >= 20, "callers are answered")
    send(service.process.pid, signal.SIGTERM)
    assert service.wait_exit() == 0
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert answers.pop("refused") == callers, answers
    return answers


def send(pid: int, number: int) -> None:
    """Send a signal to a process."""
    os.kill(pid, number)
