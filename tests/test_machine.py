"""mvlm_core/machine.py: threads, memory, bf16, GPUs and build tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvlm_core import machine
from mvlm_core.machine import (
    available_memory,
    available_threads,
    compiler_problem,
    cpu_has_bf16,
    cpu_name,
    cuda_state,
    gpu_count,
    nvidia_gpu_expected,
    nvidia_gpu_possible,
)
from tests.helpers import executable, without_cuda

pytestmark = pytest.mark.usefixtures("no_thread_setting")


def topology_of(folder: Path, siblings: dict[int, str]) -> Path:
    for processor, text in siblings.items():
        file = folder / f"cpu{processor}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(text + "\n", encoding="ascii")
    return folder


@pytest.fixture
def eight_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
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


def test_threads_are_physical_cores(eight_cpus: dict[str, Path]) -> None:
    threads, why = available_threads(**eight_cpus)
    assert threads == 4 and "physical cores of the 8 logical CPUs" in why


@pytest.mark.parametrize(("allowed", "expected"), [({0, 4}, 1), ({0, 1}, 2), ({0, 1, 2, 4, 5}, 3)])
def test_threads_respect_affinity(
    eight_cpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch, allowed: set[int], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    assert available_threads(**eight_cpus)[0] == expected


def test_threads_without_topology_count_processors(eight_cpus: dict[str, Path], tmp_path: Path) -> None:
    assert available_threads(**{**eight_cpus, "topology": tmp_path / "missing"})[0] == 8


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), ("250000 100000", 2), ("9 1", 4)],
)
def test_threads_respect_cgroup_version_2(eight_cpus: dict[str, Path], quota: str, expected: int) -> None:
    (eight_cpus["cgroup_root"] / "cpu.max").write_text(quota + "\n", encoding="ascii")
    assert available_threads(**eight_cpus)[0] == expected


def test_threads_respect_a_parent_cgroup_limit(eight_cpus: dict[str, Path]) -> None:
    eight_cpus["cgroup_membership"].write_text("0::/user/job\n", encoding="ascii")
    own = eight_cpus["cgroup_root"] / "user" / "job"
    own.mkdir(parents=True)
    (own / "cpu.max").write_text("max 100000\n", encoding="ascii")
    (own.parent / "cpu.max").write_text("300000 100000\n", encoding="ascii")
    threads, why = available_threads(**eight_cpus)
    assert threads == 3 and "container limit" in why


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("200000", 2)])
def test_threads_respect_cgroup_version_1(eight_cpus: dict[str, Path], quota: str, expected: int) -> None:
    eight_cpus["cgroup_membership"].write_text("3:memory:/x\n2:cpu,cpuacct:/box\n", encoding="ascii")
    folder = eight_cpus["cgroup_root"] / "cpu,cpuacct" / "box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(quota + "\n", encoding="ascii")
    (folder / "cpu.cfs_period_us").write_text("100000\n", encoding="ascii")
    assert available_threads(**eight_cpus)[0] == expected


@pytest.mark.parametrize(("asked", "expected"), [("3", 3), ("16,2", 16), ("none", 4), ("0", 4), ("-2", 4), ("", 4)])
def test_valid_omp_num_threads_overrides_the_thread_count(
    eight_cpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch, asked: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert available_threads(**eight_cpus)[0] == expected


def test_available_memory_respects_the_container_limit(eight_cpus: dict[str, Path]) -> None:
    paths = {name: eight_cpus[name] for name in ("cgroup_root", "cgroup_membership")}
    whole = available_memory(**paths)
    (eight_cpus["cgroup_root"] / "memory.max").write_text("max\n", encoding="ascii")
    assert available_memory(**paths) == whole
    (eight_cpus["cgroup_root"] / "memory.max").write_text("1048576\n", encoding="ascii")
    assert available_memory(**paths) == 2**20


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 fma", False),
        ("avx512f avx512bw avx512_vnni", False),
        ("avx2 avx512f avx512_bf16", True),
        ("amx_tile amx_bf16 amx_int8", True),
    ],
)
def test_bf16_support_is_read_from_cpuinfo(tmp_path: Path, flags: str, expected: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\n", encoding="utf-8")
    has_bf16, why = cpu_has_bf16(cpuinfo)
    assert has_bf16 is expected
    assert "bf16" in why.lower()
    assert cpu_name(cpuinfo) == "Some CPU"


def test_missing_cpuinfo_means_no_bf16(tmp_path: Path) -> None:
    assert cpu_has_bf16(tmp_path / "missing")[0] is False
    assert cpu_name(tmp_path / "missing")


@without_cuda
def test_gpus_that_cuda_cannot_use_are_not_counted(monkeypatch) -> None:
    monkeypatch.setattr(machine, "nvidia_gpu_possible", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # as the driver counts them
    assert gpu_count() == 0


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RuntimeError("Error 802: system not yet initialized\nframe #0"), "Error 802: system not yet initialized; on"),
        (RuntimeError("No CUDA GPUs are available"), "No CUDA GPUs are available"),
        (AssertionError("libcudart functions unavailable"), "libcudart functions unavailable"),
    ],
)
def test_the_error_with_which_cuda_fails_to_start_is_told(monkeypatch, raised: Exception, told: str) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    usable, why = cuda_state()
    assert not usable and f"see nvidia-smi): {told}" in why and "frame" not in why
    assert ("start nvidia-fabricmanager" in why) == ("802" in told)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_state() == (True, "CUDA 13.0"), "without starting CUDA, which would allocate GPU memory"


def test_gpu_hidden_by_cuda_visible_devices_is_ignored(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(empty_path / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert nvidia_gpu_possible()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not nvidia_gpu_possible()


def test_driver_files_of_the_host_are_no_sign_of_a_gpu(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without a GPU shows its host's /proc/driver; one with a GPU also has the device file."""
    (empty_path / "version").touch()
    monkeypatch.setattr(machine, "NVIDIA_TRACES", (str(empty_path / "version"),))
    assert nvidia_gpu_possible() and not nvidia_gpu_expected()
    (empty_path / "nvidiactl").touch()
    monkeypatch.setattr(machine, "DEVICE_FILE", str(empty_path / "nvidiactl"))
    assert nvidia_gpu_expected()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not nvidia_gpu_expected(), "hidden on purpose"


def test_compiler_is_looked_for_without_any_package(repository: Path) -> None:
    """As set-up does before it installs them."""
    program = "import machine; print(machine.compiler_problem())"
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(repository / 'mvlm_core')!r}); {program}",
    ]
    assert subprocess.check_output(command, text=True).strip() == str(compiler_problem())


def test_compiler_problem_names_the_packages(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(empty_path))
    headers = f"python3.{sys.version_info.minor}-dev"
    assert compiler_problem().endswith(f"Python.h: sudo apt-get install build-essential {headers}")
    (empty_path / "Python.h").touch()
    assert compiler_problem().endswith("a C compiler: sudo apt-get install build-essential")
    (empty_path / "Python.h").unlink()
    executable(empty_path / "gcc", "#!/bin/sh\nexit 0\n")
    assert compiler_problem().endswith(f"needs Python.h: sudo apt-get install {headers}")
    (empty_path / "Python.h").touch()
    assert compiler_problem() is None
