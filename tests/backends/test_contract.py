"""One contract for every backend that is installed, on the embedded package."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pytest

from app.backends.base import Backend
from app.backends.fake import FakeBackend
from app.types import Batch, Rows
from models.golden import golden_images
from models.package import Package, find_package, open_package
from models.tolerances import TOLERANCES, cosine_distance
from tests.backends.fake_tensorrt import open_fake_tensorrt
from tests.required import require

PATIENCE_SECONDS = 30.0

# How far an image's numbers may move with its batch; torch chooses its kernels by size.
BATCH_DEPENDENCE = {
    "fake": 0.0,
    "onnxruntime": 0.0,
    "torch": 1e-5,
    "tensorrt": 0.0,
    "triton": 0.0,
}


@pytest.fixture(scope="module")
def package() -> Package:
    return open_package(find_package("caformer_digits"))


def open_fake(package: Package) -> Backend:
    manifest = package.manifest
    return FakeBackend(manifest.input.size, manifest.classes, manifest.embedding_dim)


def open_onnxruntime(package: Package) -> Backend:
    require("onnxruntime")
    from app.backends.ort import OnnxRuntimeBackend

    return OnnxRuntimeBackend(package, "cpu", threads=2)


def open_torch(package: Package) -> Backend:
    require("torch")
    from app.backends.pytorch import TorchBackend

    return TorchBackend(package, "cpu", threads=1)


def open_torch_bf16(package: Package) -> Backend:
    require("torch")
    from app.backends.pytorch import TorchBackend

    return TorchBackend(package, "cpu", threads=1, precision="bf16")


def open_torch_in_sizes(package: Package) -> Backend:
    """The compiled path on the CPU: prepared sizes, padding, fixed buffers; not the compiler."""
    require("torch")
    from app.backends import pytorch_paths
    from app.backends.pytorch import TorchBackend

    with (
        patch.object(pytorch_paths, "what_keeps_from_compiling", lambda device: None),
        patch.object(pytorch_paths, "compile_network", lambda model, mode: model.forward),
    ):
        return TorchBackend(package, "cpu", threads=1, max_batch_size=8, compiling="on")


def open_triton(package: Package) -> Backend:
    require("tritonclient.grpc")
    from app.backends.triton import TritonBackend
    from tests.triton.shared import shared_server

    return TritonBackend(package, shared_server().url)


OPENERS: dict[str, Callable[[Package], Backend]] = {
    "fake": open_fake,
    "onnxruntime": open_onnxruntime,
    "torch": open_torch,
    "tensorrt": open_fake_tensorrt,
    "torch_bf16": open_torch_bf16,
    "torch_in_sizes": open_torch_in_sizes,
    "triton": open_triton,
}


@pytest.fixture(scope="module", params=OPENERS)
def backend(request: pytest.FixtureRequest, package: Package) -> Iterator[Backend]:
    backend = OPENERS[request.param](package)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def images(package: Package) -> Batch:
    """Five images, all different."""
    return golden_images(package.manifest.input.size, 5)


def assert_close(actual: Rows, expected: Rows, atol: float) -> None:
    np.testing.assert_allclose(actual.logits, expected.logits, rtol=0, atol=atol)
    np.testing.assert_allclose(actual.embedding, expected.embedding, rtol=0, atol=atol)


def part(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(rows.logits[start:stop], rows.embedding[start:stop])


def test_it_says_what_it_runs_and_where(backend: Backend, package: Package) -> None:
    info, manifest = backend.info, package.manifest
    assert info.name in OPENERS
    assert info.device == ("cuda:0" if info.name == "tensorrt" else "cpu")
    assert info.precision in ("fp32", "bf16")
    assert info.runtime
    assert info.input_size == manifest.input.size
    assert info.classes == manifest.classes
    assert info.embedding_dim == manifest.embedding_dim
    assert info.batches_in_flight >= 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_answers_float32_rows_that_are_finite(
    backend: Backend, images: Batch, size: int
) -> None:
    rows = backend.run(images[:size])
    assert rows.logits.shape == (size, backend.info.classes)
    assert rows.embedding.shape == (size, backend.info.embedding_dim)
    for array in (rows.logits, rows.embedding):
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


def test_different_images_get_different_rows(backend: Backend, images: Batch) -> None:
    rows = backend.run(images)
    assert len(np.unique(rows.logits, axis=0)) == len(images)
    assert len(np.unique(rows.embedding, axis=0)) == len(images)


def test_no_later_run_touches_earlier_rows(backend: Backend, images: Batch) -> None:
    first = backend.run(images[:2])
    logits, embedding = first.logits.copy(), first.embedding.copy()
    for _ in range(5):
        second = backend.run(images[2:4])
    assert first.logits.tobytes() == logits.tobytes()
    assert first.embedding.tobytes() == embedding.tobytes()
    for array in (second.logits, second.embedding):
        array[:] = 7.0  # the rows are the caller's own
    assert first.logits.tobytes() == logits.tobytes()
    assert backend.run(images[:2]).logits.tobytes() == logits.tobytes()


def test_a_run_leaves_its_batch_as_it_was(backend: Backend, images: Batch) -> None:
    batch = images.copy()
    backend.run(batch)
    np.testing.assert_array_equal(batch, images)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_an_image_gets_the_same_answer_alone_and_in_a_batch(
    backend: Backend, images: Batch, size: int
) -> None:
    together = backend.run(images[:size])
    for index in range(size):
        alone = backend.run(images[index : index + 1])
        tolerance = BATCH_DEPENDENCE[backend.info.name]
        in_company = part(together, index, index + 1)
        assert_close(alone, in_company, tolerance)
        if tolerance == 0:
            assert alone.logits.tobytes() == in_company.logits.tobytes()
            assert alone.embedding.tobytes() == in_company.embedding.tobytes()


def test_the_order_of_a_batch_is_kept(backend: Backend, images: Batch) -> None:
    forth = backend.run(images)
    back = backend.run(images[::-1].copy())
    reversed_back = Rows(back.logits[::-1], back.embedding[::-1])
    assert_close(forth, reversed_back, BATCH_DEPENDENCE[backend.info.name])


def test_runs_from_several_threads_do_not_mix(backend: Backend, images: Batch) -> None:
    expected = [backend.run(images[n : n + 2]) for n in range(4)]
    together = threading.Barrier(4, timeout=PATIENCE_SECONDS)

    def run_often(n: int) -> list[Rows]:
        together.wait()
        return [backend.run(images[n : n + 2]) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(run_often, n) for n in range(4)]
        for n, answer in enumerate(answers):
            for rows in answer.result(timeout=PATIENCE_SECONDS):
                assert_close(rows, expected[n], 1e-6)


@pytest.mark.parametrize("name", ["onnxruntime", "torch", "torch_in_sizes", "triton"])
def test_the_network_answers_what_the_package_says(
    name: str, package: Package, images: Batch
) -> None:
    backend = OPENERS[name](package)
    logits, embedding = package.golden
    assert_close(backend.run(images), Rows(logits, embedding), 1e-4)
    backend.close()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_one_thread_of_onnxruntime_answers_bit_for_bit_what_several_do(
    package: Package, images: Batch, size: int
) -> None:
    """The engine may answer an image on either; it must not show."""
    require("onnxruntime")
    from app.backends.ort import OnnxRuntimeBackend

    backends = [OnnxRuntimeBackend(package, "cpu", threads) for threads in (1, 2, 4)]
    narrow, *wide = [backend.run(images[:size]) for backend in backends]
    for rows in wide:
        assert rows.logits.tobytes() == narrow.logits.tobytes()
        assert rows.embedding.tobytes() == narrow.embedding.tobytes()
    for backend in backends:
        backend.close()


@pytest.mark.parametrize("name", ["torch_in_sizes", "tensorrt"])
def test_a_backend_on_prepared_sizes_says_which(name: str, package: Package) -> None:
    backend = OPENERS[name](package)
    sizes = backend.info.prepared_sizes
    backend.close()
    assert sizes is not None
    assert list(sizes) == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, backend.info.max_batch_size)


def test_only_onnxruntime_on_the_cpu_says_that_its_threads_are_its_own(backend: Backend) -> None:
    assert backend.info.threads == (2 if backend.info.name == "onnxruntime" else None)


def test_torch_and_onnxruntime_agree(package: Package) -> None:
    torch, onnxruntime = open_torch(package), open_onnxruntime(package)
    size = package.manifest.input.size
    images = np.random.default_rng(1).integers(0, 256, (8, size, size, 3), np.uint8)
    ours, theirs = torch.run(images), onnxruntime.run(images)
    assert_close(ours, theirs, 1e-4)
    np.testing.assert_array_equal(ours.logits.argmax(1), theirs.logits.argmax(1))
    torch.close()
    onnxruntime.close()


def test_torch_in_bf16_answers_within_its_tolerance(package: Package, images: Batch) -> None:
    backend = open_torch_bf16(package)
    assert backend.info.precision == "bf16"
    logits, embedding = package.golden
    rows = backend.run(images)
    difference = float(np.abs(rows.logits - logits).max())
    assert 1e-3 < difference <= TOLERANCES["bf16"].allowed(logits), "float32 would be nearer"
    assert cosine_distance(rows.embedding, embedding).max() <= TOLERANCES["bf16"].cosine
    backend.close()


@pytest.mark.parametrize("name", OPENERS)
def test_closing_frees_one_and_leaves_another_of_its_kind(
    name: str, package: Package, images: Batch
) -> None:
    closed, open_one = OPENERS[name](package), OPENERS[name](package)
    expected = open_one.run(images[:1])
    closed.run(images[:1])
    closed.close()
    assert open_one.run(images[:1]).logits.tobytes() == expected.logits.tobytes()
    open_one.close()


def test_the_fake_best_class_is_the_mean_of_the_pixels() -> None:
    backend = FakeBackend(input_size=4, classes=10)
    black = np.zeros((4, 4, 3), np.uint8)
    rows = backend.run(np.stack([black, black + 85, black + 255]))
    assert rows.logits.argmax(1).tolist() == [0, 3, 9]
    np.testing.assert_allclose(rows.embedding[1], np.arange(4) + 1 / 3, rtol=1e-6)
