"""`metaserve bench`: what it counts, from when, and what it says."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from app.bench.alarm import Alarm
from app.bench.plan import Plan, build_request, parse_url
from app.bench.recording import Recording, Summary, summarise
from app.bench.run import measure
from app.cli import main
from app.errors import StartupError
from tests.bench.tiny_server import OK, OVERLOADED, Exchange, answer_ok, tiny_server

COMMAND = Path(sysconfig.get_path("scripts")) / "metaserve"


def plan(url: str, **fields: Any) -> Plan:
    """Return a short uniform plan without a warm-up."""
    target = parse_url(url, "classify")
    request = build_request(target, b"an image", {})
    usual: dict[str, Any] = {"rates": (100.0,), "seconds": 1.0, "warmup_seconds": 0.0}
    return Plan(target, (request,), **(usual | {"arrivals": "uniform"} | fields))


def run(one: Plan, processes: int = 1) -> Summary:
    return summarise(measure(one, processes), one, processes)


def test_a_stall_counts_for_every_request_that_was_to_start_in_it() -> None:
    stalled = threading.Event()

    async def stall_once(exchange: Exchange) -> None:
        if exchange.number == 30 and not stalled.is_set():
            stalled.set()
            # The whole server stands still, as one does whose loop is blocked.
            threading.Event().wait(1.0)
        exchange.writer.write(OK)

    with tiny_server(stall_once) as server:
        # One connection: a caller that waits for its reply would have noticed a single slow one.
        (phase,) = run(plan(server.url, seconds=2.0, max_connections=1)).phases
    assert stalled.is_set()
    assert phase.good is not None
    assert phase.good.count == phase.offered == 200
    # Half of the requests were to start during the second; the first of them waited for all of it.
    assert phase.good.percentiles["p99"] > 900
    assert phase.good.percentiles["p90"] > 600
    assert phase.good.percentiles["p50"] < 900


def test_outcomes_are_told_apart_and_retry_after_is_read() -> None:
    async def in_turn(exchange: Exchange) -> None:
        kind = exchange.number % 4
        if kind == 0:
            exchange.writer.write(OVERLOADED)
        elif kind == 1:
            exchange.writer.transport.abort()
        elif kind == 2:
            exchange.writer.write(b"this is no HTTP\r\n\r\n")
        else:
            exchange.writer.write(OK)

    with tiny_server(in_turn) as server:
        summary = run(plan(server.url))
    (phase,) = summary.phases
    expected = {"200": 25, "503 overloaded": 25, "malformed reply": 25, "reset": 25}
    assert phase.outcomes == expected
    assert phase.refused is not None
    assert phase.refused.count == 25
    assert summary.retry_after == {"503 overloaded": {"count": 25, "least": 3, "most": 3}}
    assert phase.goodput == pytest.approx(25, abs=3)


def test_what_is_never_answered_is_a_timeout() -> None:
    async def answer_half(exchange: Exchange) -> None:
        if exchange.number % 2:
            exchange.writer.write(OK)

    with tiny_server(answer_half) as server:
        (phase,) = run(plan(server.url, timeout_seconds=0.3)).phases
    assert phase.outcomes == {"200": 50, "timeout": 50}
    assert phase.latency["timeout"].percentiles["p50"] >= 300


def test_a_server_that_goes_away_is_counted_and_hangs_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    (phase,) = run(plan(url)).phases
    assert phase.outcomes == {"cannot connect": 100}


def test_phases_follow_one_another_and_the_warmup_does_not_count() -> None:
    with tiny_server() as server:
        one = plan(server.url, rates=(50.0, 100.0), seconds=0.5, warmup_seconds=0.5)
        summary = run(one)
        assert len(server.exchanges) == 25 + 25 + 50
    assert [phase.offered for phase in summary.phases] == [25, 50]
    assert summary.good == 75


def test_a_closed_loop_has_as_many_requests_under_way_as_connections() -> None:
    under_way, most = 0, 0
    all_here = asyncio.Event()

    async def answer_together(exchange: Exchange) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == 5:
            all_here.set()
        await asyncio.wait_for(all_here.wait(), 10)
        under_way -= 1
        exchange.writer.write(OK)

    with tiny_server(answer_together) as server:
        (phase,) = run(plan(server.url, rates=(), connections=5, seconds=0.5), processes=2).phases
    assert most == 5
    assert phase.offered > 50
    # The last replies may come after the end.
    assert phase.outcomes == {"200": phase.offered}


def test_processes_share_the_rate_and_their_figures_are_joined() -> None:
    with tiny_server() as server:
        (phase,) = run(plan(server.url), processes=2).phases
        assert len(server.exchanges) == 100
    assert phase.outcomes == {"200": 100}


def test_a_connection_that_the_server_closes_is_replaced() -> None:
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    async def answer_and_close(exchange: Exchange) -> None:
        exchange.writer.write(closing)
        exchange.writer.close()

    with tiny_server(answer_and_close) as server:
        assert run(plan(server.url)).phases[0].outcomes == {"200": 100}
        closed_loop = plan(server.url, rates=(), connections=3, seconds=0.3)
        assert set(run(closed_loop).phases[0].outcomes) == {"200"}


def test_poisson_arrivals_are_as_many_as_asked_for_and_the_same_for_a_seed() -> None:
    one = plan("http://x", rates=(1000.0,), seconds=20.0, arrivals="poisson")
    starts = one.intended_starts()
    assert len(starts) == pytest.approx(20_000, rel=0.05)
    assert starts == sorted(starts) == one.intended_starts()
    assert starts != replace(one, seed=1).intended_starts()
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    short = sum(gap < 0.001 for gap in gaps) / len(gaps)
    assert short == pytest.approx(0.632, abs=0.02)  # 1 - 1/e of exponential gaps


def test_recordings_of_two_generators_are_joined_by_name() -> None:
    one, other = Recording(wall_seconds=1.0), Recording(wall_seconds=1.0)
    one.add(0.1, 0.1, 0.2, "200")
    other.add(0.1, 0.1, 0.3, "503 overloaded")
    other.add(0.2, 0.2, 0.3, "200")
    one.add_retry_after("503 overloaded", 2)
    other.add_retry_after("503 overloaded", 5)
    one.merge(other)
    summary = summarise(one, plan("http://x"))
    assert summary.phases[0].outcomes == {"200": 2, "503 overloaded": 1}
    assert summary.retry_after["503 overloaded"] == {"count": 2, "least": 2, "most": 5}


def test_a_service_that_is_gone_at_the_end_is_said_to_be() -> None:
    run = Recording(wall_seconds=1.0)
    run.add(0.1, 0.1, 0.2, "200")
    run.add(0.3, 0.3, 0.3, "cannot connect")
    summary = summarise(run, plan("http://x"))
    assert summary.stopped_at == 0.2
    assert any("gone after 0.2 s" in note for note in summary.notes)
    run.add(0.4, 0.4, 0.5, "200")  # it came back
    assert summarise(run, plan("http://x")).stopped_at is None


@pytest.mark.parametrize("url", ["http://x:1/", "http://x:1/classify", "http://x:1/embed/"])
def test_a_route_in_the_url_is_not_asked_for_twice(url: str) -> None:
    assert parse_url(url, "embed").path == "/embed"


def test_the_command_sends_what_was_asked_and_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [tmp_path / "a", tmp_path / "b"]
    for image in images:
        image.write_bytes(image.name.encode())
    figures = tmp_path / "figures.json"
    arguments = "--rate 100 --duration 0.5 --warmup 0 --arrivals uniform --route embed"
    arguments += f" --api-key secret --deadline-ms 150 --json {figures} --image"
    with tiny_server() as server:
        assert main(["bench", server.url, *arguments.split(), *map(str, images)]) == 0
        bodies = [one.body for one in server.exchanges]
        head = server.exchanges[0].head
    assert (bodies.count(b"a"), bodies.count(b"b")) == (25, 25)
    assert head.startswith(b"POST /embed HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in head
    assert b"X-Request-Timeout-Ms: 150\r\n" in head
    shown = capsys.readouterr().out
    assert "100 requests/s asked for, 0.5 s, 50 requests" in shown
    assert "of CPU for 1000 requests" in shown
    written = json.loads(figures.read_text())
    assert written["phases"][0]["outcomes"] == {"200": 50}
    assert written["phases"][0]["good"]["percentiles"].keys() == {
        "p50", "p90", "p99", "p99.9", "max",
    }  # fmt: skip


def test_not_one_good_reply_is_exit_code_1() -> None:
    async def refuse(exchange: Exchange) -> None:
        exchange.writer.write(OVERLOADED)

    with tiny_server(refuse) as server:
        assert main(["bench", server.url, "--duration", "0.3", "--warmup", "0"]) == 1


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:x", "http://[::1"])
def test_an_unusable_url_is_named_in_a_sentence(url: str) -> None:
    with pytest.raises(StartupError, match=r"is no URL of a service; give one like"):
        parse_url(url, "classify")


def test_nobody_at_the_url_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["bench", f"http://127.0.0.1:{port}"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"metaserve: nothing answers at 127.0.0.1:{port} (Connection refused)")
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["--rate", "0"], ["--rate", "x"], ["--duration", "nan"], ["--connections", "0"]]
)
def test_arguments_out_of_range_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "http://x", *arguments])
    assert stopped.value.code == 2


def test_ctrl_c_shows_what_was_measured() -> None:
    seen = threading.Event()

    async def answer_and_tell(exchange: Exchange) -> None:
        await answer_ok(exchange)
        if exchange.number == 30:
            seen.set()

    with tiny_server(answer_and_tell) as server:
        command = [str(COMMAND), "bench", server.url, "--duration", "600", "--warmup", "0"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert seen.wait(30), "30 requests did not come within 30 s"
        process.send_signal(signal.SIGINT)
        shown, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "50 requests/s asked for" in shown
    assert "  200 " in shown
    assert said == ""


def test_the_command_line_imports_no_generator_before_it_is_asked_to() -> None:
    script = "import sys, app.cli; print('httptools' in sys.modules, 'uvloop' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("has_timer", [True, False])
def test_an_alarm_rings_after_its_time_and_once(
    has_timer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_timer:
        monkeypatch.setattr("app.bench.alarm._timer_fd", lambda: None)

    async def ring() -> list[float]:
        loop, rang, done = asyncio.get_running_loop(), list[float](), asyncio.Event()

        def note() -> None:
            rang.append(time.monotonic())
            done.set()

        alarm = Alarm(loop, note)
        due = time.monotonic() + 0.05
        alarm.set(due)
        await asyncio.wait_for(done.wait(), 10)
        alarm.set(time.monotonic() - 1)  # long past: at once
        done.clear()
        await asyncio.wait_for(done.wait(), 10)
        alarm.close()
        return [when - due for when in rang]

    first, second = asyncio.run(ring())
    assert 0 <= first <= second
