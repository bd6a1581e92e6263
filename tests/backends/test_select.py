"""A name becomes a backend, or one sentence says what is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from app.backends import ort as ort_backend
from app.backends.base import Backend
from app.backends.fake import FakeBackend
from app.backends.select import select_backend
from app.errors import StartupError
from app.settings import Settings
from models.gpu import Gpu, NoGpuError
from models.package import Package, PackageError, find_package, open_package
from tests.required import require


@pytest.fixture(scope="module")
def package() -> Package:
    return open_package(find_package("caformer_digits"))


def select(package: Package, threads: int = 1, **settings: Any) -> Backend:
    return select_backend(Settings(**settings), package, threads)


def refusal(package: Package, **settings: Any) -> str:
    """Return the sentence with which these settings are refused."""
    with pytest.raises(StartupError) as caught:
        select(package, **settings)
    sentence = str(caught.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


class FakeSession:
    """A session that runs elsewhere than it was asked to."""

    providers: tuple[str, ...] = ("CPUExecutionProvider",)

    def __init__(self, path: str, options: object, **how: object) -> None:
        pass

    def get_providers(self) -> list[str]:
        return list(self.providers)


@pytest.fixture
def onnxruntime(monkeypatch: pytest.MonkeyPatch) -> Any:
    """onnxruntime, as if it were a build for GPUs on a machine that has one."""
    module = require("onnxruntime")
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(module, "get_available_providers", lambda: available)
    monkeypatch.setattr(module, "preload_dlls", lambda: None, raising=False)
    return module


# --- what is there


def test_each_name_gives_its_backend(package: Package) -> None:
    for name in ("onnxruntime", "torch", "fake"):
        if name != "fake":
            require(name)
        backend = select(package, backend=name, device="cpu")
        assert backend.info.name == name
        assert backend.info.device == "cpu"
        backend.close()


def test_the_fake_backend_has_the_packages_shapes(package: Package) -> None:
    backend = select(package, backend="fake")
    assert isinstance(backend, FakeBackend)
    manifest = package.manifest
    info = backend.info
    assert (info.input_size, info.classes, info.embedding_dim) == (
        manifest.input.size,
        manifest.classes,
        manifest.embedding_dim,
    )


def test_onnxruntime_tells_its_version_provider_and_threads(package: Package) -> None:
    module = require("onnxruntime")
    backend = select(package, threads=3, device="cpu")
    expected = f"onnxruntime {module.__version__} CPUExecutionProvider, 3 threads"
    assert backend.info.runtime == expected
    backend.close()


# --- what is missing


@pytest.mark.parametrize(
    ("settings", "provider"),
    [
        ({"device": "cuda"}, "CUDAExecutionProvider"),
        ({"ort_provider": "cuda"}, "CUDAExecutionProvider"),
        ({"ort_provider": "tensorrt"}, "TensorrtExecutionProvider"),
    ],
    ids=["device cuda", "provider cuda", "provider tensorrt"],
)
def test_a_provider_this_build_lacks_is_refused(
    package: Package, settings: dict[str, str], provider: str
) -> None:
    module = require("onnxruntime")
    if provider in module.get_available_providers():
        pytest.skip(f"this build has {provider}")
    sentence = refusal(package, **settings)
    assert f"has no {provider}" in sentence
    assert "CPUExecutionProvider" in sentence, "it says what there is"
    assert "metaserve[gpu]" in sentence


def test_torch_without_a_gpu_refuses_device_cuda(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = require("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in refusal(package, backend="torch", device="cuda")


@pytest.mark.parametrize(
    ("backend", "missing", "extra"),
    [
        ("onnxruntime", "onnxruntime", "metaserve[cpu] or metaserve[gpu]"),
        ("torch", "torch", "metaserve[torch]"),
        ("torch", "safetensors", "metaserve[torch]"),
    ],
)
def test_a_library_that_does_not_import_names_the_extra(
    package: Package,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    missing: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    sentence = refusal(package, backend=backend)
    assert missing in sentence
    assert f"install {extra}" in sentence


def test_triton_without_its_client_names_the_extra(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.aio", None)
    # As before any test imported it.
    monkeypatch.delitem(sys.modules, "app.backends.triton_connection", raising=False)
    monkeypatch.delattr("app.backends.triton_connection", raising=False)
    assert "install metaserve[triton]" in refusal(package, backend="triton")


def test_both_builds_of_onnxruntime_are_refused(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_backend, "distribution", lambda name: name)
    sentence = refusal(package)
    assert "onnxruntime and onnxruntime-gpu are both installed" in sentence
    assert "uninstall both" in sentence


@pytest.mark.parametrize("installed", ["onnxruntime", "onnxruntime-gpu"])
def test_one_build_of_onnxruntime_is_enough(
    package: Package, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    require("onnxruntime")

    def distribution(name: str) -> str:
        if name != installed:
            raise PackageNotFoundError(name)
        return name

    monkeypatch.setattr(ort_backend, "distribution", distribution)
    select(package, device="cpu").close()


def test_a_session_that_silently_fell_back_is_refused(
    package: Package, monkeypatch: pytest.MonkeyPatch, onnxruntime: Any
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    sentence = refusal(package, device="cuda")
    assert "fell back to CPUExecutionProvider" in sentence
    assert "CUDAExecutionProvider was asked for" in sentence


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_session_on_the_provider_asked_for_is_taken(
    package: Package,
    monkeypatch: pytest.MonkeyPatch,
    onnxruntime: Any,
    tmp_path: Path,
    provider: str,
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # the TensorRT provider sets it
    names = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

    class GpuSession(FakeSession):
        providers = (names[provider], "CPUExecutionProvider")

    monkeypatch.setattr(onnxruntime, "InferenceSession", GpuSession)
    info = select(package, ort_provider=provider, ort_cache_dir=tmp_path).info
    assert info.device == "cuda:0"
    assert names[provider] in info.runtime
    assert ("CUDA graphs" if provider == "cuda" else "no CUDA graphs") in info.runtime
    assert info.max_batch_size == 32


@pytest.mark.parametrize(("gpu", "expected"), [(True, "CUDA"), (False, "CPU")])
def test_auto_takes_cuda_only_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, expected: str
) -> None:
    def find_gpu() -> Gpu:
        if not gpu:
            raise NoGpuError("the driver shows none")
        return Gpu("NVIDIA H200", "9.0")

    monkeypatch.setattr(ort_backend, "find_gpu", find_gpu)
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert ort_backend._choose("auto", available) == f"{expected}ExecutionProvider"
    assert ort_backend._choose("auto", available[1:]) == "CPUExecutionProvider"


def test_a_session_that_does_not_start_is_told_in_one_sentence(
    package: Package, monkeypatch: pytest.MonkeyPatch, onnxruntime: Any
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("libcublas is not there\nand a long trace\nfollows")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    sentence = refusal(package, device="cuda")
    assert "cannot load" in sentence
    assert "libcublas is not there" in sentence


@pytest.mark.parametrize(
    ("backend", "missing"), [("onnxruntime", "model.onnx"), ("torch", "weights.safetensors")]
)
def test_a_package_without_the_backends_file_is_refused(
    package: Package, backend: str, missing: str
) -> None:
    require(backend)
    files = {name: sha for name, sha in package.manifest.files.items() if name != missing}
    bare = Package(package.path, package.manifest.model_copy(update={"files": files}))
    with pytest.raises(PackageError, match=f"holds no {missing}"):
        select(bare, backend=backend, device="cpu")


# --- only the one asked for


@pytest.mark.parametrize(
    ("backend", "others"),
    [
        ("onnxruntime", ["torch", "safetensors", "tritonclient"]),
        ("torch", ["onnxruntime", "tritonclient"]),
        ("fake", ["torch", "onnxruntime", "safetensors", "tritonclient"]),
    ],
)
def test_only_the_library_of_the_backend_asked_for_is_imported(
    backend: str, others: list[str]
) -> None:
    if backend != "fake":
        require(backend)
    program = (
        "import sys\n"
        "from app.backends.select import select_backend\n"
        "from app.settings import Settings\n"
        "from models.package import find_package, open_package\n"
        "package = open_package(find_package('caformer_digits'))\n"
        f"select_backend(Settings(backend={backend!r}, device='cpu'), package, 1).close()\n"
        "libraries = {'torch', 'onnxruntime', 'safetensors', 'tritonclient'}\n"
        "print(*sorted(set(sys.modules) & libraries))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert not set(imported) & set(others)
    assert backend == "fake" or backend in imported
