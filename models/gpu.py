"""What the CUDA driver says of this machine's GPU, asked without loading any library but it.

A TensorRT runtime without a driver kills the process; whoever wants to touch one asks here first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER = "libcuda.so.1"
# Where the kernel shows an NVIDIA GPU: on Linux, and on Linux inside Windows.
DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))

# Of the CUDA driver API: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_CAPABILITY = (75, 76)
_NAME_BYTES = 256


class NoGpuError(Exception):
    """There is no GPU to use; the message is the second half of a sentence, the reason."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process may use.

    Attributes:
        name: as its driver calls it, for example `NVIDIA H200`.
        compute_capability: of its architecture, for example `9.0`.
    """

    name: str
    compute_capability: str


def find_gpu(
    device_files: tuple[Path, ...] = DEVICE_FILES,
    load_library: Callable[[str], Any] = ctypes.CDLL,
) -> Gpu:
    """Return the GPU that CUDA calls device 0.

    Args:
        device_files: one of them must exist; a container without GPUs may hold the driver's
            library all the same.
        load_library: opens the driver's library by its name.

    Raises:
        NoGpuError: with the reason.
    """
    if not any(file.exists() for file in device_files):
        raise NoGpuError(f"there is none here (no {device_files[0]})")
    try:
        driver = load_library(DRIVER)
    except OSError as error:
        raise NoGpuError(f"the CUDA driver's library {DRIVER} cannot be loaded") from error
    count, device = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call(driver, "cuInit", 0)
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise NoGpuError("the CUDA driver shows none; check CUDA_VISIBLE_DEVICES")
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    _call(driver, "cuDeviceGetName", name, _NAME_BYTES, device)
    major, minor = (_attribute(driver, number, device) for number in _CAPABILITY)
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}")


def _attribute(driver: Any, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), number, device)
    return value.value


def _call(driver: Any, function: str, *arguments: Any) -> None:
    code = getattr(driver, function)(*arguments)
    if code != 0:
        raise NoGpuError(f"the CUDA driver does not start ({function} gave error {code})")
