"""The examples run: every module imports, and the training script trains what it says."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import examples
from app.cli import main

MODULES = [module.name for module in pkgutil.walk_packages(examples.__path__, "examples.")]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_of_the_examples_imports(name: str) -> None:
    importlib.import_module(name)


def test_training_script_writes_a_checkpoint_that_exports(tmp_path: Path) -> None:
    weights = tmp_path / "digits.safetensors"
    command = [
        sys.executable,
        "-m",
        "examples.digits.train",
        "--out",
        str(weights),
        "--epochs",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    arguments = ["--checkpoint", str(weights), "--out", str(tmp_path / "digits")]
    assert main(["export", "caformer_digits", *arguments]) == 0
