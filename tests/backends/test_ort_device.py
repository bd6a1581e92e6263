"""The device half of the onnxruntime backend, for real on the CPU; its options by a double."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from app.backends import ort_session
from app.backends.ort import OnnxRuntimeBackend
from app.backends.ort_device import BoundBuckets
from app.backends.ort_session import CPU, CUDA, TENSORRT, SessionPlan, gpu_providers, open_session
from app.errors import StartupError
from app.types import Batch
from models.golden import golden_images
from models.onnx_runtime import import_onnxruntime
from models.package import Package, find_package, open_package
from tests.required import require

PATIENCE_SECONDS = 30.0


@pytest.fixture(scope="module")
def package() -> Package:
    return open_package(find_package("caformer_digits"))


@pytest.fixture(scope="module")
def ort() -> ModuleType:
    require("onnxruntime")
    return import_onnxruntime()


@pytest.fixture
def plan(package: Package, tmp_path: Path) -> SessionPlan:
    return SessionPlan(
        package.model_path,
        CUDA,
        threads=1,
        input_size=package.manifest.input.size,
        sizes=(1, 2, 4, 6),
        exact_float32=True,
        cuda_graphs=True,
        graph_hash="0123456789abcdef" * 4,
        cache_dir=tmp_path,
    )


class WatchedSession:
    """A real session; says how it was run and in which threads."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.runs: list[tuple[tuple[int, ...], str | None]] = []
        self.threads: set[int] = set()

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.threads.add(threading.get_ident())
        try:
            graph_id = options.get_run_config_entry("gpu_graph_id")
        except RuntimeError:  # it has none
            graph_id = None
        self.runs.append((tuple(binding.get_outputs()[0].shape()), graph_id))
        self._session.run_with_iobinding(binding, options)


@pytest.fixture
def session(ort: ModuleType, plan: SessionPlan) -> WatchedSession:
    return WatchedSession(open_session(ort, replace(plan, provider=CPU, cuda_graphs=False))[0])


@pytest.fixture
def bound(
    ort: ModuleType, session: WatchedSession, package: Package, plan: SessionPlan
) -> Iterator[BoundBuckets]:
    manifest = package.manifest
    widths = manifest.classes, manifest.embedding_dim
    bound = BoundBuckets(ort, session, "cpu", plan.sizes, plan.input_size, widths, graphs=True)
    yield bound
    bound.close()


@pytest.fixture(scope="module")
def images(package: Package) -> Batch:
    return golden_images(package.manifest.input.size, 6)


# --- buffers of each size


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_batch_is_padded_and_answers_what_the_plain_session_answers(
    bound: BoundBuckets, package: Package, images: Batch, count: int
) -> None:
    plain = OnnxRuntimeBackend(package, "cpu", threads=1)
    expected, found = plain.run(images[:count]), bound.run(images[:count])
    assert found.logits.tobytes() == expected.logits.tobytes()
    assert found.embedding.tobytes() == expected.embedding.tobytes()


def test_each_size_runs_under_its_own_graph_id(
    bound: BoundBuckets, session: WatchedSession, images: Batch
) -> None:
    for count in (1, 3, 4, 5, 3):
        bound.run(images[:count])
    assert [(shape[0], graph_id) for shape, graph_id in session.runs] == [
        (1, "1"),
        (4, "4"),
        (4, "4"),
        (6, "6"),
        (4, "4"),
    ]


def test_without_cuda_graphs_no_graph_id_is_given(
    ort: ModuleType, session: WatchedSession, package: Package, images: Batch
) -> None:
    manifest = package.manifest
    widths = manifest.classes, manifest.embedding_dim
    size = manifest.input.size
    bound = BoundBuckets(ort, session, "cpu", (1,), size, widths, graphs=False)
    bound.run(images[:1])
    bound.close()
    assert [graph_id for _, graph_id in session.runs] == [None]


def test_rows_are_not_touched_by_later_runs(bound: BoundBuckets, images: Batch) -> None:
    first = bound.run(images[:2])
    kept = first.logits.copy(), first.embedding.copy()
    bound.run(images[2:4])
    np.testing.assert_array_equal(first.logits, kept[0])
    np.testing.assert_array_equal(first.embedding, kept[1])
    first.logits[:] = 7.0  # the rows are the caller's own
    np.testing.assert_array_equal(bound.run(images[:2]).logits, kept[0])


def test_a_replay_runs_the_graph_as_often_as_asked(
    bound: BoundBuckets, session: WatchedSession
) -> None:
    bound.replay(4, times=3)
    assert [graph_id for _, graph_id in session.runs] == ["4", "4", "4"]


def test_a_batch_above_the_largest_size_is_refused(bound: BoundBuckets, images: Batch) -> None:
    with pytest.raises(ValueError, match="exceeds the largest prepared, 6"):
        bound.run(images.repeat(2, 0))


def test_callers_in_many_threads_are_answered_by_one(
    bound: BoundBuckets, session: WatchedSession, images: Batch
) -> None:
    expected = [bound.run(images[n : n + 2]) for n in range(4)]
    together = threading.Barrier(4, timeout=PATIENCE_SECONDS)

    def run_often(n: int) -> list[bytes]:
        together.wait()
        return [bound.run(images[n : n + 2]).logits.tobytes() for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(run_often, n) for n in range(4)]
        for n, answer in enumerate(answers):
            assert set(answer.result(timeout=PATIENCE_SECONDS)) == {expected[n].logits.tobytes()}
    assert len(session.threads) == 1
    assert threading.get_ident() not in session.threads


# --- options of the providers


def test_cuda_searches_by_heuristic_and_captures_graphs(plan: SessionPlan) -> None:
    ((name, options),) = gpu_providers(plan)
    assert name == CUDA
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["enable_cuda_graph"] == "1"
    assert options["use_tf32"] == "0", "a float32 graph is computed in float32"
    ((_, halves),) = gpu_providers(replace(plan, exact_float32=False, cuda_graphs=False))
    assert (halves["use_tf32"], halves["enable_cuda_graph"]) == ("1", "0")


def test_tensorrt_gets_a_profile_over_the_sizes_and_a_cache_of_its_own(
    plan: SessionPlan, tmp_path: Path
) -> None:
    (name, options), (beside, cuda) = gpu_providers(replace(plan, provider=TENSORRT))
    side = plan.input_size
    assert (name, beside) == (TENSORRT, CUDA)
    assert options["trt_profile_min_shapes"] == f"images:1x{side}x{side}x3"
    assert options["trt_profile_opt_shapes"] == f"images:6x{side}x{side}x3"
    assert options["trt_profile_max_shapes"] == f"images:6x{side}x{side}x3"
    folder = tmp_path / "0123456789abcdef"
    assert folder.is_dir()
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder)
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert not [key for key in options if "fp16" in key or "bf16" in key or "int8" in key]
    assert cuda["enable_cuda_graph"] == "0", "graphs need every node on one provider"


def test_a_cache_that_cannot_be_written_names_the_setting(
    plan: SessionPlan, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    blocked = replace(plan, provider=TENSORRT, cache_dir=tmp_path / "file")
    with pytest.raises(StartupError, match="METASERVE_ORT_CACHE_DIR"):
        gpu_providers(blocked)


def test_the_cache_lies_in_the_users_own_unless_it_is_named(
    plan: SessionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    (_, options), _ = gpu_providers(replace(plan, provider=TENSORRT, cache_dir=None))
    folder = tmp_path / "users/metaserve/onnxruntime/0123456789abcdef"
    assert folder.is_dir()
    assert options["trt_engine_cache_path"] == str(folder)


def test_without_a_home_the_cache_has_to_be_named(
    plan: SessionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_session, "user_cache", lambda kind: None)
    with pytest.raises(StartupError, match=r"no home directory.*METASERVE_ORT_CACHE_DIR"):
        gpu_providers(replace(plan, provider=TENSORRT, cache_dir=None))


# --- sessions that do not start


class Library:
    """onnxruntime, as far as a session is opened with it; each opening takes one outcome."""

    __version__ = "9.9"

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.opened: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.entries: dict[str, str] = {}
        self.preloads = 0
        self.threads = 0

    def preload_dlls(self) -> None:
        self.preloads += 1

    def SessionOptions(self) -> Any:
        library = self

        class Options:
            intra_op_num_threads = 0
            log_severity_level = 2

            def add_session_config_entry(self, key: str, value: str) -> None:
                library.entries[key] = value

        return Options()

    def InferenceSession(self, path: str, options: Any, providers: Any, **extra: Any) -> Any:
        outcome = self.outcomes.pop(0)
        named = not isinstance(providers[0], str)
        self.opened.append((dict(providers[0][1]) if named else {}, extra))
        self.threads = options.intra_op_num_threads
        if outcome is not None:
            raise outcome

        class Session:
            def get_providers(self) -> list[str]:
                return [providers[0][0], CPU] if named else [CPU]

        return Session()


def opened(library: Library, plan: SessionPlan) -> SessionPlan:
    module: Any = library
    return open_session(module, plan)[1]


def test_no_part_of_the_graph_may_fall_back_to_the_cpu(plan: SessionPlan) -> None:
    library = Library(None)
    assert opened(library, plan) == plan
    assert library.entries["session.disable_cpu_ep_fallback"] == "1"
    assert library.opened[0][1] == {"enable_fallback": 0}
    assert library.preloads == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_a_session_gets_the_threads_of_the_containers_limit(
    plan: SessionPlan, threads: int
) -> None:
    library = Library(None)
    opened(library, replace(plan, provider=CPU, threads=threads, cuda_graphs=False))
    assert library.threads == threads
    assert library.entries["session.force_spinning_stop"] == "1"


def test_a_session_that_refuses_graph_capture_is_opened_without(
    plan: SessionPlan, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = RuntimeError(
        "This session cannot use the graph capture feature as requested by the user as all "
        "compute graph nodes have not been partitioned to the CUDAExecutionProvider"
    )
    library = Library(refusal, None)
    assert not opened(library, plan).cuda_graphs
    assert [options["enable_cuda_graph"] for options, _ in library.opened] == ["1", "0"]
    (line,) = caplog.records
    assert line.name == "metaserve.backends"
    assert "captures no CUDA graphs here" in line.getMessage()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=0",
            "driver is too old",
        ),
        ("CUDA failure 100: no CUDA-capable device is detected ; GPU=-1", "sees no GPU"),
        ("libcublas.so.13: cannot open\nand a long trace", "libcublas.so.13: cannot open"),
    ],
    ids=["driver", "no GPU", "something else"],
)
def test_what_keeps_a_gpu_from_starting_is_one_sentence(
    plan: SessionPlan, said: str, sentence: str
) -> None:
    with pytest.raises(StartupError, match=sentence) as caught:
        opened(Library(RuntimeError(said)), plan)
    assert "\n" not in str(caught.value)


def test_a_float32_graph_on_tensorrt_is_not_rounded_to_tf32(
    plan: SessionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # so that it is put back
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    opened(Library(None), replace(plan, provider=TENSORRT, exact_float32=False))
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    opened(Library(None), replace(plan, provider=TENSORRT))
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


# --- precisions


@pytest.fixture
def bf16(package: Package) -> Package:
    return Package(package.path, package.manifest.model_copy(update={"precision": "bf16"}))


def test_a_bf16_package_is_refused_on_the_cpu_before_it_is_loaded(
    bf16: Package, ort: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "InferenceSession", None)  # a session would fail otherwise
    with pytest.raises(StartupError, match="bf16 package, which onnxruntime does not run") as told:
        OnnxRuntimeBackend(bf16, "cpu", threads=1)
    assert "--precision fp32" in str(told.value)


def test_the_cpu_takes_batches_of_any_size(package: Package, ort: ModuleType) -> None:
    backend = OnnxRuntimeBackend(package, "cpu", threads=1, max_batch_size=2)
    assert backend.info.max_batch_size is None
    assert len(backend.run(golden_images(package.manifest.input.size, 3)).logits) == 3
