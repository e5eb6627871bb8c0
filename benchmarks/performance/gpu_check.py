"""Is this GPU right, and how fast is it here? One command, under eight minutes, tables to paste.

    python -m benchmarks.performance.gpu_check

Right: the smallest models, the same weights and tokens on the CPU in float32 and on the device in float32 and in
the run's precision: loss and gradients side by side. Fast: a whole training step (forward, backward, clipping,
optimizer) of both models at every preset's shape, on random tokens, with its share of the device's peak and its memory.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from benchmarks import command
from benchmarks.experiments.runner import SETTINGS, recipe_of
from mvlm_core.errors import UserError, run_main
from mvlm_core.hardware import Hardware, set_process_environment

# Dense bf16 peak in FLOP/s by a part of the device's name, from the makers' data sheets.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
# A relative difference of loss and of the gradients' norm from the CPU's float32.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 5e-2)}
WARM_UP = 3
PRESETS = ("h200", "cpu", "smoke")


def build(name: str, preset: str, hardware: Hardware) -> tuple[Any, Any]:
    """Settings and the model with its optimizers, seeded."""
    import torch

    from mvlm_core.training.cost import TokenizerShape

    settings = SETTINGS[name](preset=preset, device="cpu" if hardware.device == "cpu" else "cuda")
    torch.manual_seed(0)
    built = recipe_of(name).build(settings, TokenizerShape(settings.vocab_size), hardware)
    for module in built.modules.values():
        module.to(hardware.device).train()
    return settings, built


def tokens(settings: Any, sequences: int, device: str) -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(settings.vocab_size, (sequences, settings.max_length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(sequences, settings.max_length, device=device)


def forward_and_backward(settings: Any, built: Any, hardware: Hardware, sequences: int) -> tuple[float, float]:
    """Loss, and the norm of all gradients, of one batch."""
    import torch

    with hardware.autocast():
        loss = built.loss(*tokens(settings, sequences, hardware.device), 0.0).total
    loss.backward()
    gradients = [p.grad for module in built.modules.values() for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(loss.detach()), float(norm)


def check(name: str, hardware: Hardware, reference: Hardware) -> tuple[str, bool]:
    """A row: the device beside the CPU, without compilation and with it where the run has it."""
    expected = forward_and_backward(*build(name, "smoke", reference), reference, 4)
    cells, good = [], True
    for precision in dict.fromkeys(("fp32", hardware.precision)):
        for compiled in dict.fromkeys((False, hardware.compile)):
            variant = replace(hardware, precision=precision, compile=compiled)
            found = forward_and_backward(*build(name, "smoke", variant), variant, 4)
            errors = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
            right = all(e <= most for e, most in zip(errors, TOLERANCES[precision], strict=True))
            good &= right
            words = f"{precision}{', compiled' if compiled else ''}"
            cells.append(f"{words}: loss {errors[0]:.1e}, gradients {errors[1]:.1e}{'' if right else ' WRONG'}")
    return command.row((name, "; ".join(cells))), good


def time_step(name: str, preset: str, hardware: Hardware, seconds: float) -> str:
    """A row of the table of speed; the micro-batch is halved until it fits, as in a run."""
    import torch

    from mvlm_core.monitor import peak_memory
    from mvlm_core.training.cost import step_cost

    settings, built = build(name, preset, hardware)
    parameters = [p for module in built.modules.values() for p in module.parameters()]
    sequences = settings.batch_size

    def step() -> None:
        with hardware.autocast():
            loss = built.loss(*batch, 0.0).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        built.optimizers.step()
        built.optimizers.zero_grad()

    while True:
        batch = tokens(settings, sequences, hardware.device)
        try:
            for _ in range(WARM_UP):
                step()
            break
        except torch.OutOfMemoryError:
            built.optimizers.zero_grad()
            if sequences == 1:
                return command.row((name, preset, "not even one sequence fits", "", "", ""))
            sequences = -(-sequences // 2)
    on_gpu = hardware.device == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started, count = time.perf_counter(), 0
    while count < 5 or time.perf_counter() - started < seconds:
        step()
        count += 1
        wait()
    rate = count * sequences * settings.max_length / (time.perf_counter() - started)
    flops = step_cost(recipe_of(name).build, settings, hardware, 1).flops_per_token * rate
    peak = device_peak(hardware.name)
    share = f"{flops / peak:.1%}" if on_gpu and peak else "–"
    shape = f"{settings.hidden_dim} × {settings.num_layers}, {sequences} × {settings.max_length}"
    memory = f"{peak_memory(hardware.device) / 1e9:.2f}"
    return command.row((name, f"{preset}: {shape}", f"{rate:,.0f}", f"{flops / 1e12:.2f}", share, memory))


def device_peak(name: str) -> float | None:
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__, json=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the command itself")
    parser.add_argument(
        "--presets", default=",".join(PRESETS), help=f"separated by commas [default {','.join(PRESETS)}]"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="of each timing [default 15]")
    parser.add_argument("--attention_backend", default="auto")
    options = parser.parse_args(arguments)
    presets = options.presets.split(",")
    if unknown := [preset for preset in presets if preset not in PRESETS]:
        raise UserError([f"--presets {preset}: unknown" for preset in unknown])
    set_process_environment()
    import torch

    from mvlm_core.hardware import choose_hardware, describe

    hardware = choose_hardware(device=options.device, attention_backend=options.attention_backend)
    hardware.apply()
    reference = choose_hardware(device="cpu", precision="fp32", no_compile=True)
    print("\n".join(describe(hardware)))
    print(f"torch {torch.__version__}, matrix products in float32: {torch.get_float32_matmul_precision()}\n")
    print(command.head(("model", "relative difference from the CPU's float32"), left=2))
    good = True
    # TF32 rounds to ten bits: what is compared in float32 is computed in it.
    torch.set_float32_matmul_precision("highest")
    for name in SETTINGS:
        row, right = check(name, hardware, reference)
        good &= right
        print(row, flush=True)
    hardware.apply()
    columns = ("model", "preset: shape, batch", "tokens/s", "TFLOP/s", "of the peak", "memory, GB")
    print("\n" + command.head(columns, left=2))
    for preset in presets:
        for name in SETTINGS:
            print(time_step(name, preset, hardware, options.seconds), flush=True)
            if hardware.device == "cuda":
                torch.cuda.empty_cache()
    if peak := device_peak(hardware.name):
        print(f"\nPeak: {peak / 1e12:.0f} TFLOP/s in bf16, dense, by the maker's data sheet for {hardware.name}.")
    return 0 if good else 1


if __name__ == "__main__":
    run_main(main)
