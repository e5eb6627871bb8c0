"""mvlm_core/monitor.py: memory in use and sampled load."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from mvlm_core import monitor
from mvlm_core.monitor import memory_in_use, peak_memory, reset_peak_memory, resource_lines
from tests.helpers import executable, needs_cuda, needs_peak_reset, touched, without_cuda


@needs_peak_reset
def test_peak_memory_includes_freed_memory_until_reset() -> None:
    size = 128 * 2**20
    earlier = touched(2 * size)
    earlier_peak = peak_memory()
    earlier.close()
    reset_peak_memory()
    small = peak_memory()
    assert small < earlier_peak - size
    before = memory_in_use()
    touched(size).close()
    assert peak_memory() - small == pytest.approx(size, rel=0.1)
    assert peak_memory() == pytest.approx(before + size, rel=0.1)


@needs_cuda
def test_cuda_peak_memory_includes_freed_tensors() -> None:
    reset_peak_memory("cuda")
    block = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    held = memory_in_use("cuda")
    del block
    assert peak_memory("cuda") >= held >= 2**26


# --- sampling ---------------------------------------------------------------------------------------------


def first_line(seconds: float = 0.02) -> tuple[str, str]:
    """The source and the first line of a sampling context that lasts until that line arrives."""
    lines: list[str] = []
    spoken = threading.Event()

    def take(line: str) -> None:
        lines.append(line)
        spoken.set()

    with resource_lines(take, seconds=seconds):
        assert spoken.wait(10)
    count = len(lines)
    time.sleep(3 * seconds)
    assert len(lines) == count, "a line came after the end"
    return ("NVML" if lines[0].startswith("GPU") else "psutil"), lines[0]


def test_sampling_without_a_gpu(empty_path: Path) -> None:
    source, line = first_line()
    assert source == "psutil"
    assert "CPU" in line and "GiB used by this run" in line


@without_cuda
def test_sampling_logs_why_nvml_is_unavailable(empty_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    executable(empty_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    monitor.log.propagate = True
    with caplog.at_level("INFO", "mvlm"):
        assert first_line()[0] == "psutil"
    assert "no GPU statistics from NVML: NVMLError" in caplog.text


def test_sampling_omits_readings_a_gpu_does_not_support(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(empty_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    memory = SimpleNamespace(used=40 * 2**30, total=140 * 2**30)
    power = {0: 645_200}
    monkeypatch.setattr("pynvml.nvmlInit", lambda: None)
    monkeypatch.setattr("pynvml.nvmlShutdown", lambda: None)
    monkeypatch.setattr("pynvml.nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr("pynvml.nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr("pynvml.nvmlDeviceGetMemoryInfo", lambda _: memory)
    monkeypatch.setattr("pynvml.nvmlDeviceGetUtilizationRates", lambda _: SimpleNamespace(gpu=97))
    monkeypatch.setattr("pynvml.nvmlDeviceGetTemperature", lambda *_: 61)

    def power_of(index: int) -> int:
        if index not in power:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return power[index]

    monkeypatch.setattr("pynvml.nvmlDeviceGetPowerUsage", power_of)
    source, line = first_line()
    assert source == "NVML"
    one = "memory 40.0 of 140.0 GiB, busy 97 %, temperature 61 C"
    assert line == f"GPU 0: {one}, power 645 W; GPU 1: {one}"


@needs_cuda
def test_sampling_by_nvml() -> None:
    source, line = first_line()
    assert source == "NVML" and "GPU 0: memory" in line and "busy" in line


def test_failing_sampling_callback_is_logged(empty_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed = threading.Event()

    def fail(line: str) -> None:
        failed.set()
        raise OSError("disk full")

    monitor.log.propagate = True
    with resource_lines(fail, seconds=0.01):
        assert failed.wait(10)
    assert "disk full" in caplog.text
