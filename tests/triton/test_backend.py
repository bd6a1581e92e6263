"""The triton backend against a real server: same answers, errors in our words, deadlines kept."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc.aio import InferenceServerClient as AsyncClient

from app.backends import triton, triton_connection
from app.backends.ort import OnnxRuntimeBackend
from app.backends.triton import TritonBackend, _address
from app.engine.loading import check_golden
from app.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    Overloaded,
    ServiceError,
    StartupError,
)
from app.types import Batch, Rows
from models.golden import golden_images
from models.package import Package, PackageError, open_package, sha256_file
from tests.servers import EMBEDDED, wait_until
from tests.triton.relay import PATIENCE_SECONDS, Relay
from tests.triton.server import Repository, TritonServer, free_port
from tests.triton.shared import GATED, MAX_BATCH_SIZE, MODEL, gate


@contextmanager
def backend_of(
    server: TritonServer, package: Package, model: str = MODEL, **arguments: Any
) -> Iterator[TritonBackend]:
    backend = TritonBackend(package, server.url, model, **arguments)
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture
def gated(server: TritonServer, package: Package) -> Iterator[TritonBackend]:
    """A backend whose model answers once `gate()` exists."""
    clear_gate()
    with backend_of(server, package, GATED) as backend:
        yield backend
    gate().touch()  # whatever still waits on the server, let it go


def clear_gate() -> None:
    for path in (gate(), waiting()):
        path.unlink(missing_ok=True)


def waiting() -> Path:
    """Return the file that says that a batch waits at the gate."""
    return gate().with_name("gate.waiting")


@pytest.fixture
def images() -> Batch:
    return golden_images(32, 5)


def refusal(package: Package, url: str, model: str | None = None, **arguments: Any) -> str:
    """Return the one sentence with which a start is refused."""
    with pytest.raises(StartupError) as caught:
        TritonBackend(package, url, model, **arguments)
    assert "\n" not in str(caught.value)
    assert "triton" not in {one.name for one in threading.enumerate()}, "it leaves no thread"
    return str(caught.value)


def altered(package: Path, folder: Path, **changes: Any) -> Package:
    """Return a copy of a package whose manifest says something else."""
    copy = Path(shutil.copytree(package, folder / "altered"))
    manifest = json.loads((copy / "manifest.json").read_text())
    for name, value in changes.items():
        manifest[name] = {**manifest[name], **value} if isinstance(value, dict) else value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return open_package(copy)


# --- what it answers


def test_answers_are_the_bytes_of_onnxruntime(server: TritonServer, package: Package) -> None:
    images = np.random.default_rng(5).integers(0, 256, (MAX_BATCH_SIZE, 32, 32, 3), np.uint8)
    local = OnnxRuntimeBackend(package, "cpu", threads=1)
    with backend_of(server, package) as backend:
        for size in (1, 3, MAX_BATCH_SIZE):
            ours, theirs = backend.run(images[:size]), local.run(images[:size])
            assert ours.logits.tobytes() == theirs.logits.tobytes()
            assert ours.embedding.tobytes() == theirs.embedding.tobytes()
    local.close()


def test_it_says_server_address_model_and_limits(server: TritonServer, package: Package) -> None:
    with backend_of(server, package) as backend:
        info = backend.info
        assert info.runtime == f"Triton 2.51.0 at {server.url}, model {MODEL} on its python backend"
        assert (info.device, info.max_batch_size) == ("cpu", MAX_BATCH_SIZE)
        assert info.batches_in_flight == 2, "one instance, and one batch that waits its turn"


def test_the_golden_outputs_are_reproduced(server: TritonServer, package: Package) -> None:
    with backend_of(server, package) as backend:
        check = check_golden(backend, package)
    assert check.max_abs_logit_difference <= 1e-4
    assert check.batch_dependence == 0


def test_a_server_with_other_weights_is_found_by_the_golden_outputs(
    server: TritonServer, package: Package, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(EMBEDDED, tmp_path / "other"))
    logits, embedding = package.golden
    np.savez(other / "golden.npz", logits=logits[:, ::-1], embedding=embedding)
    files = {**package.manifest.files, "golden.npz": sha256_file(other / "golden.npz")}
    expected = Package(other, package.manifest.model_copy(update={"files": files}))
    with (
        backend_of(server, expected) as backend,
        pytest.raises(PackageError, match=r"Triton 2\.51\.0 .* does not reproduce the golden"),
    ):
        check_golden(backend, expected)


def test_the_models_name_is_the_packages_when_none_is_given(
    server: TritonServer, package: Package, images: Batch
) -> None:
    backend = TritonBackend(package, server.url)
    assert len(backend.run(images).logits) == len(images)
    backend.close()


def test_threads_get_their_own_answers(server: TritonServer, package: Package) -> None:
    images = np.random.default_rng(6).integers(0, 256, (8, 32, 32, 3), np.uint8)
    together = threading.Barrier(8, timeout=PATIENCE_SECONDS)
    with backend_of(server, package) as backend, ThreadPoolExecutor(8) as pool:
        expected = backend.run(images)

        def ask(index: int) -> list[Rows]:
            together.wait()
            return [backend.run(images[index : index + 1]) for _ in range(25)]

        for index, answers in enumerate(pool.map(ask, range(8), timeout=PATIENCE_SECONDS)):
            row = expected.logits[index].tobytes()
            assert {one.logits[0].tobytes() for one in answers} == {row}


# --- what it refuses at start


def test_an_unknown_model_is_named_with_those_there_are(
    server: TritonServer, package: Package
) -> None:
    sentence = refusal(package, server.url, "nosuch", wait_seconds=PATIENCE_SECONDS)
    assert f"Triton at {server.url} has no model 'nosuch'" in sentence
    assert f"its models: {MODEL}, {GATED}" in sentence
    assert "METASERVE_TRITON_MODEL" in sentence


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input": {"size": 64}}, "images is UINT8 [-1, 32, 32, 3] there and UINT8 [-1, 64, 64, 3"),
        ({"classes": 9}, "logits is FP32 [-1, 10] there and FP32 [-1, 9] here"),
        ({"embedding_dim": 32}, "embedding is FP32 [-1, 64] there and FP32 [-1, 32] here"),
    ],
)
def test_another_packages_model_is_refused(
    server: TritonServer, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    sentence = refusal(altered(EMBEDDED, tmp_path, **changes), server.url, MODEL)
    assert says in sentence
    assert "is not the model of" in sentence


def test_a_model_on_another_device_than_asked_for_is_refused(
    server: TritonServer, package: Package
) -> None:
    sentence = refusal(package, server.url, MODEL, device="cuda")
    assert f"METASERVE_DEVICE=cuda was asked for, but Triton runs {MODEL} on cpu" in sentence


def test_nobody_at_the_address_is_one_sentence(package: Package) -> None:
    url = f"127.0.0.1:{free_port()}"
    started_at = time.monotonic()
    sentence = refusal(package, url, wait_seconds=0.6)
    assert time.monotonic() - started_at >= 0.6
    assert f"Triton at {url} cannot be used" in sentence
    assert "Connection refused" in sentence
    assert "METASERVE_TRITON_URL" in sentence


def test_a_listener_that_never_speaks_is_given_up_on(package: Package) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        sentence = refusal(package, url)
    assert "no answer in 2 s" in sentence


@pytest.mark.parametrize(
    "url",
    [
        "http://triton:8000",
        "grpc://",
        "triton:port",
        "triton:8001/v2",
        "",
        "me:secret@triton:1",
        "triton:0",
        "triton:1?x=y",
        "triton:1#f",
        "tri ton:1",
        "triton\n:1",
        "::1",
        "[::1:8001",
    ],
)
def test_what_is_no_address_is_told_without_secrets(package: Package, url: str) -> None:
    sentence = refusal(package, url)
    assert "is no gRPC address; write it like localhost:8001" in sentence
    assert "secret" not in sentence


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("triton:9001", "triton:9001"),
        ("grpc://triton:9001", "triton:9001"),
        ("triton", "triton:8001"),
        ("[::1]:9", "[::1]:9"),
    ],
)
def test_an_address_may_lack_its_port_or_have_a_scheme(url: str, address: str) -> None:
    assert _address(url) == address


# --- deadlines, overload, bad batches


def test_a_deadline_cuts_a_batch_that_hangs(gated: TritonBackend, images: Batch) -> None:
    started_at = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        gated.run(images, started_at + 0.3)
    assert 0.25 < time.monotonic() - started_at < 2
    gate().touch()
    assert len(gated.run(images).logits) == len(images), "a late batch loses no connection"


def test_a_deadline_that_has_passed_sends_nothing(
    server: TritonServer, package: Package, images: Batch
) -> None:
    with backend_of(server, package) as backend, InferenceServerClient(server.url) as client:
        before = executed(client, MODEL)
        with pytest.raises(DeadlineExceeded):
            backend.run(images, time.monotonic() - 1)
        assert executed(client, MODEL) == before


def executed(client: InferenceServerClient, model: str) -> int:
    """Return how many images a model has answered so far."""
    return int(client.get_inference_statistics(model).model_stats[0].inference_count)


def test_triton_never_runs_what_was_late_in_its_queue(
    gated: TritonBackend, server: TritonServer, images: Batch
) -> None:
    with ThreadPoolExecutor(1) as pool, InferenceServerClient(server.url) as client:
        before = executed(client, GATED)
        first = pool.submit(gated.run, images[:2])
        wait_until(waiting().exists, "the first batch waits at the gate")
        with pytest.raises(DeadlineExceeded):
            gated.run(images[:3], time.monotonic() + 0.3)
        gate().touch()
        assert len(first.result(PATIENCE_SECONDS).logits) == 2
        assert len(gated.run(images[:1]).logits) == 1
        assert executed(client, GATED) - before == 3, "two and one, not the three that were late"


def test_tritons_own_queue_knows_the_deadline(
    gated: TritonBackend, images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Our own clock would cut the call first: without it, the server's word must come.
    sent: list[dict[str, Any]] = []
    infer = AsyncClient.infer

    def without_client_timeout(self: Any, *args: Any, **options: Any) -> Any:
        sent.append(dict(options))
        return infer(self, *args, **{**options, "client_timeout": None})

    monkeypatch.setattr(AsyncClient, "infer", without_client_timeout)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gated.run, images[:1])
        wait_until(waiting().exists, "the first batch waits at the gate")
        late = pool.submit(gated.run, images[:1], time.monotonic() + 0.3)
        wait_until(lambda: len(sent) == 2, "the second batch is on its way")
        # What is left of the deadline: less by as much as the way to here took.
        assert 0 < sent[1]["client_timeout"] <= 0.3, "seconds"
        assert sent[1]["timeout"] == math.ceil(sent[1]["client_timeout"] * 1e6), "microseconds"
        wait([late], timeout=1)
        gate().touch()
        with pytest.raises(DeadlineExceeded):
            late.result(PATIENCE_SECONDS)
        first.result(PATIENCE_SECONDS)


def test_a_full_queue_is_overload_and_not_an_outage(gated: TritonBackend, images: Batch) -> None:
    # More than wait in the queue, the batch that is formed next, and the one that runs.
    callers = 24
    with ThreadPoolExecutor(callers) as pool:
        first = pool.submit(gated.run, images[:1])
        wait_until(waiting().exists, "the first batch waits at the gate")
        others = [pool.submit(gated.run, images[:1]) for _ in range(callers - 1)]
        wait(others, timeout=PATIENCE_SECONDS, return_when="FIRST_EXCEPTION")
        gate().touch()
        outcomes = [one.exception(PATIENCE_SECONDS) for one in (first, *others)]
    refused = [one for one in outcomes if one is not None]
    assert {type(one) for one in refused} == {Overloaded}
    assert 1 <= len(refused) < callers
    assert len(gated.run(images[:1]).logits) == 1


def test_a_batch_above_the_limit_is_the_batchs_own_fault(
    server: TritonServer, package: Package, images: Batch
) -> None:
    with backend_of(server, package) as backend:
        with pytest.raises(triton_connection.InferenceError, match="must be <= 8") as caught:
            backend.run(np.repeat(images, 2, axis=0))
        assert not isinstance(caught.value, ServiceError), "the engine runs its halves"
        assert len(backend.run(images).logits) == len(images)


# --- a server that goes away


def test_a_killed_server_is_refused_at_once_and_used_again_when_back(
    mortal: TritonServer, package: Package, images: Batch
) -> None:
    with backend_of(mortal, package) as backend:
        expected = backend.run(images)
        mortal.kill()
        with pytest.raises(BackendUnavailable) as caught:
            backend.run(images)
        assert caught.value.retry_after_seconds >= 1
        started_at = time.monotonic()
        for _ in range(100):
            with pytest.raises(BackendUnavailable):
                backend.run(images)
        assert time.monotonic() - started_at < 1, "an open circuit asks nobody"

        mortal.start()
        ready_at = time.monotonic()
        wait_until(lambda: answers(backend, images), "it answers again", seconds=5)
        assert time.monotonic() - ready_at < 5
        assert backend.run(images).logits.tobytes() == expected.logits.tobytes()


def test_a_server_that_comes_back_with_another_model_is_not_used(
    mortal: TritonServer, package: Package, images: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    graph = mortal.repository.path / MODEL / "1" / "model.onnx"
    with backend_of(mortal, package) as backend:
        expected = backend.run(images)
        mortal.kill()
        ours = graph.read_bytes()
        model = onnx.load_from_string(ours)
        (bias,) = (one for one in model.graph.initializer if one.name.endswith("head.fc.fc2.bias"))
        moved = onnx.numpy_helper.to_array(bias) + np.float32(0.1)
        bias.CopyFrom(onnx.numpy_helper.from_array(moved, bias.name))
        onnx.save(model, graph)
        with pytest.raises(BackendUnavailable):
            backend.run(images)
        mortal.start()

        def said() -> bool:
            assert not answers(backend, images), "it answers with another network's numbers"
            return "there is another than before: its logits are 0.1 from those" in caplog.text

        wait_until(said, "the other model is found")
        mortal.kill()
        graph.write_bytes(ours)
        mortal.start()
        wait_until(lambda: answers(backend, images), "it answers again", seconds=5)
        assert backend.run(images).logits.tobytes() == expected.logits.tobytes()


def answers(backend: TritonBackend, images: Batch) -> bool:
    try:
        backend.run(images)
    except BackendUnavailable:
        return False
    return True


def test_an_unloaded_model_is_an_outage_until_it_is_loaded(
    mortal: TritonServer, package: Package, images: Batch
) -> None:
    with backend_of(mortal, package) as backend:
        mortal.unload(MODEL)
        with pytest.raises(BackendUnavailable):
            backend.run(images)
        # Known to the server, so a start waits for it, and says its state in the end.
        with pytest.raises(StartupError) as caught:
            TritonBackend(package, mortal.url, MODEL)
        assert f"cannot be used: model {MODEL} is un" in str(caught.value)
        mortal.load(MODEL)
        wait_until(lambda: answers(backend, images), "it answers again", seconds=5)


def test_another_model_that_fails_to_load_is_not_ours_to_mind(
    tmp_path: Path, package: Package, images: Batch
) -> None:
    repository = Repository(tmp_path / "models")
    repository.add(MODEL)
    (repository.add("broken") / "1" / "model.py").write_text("raise RuntimeError('broken')\n")
    server = TritonServer(tmp_path, repository)
    try:
        server.launch()
        with backend_of(server, package, wait_seconds=PATIENCE_SECONDS) as backend:
            assert len(backend.run(images).logits) == len(images)
        with InferenceServerClient(server.url) as client:
            assert not client.is_server_ready(), "the server itself minds"
        sentence = refusal(package, server.url, "broken")
        assert "cannot be used: model broken is unavailable" in sentence
        assert "RuntimeError: broken" in sentence
    finally:
        server.kill()


def test_a_lost_connection_to_a_server_that_lives_costs_no_answer(
    server: TritonServer, package: Package, images: Batch
) -> None:
    with Relay(server.port) as relay:
        backend = TritonBackend(package, relay.url, MODEL)
        expected = backend.run(images)
        for _ in range(3):
            relay.cut()
            assert backend.run(images).logits.tobytes() == expected.logits.tobytes()
        backend.close()


def test_the_packages_files_are_read_at_the_start_and_never_again(
    server: TritonServer, tmp_path: Path, images: Batch
) -> None:
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    clear_gate()
    with Relay(server.port) as relay, ThreadPoolExecutor(1) as pool:
        backend = TritonBackend(open_package(folder), relay.url, GATED)
        shutil.rmtree(folder)
        running = pool.submit(backend.run, images)
        wait_until(waiting().exists, "the batch waits at the gate")
        relay.cut()
        gate().touch()
        assert len(running.result(PATIENCE_SECONDS).logits) == len(images)
        backend.close()


def test_a_package_without_golden_outputs_leaves_no_thread(
    server: TritonServer, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    (folder / "golden.npz").write_bytes(b"")
    with pytest.raises(PackageError, match="holds no golden outputs"):
        TritonBackend(open_package(folder), server.url, MODEL)
    assert "triton" not in {one.name for one in threading.enumerate()}


def test_a_batch_whose_connection_is_cut_is_sent_once_more(
    server: TritonServer, package: Package, images: Batch
) -> None:
    clear_gate()
    with Relay(server.port) as relay, ThreadPoolExecutor(1) as pool:
        backend = TritonBackend(package, relay.url, GATED)
        running = pool.submit(backend.run, images)
        wait_until(waiting().exists, "the batch waits at the gate")
        relay.cut()
        gate().touch()
        rows = running.result(PATIENCE_SECONDS)
        np.testing.assert_allclose(rows.logits, package.golden[0], atol=1e-4)
        backend.close()


def test_a_connection_that_died_in_silence_is_replaced_though_deadlines_are_short(
    server: TritonServer, package: Package, images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_connection, "ALIVE_SECONDS", 0.3)
    assert triton_connection.SILENCE_SECONDS > 1, "no batch here waits for the check of long ones"
    with Relay(server.port) as relay:
        backend = TritonBackend(package, relay.url, MODEL)
        expected = backend.run(images)
        relay.swallow()

        def is_answered() -> bool:
            try:
                return backend.run(images, time.monotonic() + 0.2).logits is not None
            except (DeadlineExceeded, BackendUnavailable):
                return False

        assert not is_answered(), "the relay passes what it was to swallow"
        wait_until(is_answered, "a new connection is in use", seconds=5)
        assert backend.run(images).logits.tobytes() == expected.logits.tobytes()
        backend.close()


def test_a_check_for_life_takes_no_batch_beyond_its_deadline(
    server: TritonServer, package: Package, images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_connection, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(triton_connection, "ALIVE_SECONDS", PATIENCE_SECONDS)
    with Relay(server.port) as relay:
        backend = TritonBackend(package, relay.url, MODEL)
        relay.swallow()
        started_at = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            backend.run(images, started_at + 0.5)
        assert time.monotonic() - started_at < PATIENCE_SECONDS / 3
        backend.close()


def test_a_batch_waits_for_no_probe_beyond_its_deadline(
    server: TritonServer, package: Package, images: Batch
) -> None:
    clear_gate()
    with Relay(server.port) as relay, ThreadPoolExecutor(1) as pool:
        backend = TritonBackend(package, relay.url, GATED)
        started_at = time.monotonic()
        running = pool.submit(backend.run, images, started_at + 1)
        wait_until(waiting().exists, "the batch waits at the gate")
        relay.cut()  # the probe finds the server, but its golden image waits at the gate as well
        assert isinstance(running.exception(PATIENCE_SECONDS), DeadlineExceeded)
        assert time.monotonic() - started_at < triton.SAME_SECONDS / 2
        gate().touch()
        backend.close()


def test_a_batch_is_not_sent_a_third_time(
    server: TritonServer, package: Package, images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = threading.Semaphore(0)
    infer = AsyncClient.infer

    def count(self: Any, *args: Any, **options: Any) -> Any:
        sent.release()
        return infer(self, *args, **options)

    monkeypatch.setattr(AsyncClient, "infer", count)
    clear_gate()
    with Relay(server.port) as relay, ThreadPoolExecutor(1) as pool:
        backend = TritonBackend(package, relay.url, GATED)
        running = pool.submit(backend.run, images)
        wait_until(waiting().exists, "the batch waits at the gate")
        relay.cut()
        for _ in range(2):
            assert sent.acquire(timeout=PATIENCE_SECONDS), "the batch was not sent twice"
        # Again and again: a cut before the batch is on its way hurts nobody.
        wait_until(running.done, "it gives up", between=relay.cut)
        assert isinstance(running.exception(), BackendUnavailable)
        assert not sent.acquire(blocking=False)
        gate().touch()
        backend.close()


def test_a_server_that_stops_in_the_middle_is_noticed_and_taken_back(
    mortal: TritonServer, package: Package, images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SILENCE_SECONDS", "ALIVE_SECONDS"):
        monkeypatch.setattr(triton_connection, name, 0.3)
    with backend_of(mortal, package) as backend, ThreadPoolExecutor(4) as pool:
        mortal.signal(signal.SIGSTOP)
        try:
            started_at = time.monotonic()
            hanging = [pool.submit(backend.run, images, math.inf) for _ in range(4)]
            outcomes = [one.exception(PATIENCE_SECONDS) for one in hanging]
            assert {type(one) for one in outcomes} == {BackendUnavailable}
            assert time.monotonic() - started_at < 6
        finally:
            mortal.signal(signal.SIGCONT)
        wait_until(lambda: answers(backend, images), "it answers again", seconds=5)


def test_a_long_batch_on_a_live_server_is_waited_for(
    gated: TritonBackend, images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Semaphore(0)
    is_live = AsyncClient.is_server_live

    async def count(self: Any, **options: Any) -> Any:
        asked.release()
        return await is_live(self, **options)

    monkeypatch.setattr(triton_connection, "SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(AsyncClient, "is_server_live", count)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(gated.run, images)
        for _ in range(5):
            assert asked.acquire(timeout=PATIENCE_SECONDS), "the server was not asked for life"
        assert not running.done()
        gate().touch()
        assert len(running.result(PATIENCE_SECONDS).logits) == len(images)


def test_closing_ends_a_run_that_hangs(gated: TritonBackend, images: Batch) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(gated.run, images)
        wait_until(waiting().exists, "the batch waits at the gate")
        gated.close()
        assert isinstance(running.exception(PATIENCE_SECONDS), BackendUnavailable)
        assert "triton" not in {one.name for one in threading.enumerate()}
