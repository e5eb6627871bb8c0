"""mvlm_core/hardware.py: what is chosen, what is refused, and what is counted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mvlm_core import hardware
from mvlm_core.errors import UserError
from mvlm_core.hardware import (
    Hardware,
    PeakMemory,
    ResourceSampler,
    available_memory,
    available_threads,
    choose_hardware,
    describe,
    memory_in_use,
    peak_memory,
    processor_has_bf16,
    resolve_preset,
    set_process_environment,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")


@pytest.fixture(autouse=True)
def no_thread_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one folder, into which a test puts its own nvidia-smi; no other trace of a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(hardware, "NVIDIA_TRACES", ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def add_nvidia_smi(folder: Path, script: str) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)


# --- choices ----------------------------------------------------------------------------------------------


def test_cpu_choice_and_its_reasons() -> None:
    chosen = choose_hardware(device="cpu")
    assert chosen.device == "cpu" and chosen.attention_backend == "sdpa" and chosen.compile is False
    assert chosen.precision == ("bf16" if processor_has_bf16()[0] else "fp32")
    assert 1 <= chosen.threads <= os.cpu_count()
    assert chosen.memory_bytes > 2**28
    assert set(chosen.reasons) == {"device", "precision", "attention_backend", "compile", "threads"}
    lines = describe(chosen)
    assert all(any(reason in line for line in lines) for reason in chosen.reasons.values())


def test_auto_device_follows_torch() -> None:
    assert choose_hardware().device == ("cuda" if torch.cuda.is_available() else "cpu")


@without_cuda
def test_everything_missing_is_named_at_once() -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    with pytest.raises(UserError) as caught:
        choose_hardware(device="cuda", attention_backend="flash_attn")
    assert len(caught.value.problems) == 2
    device, attention = caught.value.problems
    assert "--device cuda" in device
    assert "not installed" in attention and "pip install" in attention and "flash-attn" in attention


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_installed_backend_still_needs_cuda(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{backend}.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="CUDA device only"):
        choose_hardware(device="cpu", attention_backend=backend)


def test_unknown_values_are_all_named() -> None:
    with pytest.raises(UserError) as caught:
        choose_hardware(device="tpu", precision="fp8", attention_backend="magic")
    text = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert all(word in text for word in ("tpu", "fp8", "magic", "bf16", "sdpa"))


def test_contradiction_is_refused() -> None:
    with pytest.raises(UserError, match="contradict"):
        choose_hardware(device="cpu", precision="bf16", no_mixed_precision=True)


def test_switches_are_given_as_reasons() -> None:
    switches = {"no_mixed_precision": True, "no_compile": True}
    chosen = choose_hardware(device="cpu", attention_backend="eager", **switches)
    assert chosen.precision == "fp32" and chosen.reasons["precision"] == "--no_mixed_precision"
    assert chosen.compile is False and chosen.reasons["compile"] == "--no_compile"
    assert chosen.attention_backend == "eager"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 fma", False),
        ("avx512f avx512bw avx512_vnni", False),
        ("avx2 avx512f avx512_bf16", True),
        ("amx_tile amx_bf16 amx_int8", True),
    ],
)
def test_bf16_is_read_from_the_processor(tmp_path: Path, flags: str, expected: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\n", encoding="utf-8")
    has_bf16, why = processor_has_bf16(cpuinfo)
    assert has_bf16 is expected
    assert "bf16" in why.lower()
    assert hardware.processor_name(cpuinfo) == "Some CPU"


def test_no_cpuinfo_means_fp32(tmp_path: Path) -> None:
    assert processor_has_bf16(tmp_path / "missing")[0] is False
    assert hardware.processor_name(tmp_path / "missing")


def test_bf16_asked_of_a_processor_without_it() -> None:
    if processor_has_bf16()[0]:
        assert choose_hardware(device="cpu", precision="bf16").precision == "bf16"
    else:
        with pytest.raises(UserError, match="--precision bf16"):
            choose_hardware(device="cpu", precision="bf16")


def test_autocast_changes_the_product_only_in_bf16() -> None:
    layer = torch.nn.Linear(16, 16)
    common = {"device": "cpu", "name": "", "memory_bytes": 0, "attention_backend": "sdpa", "compile": False}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Hardware(precision=precision, threads=1, reasons={}, **common).autocast():
            assert layer(torch.ones(2, 16)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_apply_sets_the_threads() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            Hardware("cpu", "", 0, "fp32", "sdpa", False, threads, {}).apply()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@needs_cuda
def test_cuda_choice() -> None:
    chosen = choose_hardware(device="cuda")
    assert chosen.name == torch.cuda.get_device_name(0)
    assert chosen.precision == "bf16" or torch.cuda.get_device_capability()[0] < 8
    assert chosen.attention_backend == "sdpa"
    chosen.apply()
    assert torch.get_float32_matmul_precision() == "high"
    with chosen.autocast():
        product = torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    assert product.dtype == (torch.bfloat16 if chosen.precision == "bf16" else torch.float32)


# --- presets and environment ------------------------------------------------------------------------------


def test_named_presets_pass_through() -> None:
    assert [resolve_preset(name)[0] for name in ("h200", "cpu", "smoke")] == ["h200", "cpu", "smoke"]


def test_auto_preset_without_a_gpu(empty_path: Path) -> None:
    assert resolve_preset("auto") == ("cpu", "no NVIDIA GPU found")


@without_cuda
def test_auto_preset_with_a_gpu_that_torch_cannot_use(empty_path: Path) -> None:
    add_nvidia_smi(empty_path, "exit 0")
    preset, why = resolve_preset("auto")
    assert preset == "cpu" and "torch" in why and "CUDA" in why


def test_hidden_gpu_counts_as_none(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_nvidia_smi(empty_path, "exit 0")
    assert hardware.nvidia_may_be_there()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not hardware.nvidia_may_be_there()


def test_module_and_preset_do_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from mvlm_core import hardware; hardware.NVIDIA_TRACES = ();"
        "hardware.resolve_preset('auto'); hardware.set_process_environment(); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr


def test_allocator_advice_gives_way_to_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    monkeypatch.delenv(new, raising=False)
    monkeypatch.setenv(old, "placeholder")  # so that the value set below is taken back after the test
    monkeypatch.delenv(old)
    set_process_environment()
    assert os.environ[old] == "max_split_size_mb:512"
    monkeypatch.setenv(old, "expandable_segments:True")
    set_process_environment()
    assert os.environ[old] == "expandable_segments:True"
    monkeypatch.delenv(old)
    monkeypatch.setenv(new, "expandable_segments:True")
    set_process_environment()
    assert old not in os.environ


def test_compiler_problem_names_the_package(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert "build-essential" in hardware.compiler_problem()
    add_nvidia_smi(empty_path, "exit 0")
    (empty_path / "nvidia-smi").rename(empty_path / "gcc")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(empty_path))
    assert "-dev" in hardware.compiler_problem()
    (empty_path / "Python.h").touch()
    assert hardware.compiler_problem() is None


# --- threads and memory -----------------------------------------------------------------------------------


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
    assert threads == 4 and "physical cores of the 8 processors" in why


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


def test_threads_respect_a_limit_above_the_own_group(machine: dict[str, Path]) -> None:
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
def test_threads_asked_for(
    machine: dict[str, Path], monkeypatch: pytest.MonkeyPatch, asked: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert available_threads(**machine)[0] == expected


def test_memory_respects_the_container(machine: dict[str, Path]) -> None:
    paths = {name: machine[name] for name in ("cgroup_root", "cgroup_membership")}
    whole = available_memory(**paths)
    (machine["cgroup_root"] / "memory.max").write_text("max\n", encoding="ascii")
    assert available_memory(**paths) == whole
    (machine["cgroup_root"] / "memory.max").write_text("1048576\n", encoding="ascii")
    assert available_memory(**paths) == 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel resets no peak here")
def test_peak_memory_sees_what_was_freed() -> None:
    size = 128 * 2**20
    earlier = bytearray(2 * size)
    earlier_peak = peak_memory()
    del earlier
    with PeakMemory() as small:
        pass
    assert small.bytes < earlier_peak - size
    before = memory_in_use()
    with PeakMemory() as large:
        block = bytearray(size)
        del block
    assert large.bytes - small.bytes == pytest.approx(size, rel=0.1)
    assert large.bytes == pytest.approx(before + size, rel=0.1)
    assert peak_memory() >= large.bytes


@needs_cuda
def test_cuda_memory_counts_tensors() -> None:
    with PeakMemory("cuda") as peak:
        block = torch.empty(2**26, dtype=torch.uint8, device="cuda")
        held = memory_in_use("cuda")
        del block
    assert peak.bytes >= held >= 2**26


# --- sampling ---------------------------------------------------------------------------------------------


def first_line(seconds: float = 0.02) -> tuple[str, str]:
    """The source and first line of a sampler that runs until it has spoken."""
    lines: list[str] = []
    spoken = threading.Event()

    def take(line: str) -> None:
        lines.append(line)
        spoken.set()

    with ResourceSampler(take, seconds=seconds) as sampler:
        assert spoken.wait(10)
    count = len(lines)
    time.sleep(3 * seconds)
    assert len(lines) == count, "a line came after stop()"
    return sampler.source, lines[0]


def test_sampling_without_a_gpu(empty_path: Path) -> None:
    source, line = first_line()
    assert source == "psutil"
    assert "CPU" in line and "GiB used here" in line


@without_cuda
def test_sampling_by_nvidia_smi_where_nvml_is_not(empty_path: Path) -> None:
    add_nvidia_smi(empty_path, "echo '97, 40960, 143771, 61, 645.20'; echo '3, 1024, 143771, 30, [N/A]'")
    source, line = first_line()
    assert source == "nvidia-smi"
    first = "GPU 0: memory 40.0 of 140.4 GiB, busy 97 %, temperature 61 C, power 645.20 W"
    second = "GPU 1: memory 1.0 of 140.4 GiB, busy 3 %, temperature 30 C, power [N/A] W"
    assert line == f"{first}; {second}"


@without_cuda
@pytest.mark.parametrize("script", ["exit 9", "echo nonsense", "true"])
def test_sampling_passes_over_a_broken_nvidia_smi(empty_path: Path, script: str) -> None:
    add_nvidia_smi(empty_path, script)
    assert first_line()[0] == "psutil"


@needs_cuda
def test_sampling_by_nvml() -> None:
    source, line = first_line()
    assert source == "NVML" and "GPU 0: memory" in line and "busy" in line


def test_a_failing_callback_ends_sampling_with_a_line(empty_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(line: str) -> None:
        raise OSError("disk full")

    hardware.log.propagate = True
    sampler = ResourceSampler(fail, seconds=0.01)
    sampler._thread.join(timeout=10)
    assert not sampler._thread.is_alive()
    assert "disk full" in caplog.text
    sampler.stop()
