"""What a run will take before anything is spent: memory by part, floating-point operations, time and money.

The real model and the real loss are run once on fake tensors, which have shapes and no memory, and what autograd keeps
for the backward pass is added up. Compilation saves some of it on a GPU, so the activations are an upper bound there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from mvlm_core.hardware import Hardware
from mvlm_core.settings import TrainingSettings

# Assumptions, printed with every estimate.
BYTES_PER_TOKEN = {8192: 4.0, 1_000_000: 4.4}  # by vocabulary up to; the trainer counts the tokens themselves
SHARE_OF_PEAK = 0.35  # plain GPT-2 training at this size reached 0.29 to 0.40 of the bf16 peak on A100 and H100
GPU_PEAK = 989e12  # FLOP/s of an H200 or H100, bf16 without sparsity
PRICE_PER_HOUR = 4.0  # US dollars
OVERHEAD = 2e9  # bytes: CUDA context, kernels' workspaces, gaps between the allocator's blocks
GPU_MEMORY = (80e9, 141e9)


@dataclass(frozen=True)
class TokenizerShape:
    """What a model needs to know of a tokenizer that is not there yet."""

    vocab_size: int
    start_id: int = 0
    end_id: int = 1

    def token_id(self, _role: str) -> int:
        return 0


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the end of the forward pass, when most are held; averaged weights count as the optimizer's."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class StepCost:
    """One micro-batch: parameters, memory, and operations a token, forward and backward without the optimizer's."""

    parameters: int
    memory: StepMemory
    flops_per_token: float


def step_cost(
    build: Callable[[Any, Any, Hardware], Any],
    settings: TrainingSettings,
    hardware: Hardware,
    sequences: int,
) -> StepCost:
    """The cost of one micro-batch of ``sequences``, by running it on fake tensors.

    Args:
        build: of a recipe (``training_run.Recipe``).
        hardware: whose precision is used; nothing of it is touched.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    # Fake weights cannot be moved, and need not be: they are nowhere.
    with FakeTensorMode(), patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
        built = build(settings, TokenizerShape(settings.vocab_size), replace(hardware, device="cpu", compile=False))
        parameters = {id(p): p for module in built.modules.values() for p in module.parameters()}.values()
        for module in built.modules.values():
            module.train()
        shape = (sequences, settings.max_length)
        inputs, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        counter = FlopCounterMode(display=False, custom_mapping=_attention_counts())
        with counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                with replace(hardware, device="cpu").autocast():
                    total = built.loss(inputs, targets, torch.ones(shape), 0.0).total
            total.backward()
        own = {p.untyped_storage()._cdata for p in parameters}
        average = sum(p.untyped_storage().nbytes() for p in built.model.parameters()) if settings.ema_decay else 0
        weights = sum(p.untyped_storage().nbytes() for p in parameters)
        return StepCost(
            built.model.num_parameters(),
            StepMemory(
                weights,
                weights,
                sum(_optimizer_bytes(part) for part in built.optimizers.parts) + average,
                sum(size for storage, size in kept.items() if storage not in own),
            ),
            counter.get_total_flops() / (sequences * settings.max_length),
        )


def _optimizer_bytes(optimizer: Any) -> int:
    import torch

    moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    return sum(moments * p.untyped_storage().nbytes() for group in optimizer.param_groups for p in group["params"])


def _attention_counts() -> dict[Any, Callable[..., int]]:
    """How torch's counter is to count the processor's fused attention, which it does not know.

    As it counts the others: two products forward, four and the scores once more backward, causal or not.
    """
    import torch

    def product(query: Any, value: Any) -> int:
        batch, heads, length, _ = query
        return 2 * batch * heads * length * length * value[-1]

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 2 * product(query, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 5 * product(query, value)

    operations = torch.ops.aten
    return {
        operations._scaled_dot_product_flash_attention_for_cpu: forward,
        operations._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def fitting_micro_batch(one: StepMemory, two: StepMemory, memory_bytes: float, most: int) -> int | None:
    """The largest micro-batch, halved from ``most`` as the trainer does it, whose step fits; None where none does.

    Args:
        one, two: the memory of micro-batches of one and of two sequences; what a sequence adds is the difference.
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
    """What a run would take, in lines of text.

    Args:
        train_bytes: of the corpus; the preset's length says how much of it is read, and how often.
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
        f"{one.parameters:,} parameters; {flops / 1e6:,.0f} MFLOP a token (forward and backward, {hardware.precision})",
        f"about {tokens / 1e6:,.1f} M tokens ({settings.sequences_per_step * settings.max_length:,} a step), "
        f"{flops * tokens:.2g} FLOP",
        f"memory of a step with micro-batches of {batch}: "
        + ", ".join(
            f"{name} {getattr(memory, name) / 1e9:.2f}" for name in ("weights", "gradients", "optimizer", "activations")
        )
        + f", together {memory.total / 1e9:.2f} GB",
    ]
    if not on_gpu:
        return [*lines, f"assumed: {per_token} bytes a token"]
    for size in GPU_MEMORY:
        fits = fitting_micro_batch(one.memory, two.memory, size, batch)
        lines.append(
            f"{size / 1e9:.0f} GB: " + (f"micro-batches of {fits} fit" if fits else "not even one sequence fits")
        )
    hours = flops * tokens / (GPU_PEAK * SHARE_OF_PEAK) / 3600
    lines += [
        f"about {hours * 60:.0f} minutes and {hours * PRICE_PER_HOUR:.2f} dollars on one H200",
        f"assumed: {SHARE_OF_PEAK:.0%} of {GPU_PEAK / 1e12:.0f} TFLOP/s, {PRICE_PER_HOUR:.2f} dollars an hour, "
        f"{per_token} bytes a token, {OVERHEAD / 1e9:.0f} GB beside the tensors; activations as without compilation, "
        "which needs less; evaluations, set-up and early stopping not counted",
    ]
    return lines


def _bytes_read(settings: TrainingSettings, train_bytes: int, per_token: float) -> float:
    """The first of the limits that are set, in bytes of text."""
    step = settings.sequences_per_step * settings.max_length * per_token
    limits = {
        "num_epochs": train_bytes,
        "max_steps": step,
        "max_tokens": per_token,
        "max_bytes": 1.0,
    }
    return min(value * unit for name, unit in limits.items() if (value := getattr(settings, name)))
