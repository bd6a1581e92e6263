"""The driver is asked for a GPU, and every way of having none is a reason in words."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from models.gpu import DRIVER, Gpu, NoGpuError, find_gpu


class FakeDriver:
    """The driver's C functions, writing through the pointers they are given.

    Args:
        devices: how many GPUs there are.
        failing: a function that returns an error.
    """

    def __init__(self, devices: int = 1, failing: str | None = None) -> None:
        self._devices = devices
        self._failing = failing
        self.called: list[str] = []

    def _answer(self, function: str) -> int:
        self.called.append(function)
        return 100 if function == self._failing else 0

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._answer("cuInit")

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._devices
        return self._answer("cuDeviceGetCount")

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 40 + ordinal
        return self._answer("cuDeviceGet")

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        assert len(name) == size
        assert device.value == 40
        name.value = b"NVIDIA H200"
        return self._answer("cuDeviceGetName")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        assert device.value == 40
        value._obj.value = {75: 9, 76: 0}[attribute]
        return self._answer("cuDeviceGetAttribute")


@pytest.fixture
def device_file(tmp_path: Path) -> Path:
    path = tmp_path / "nvidiactl"
    path.touch()
    return path


def reason(*device_files: Path, driver: FakeDriver) -> str:
    with pytest.raises(NoGpuError) as caught:
        find_gpu(device_files, lambda name: driver)
    return str(caught.value)


def test_the_first_gpu_is_told_by_name_and_architecture(device_file: Path) -> None:
    opened = []

    def load(name: str) -> FakeDriver:
        opened.append(name)
        return FakeDriver(devices=2)

    assert find_gpu((Path("/nowhere"), device_file), load) == Gpu("NVIDIA H200", "9.0")
    assert opened == [DRIVER]


def test_without_a_device_file_the_driver_is_not_touched(tmp_path: Path) -> None:
    driver = FakeDriver()
    missing = tmp_path / "nvidiactl"
    assert reason(missing, driver=driver) == f"there is none here (no {missing})"
    assert driver.called == []


def test_a_driver_that_cannot_be_loaded_is_a_reason(device_file: Path) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(NoGpuError, match=r"driver's library libcuda\.so\.1 cannot be loaded"):
        find_gpu((device_file,), fail)


def test_a_driver_that_shows_no_gpu_is_a_reason(device_file: Path) -> None:
    driver = FakeDriver(devices=0)
    assert "check CUDA_VISIBLE_DEVICES" in reason(device_file, driver=driver)
    assert driver.called == ["cuInit", "cuDeviceGetCount"]


@pytest.mark.parametrize(
    "function", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute"]
)
def test_a_driver_that_answers_with_an_error_is_a_reason(device_file: Path, function: str) -> None:
    driver = FakeDriver(failing=function)
    assert f"({function} gave error 100)" in reason(device_file, driver=driver)
    assert driver.called[-1] == function, "nothing is asked after an error"
