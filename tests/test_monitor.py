"""mvlm_core/monitor.py: thread counts, memory, and sampled load."""

from __future__ import annotations

import mmap
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from mvlm_core import monitor
from mvlm_core.monitor import (
    available_memory,
    available_threads,
    memory_in_use,
    peak_memory,
    reset_peak_memory,
    resource_lines,
)
from tests.helpers import executable, needs_cuda, without_cuda

# --- threads and memory -----------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("no_thread_setting")


def topology_of(folder: Path, siblings: dict[int, str]) -> Path:
    for processor, text in siblings.items():
        file = folder / f"cpu{processor}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(text + "\n", encoding="ascii")
    return folder


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Eight processors on four cores, all allowed, no container limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    topology = topology_of(tmp_path / "cpu", {n: f"{n % 4},{n % 4 + 4}" for n in range(8)})
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "membership").write_text("0::/\n", encoding="ascii")
    return {
        "topology": topology,
        "cgroup_root": tmp_path / "cgroup",
        "cgroup_membership": tmp_path / "membership",
    }


def test_threads_are_physical_cores(machine: dict[str, Path]) -> None:
    threads, why = available_threads(**machine)
    assert threads == 4 and "physical cores of the 8 logical CPUs" in why


@pytest.mark.parametrize(("allowed", "expected"), [({0, 4}, 1), ({0, 1}, 2), ({0, 1, 2, 4, 5}, 3)])
def test_threads_respect_affinity(
    machine: dict[str, Path], monkeypatch: pytest.MonkeyPatch, allowed: set[int], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    assert available_threads(**machine)[0] == expected


def test_threads_without_topology_count_processors(machine: dict[str, Path], tmp_path: Path) -> None:
    assert available_threads(**{**machine, "topology": tmp_path / "missing"})[0] == 8


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), ("250000 100000", 2), ("9 1", 4)],
)
def test_threads_respect_cgroup_version_2(machine: dict[str, Path], quota: str, expected: int) -> None:
    (machine["cgroup_root"] / "cpu.max").write_text(quota + "\n", encoding="ascii")
    assert available_threads(**machine)[0] == expected


def test_threads_respect_a_parent_cgroup_limit(machine: dict[str, Path]) -> None:
    machine["cgroup_membership"].write_text("0::/user/job\n", encoding="ascii")
    own = machine["cgroup_root"] / "user" / "job"
    own.mkdir(parents=True)
    (own / "cpu.max").write_text("max 100000\n", encoding="ascii")
    (own.parent / "cpu.max").write_text("300000 100000\n", encoding="ascii")
    threads, why = available_threads(**machine)
    assert threads == 3 and "container limit" in why


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("200000", 2)])
def test_threads_respect_cgroup_version_1(machine: dict[str, Path], quota: str, expected: int) -> None:
    machine["cgroup_membership"].write_text("3:memory:/x\n2:cpu,cpuacct:/box\n", encoding="ascii")
    folder = machine["cgroup_root"] / "cpu,cpuacct" / "box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(quota + "\n", encoding="ascii")
    (folder / "cpu.cfs_period_us").write_text("100000\n", encoding="ascii")
    assert available_threads(**machine)[0] == expected


@pytest.mark.parametrize(("asked", "expected"), [("3", 3), ("16,2", 16), ("none", 4), ("0", 4), ("-2", 4), ("", 4)])
def test_valid_omp_num_threads_overrides_the_thread_count(
    machine: dict[str, Path], monkeypatch: pytest.MonkeyPatch, asked: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert available_threads(**machine)[0] == expected


def test_available_memory_respects_the_container_limit(machine: dict[str, Path]) -> None:
    paths = {name: machine[name] for name in ("cgroup_root", "cgroup_membership")}
    whole = available_memory(**paths)
    (machine["cgroup_root"] / "memory.max").write_text("max\n", encoding="ascii")
    assert available_memory(**paths) == whole
    (machine["cgroup_root"] / "memory.max").write_text("1048576\n", encoding="ascii")
    assert available_memory(**paths) == 2**20


def touched(size: int) -> mmap.mmap:
    """Memory mapped directly from the system, with every page in use; malloc might keep what is freed."""
    memory = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    return memory


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel resets no peak here")
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
