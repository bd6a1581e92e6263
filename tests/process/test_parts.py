"""The parts of a service of several processes, each alone."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from app.engine.base import EngineStatus
from app.engine.shared.board import Board
from app.errors import StartupError
from app.logs import whole_lines
from app.processes import run_child as children
from app.processes import shape as shapes
from app.processes.acceptor import HOLD_BACK_SECONDS, Acceptor, lead_beyond_chance
from app.processes.child import Child, delay_seconds, in_words
from app.processes.metric_files import FIRST_BYTES, ReservedDict
from app.processes.metrics_whole import children_seconds, whole_status
from app.processes.roster import Roster
from app.processes.runtime_folder import LOCK, UNLOCKED_SECONDS, runtime_folder
from app.processes.seat import Seat
from app.processes.shape import choose_shape
from app.settings import Settings, as_environment, load_settings
from models.gpu import Gpu, NoGpuError
from tests.engine.processes import open_descriptors
from tests.servers import WAIT_SECONDS, wait_until


def gpu() -> Gpu:
    return Gpu("NVIDIA L4", "8.9")


def no_gpu() -> Gpu:
    raise NoGpuError("there is none here")


@pytest.mark.parametrize(
    ("fields", "find", "installed", "shared"),
    [
        ({}, gpu, {"onnxruntime-gpu": "1.31"}, True),
        ({}, no_gpu, {"onnxruntime-gpu": "1.31"}, False),
        ({}, gpu, {"onnxruntime": "1.31"}, False),
        ({"device": "cpu"}, gpu, {"onnxruntime-gpu": "1.31"}, False),
        ({"ort_provider": "cpu"}, gpu, {"onnxruntime-gpu": "1.31"}, False),
        ({"backend": "torch"}, gpu, {"torch": "2.13.0"}, True),
        ({"backend": "torch"}, gpu, {"torch": "2.13.0+cpu"}, False),
        ({"backend": "torch", "device": "cpu"}, gpu, {"torch": "2.13.0"}, False),
        ({"backend": "torch"}, gpu, {}, False),
        ({"backend": "triton"}, no_gpu, {}, True),
        ({"backend": "tensorrt"}, no_gpu, {}, True),
        ({"backend": "fake"}, gpu, {}, False),
        ({"backend": "fake", "engine": "shared"}, no_gpu, {}, True),
        ({"backend": "triton", "engine": "own"}, no_gpu, {}, False),
    ],
)
def test_workers_share_an_engine_where_they_would_share_a_device(
    fields: dict[str, Any],
    find: Any,
    installed: dict[str, str],
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shapes, "_installed", installed.get)

    shape = choose_shape(Settings(**fields, workers=2), find)

    assert shape.shares_engine is shared
    assert not shape.is_one_process


@pytest.mark.parametrize(
    ("threads", "workers", "share"), [(8, 2, 4), (7, 2, 3), (2, 2, 1), (1, 4, 1)]
)
def test_workers_divide_the_threads_and_have_one_at_least(
    threads: int, workers: int, share: int
) -> None:
    fields: dict[str, Any] = {"threads": threads, "workers": workers, "backend": "fake"}
    shape = choose_shape(Settings(**fields), no_gpu)
    assert (shape.worker_threads, shape.engine_threads) == (share, threads)


def test_one_worker_is_one_process_even_with_a_device() -> None:
    fields: dict[str, Any] = {"backend": "triton"}
    assert choose_shape(Settings(**fields), gpu).is_one_process


def test_settings_cross_to_a_child_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {
        "model": "/a/package",
        "model_store": "/a store",
        "cuda_graphs": False,
        "max_wait_ms": 2.5,
        "overload_status": 429,
        "metrics_port": 9100,
        "workers": 3,
        "engine": "shared",
    }
    settings = Settings(**fields)

    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)

    assert load_settings() == settings


def test_a_seat_crosses_as_one_argument() -> None:
    seat = Seat("engine", 2, 2, True, "/tmp/x y", 3, 4, 5, 6, "a key")
    assert Seat.parse(seat.as_argument()) == seat
    assert (seat.rows, seat.engine_path) == (3, "/tmp/x y/engine")


def test_restarts_come_at_once_and_then_later_and_later() -> None:
    assert [delay_seconds(deaths) for deaths in range(8)] == [0, 0.5, 1, 2, 4, 8, 10, 10]
    assert delay_seconds(10_000) == 10


def test_an_end_is_told_in_words() -> None:
    assert in_words(2) == "ended with exit code 2"
    assert in_words(-9) == "was ended by SIGKILL"


def test_a_child_that_cannot_import_its_module_is_seen_to_end() -> None:
    child = Child(Seat("worker-0", 0, 1, False, "", 0, 0, 0, 0, ""), "app.nosuch", {}, ())
    child.start()
    codes: list[int] = []

    def ended() -> bool:
        code = child.poll()
        codes.extend([] if code is None else [code])
        return bool(codes)

    wait_until(ended, "the child ends")

    assert codes == [1]
    assert (child.pid, child.is_ready, child.forget()) == (None, False, 0.0)
    assert child.forget() == 0.5


def test_a_child_that_cannot_be_started_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_process_ids(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "no process ids are left")

    monkeypatch.setattr(subprocess, "Popen", no_process_ids)
    child = Child(Seat("worker-0", 0, 1, False, "", 0, 0, 0, 0, ""), "app.nosuch", {}, ())
    before = open_descriptors()

    for _ in range(3):
        with pytest.raises(BlockingIOError):
            child.start()
        child.forget()

    assert open_descriptors() == before
    assert child.pid is None


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (StartupError("there is no GPU"), 2, "there is no GPU"),
        (KeyError("rows"), 1, "worker-0 hit a fault of ours: KeyError('rows')"),
    ],
)
def test_a_child_that_cannot_serve_says_why_whosever_fault_it_is(
    error: Exception, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(settings: Settings, seat: Seat) -> None:
        raise error

    monkeypatch.setattr(children, "configure_logs", lambda *_: None)
    reading, writing = os.pipe()
    seat = Seat("worker-0", 0, 1, False, "", 0, 0, 0, 0, "", report=writing)

    assert children.run_child(seat.as_argument(), serve) == code

    assert os.read(reading, 4096).decode() == f"failed {sentence}\n"
    os.close(reading)
    os.close(writing)


def test_a_runtime_folder_is_private_and_goes_at_the_end(tmp_path: Path) -> None:
    with runtime_folder([str(tmp_path)]) as folder:
        assert os.stat(folder.path).st_mode & 0o777 == 0o700
        Path(folder.path, "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_folder_is_made_in_the_next_place_where_one_cannot_be(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with runtime_folder(["/nowhere", str(long), "/dev/shm"]) as folder:
        assert folder.path.startswith("/dev/shm/")
    with pytest.raises(StartupError, match="set TMPDIR"), runtime_folder(["/nowhere"]):
        pass


def test_what_a_killed_service_left_goes_with_the_next_start_once_no_process_uses_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="metaserve.supervisor")
    script = (
        "import subprocess, sys, time\n"
        "from app.processes.runtime_folder import runtime_folder\n"
        "with runtime_folder([sys.argv[1]]) as folder:\n"
        "    subprocess.Popen(['cat'], pass_fds=[folder.lock])\n"
        "    print(folder.path, flush=True)\n"
        "    time.sleep(3600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as service:
        assert service.stdin is not None
        assert service.stdout is not None
        left = Path(service.stdout.readline().strip())
        service.kill()
        service.wait()
        with runtime_folder([str(tmp_path)]) as folder:
            assert Path(folder.path) != left
            assert left.exists(), "its worker lives: `cat` holds the lock"
        service.stdin.close()
        with (left / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits until `cat` is gone
    with runtime_folder([str(tmp_path)]) as folder:
        assert [str(path) for path in tmp_path.iterdir()] == [folder.path]
    assert f"removed {left}, which a killed service had left" in caplog.messages


def test_what_is_no_runtime_folder_of_a_service_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metaserve.being-made").mkdir()
    (tmp_path / "metaserve.file").touch()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "lock").touch()
    (tmp_path / "metaserve.link").symlink_to(tmp_path / "others")
    before = sorted(tmp_path.rglob("*"))
    with runtime_folder([str(tmp_path)]):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_what_another_users_service_left_is_not_ours_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "metaserve.left"
    left.mkdir()
    (left / LOCK).touch()
    with monkeypatch.context() as patch:
        patch.setattr("app.processes.runtime_folder.os.geteuid", lambda: os.getuid() + 1)
        with runtime_folder([str(tmp_path)]):
            assert left.exists()
    with runtime_folder([str(tmp_path)]):
        assert not left.exists()


def test_a_folder_whose_service_was_killed_while_it_made_it_goes_after_an_hour(
    tmp_path: Path,
) -> None:
    left = tmp_path / "metaserve.half-made"
    left.mkdir()
    (left / "lock.new").touch()
    long_ago = time.time() - UNLOCKED_SECONDS - 60
    os.utime(left, (long_ago, long_ago))
    with runtime_folder([str(tmp_path)]) as folder:
        assert [str(path) for path in tmp_path.iterdir()] == [folder.path]


def test_a_place_without_locks_is_passed_over_and_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("app.processes.runtime_folder.fcntl.flock", refuse)
    with pytest.raises(StartupError, match="set TMPDIR"), runtime_folder([str(tmp_path)]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_metrics_on_a_full_disk_stay_in_memory_and_end_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = ReservedDict(str(tmp_path / "counter_worker-0.db"))
    kept.write_value("early", 1.0, 0.0)
    assert os.stat(tmp_path / "counter_worker-0.db").st_blocks * 512 >= FIRST_BYTES
    monkeypatch.setattr(os, "posix_fallocate", full)
    for number in range(3):
        kept.write_value(f"{number}" * 30_000, float(number), 0.0)
    kept.write_value("early", 2.0, 0.0)
    assert kept.read_value("early") == (2.0, 0.0)
    assert kept.read_value("2" * 30_000) == (2.0, 0.0)
    kept.close()  # type: ignore[no-untyped-call]
    with pytest.raises(StartupError, match="is full"):
        ReservedDict(str(tmp_path / "counter_worker-1.db"))


def test_a_roster_shows_another_process_who_there_is() -> None:
    with closing(Roster.create(workers=2, rows=3)) as roster:
        roster.enter(0, 111)
        roster.enter(1, 222)
        roster.enter(2, 333)
        roster.leave(1)
        roster.count_restart(1)
        roster.count_restart(1)
        roster.count_connections(0, 7)
        script = f"""
from app.processes.roster import Roster
roster = Roster({roster.descriptor}, 2, 3)
print(roster.pids(), roster.restarts(), roster.connections(0), roster.connections(1))
"""
        done = subprocess.run(
            [sys.executable, "-c", script],
            pass_fds=[roster.descriptor],
            capture_output=True,
            text=True,
            timeout=60,
        )
    pids = {"supervisor": [os.getpid()], "worker": [111], "engine": [333]}
    assert done.stdout.strip() == f"{pids} {{'worker': 2, 'engine': 0}} 7 0", done.stderr


def test_the_whole_is_the_sum_of_queues_and_the_longest_of_waits() -> None:
    with closing(Board.create(3)) as board:
        board.publish(0, EngineStatus(1, 4, 1, 0.5, 0.0, None))
        board.publish(1, EngineStatus(2, 8, 2, 0.25, 3.0, "stuck"))

        whole = whole_status(board)

    assert (whole.queue_depth, whole.in_flight, whole.running_batches) == (3, 12, 3)
    assert (whole.predicted_wait_seconds, whole.last_error) == (0.5, "stuck")
    assert whole.stalled_seconds >= 3.0


def test_cpu_time_of_ended_children_is_known() -> None:
    before = children_seconds(os.getpid())
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True, timeout=60)
    assert children_seconds(os.getpid()) > before
    assert children_seconds(2**22 + 1) == 0.0


class Taken(asyncio.Protocol):
    """A connection that was accepted."""


def test_an_acceptor_holds_back_while_ahead_and_takes_what_is_left() -> None:
    async def connect_while(lead: int, may_accept: bool) -> list[float]:
        loop = asyncio.get_running_loop()
        taken: list[float] = []
        event = asyncio.Event()

        def protocol() -> asyncio.Protocol:
            taken.append(loop.time() - started_at)
            event.set()
            return Taken()

        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            acceptor = Acceptor(listener, protocol, lambda: may_accept, lambda: lead, lambda: None)
            acceptor.update()
            started_at = loop.time()
            with socket.create_connection(listener.getsockname()):
                if may_accept:
                    await asyncio.wait_for(event.wait(), WAIT_SECONDS)
                else:
                    for _ in range(100):
                        await asyncio.sleep(0)
            await acceptor.close()
        return taken

    assert len(asyncio.run(connect_while(0, True))) == 1
    (ahead,) = asyncio.run(connect_while(3, True))
    assert ahead >= 0.003, "it did not hold back"
    assert asyncio.run(connect_while(0, False)) == []


def test_an_acceptor_takes_in_portions_what_nobody_else_takes() -> None:
    async def hold_backs(connections: int) -> int:
        """Return how often a process that is always ahead holds back."""
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0), backlog=connections) as listener:
            listener.setblocking(False)
            all_taken = asyncio.Event()
            taken = []

            def count() -> None:
                taken.append(loop.time())
                if len(taken) == connections:
                    all_taken.set()

            callers = [socket.create_connection(listener.getsockname()) for _ in range(connections)]
            acceptor = Acceptor(listener, Taken, lambda: True, lambda: 1, count)
            acceptor.update()
            await asyncio.wait_for(all_taken.wait(), WAIT_SECONDS)
            await acceptor.close()
            for caller in callers:
                caller.close()
        gaps = [after - before for before, after in pairwise(taken)]
        return sum(gap >= HOLD_BACK_SECONDS for gap in gaps)

    # 2 + 4 + 8 + 16 + 16 + 16: five times; a busy machine may pause as long by itself.
    assert asyncio.run(hold_backs(62)) <= 15, "one by one it holds back 61 times"


class Full(socket.socket):
    """A listener in a process that has no descriptor left."""

    tries = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        raise OSError(errno.EMFILE, "Too many open files")


def test_an_acceptor_without_descriptors_says_so_once_and_not_ten_times_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def try_thrice() -> None:
        with Full() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.setblocking(False)
            acceptor = Acceptor(listener, Taken, lambda: True, lambda: 0, lambda: None)
            acceptor.update()
            with socket.create_connection(listener.getsockname()):
                async with asyncio.timeout(WAIT_SECONDS):
                    while listener.tries < 3:
                        await asyncio.sleep(0.01)
            await acceptor.close()

    asyncio.run(try_thrice())
    (said,) = caplog.messages
    assert said.endswith("Too many open files; allow more open files (ulimit -n)")


def test_a_lead_is_chance_where_it_is_small() -> None:
    assert lead_beyond_chance(2, 0) == 0
    assert lead_beyond_chance(3, 0) == 1
    assert lead_beyond_chance(320, 300) == 0
    assert lead_beyond_chance(321, 300) == 1


def test_an_acceptor_that_ends_takes_those_who_were_let_in() -> None:
    async def served() -> int:
        made = []

        def protocol() -> asyncio.Protocol:
            made.append(Taken())
            return made[-1]

        with socket.create_server(("127.0.0.1", 0), backlog=20) as listener:
            listener.setblocking(False)
            acceptor = Acceptor(listener, protocol, lambda: True, lambda: 1, lambda: None)
            acceptor.update()
            callers = [socket.create_connection(listener.getsockname()) for _ in range(20)]
            await asyncio.wait_for(acceptor.close(), WAIT_SECONDS)
            for caller in callers:
                caller.close()
        return len(made)

    assert asyncio.run(served()) == 20


def test_log_lines_go_out_whole_in_pieces_that_a_pipe_takes_at_once() -> None:
    lines = [b"a" * length + b"\n" for length in (10, 80, 20, 200, 5, 99, 98, 0)]

    pieces = list(whole_lines(b"".join(lines), 100))

    assert b"".join(pieces) == b"".join(lines)
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert all(len(piece) <= 100 or piece.count(b"\n") == 1 for piece in pieces)
    assert len(pieces) == 6, "lines that fit together go together"
