"""mvlm_core/hardware.py: default choices and refused requests."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mvlm_core import hardware
from mvlm_core.errors import UserError
from mvlm_core.hardware import (
    Hardware,
    caution,
    choose_hardware,
    describe,
    missing_gpu,
    resolve_preset,
    set_process_environment,
)
from mvlm_core.machine import cpu_has_bf16
from tests.helpers import executable, needs_cuda, without_cuda

pytestmark = pytest.mark.usefixtures("no_thread_setting")


# --- choices ----------------------------------------------------------------------------------------------


def test_cpu_choice_and_its_reasons() -> None:
    chosen = choose_hardware(device="cpu")
    assert chosen.device == "cpu" and chosen.attention_backend == "sdpa" and chosen.compile is False
    assert chosen.precision == ("bf16" if cpu_has_bf16()[0] else "fp32")
    assert 1 <= chosen.threads <= os.cpu_count()
    assert chosen.memory_bytes > 2**28
    assert set(chosen.reasons) == {
        "device",
        "precision",
        "attention_backend",
        "compile",
        "loss_kernel",
        "deterministic",
        "threads",
    }
    lines = describe(chosen)
    assert all(any(reason in line for line in lines) for reason in chosen.reasons.values())


def test_auto_device_follows_torch() -> None:
    assert choose_hardware().device == ("cuda" if torch.cuda.is_available() else "cpu")


@without_cuda
def test_missing_device_and_backend_are_reported_in_one_error() -> None:
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
    with pytest.raises(UserError, match="needs a CUDA device"):
        choose_hardware(device="cpu", attention_backend=backend)


def test_optional_backends_are_not_compiled_and_need_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xformers.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    problems: list[str] = []
    assert hardware._choose_attention("xformers", "cuda", "bf16", problems)[0] == "xformers" and not problems
    hardware._choose_attention("xformers", "cuda", "fp32", problems)
    assert len(problems) == 1 and "only used in bf16" in problems[0]
    compiled, why = hardware._choose_compile(False, "cuda", "xformers")
    assert not compiled and "xformers" in why


def test_contradictory_precision_flags_are_refused() -> None:
    with pytest.raises(UserError, match="contradict"):
        choose_hardware(device="cpu", precision="bf16", no_mixed_precision=True)


def test_switches_are_reported_as_reasons() -> None:
    chosen = choose_hardware(device="cpu", attention_backend="eager", no_mixed_precision=True, no_compile=True)
    assert chosen.precision == "fp32" and chosen.reasons["precision"] == "--no_mixed_precision"
    assert chosen.compile is False and chosen.reasons["compile"] == "--no_compile"
    assert chosen.attention_backend == "eager"


def test_description_says_whether_training_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(device: str, asked: bool) -> str:
        monkeypatch.setattr(hardware, "_choose_device", lambda *_: (device, "as if"))
        monkeypatch.setattr(hardware, "_choose_precision", lambda *_: ("fp32", "as if"))
        monkeypatch.setattr(hardware, "_name_and_memory", lambda _: ("some device", 0))
        chosen = choose_hardware(device=device, deterministic=asked)
        assert chosen.deterministic is asked
        return next(each for each in describe(chosen) if each.startswith("deterministic"))

    assert "yes (CPU training always is)" in line("cpu", False)
    assert "yes (CPU training always is, with or without --deterministic)" in line("cpu", True)
    assert "no (CUDA sums in varying order" in line("cuda", False)
    assert "yes (--deterministic" in line("cuda", True) and ":4096:8" in line("cuda", True)


def test_deterministic_requires_the_sdpa_backend() -> None:
    problems: list[str] = []
    for backend in hardware.OPTIONAL_BACKENDS:
        hardware._why_deterministic(True, "cuda", backend, problems)
    assert len(problems) == 2 and all("use sdpa" in problem for problem in problems)


DETERMINISTIC = """
import os, torch, torch._inductor.config
from mvlm_core.hardware import Hardware
Hardware("cuda", "", 0, "fp32", "sdpa", False, 1, {}, deterministic=DETERMINISTIC).apply()
print(
    torch.are_deterministic_algorithms_enabled(), torch._inductor.config.deterministic,
    torch.utils.deterministic.fill_uninitialized_memory, os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
)
"""


def test_deterministic_sets_torch_flags_and_keeps_a_user_set_cublas_workspace(repository: Path) -> None:
    def switches(asked: bool, **environment: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
        command = [sys.executable, "-c", DETERMINISTIC.replace("=DETERMINISTIC", f"={asked}")]
        return subprocess.check_output(command, cwd=repository, env=inherited | environment, text=True).strip()

    assert switches(True) == "True True False :4096:8"
    assert switches(True, CUBLAS_WORKSPACE_CONFIG=":16:8") == "True True False :16:8"
    assert switches(False) == "False False True None"


def test_loss_kernel_is_compiled_when_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_hardware(device="cpu").loss_kernel == "blocks"
    monkeypatch.setattr(hardware, "_choose_compile", lambda *_: (True, "as on a CUDA device"))
    assert choose_hardware(device="cpu").loss_kernel == "compiled"
    assert choose_hardware(device="cpu", loss_kernel="blocks").loss_kernel == "blocks"
    monkeypatch.setattr(hardware, "compiler_problem", lambda: None)
    asked = choose_hardware(device="cpu", loss_kernel="compiled")
    assert asked.loss_kernel == "compiled" and "loss: compiled (requested)" in describe(asked)
    with pytest.raises(UserError, match="--no_compile contradict"):
        choose_hardware(device="cpu", loss_kernel="compiled", no_compile=True)
    monkeypatch.setattr(hardware, "compiler_problem", lambda: "no compiler here")
    with pytest.raises(UserError, match="--loss_kernel compiled: no compiler here"):
        choose_hardware(device="cpu", loss_kernel="compiled")


def test_bf16_on_the_cpu_requires_hardware_support() -> None:
    if cpu_has_bf16()[0]:
        assert choose_hardware(device="cpu", precision="bf16").precision == "bf16"
    else:
        with pytest.raises(UserError, match="--precision bf16"):
            choose_hardware(device="cpu", precision="bf16")


def test_autocast_applies_only_with_bf16() -> None:
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


FAULTS = """
import resource, torch
from mvlm_core.hardware import choose_hardware
choose_hardware(device="cpu").apply()
for number in range(30):
    if number == 20:  # the first ones find their place in the heap
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(4 << 20)  # 16 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="advice for glibc's allocator")
def test_freed_memory_is_kept_unless_the_environment_configures_malloc(repository: Path) -> None:
    """Ten blocks of 16 MB are 40,960 pages: faulted in again each time, or reused."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    found = []
    for advice in ({}, {"MALLOC_MMAP_THRESHOLD_": "131072"}):
        command = [sys.executable, "-c", FAULTS]
        output = subprocess.check_output(command, cwd=repository, env=environment | advice, text=True)
        found.append(int(output))
    assert found[0] < 2_000 and found[1] >= 40_960


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


def test_auto_preset_on_the_cpu_whatever_gpu_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "nvidia_gpu_possible", lambda: True)
    monkeypatch.setattr(hardware, "cuda_state", lambda: (True, "torch uses it"))
    assert resolve_preset("auto", "cpu") == ("cpu", "--device cpu")
    assert resolve_preset("auto", "cuda") == resolve_preset("auto") == ("h200", "torch uses it")
    assert resolve_preset("smoke", "cpu") == ("smoke", "requested")


def test_auto_preset_without_a_gpu(empty_path: Path) -> None:
    assert resolve_preset("auto") == ("cpu", "no NVIDIA GPU found")


@without_cuda
def test_auto_preset_with_a_gpu_that_torch_cannot_use(empty_path: Path) -> None:
    executable(empty_path / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    preset, why = resolve_preset("auto")
    assert preset == "cpu" and "torch" in why and "CUDA" in why


def test_resolving_the_preset_does_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from mvlm_core import hardware, machine; machine.NVIDIA_TRACES = ();"
        "hardware.resolve_preset('auto'); hardware.set_process_environment(); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({}, ("PASSIVE", "1000")),
        ({"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
    ],
)
def test_openmp_wait_settings_respect_the_users_environment(monkeypatch, theirs, expected):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what the call sets
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    set_process_environment()
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")) == expected


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(2, 1, 2), (96, 1, 32), (96, 8, 12), (4, 8, 1)])
def test_compiler_workers_share_the_cores(monkeypatch, cores: int, ranks: int, expected: int) -> None:
    monkeypatch.setattr(hardware, "available_threads", lambda: (cores, ""))
    monkeypatch.setenv(hardware.COMPILE_THREADS, "placeholder")  # so that monkeypatch undoes the value set below
    monkeypatch.delenv(hardware.COMPILE_THREADS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))  # as set by torchrun
    set_process_environment()
    assert os.environ[hardware.COMPILE_THREADS] == str(expected)
    monkeypatch.setenv(hardware.COMPILE_THREADS, "5")
    set_process_environment()
    assert os.environ[hardware.COMPILE_THREADS] == "5"


def test_cuda_allocator_settings_of_the_user_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    monkeypatch.delenv(old, raising=False)
    monkeypatch.setenv(new, "placeholder")  # so that monkeypatch undoes the value set below
    monkeypatch.delenv(new)
    set_process_environment()
    assert os.environ[new] == "max_split_size_mb:512" and old not in os.environ
    for users, other in ((new, old), (old, new)):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(users, "expandable_segments:True")
        set_process_environment()
        assert os.environ[users] == "expandable_segments:True" and other not in os.environ


def test_uncompiled_h200_run_on_a_gpu_gets_a_warning() -> None:
    chosen = choose_hardware(device="cpu", no_compile=True)
    on_gpu = replace(chosen, device="cuda")
    warning = caution(on_gpu, "h200")
    assert "NOT COMPILED" in warning and "--no_compile" in warning and "not measured" in warning
    assert caution(chosen, "h200") is caution(on_gpu, "cpu") is caution(replace(on_gpu, compile=True), "h200") is None


def test_cpu_in_the_place_of_a_gpu_is_a_problem_unless_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = choose_hardware(device="cpu")
    fallback = replace(requested, reasons=requested.reasons | {"device": "driver too old"})
    for gpu_is_there in (True, False):
        monkeypatch.setattr(hardware, "nvidia_gpu_expected", lambda found=gpu_is_there: found)
        problem = missing_gpu(fallback, "h200", automatic=False)
        assert problem.startswith("--preset h200 would train on the CPU: driver too old; check that nvidia-smi lists")
        assert "torch build" in problem and "use --device cpu" in problem
        assert missing_gpu(fallback, "cpu", automatic=False) is missing_gpu(fallback, "smoke", automatic=False) is None
        assert missing_gpu(replace(fallback, device="cuda"), "h200", automatic=True) is None
        assert missing_gpu(requested, "h200", automatic=False) is missing_gpu(requested, "cpu", automatic=True) is None
        problem = missing_gpu(fallback, "cpu", automatic=True)
        assert (problem or "").startswith("--preset auto would train on the CPU: driver too old") == gpu_is_there


def test_only_small_models_are_decoded_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(hardware, "SMALL_MODEL", model.num_parameters())
        hardware.limit_decoding_threads([model])
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(hardware, "SMALL_MODEL", model.num_parameters() + 1)
        hardware.limit_decoding_threads([model])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
