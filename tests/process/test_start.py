"""A start that lacks a library or the right GPU: one sentence, exit code 2, a real process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.package import MANIFEST, hash_files
from models.tensorrt import operating_system
from tests.servers import EMBEDDED

WITHOUT = "import sys\nsys.modules[{!r}] = None\n"
ANOTHER_GPU = """
import models.gpu
models.gpu.find_gpu = lambda: models.gpu.Gpu('NVIDIA L4', '8.9')
"""
SERVE = "import sys\nfrom app.cli import main\nsys.exit(main(['serve', '--port=0', *sys.argv[1:]]))"


def start(preparation: str, *arguments: str | Path) -> tuple[int, list[str]]:
    """Serve in a process that was prepared; returns its exit code and what it says of itself."""
    done = subprocess.run(
        [sys.executable, "-c", preparation + SERVE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, [line for line in done.stderr.splitlines() if "metaserve: " in line]


@pytest.mark.parametrize(
    ("backend", "library", "extra"),
    [
        ("onnxruntime", "onnxruntime", "metaserve[cpu]"),
        ("torch", "torch", "metaserve[torch]"),
        ("triton", "tritonclient", "metaserve[triton]"),
    ],
)
def test_a_missing_extra_is_named(backend: str, library: str, extra: str) -> None:
    code, said = start(WITHOUT.format(library), "--backend", backend)
    assert code == 2
    (sentence,) = said
    assert f"install {extra}" in sentence


def test_a_package_without_an_engine_is_told_how_to_get_one() -> None:
    code, (sentence,) = start(ANOTHER_GPU, "--backend", "tensorrt")
    assert code == 2
    assert "holds no model.plan" in sentence


def test_an_engine_for_another_gpu_is_refused_by_its_name(tmp_path: Path) -> None:
    package = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    (package / "model.plan").write_bytes(b"an engine")
    manifest = json.loads((package / MANIFEST).read_text())
    manifest["plan"] = {
        "module": "tensorrt",
        "version": "11.4.0",
        "compute_capability": "9.0",
        "operating_system": operating_system(),
        "min_batch_size": 1,
        "opt_batch_size": 8,
        "max_batch_size": 8,
        "precision": "fp32",
        "onnx_sha256": manifest["files"]["model.onnx"],
        "options": {},
    }
    manifest["files"] = dict(hash_files(package))
    (package / MANIFEST).write_text(json.dumps(manifest))
    code, (sentence,) = start(ANOTHER_GPU, "--backend", "tensorrt", "--model", package)
    assert code == 2
    assert "compute capability 9.0 and NVIDIA L4 has 8.9" in sentence
