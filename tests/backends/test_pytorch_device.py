"""The device half of the torch backend: on the CPU for real, on a GPU by doubles of its calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from app.backends import pytorch_compile, pytorch_paths
from app.backends.buckets import pad_batch
from app.backends.pytorch_buckets import Forward, HostDevice, TorchBuckets
from app.backends.pytorch_compile import compile_network, what_keeps_from_compiling
from app.backends.pytorch_paths import TorchPath, choose_path, open_path
from app.errors import StartupError
from app.types import Batch
from models.buckets import bucket_sizes
from models.golden import golden_images
from models.package import InputSpec
from models.serving import ServedModel
from models.tolerances import Precision
from tests.models.tiny import CAFORMER, CLASSES, network
from tests.required import missing as not_here

PATIENCE_SECONDS = 30.0
SIDE = CAFORMER.input_size
WIDTHS = CLASSES, CAFORMER.embedding_dim
SIZES = (1, 2, 4, 6)


def served() -> ServedModel:
    return ServedModel(network(CAFORMER), InputSpec(size=SIDE)).eval()


@pytest.fixture(scope="module")
def images() -> Batch:
    return golden_images(SIDE, 6)


class LazyDevice(HostDevice):
    """Does nothing before `finish`, as a GPU may; notes what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._queue: list[Callable[[], object]] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.asked.append(f"copy {len(source)}")
        self._queue.append(lambda: target.copy_(source))

    def prepare(self, work: Callable[[], None]) -> Callable[[], None]:
        self.asked.append("prepare")
        work()

        def queue() -> None:
            self.asked.append("replay")
            self._queue.append(work)

        return queue

    def finish(self) -> None:
        self.asked.append("finish")
        for work in self._queue:
            work()
        self._queue.clear()


class CpuInPlaceOfCuda(HostDevice):
    def __init__(self, graphs: bool) -> None:
        pass


@pytest.fixture
def device() -> LazyDevice:
    return LazyDevice()


def buckets(forward: Forward, device: LazyDevice) -> TorchBuckets:
    return TorchBuckets(forward, device, SIZES, SIDE, WIDTHS)


# --- batches on buffers that never move


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_batch_is_padded_and_answers_what_the_network_answers(
    device: LazyDevice, images: Batch, count: int
) -> None:
    model = served()
    size = next(size for size in SIZES if size >= count)
    with torch.inference_mode():
        logits, embedding = model(torch.from_numpy(pad_batch(images[:count], size)))
    rows = buckets(model.forward, device).run(images[:count])
    np.testing.assert_array_equal(rows.logits, logits[:count].numpy())
    np.testing.assert_array_equal(rows.embedding, embedding[:count].numpy())


def test_work_is_queued_in_order_and_awaited_once(device: LazyDevice, images: Batch) -> None:
    run = buckets(served().forward, device).run
    run(images[:3])
    run(images[:4])
    once = ["copy 4", "replay"]
    assert device.asked == [
        "prepare",
        *once,
        *["copy 3", "copy 3", "finish"],
        *once,
        *["copy 4", "copy 4", "finish"],
    ]


def test_padding_holds_this_batch_and_nothing_of_another(device: LazyDevice, images: Batch) -> None:
    seen: list[Tensor] = []
    model = served()

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(pixels.clone())
        return model.forward(pixels)

    run = buckets(forward, device).run
    run(images[:4])
    run(images[4:5].repeat(3, 0))
    np.testing.assert_array_equal(seen[-1].numpy(), images[[4, 4, 4, 4]])


def test_buffers_have_fixed_addresses(device: LazyDevice, images: Batch) -> None:
    addresses = []
    model = served()

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        addresses.append(pixels.data_ptr())
        return model.forward(pixels)

    run = buckets(forward, device).run
    for count in (1, 6, 2, 3, 5, 1):
        run(images[:count])
    assert len(set(addresses)) == 1


def test_rows_are_not_touched_by_later_runs(device: LazyDevice, images: Batch) -> None:
    run = buckets(served().forward, device).run
    first = run(images[:2])
    kept = first.logits.copy(), first.embedding.copy()
    run(images[2:4])
    np.testing.assert_array_equal(first.logits, kept[0])
    np.testing.assert_array_equal(first.embedding, kept[1])
    first.logits[:] = 7.0  # the rows are the caller's own
    np.testing.assert_array_equal(run(images[:2]).logits, kept[0])


def test_a_replay_runs_the_network_and_copies_nothing(device: LazyDevice, images: Batch) -> None:
    opened = buckets(served().forward, device)
    opened.run(images[:4])
    device.asked.clear()
    opened.replay(4, times=3)
    assert device.asked == ["replay", "replay", "replay", "finish"]


def test_a_run_leaves_its_batch_as_it_was(device: LazyDevice, images: Batch) -> None:
    batch = images[:3].copy()
    buckets(served().forward, device).run(batch)
    np.testing.assert_array_equal(batch, images[:3])


def test_a_batch_above_the_largest_size_is_refused(device: LazyDevice, images: Batch) -> None:
    with pytest.raises(ValueError, match="exceeds the largest prepared, 6"):
        buckets(served().forward, device).run(images.repeat(2, 0))


def test_runs_from_several_threads_do_not_mix(device: LazyDevice, images: Batch) -> None:
    run = buckets(served().forward, device).run
    expected = [run(images[n : n + 2]).logits.tobytes() for n in range(4)]
    together = threading.Barrier(4, timeout=PATIENCE_SECONDS)

    def run_often(n: int) -> set[bytes]:
        together.wait()
        return {run(images[n : n + 2]).logits.tobytes() for _ in range(20)}

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(run_often, n) for n in range(4)]
        for n, answer in enumerate(answers):
            assert answer.result(timeout=PATIENCE_SECONDS) == {expected[n]}


# --- compiled, one shape at a time


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CountingCompiler:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.compiled = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: object) -> Callable[..., Any]:
        self.compiled += 1

        def run(*inputs: Tensor) -> Any:
            self.runs += 1
            return graph(*inputs)

        return run


@pytest.mark.usefixtures("_fresh_compiler")
def test_eleven_sizes_are_compiled_in_another_thread_than_the_one_that_opened() -> None:
    sizes = bucket_sizes(1024)
    assert len(sizes) == 11, "more than the eight that dynamo compiles on its own"
    compiler = CountingCompiler()
    forward = compile_network(torch.nn.Linear(3, 2, bias=False).eval(), compiler)

    def run_all() -> None:
        with torch.inference_mode():
            for size in sizes:
                forward(torch.zeros(size, 3))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run_all).result(timeout=PATIENCE_SECONDS)
    run_all()
    assert compiler.compiled == 11
    assert compiler.runs == 22


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_shape_beyond_the_limit_raises_and_never_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pytorch_compile, "RECOMPILE_LIMIT", 2)
    forward = compile_network(torch.nn.Linear(3, 2).eval(), CountingCompiler())
    with torch.inference_mode():
        forward(torch.zeros(1, 3))
        forward(torch.zeros(2, 3))
        with pytest.raises(FailOnRecompileLimitHit):
            forward(torch.zeros(4, 3))


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_network_is_compiled_whole_once_for_each_size(images: Batch) -> None:
    compiler, model = CountingCompiler(), served()
    run = TorchBuckets(compile_network(model, compiler), HostDevice(), (1, 3), SIDE, WIDTHS).run
    for _ in range(2):
        for count in (1, 2, 3):
            rows = run(images[:count])
            with torch.inference_mode():
                logits, _ = model(torch.from_numpy(images[:count]))
            np.testing.assert_allclose(rows.logits, logits.numpy(), rtol=0, atol=1e-5)
    assert compiler.compiled == 2
    assert compiler.runs == 6 + 2, "a prepared size has run once before"


class SmallestNetwork(torch.nn.Module):
    """Compiles in seconds, where the smallest MetaFormer takes most of a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(SIDE * SIDE * 3, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        positive = torch.relu(pixels.float().flatten(1) / 255 - 0.5)
        embedding = positive * positive
        return self.fc(embedding), embedding


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's, about torch itself
def test_inductor_compiles_on_the_cpu_and_answers_the_same(
    images: Batch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = what_keeps_from_compiling("cpu")
    if missing:
        not_here(missing)
    config = torch._inductor.config
    monkeypatch.setattr(config, "compile_threads", 1)  # else it leaves workers
    # Trying out vector units and compiling headers for later take most of the time.
    monkeypatch.setattr(config.cpp, "vec_isa_ok", False)
    monkeypatch.setattr(config, "cpp_cache_precompile_headers", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = SmallestNetwork().eval()
    widths = 2, SIDE * SIDE * 3
    run = TorchBuckets(compile_network(model), HostDevice(), (2,), SIDE, widths).run
    rows = run(images[:1])
    with torch.inference_mode():
        logits, embedding = model(torch.from_numpy(images[:1]))
    np.testing.assert_allclose(rows.logits, logits.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows.embedding, embedding.numpy(), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_path_is_opened_with_its_first_size_ready(
    images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = CountingCompiler()
    monkeypatch.setattr(
        pytorch_paths, "compile_network", lambda model, mode: compile_network(model, compiler)
    )
    path = TorchPath("cpu", "bf16", compiled=True, cuda_graphs=False)
    run = open_path(served(), path, (1, 2), SIDE, WIDTHS).run
    assert compiler.compiled == 1
    eager = TorchPath("cpu", "bf16", False, False)
    cast = open_path(served(), eager, (1, 2), SIDE, WIDTHS).run
    np.testing.assert_allclose(run(images[:2]).logits, cast(images[:2]).logits, rtol=0, atol=1e-3)
    assert compiler.compiled == 2


def test_a_network_that_cannot_be_compiled_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> Forward:
        def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("inductor raised:\nLinkError: no libc\nand said so at length")

        return forward

    monkeypatch.setattr(pytorch_paths, "compile_network", fail)
    with pytest.raises(StartupError, match="raised: LinkError: no libc; set METASERVE_TORCH_C"):
        open_path(served(), TorchPath("cpu", "fp32", True, False), (1, 2), SIDE, WIDTHS)


@pytest.mark.parametrize(
    ("path", "said", "sentence"),
    [
        (
            TorchPath("cpu", "fp32", compiled=True, cuda_graphs=True),
            "no kernel",
            "cpu (compiled): no kernel; set METASERVE_TORCH_COMPILE=off",
        ),
        (
            TorchPath("cuda", "bf16", compiled=True, cuda_graphs=True),
            "CUDA out of memory. Tried",
            "cuda (compiled, CUDA graphs): CUDA out of memory. Tried; "
            "lower METASERVE_MAX_BATCH_SIZE, or free memory there",
        ),
        (
            TorchPath("cuda", "bf16", compiled=False, cuda_graphs=True),
            "capture failed",
            "cuda (eager, CUDA graphs): capture failed; set METASERVE_CUDA_GRAPHS=false",
        ),
        (
            TorchPath("cuda", "bf16", compiled=False, cuda_graphs=False),
            "CUDA error",
            "cuda (eager, no CUDA graphs): CUDA error; "
            "check the driver, or set METASERVE_DEVICE=cpu",
        ),
    ],
)
def test_what_does_not_start_says_on_which_path_and_what_may_help(
    monkeypatch: pytest.MonkeyPatch, path: TorchPath, said: str, sentence: str
) -> None:
    class Failing(CpuInPlaceOfCuda):
        def prepare(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError(said)

    monkeypatch.setattr(pytorch_paths, "CudaDevice", Failing)
    monkeypatch.setattr(pytorch_paths, "HostDevice", lambda: Failing(graphs=False))
    with pytest.raises(StartupError) as caught:
        open_path(served(), path, (1, 2), SIDE, WIDTHS)
    assert str(caught.value) == f"torch cannot prepare the network on {sentence}"


def test_buffers_that_do_not_fit_are_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(CpuInPlaceOfCuda):
        def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pytorch_paths, "CudaDevice", Full)
    with pytest.raises(StartupError, match="out of memory; lower METASERVE_MAX_BATCH_SIZE"):
        open_path(served(), TorchPath("cuda", "bf16", False, True), (1, 2), SIDE, WIDTHS)


# --- which path


@pytest.mark.parametrize(
    ("use_cuda", "precision", "compiling", "graphs", "found", "words"),
    [
        (False, "auto", "auto", True, ("fp32", False), "eager, 3 threads"),
        (False, "bf16", "off", True, ("bf16", False), "eager, 3 threads"),
        (False, "auto", "on", True, ("fp32", True), "compiled, 3 threads"),
        (True, "auto", "auto", True, ("bf16", True), "compiled, CUDA graphs"),
        (True, "fp16", "auto", False, ("fp16", True), "compiled, no CUDA graphs"),
        (True, "fp32", "off", True, ("fp32", False), "eager, CUDA graphs"),
    ],
)
def test_settings_and_device_choose_the_path(
    monkeypatch: pytest.MonkeyPatch,
    use_cuda: bool,
    precision: Any,
    compiling: Any,
    graphs: bool,
    found: tuple[str, bool],
    words: str,
) -> None:
    monkeypatch.setattr(pytorch_paths, "what_keeps_from_compiling", lambda device: None)
    path = choose_path(use_cuda, precision, compiling, graphs)
    assert (path.precision, path.compiled) == found
    assert path.words(3) == words
    assert path.prepares_sizes == (use_cuda or path.compiled)


def test_without_a_compiler_auto_says_why_and_on_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pytorch_paths, "what_keeps_from_compiling", lambda device: "no compiler")
    path = choose_path(True, "auto", "auto", True)
    assert path.words(1) == "eager (no compiler), CUDA graphs"
    with pytest.raises(StartupError, match="METASERVE_TORCH_COMPILE=on cannot be met: no compiler"):
        choose_path(True, "auto", "on", True)
    assert choose_path(False, "auto", "auto", True).words(1) == "eager, 1 thread"


def test_a_compiler_is_looked_for_where_the_system_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert what_keeps_from_compiling("cpu") == "there is no C++ compiler"
    compiler = tmp_path / "g++"
    compiler.write_text("")
    compiler.chmod(0o755)
    assert what_keeps_from_compiling("cpu") is None


# --- on a GPU, as far as the CPU can tell


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_float32_on_a_gpu_is_not_rounded_to_tf32(
    monkeypatch: pytest.MonkeyPatch, images: Batch, precision: Any
) -> None:
    monkeypatch.setattr(pytorch_paths, "CudaDevice", CpuInPlaceOfCuda)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    path = TorchPath("cuda", precision, False, True)
    rows = open_path(served(), path, SIZES, SIDE, WIDTHS).run(images[:3])
    assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")
    assert rows.logits.shape == (3, CLASSES)
    assert rows.logits.dtype == np.float32


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_on_a_gpu_the_network_is_cast_and_laid_out_channels_last(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytorch_paths, "CudaDevice", lambda graphs: HostDevice())
    model = ServedModel(network(CAFORMER), InputSpec(size=CAFORMER.input_size)).eval()
    stem = model.network.get_submodule("stem.conv")
    path = TorchPath("cuda", precision, compiled=False, cuda_graphs=False)
    open_path(model, path, (1,), CAFORMER.input_size, (CLASSES, CAFORMER.embedding_dim))
    weight = stem.weight
    assert isinstance(weight, Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert weight.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
