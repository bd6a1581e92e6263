"""The tensorrt backend over a played library and GPU; the refusals before either is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.backends import tensorrt as tensorrt_backend
from app.backends.base import Backend
from app.backends.fake import FakeBackend
from app.backends.select import select_backend
from app.backends.tensorrt import TensorRTBackend
from app.backends.tensorrt_buckets import PlanBuckets
from app.backends.tensorrt_runtime import LoadedPlan
from app.errors import StartupError
from app.settings import Settings
from app.types import Batch
from models.golden import golden_images
from models.gpu import Gpu, NoGpuError
from models.package import (
    MODEL,
    PLAN,
    Package,
    PackageError,
    find_package,
    open_package,
    sha256_file,
)
from tests.backends.fake_tensorrt import (
    VERSION,
    FakeCuda,
    FakeTensorRT,
    Faults,
    fake_plan,
    open_fake_tensorrt,
    with_plan,
)
from tests.required import require

H200 = Gpu("NVIDIA H200", "9.0")


@pytest.fixture(scope="module")
def package() -> Package:
    return open_package(find_package("caformer_digits"))


@pytest.fixture(scope="module")
def images(package: Package) -> Batch:
    return golden_images(package.manifest.input.size, 8)


def start(package: Package, **settings: Any) -> Backend:
    return select_backend(Settings(backend="tensorrt", **settings), package, 1)


def refusal(package: Package, **settings: Any) -> str:
    """Return the sentence with which a start is refused, whatever class it has."""
    with pytest.raises((StartupError, PackageError)) as caught:
        start(package, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def start_refusal(package: Package, plan: bytes | None = None, **faults: Any) -> str:
    """Return the sentence when the library misbehaves."""
    with pytest.raises(StartupError) as caught:
        open_fake_tensorrt(package, plan=plan, cuda=FakeCuda(Faults(**faults)))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# --- batches


@pytest.mark.parametrize("size", range(1, 9))
def test_a_batch_of_any_size_gets_its_own_rows_and_no_more(
    package: Package, images: Batch, size: int
) -> None:
    backend = open_fake_tensorrt(package)
    manifest = package.manifest
    expected = FakeBackend(manifest.input.size, manifest.classes, manifest.embedding_dim).run(
        images[:size]
    )
    rows = backend.run(images[:size])
    np.testing.assert_array_equal(rows.logits, expected.logits)
    np.testing.assert_array_equal(rows.embedding, expected.embedding)


def test_batches_of_mixed_sizes_never_see_each_others_rows(package: Package, images: Batch) -> None:
    backend = open_fake_tensorrt(package)
    alone = [backend.run(images[index : index + 1]) for index in range(8)]
    for size in (8, 3, 1, 5, 2, 7, 1, 8):
        rows = backend.run(images[8 - size :].copy())
        for row, index in enumerate(range(8 - size, 8)):
            assert rows.logits[row].tobytes() == alone[index].logits.tobytes()


def test_a_batch_above_the_largest_is_an_error_and_not_a_cut_one(
    package: Package, images: Batch
) -> None:
    backend = open_fake_tensorrt(package, max_batch_size=4)
    with pytest.raises(ValueError, match="a batch of 5 images exceeds the largest prepared, 4"):
        backend.run(images[:5])


@pytest.mark.parametrize(("asked", "sizes"), [(6, "1, 2, 4, 6"), (8, "1, 2, 4, 8"), (1, "1")])
def test_batch_sizes_are_prepared_up_to_what_was_asked_for(
    package: Package, asked: int, sizes: str
) -> None:
    info = open_fake_tensorrt(package, max_batch_size=asked).info
    assert info.max_batch_size == asked
    assert info.runtime == f"tensorrt {VERSION}, CUDA graphs for batches of {sizes}"
    assert info.batches_in_flight == 1


def test_the_engines_own_limit_goes_before_the_settings(package: Package) -> None:
    backend = open_fake_tensorrt(package, max_batch_size=64, plan=fake_plan(package, 3))
    assert backend.info.max_batch_size == 3
    assert backend.info.runtime.endswith("batches of 1, 2, 3")


def test_every_run_replays_a_graph_with_the_engine_in_it(package: Package, images: Batch) -> None:
    cuda = FakeCuda()
    backend = open_fake_tensorrt(package, cuda=cuda)
    cuda.replays.clear()
    for size in (1, 3, 8):
        backend.run(images[:size])
    assert cuda.replays == [1, 1, 1]


def test_a_replay_runs_the_graph_alone_as_often_as_asked(package: Package, images: Batch) -> None:
    cuda = FakeCuda()
    manifest = package.manifest
    plan = LoadedPlan(
        FakeTensorRT(cuda),
        cuda,
        fake_plan(package),
        input_size=manifest.input.size,
        classes=manifest.classes,
        embedding_dim=manifest.embedding_dim,
    )
    buckets = PlanBuckets(plan, cuda, (1, 4))
    expected = buckets.run(images[:3])
    cuda.replays.clear()
    buckets.replay(4, times=3)
    assert cuda.replays == [1, 1, 1]
    assert cuda.is_idle, "it waits"
    assert buckets.run(images[:3]).logits.tobytes() == expected.logits.tobytes()
    buckets.close()
    assert cuda.closed


def test_closing_gives_the_device_back(package: Package) -> None:
    cuda = FakeCuda()
    open_fake_tensorrt(package, cuda=cuda).close()
    assert cuda.closed


# --- the library refuses; nothing raises in it


def test_an_engine_that_does_not_load_is_told_in_the_librarys_first_line(package: Package) -> None:
    sentence = start_refusal(package, plan=b"no engine")
    assert f"tensorrt {VERSION} cannot load the engine: the magic tag does not match;" in sentence
    assert "build the engine again" in sentence


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"no_context": True}, "make an execution context: out of memory"),
        ({"shapes_refused": {4}}, "take 4 images: (4, 32, 32, 3) is outside the profile"),
        ({"addresses_refused": {"logits"}}, "take the address of logits"),
        ({"runs_refused": {8}}, "run the engine on 8 images: the run was refused"),
        ({"uncapturable": True}, "capture a run on 1 images in a CUDA graph"),
        ({"empty_graph": True}, "repeat a run on 1 images from its CUDA graph"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_library_refuses_stops_the_start(
    package: Package, faults: dict[str, Any], words: str
) -> None:
    assert f"cannot {words}" in start_refusal(package, **faults)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": ("UINT8", [-1, 64, 64, 3])},
        {"images": ("FLOAT", [-1, 32, 32, 3])},
        {"logits": ("FLOAT", [-1, 1000])},
        {"embedding": ("HALF", [-1, 64])},
        {"hidden": ("FLOAT", [-1, 64])},
    ],
    ids=["another side", "float pixels", "other classes", "half rows", "one more output"],
)
def test_an_engine_of_another_network_is_refused(package: Package, changes: dict[str, Any]) -> None:
    sentence = start_refusal(package, plan=fake_plan(package, **changes))
    assert "build the engine again" in sentence
    assert next(iter(changes)) in sentence


# --- what is missing or does not fit


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A machine that has an H200 and the library."""
    cuda = FakeCuda()
    monkeypatch.setattr(tensorrt_backend, "find_gpu", lambda: H200)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(cuda))
    return cuda


def test_an_engine_that_fits_is_served(
    package: Package,
    images: Batch,
    tmp_path: Path,
    with_gpu: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = require("app.backends.pytorch_cuda")
    monkeypatch.setattr(module, "EngineCuda", lambda: with_gpu)
    backend = start(with_plan(package, tmp_path), max_batch_size=4)
    assert isinstance(backend, TensorRTBackend)
    assert backend.info.device == "cuda:0"
    assert len(backend.run(images[:3]).logits) == 3


def test_without_a_gpu_the_reason_is_told(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_none() -> Gpu:
        raise NoGpuError("the CUDA driver shows none")

    monkeypatch.setattr(tensorrt_backend, "find_gpu", find_none)
    sentence = refusal(with_plan(package, tmp_path))
    assert "needs an NVIDIA GPU, and the CUDA driver shows none" in sentence
    assert "METASERVE_BACKEND=onnxruntime" in sentence


def test_a_device_that_contradicts_the_backend_is_refused(package: Package) -> None:
    assert "METASERVE_DEVICE=cpu contradicts it" in refusal(package, device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compute_capability": "8.6"}, "compute capability 8.6 and NVIDIA H200 has 9.0"),
        ({"operating_system": "windows-amd64"}, "was built on windows-amd64 and this is"),
        ({"onnx_sha256": "1" * 64}, "was built from another model.onnx"),
        ({"version": "10.9.0.1"}, f"built by tensorrt 10.9.0.1 and {VERSION} is installed"),
    ],
    ids=["another GPU", "another system", "another graph", "another version"],
)
@pytest.mark.usefixtures("with_gpu")
def test_an_engine_that_does_not_fit_is_refused_with_what_differs(
    package: Package, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    sentence = refusal(with_plan(package, tmp_path, **changes))
    assert words in sentence
    assert "metaserve export with --format tensorrt" in sentence


def test_an_engine_without_its_graph_beside_it_is_taken_at_its_word(
    package: Package, tmp_path: Path, with_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = with_plan(package, tmp_path)
    files = {name: sha for name, sha in planned.manifest.files.items() if name != MODEL}
    bare = Package(tmp_path, planned.manifest.model_copy(update={"files": files}))
    module = require("app.backends.pytorch_cuda")
    monkeypatch.setattr(module, "EngineCuda", lambda: with_gpu)
    assert start(bare).info.name == "tensorrt"


@pytest.mark.usefixtures("with_gpu")
def test_a_package_without_an_engine_is_refused(package: Package, tmp_path: Path) -> None:
    assert "holds no model.plan, which the tensorrt backend needs" in refusal(package)
    planned = with_plan(package, tmp_path)
    silent = Package(tmp_path, planned.manifest.model_copy(update={"plan": None}))
    assert "does not describe its engine" in refusal(silent)


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.usefixtures("with_gpu")
def test_the_library_that_built_the_engine_is_named_where_it_is_missing(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    sentence = refusal(with_plan(package, tmp_path, module=module))
    assert f"cannot start: {module} is not installed; install" in sentence


@pytest.mark.usefixtures("with_gpu")
def test_without_torch_the_extra_is_named(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "app.backends.pytorch_cuda", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "install metaserve[tensorrt]" in refusal(with_plan(package, tmp_path))


@pytest.mark.usefixtures("with_gpu")
def test_a_torch_that_cannot_use_the_gpu_is_told_in_its_words(
    package: Package, tmp_path: Path
) -> None:
    torch = require("torch")
    if torch.cuda.is_available():
        pytest.skip("this torch uses the GPU that is here")
    sentence = refusal(with_plan(package, tmp_path))
    assert "torch cannot use the GPU NVIDIA H200: Torch not compiled with CUDA" in sentence


def test_a_real_start_without_a_gpu_ends_in_a_sentence_and_touches_no_library(
    package: Package, tmp_path: Path
) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    for name in package.manifest.files:
        (tmp_path / name).write_bytes((package.path / name).read_bytes())
    planned = with_plan(package, tmp_path, module="tensorrt_rtx")
    files = planned.manifest.files | {PLAN: sha256_file(tmp_path / PLAN)}
    manifest = planned.manifest.model_copy(update={"files": files})
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    program = (
        "import sys\n"
        "from app.cli import main\n"
        "code = main(['serve', '--backend', 'tensorrt', '--port', '0', '--model', sys.argv[1]])\n"
        "print(*sorted(set(sys.modules) & {'tensorrt', 'tensorrt_rtx', 'torch'}))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "\n", "a library was imported"
    told = [line for line in done.stderr.splitlines() if line.startswith("metaserve: ")]
    assert len(told) == 1
    assert "the tensorrt backend needs an NVIDIA GPU, and there is none here" in told[0]


# --- names of the real libraries, as far as they can be told without a GPU


def test_the_real_library_has_every_name_that_the_backend_uses() -> None:
    trt = require("tensorrt_rtx")
    used = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            "num_io_tensors",
            "get_tensor_name",
            "get_tensor_dtype",
            "get_tensor_shape",
            "get_tensor_profile_shape",
            "create_execution_context",
            "device_memory_size_v2",
        ],
        trt.IExecutionContext: [
            "set_device_memory",
            "set_input_shape",
            "set_tensor_address",
            "get_tensor_shape",
            "execute_async_v3",
            "is_stream_capturable",
        ],
        trt.ExecutionContextAllocationStrategy: ["USER_MANAGED"],
    }
    missing = [name for kind, names in used.items() for name in names if not hasattr(kind, name)]
    assert not missing
    assert trt.DataType.UINT8.name == "UINT8"
    assert trt.DataType.FLOAT.name == "FLOAT"
    assert trt.ILogger.ERROR.value == 1
