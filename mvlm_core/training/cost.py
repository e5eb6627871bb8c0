"""An estimate of what a run will cost: memory by kind, floating-point operations, time and money.

The real model and loss run once on fake tensors, which have shapes but no memory, and what autograd saves for the
backward pass is added up. Compilation saves less of it on a GPU, so the activations are an upper bound there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mvlm_core.hardware import Hardware
from mvlm_core.settings import TrainingSettings

# Assumptions, printed with every estimate.
BYTES_PER_TOKEN = {8192: 4.0, 1_000_000: 4.4}  # by largest vocabulary; a run counts the real tokens
SHARE_OF_PEAK = 0.35  # plain GPT-2 training at this size reached 0.29 to 0.40 of the bf16 peak on A100 and H100
GPU_PEAK = 989e12  # FLOP/s of an H200 or H100, bf16 without sparsity
PRICE_PER_HOUR = 4.0  # US dollars
OVERHEAD = 2e9  # bytes: CUDA context, kernel workspaces, fragmentation
GPU_MEMORY = (80e9, 141e9)


@dataclass(frozen=True)
class TokenizerShape:
    """What a model needs to know about a tokenizer that is not trained yet."""

    vocab_size: int
    start_id: int = 0
    end_id: int = 1

    def token_id(self, _role: str) -> int:
        return 0


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the end of the forward pass, when most are held; an EMA of the weights counts as the optimizer's."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class StepCost:
    """One micro-batch: parameters, memory, and operations per token, forward and backward without the optimizer's."""

    parameters: int
    memory: StepMemory
    flops_per_token: float


def step_cost(
    build: Callable[[Any, Any, Hardware], Any], settings: TrainingSettings, hardware: Hardware, sequences: int
) -> StepCost:
    """The cost of one micro-batch of ``sequences``, from running it on fake tensors.

    Args:
        build: that of a recipe.
        hardware: whose precision is used; the device itself is not touched.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode  # "meta" tensors, the alternative, have no autocast
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # The fused attention of the CPU, which torch's counter does not know, by the same formulas as the others.
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
        ),
    }
    saved = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    hardware, shape = (
        replace(hardware, device="cpu", compile=False, loss_kernel="blocks"),
        (sequences, settings.max_length),
    )
    with FakeTensorMode():
        built = build(settings, TokenizerShape(settings.vocab_size), hardware)
        for module in built.modules.values():
            module.train()
        inputs, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), hardware.autocast():
                total = built.loss(inputs, targets, torch.ones(shape), 0.0).total
            total.backward()
        parameters = {p for module in built.modules.values() for p in module.parameters()}
        weights = sum(p.nbytes for p in parameters)
        averages = sum(p.nbytes for p in built.model.parameters()) if settings.ema_decay else 0
        moments = sum(
            p.nbytes * (2 if isinstance(part, torch.optim.AdamW) else 1)
            for part in built.optimizers.parts
            for group in part.param_groups
            for p in group["params"]
        )
        activations = sum(storage.nbytes() for storage in saved - {p.untyped_storage() for p in parameters})
        memory = StepMemory(weights, weights, moments + averages, activations)
        flops = counter.get_total_flops() / (sequences * settings.max_length)
        return StepCost(built.model.num_parameters(), memory, flops)


def fitting_micro_batch(one: StepMemory, two: StepMemory, memory_bytes: float, most: int) -> int | None:
    """The largest micro-batch, halved from ``most`` as the trainer does, whose step fits; None if none does.

    Args:
        one, two: memory of micro-batches of one and of two sequences; each further sequence adds the difference.
    """
    each = two.activations - one.activations
    fixed = one.total - each + OVERHEAD
    sequences = most
    while sequences > 1 and fixed + sequences * each > memory_bytes:
        sequences = -(-sequences // 2)
    return sequences if fixed + sequences * each <= memory_bytes else None


def describe_cost(
    build: Callable[[Any, Any, Hardware], Any], settings: TrainingSettings, hardware: Hardware, train_bytes: int
) -> list[str]:
    """What a run would cost, in lines of text.

    Args:
        train_bytes: of the corpus; the run's length says how much of it is read, and how often.
    """
    on_gpu = settings.preset == "h200" or hardware.device == "cuda"
    if on_gpu and not settings.no_mixed_precision and settings.precision != "fp32":
        hardware = replace(hardware, precision="bf16")
    one, two = (step_cost(build, settings, hardware, sequences) for sequences in (1, 2))
    batch = settings.batch_size
    each = two.memory.activations - one.memory.activations
    memory = replace(one.memory, activations=one.memory.activations + (batch - 1) * each)
    per_token = next(size for limit, size in BYTES_PER_TOKEN.items() if settings.vocab_size <= limit)
    tokens = _bytes_read(settings, train_bytes, per_token) / per_token
    flops = one.flops_per_token
    lines = [
        f"{one.parameters:,} parameters; {flops / 1e6:,.0f} MFLOP per token (forward, backward, {hardware.precision})",
        f"about {tokens / 1e6:,.1f} M tokens ({settings.sequences_per_step * settings.max_length:,} a step), "
        f"{flops * tokens:.2g} FLOP",
        f"memory of a step with micro-batches of {batch}: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in vars(memory).items())
        + f", together {memory.total / 1e9:.2f} GB",
    ]
    if not on_gpu:
        return [*lines, f"assumed: {per_token} bytes per token"]
    for size in GPU_MEMORY:
        fits = fitting_micro_batch(one.memory, two.memory, size, batch)
        verdict = f"micro-batches of {fits} fit" if fits else "not even one sequence fits"
        lines.append(f"{size / 1e9:.0f} GB: {verdict}")
    hours = flops * tokens / (GPU_PEAK * SHARE_OF_PEAK) / 3600
    lines += [
        f"about {hours * 60:.0f} minutes and {hours * PRICE_PER_HOUR:.2f} dollars on one H200",
        f"assumed: {SHARE_OF_PEAK:.0%} of {GPU_PEAK / 1e12:.0f} TFLOP/s, {PRICE_PER_HOUR:.2f} dollars an hour, "
        f"{per_token} bytes per token, {OVERHEAD / 1e9:.0f} GB besides the tensors; activations as without "
        "compilation, which needs less; evaluations, set-up and early stopping not counted",
    ]
    return lines


def _bytes_read(settings: TrainingSettings, train_bytes: int, per_token: float) -> float:
    """The first limit that is set, in bytes of text."""
    step = settings.sequences_per_step * settings.max_length * per_token
    limits = {"num_epochs": train_bytes, "max_steps": step, "max_tokens": per_token, "max_bytes": 1.0}
    return min(value * unit for name, unit in limits.items() if (value := getattr(settings, name)))
