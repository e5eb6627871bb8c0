"""``benchmarks/performance/gpu_check.py``, tried on the CPU: its table, and that it notices a wrong device."""

from benchmarks.performance import gpu_check

SHORT = ["--device", "cpu", "--presets", "smoke", "--seconds", "0.01"]


def test_a_device_that_is_right_passes(capsys):
    assert gpu_check.main(SHORT) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| mvlm_gpt2", "| simone"))]
    assert len(rows) == 4 and "fp32: loss 0.0e+00, gradients 0.0e+00" in rows[0] and "smoke: 64 × 3" in rows[2]


def test_a_device_that_is_wrong_is_told(capsys, monkeypatch):
    right, calls = gpu_check.tokens, []

    def wrong_on_the_second_call(settings, sequences, device):
        calls.append(device)
        inputs, targets, weights = right(settings, sequences, device)
        return (inputs.flip(0) if len(calls) % 2 == 0 else inputs), targets, weights

    monkeypatch.setattr(gpu_check, "tokens", wrong_on_the_second_call)
    assert gpu_check.main(SHORT) == 1 and "WRONG" in capsys.readouterr().out


def test_peaks_are_found_by_name():
    assert gpu_check.device_peak("NVIDIA H200") == gpu_check.device_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_check.device_peak("NVIDIA H100 PCIe") == 756e12 and gpu_check.device_peak("AMD EPYC") is None
