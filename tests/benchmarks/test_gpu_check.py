"""``benchmarks/performance/gpu_check.py`` on the CPU: its report, its exit code and its time limit.

Which faults it detects: ``test_gpu_faults.py``.
"""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.performance import gpu_check, gpu_correctness, gpu_speed
from mvlm_core.errors import UserError
from mvlm_core.hardware import choose_hardware
from mvlm_core.machine import compiler_problem
from mvlm_core.training.gradients import GradientAccumulator
from prioritary_mvlm import PrioritaryConfig
from tests.helpers import MODELS, needs_cuda


@pytest.fixture
def check(tiny_corpus, tmp_path, monkeypatch):
    """Run ``gpu_check`` on the CPU at a small size; returns its exit code and its JSON."""
    monkeypatch.setattr(gpu_speed, "MICRO_BATCHES", (2, 4))

    def run(*arguments):
        places = ["--data_dir", str(tiny_corpus), "--cache_dir", str(tmp_path / "cache")]
        size = ["--layers", "1", "--tokens", "32", "--steps", "4", "--seconds", "0"]
        file = tmp_path / "report.json"
        code = gpu_check.main(["--device", "cpu", *places, *size, "--json", str(file), *arguments])
        return code, json.loads(file.read_text())

    return run


def test_every_check_is_reported_and_passes_on_a_correct_machine(check, capsys):
    code, report = check()
    assert code == 0 and report["not_reached"] == [] and report["failed_with_exception"] == {}
    rows, table = report["rows"], capsys.readouterr().out
    assert {row["check"] for row in rows} == {*gpu_check.CORRECTNESS, *gpu_check.SPEED}
    assert table.count("\n| ") == len(rows) + 2 and "FAIL" not in table
    by_name = {(row["check"], row["case"]): row["figures"] for row in rows}
    for model in MODELS:
        tensors = by_name["loss_and_gradients", f"{model}, fp32, sdpa"]["tensors"]
        assert len(tensors) > 12 and all(one["its share of limit"] < 1 for one in tensors.values())
        steps = next(figures for (name, case), figures in by_name.items() if name == "real_steps" and model in case)
        assert steps["steps"] == 4 and steps["tokens/s"] > 0 and steps["of matrix product"] > 0
        resumed = by_name["resume", f"{model}, smoke"]
        assert resumed == {"from step": 2, "largest loss difference": 0, "bitwise equal": "yes"}
        assert by_name["micro_batches", f"{model}, 4"]["GB"] > 0
    parts = next(f for (_, case), f in by_name.items() if case.startswith(MODELS[1]) and case.endswith("ms"))
    timed = ["body", "loss", "body and loss with a teacher", "optimizer", "data", "evaluation", "checkpoint"]
    assert list(parts) == timed
    assert all(milliseconds > 0 for name, milliseconds in parts.items() if name != "body")
    ran = {
        case: figures["ran"]
        for (name, case), figures in by_name.items()
        if name == "attention_backends" and "ran" in figures
    }
    assert any("flash_attention_for_cpu" in kernels for kernels in ran.values())
    assert any(", eager" in case and kernels == "matrix products and softmax" for case, kernels in ran.items())
    missing = {name for (name, _), figures in by_name.items() if gpu_correctness.NOT_HERE in figures}
    assert missing >= {"attention_backends", "products_and_clock", "compiled_or_not", "all_reduce"}


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_wrong_attention_output_fails_with_exit_code_1(factor, check, capsys, monkeypatch):
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: right(*args, **kwargs) * factor)
    code, report = check("--only", "loss_and_gradients,products_and_clock", "--precision", "bf16")
    assert code == 1 and "FAIL" in capsys.readouterr().out
    assert [row["passed"] for row in report["rows"]][:4] == [False] * 4


@pytest.mark.parametrize("name, code", [("loss_and_gradients", 1), ("products_and_clock", 0)])
def test_a_crashing_check_does_not_stop_the_others(name, code, check, monkeypatch):
    def broken(_session):
        yield "something", {}, None
        raise RuntimeError("no such kernel")

    module = gpu_correctness if name in gpu_check.CORRECTNESS else gpu_speed
    monkeypatch.setitem(module.CHECKS, name, broken)
    actual_code, report = check("--only", f"{name},all_reduce")
    assert actual_code == code and report["failed_with_exception"] == {name: "RuntimeError: no such kernel"}
    assert [row["check"] for row in report["rows"]] == [name, "all_reduce"]


def test_micro_batch_sweep_stops_at_out_of_memory(check, monkeypatch):
    right = GradientAccumulator.run_micro_batch

    def small(gradients, step, first, count, *rest, **named):
        if count > 2:
            raise torch.OutOfMemoryError
        return right(gradients, step, first, count, *rest, **named)

    monkeypatch.setattr(GradientAccumulator, "run_micro_batch", small)
    monkeypatch.setattr(gpu_speed, "MICRO_BATCHES", (2, 4, 8))
    rows = check("--only", "micro_batches")[1]["rows"]
    assert [row["case"] for row in rows] == [f"{model}, {size}" for model in MODELS for size in (2, 4)]
    assert ["out of memory" in row["figures"] for row in rows] == [False, True] * 2


def test_time_limit_is_kept_and_unreached_checks_are_listed(check, capsys, monkeypatch):
    def endless(_session, work):
        while True:
            work()

    monkeypatch.setattr(gpu_speed, "timed", endless)
    code, report = check("--minutes", "0.01", "--only", "products_and_clock,resume")
    assert code == 0 and report["not_reached"] == ["products_and_clock", "resume"]
    assert "Not reached: products_and_clock, resume." in capsys.readouterr().out


def test_too_little_time_for_the_correctness_checks_is_a_failure(check, monkeypatch):
    def endless(_session):
        while True:
            time.sleep(0.01)
        yield

    monkeypatch.setitem(gpu_correctness.CHECKS, "cached_decoding", endless)
    code, report = check("--minutes", "0.01", "--only", "cached_decoding,resume")
    assert code == 1 and report["not_reached"] == ["cached_decoding", "resume"]


@pytest.mark.parametrize("factor, passed", [(1.0, True), (1.3, False), (float("nan"), False)])
def test_a_wrong_gradient_of_the_compiled_model_is_found(factor, passed, check, monkeypatch):
    right = gpu_correctness.full_size_gradients

    def gradients(session, name, hardware):
        """Stand in for the compiler, which is too slow here: the uncompiled gradients, one of them with an error."""
        uncompiled = right(session, name, replace(hardware, loss_kernel="blocks"))
        wrong = sorted(uncompiled)[-1]
        return uncompiled | ({wrong: uncompiled[wrong] * factor} if hardware.compiles else {})

    def compiling(**flags):
        return replace(choose_hardware(**flags), loss_kernel="compiled")

    monkeypatch.setattr(gpu_correctness, "full_size_gradients", gradients)
    monkeypatch.setattr("mvlm_core.hardware.choose_hardware", compiling)
    code, report = check("--only", "compiled_gradients", "--layers", "2")
    assert code == (0 if passed else 1) and [row["passed"] for row in report["rows"]] == [passed] * 2


def test_bad_arguments():
    bad = ["--presets", "big", "--minutes", "0", "--tokens", "8", "--steps", "1"]
    with pytest.raises(UserError) as caught:
        gpu_check.parse_options(bad)
    assert len(caught.value.problems) == 4
    with pytest.raises(UserError, match="choose from loss_and_gradients"):
        gpu_check.parse_options(["--only", "speed"])


def test_the_names_offered_by_only_are_those_of_the_checks():
    assert (*gpu_correctness.CHECKS,) == gpu_check.CORRECTNESS and (*gpu_speed.CHECKS,) == gpu_check.SPEED
    assert gpu_check.parse_options([]).checks == [*gpu_check.CORRECTNESS, *gpu_check.SPEED]


def test_peak_flops_are_looked_up_by_device_name():
    assert gpu_speed.device_peak("NVIDIA H200") == gpu_speed.device_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_speed.device_peak("NVIDIA H100 PCIe") == 756e12 and gpu_speed.device_peak("NVIDIA L40") == 181e12
    assert gpu_speed.device_peak("AMD EPYC") is gpu_speed.device_peak("NVIDIA H200 MIG 1g.18gb") is None


@pytest.mark.integration
def test_all_reduce_sums_across_processes(tmp_path):
    """The code of the NCCL check, run with gloo."""
    ((case, figures, right),) = gpu_speed.all_reduce(SimpleNamespace(scratch=tmp_path), world=2, megabytes=1)
    assert right and case == "gloo, 2 × 1 MB" and figures["GB/s"] > 0


@pytest.mark.integration
@pytest.mark.skipif(compiler_problem() is not None, reason="torch.compile needs a C compiler and Python.h")
def test_compiled_models_are_checked_and_compilations_counted(check, monkeypatch):
    """As on a GPU, where runs are compiled."""
    from mvlm_core import hardware

    cpu = choose_hardware(device="cpu", precision="fp32")
    for module in (gpu_correctness, gpu_speed):
        monkeypatch.setattr(module, "SETTINGS", {MODELS[1]: PrioritaryConfig})  # one model: compilation is slow
    monkeypatch.setattr(hardware, "choose_hardware", lambda **_: replace(cpu, compile=True, loss_kernel="compiled"))
    code, report = check("--only", "loss_and_gradients,compiled_or_not")
    rows = {row["case"]: row for row in report["rows"]}
    assert code == 0 and rows["simone_enhanced, fp32, sdpa, compiled"]["passed"]
    compiled, plain = (rows[f"simone_enhanced, {how}"]["figures"] for how in ("compiled", "not compiled"))
    assert compiled["graphs"] >= 1 and compiled["recompiles"] == 0 and plain["graphs"] == 0
    assert 0 < compiled["s of compilation"] < compiled["s of first step"] and plain["s of compilation"] == 0


@needs_cuda
def test_this_gpu_passes_all_correctness_checks(tiny_corpus, tmp_path):
    places = ["--data_dir", str(tiny_corpus), "--cache_dir", str(tmp_path / "cache")]
    correctness = ",".join(gpu_check.CORRECTNESS)
    assert gpu_check.main([*places, "--presets", "smoke", "--tokens", "1024", "--only", correctness]) == 0
