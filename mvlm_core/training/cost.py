"""Cost of a step: memory by category and FLOPs.

The actual model and loss run once on fake tensors, which have shapes but no storage; activation memory is the total
size of the tensors that autograd saves for backward. This is an upper bound for a compiled model, which saves fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mvlm_core.hardware import Hardware
from mvlm_core.settings import TrainingSettings

OVERHEAD = 2e9  # bytes: CUDA context, kernel workspaces, fragmentation


@dataclass(frozen=True)
class StubTokenizer:
    """Placeholder for a tokenizer that is not trained yet, used to build a model."""

    vocab_size: int
    start_id: int = 0
    end_id: int = 1

    def token_id(self, _role: str) -> int:
        return 0


@dataclass(frozen=True)
class StepMemory:
    """Memory in bytes at the end of the forward pass, where a step peaks."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    teachers: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class StepCost:
    """Parameters, memory and FLOPs of one micro-batch.

    Attributes:
        flops_per_token: forward and backward.
        optimizer_flops: matmuls of one optimizer step (Muon's Newton-Schulz iteration).
    """

    parameters: int
    memory: StepMemory
    flops_per_token: float
    optimizer_flops: float


def step_cost(
    build: Callable[[Any, Any, Hardware], Any], settings: TrainingSettings, hardware: Hardware, sequences: int
) -> StepCost:
    """Compute the cost of one micro-batch of ``sequences`` by running it on fake tensors.

    Args:
        build: ``Recipe.build``.
        hardware: supplies the precision; the device itself is not used.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode  # unlike "meta" tensors it supports autocast
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from mvlm_core.training.optimizer import Muon

    # torch's FLOP counter does not cover the CPU's fused attention; the formulas of the other kernels apply.
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

    hardware = replace(hardware, device="cpu", compile=False, loss_kernel="blocks")
    shape = (sequences, settings.max_length)
    with FakeTensorMode():
        built = build(settings, StubTokenizer(settings.vocab_size), hardware)
        for module in built.modules.values():
            module.train()
        inputs, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), hardware.autocast():
                total = built.loss(inputs, targets, torch.ones(shape), 0.0).total
            total.backward()
        parameters = {p for module in built.modules.values() for p in module.parameters()}
        weights = sum(p.nbytes for p in parameters)
        activations = sum(storage.nbytes() for storage in saved - {p.untyped_storage() for p in parameters})
        teachers = settings.num_models - 1 or len(settings.teacher)
        memory = StepMemory(weights, weights, built.optimizers.state_bytes, activations, teachers * weights)
        flops = counter.get_total_flops() / (sequences * settings.max_length)
        with FlopCounterMode(display=False) as products:
            for part in built.optimizers.parts:
                if isinstance(part, Muon):
                    part.step()
        return StepCost(built.model.num_parameters(), memory, flops, products.get_total_flops())


def fitting_micro_batch(one: StepMemory, per_sequence: int, memory_bytes: float, max_sequences: int) -> int | None:
    """Largest micro-batch that fits, halving from ``max_sequences`` as the trainer does; None if no sequence fits.

    Args:
        one: memory of a micro-batch of one sequence; each additional sequence adds ``per_sequence`` bytes.
    """
    sequences, room = max_sequences, memory_bytes - OVERHEAD - one.total
    while sequences > 1 and (sequences - 1) * per_sequence > room:
        sequences = -(-sequences // 2)
    return sequences if (sequences - 1) * per_sequence <= room else None
