"""torch.compile for a fixed set of batch sizes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from app.backends.pytorch_buckets import Forward

# Dynamo compiles a function eight times and then runs it as it is. Every batch size is one time,
# and eleven sizes lead up to the largest batch that a setting allows; a process may open several
# backends one after the other.
RECOMPILE_LIMIT = 256

MODES = {"cuda": "max-autotune-no-cudagraphs", "cpu": "default"}
"""Our own CUDA graphs replay the kernels; those of `max-autotune` overwrite what they answered."""


def what_keeps_from_compiling(device: str) -> str | None:
    """Return what is missing for torch's compiler on `cpu` or `cuda`, or None."""
    if device == "cuda":
        if find_spec("triton") is None:
            return "triton is not installed"
        names = [os.environ.get("CC"), "cc", "gcc", "clang"]
        kind = "C"
    else:
        names = [os.environ.get("CXX"), "g++", "clang++"]
        kind = "C++"
    if not any(name and shutil.which(name) for name in names):
        return f"there is no {kind} compiler"
    return None


def compile_network(
    model: nn.Module, backend: str | Callable[..., Any] = "inductor", mode: str | None = None
) -> Forward:
    """Return the network, to be compiled anew for each shape that it is called with.

    A shape that cannot be compiled whole raises; nothing runs uncompiled in silence.
    """
    compiled: Forward = torch.compile(
        model, dynamic=False, fullgraph=True, backend=backend, mode=mode
    )

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        # Dynamo's settings belong to the thread that sets them; a size may be compiled in any.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled(pixels)

    return forward
