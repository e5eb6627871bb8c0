"""What a training run is made of: the model's part of it, where it stands, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from mvlm_core.data.batches import BatchSource
from mvlm_core.errors import UserError
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.divergence import GuardState
from mvlm_core.training.ema import WeightAverage
from mvlm_core.training.optimizer import Optimizers

_WARMUP_SHARE = 0.02


@dataclass(frozen=True)
class StepLoss:
    """What a task's loss gives for one micro-batch: ``total`` is minimised, the rest is detached and logged."""

    total: Tensor
    train_loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingTask:
    """The part of a run that depends on the model.

    Attributes:
        modules: every module whose weights training moves, by name; ``"model"`` is the one that is exported.
        loss: (inputs, targets, document weights, share of the run done) → ``StepLoss`` or alike.
        evaluate: validation bits per byte of the model as it stands.
        average: of the exported model's weights, where the run keeps one: it is what is evaluated and exported.
        identity: what a checkpoint must agree on to be continued: settings, data, tokenizer.
    """

    modules: dict[str, nn.Module]
    loss: Callable[[Tensor, Tensor, Tensor, float], Any]
    optimizers: Optimizers
    batches: BatchSource
    evaluate: Callable[[], float]
    identity: dict[str, Any]
    average: WeightAverage | None = None

    def weights(self) -> dict[str, Tensor]:
        """All weights by ``<module>.<parameter>``; tied ones once."""
        named, seen = {}, set()
        for prefix, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                if tensor.data_ptr() not in seen or tensor.numel() == 0:
                    named[f"{prefix}.{name}"] = tensor
                    seen.add(tensor.data_ptr())
        return named

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``weights`` gave, in place."""
        with torch.no_grad():
            for name, tensor in self.weights().items():
                tensor.copy_(tensors[name])

    def evaluated(self) -> AbstractContextManager[Any]:
        """The model as it is evaluated: with its averaged weights, where there are any."""
        return nullcontext() if self.average is None else self.average.in_module()

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything of a checkpoint that is a tensor, by the name of its file."""
        found = {"model": self.weights(), "optimizer": self.optimizers.state_tensors()}
        return found if self.average is None else found | {"average": self.average.tensors()}


@dataclass
class LoopState:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        seconds: spent in training steps, evaluations and checkpoints not counted.
        best_step, best_bpb: of the evaluations so far.
        evaluations_since_best: for early stopping.
        micro_batch: sequences that fit the device at a time.
        finished: the run reached its end (or stopped early) at this step.
        guard: what the guard against broken numbers remembers.
    """

    step: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_bpb: float | None = None
    evaluations_since_best: int = 0
    micro_batch: int = 0
    finished: bool = False
    stopped_early: bool = False
    guard: GuardState = field(default_factory=GuardState)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> LoopState:
        """The state a checkpoint holds.

        Raises:
            ValueError: it is not one.
        """
        return _typed(cls, {**saved, "guard": _typed(GuardState, saved.get("guard"))})


def _typed(cls: type, saved: Any) -> Any:
    """An instance of a dataclass from its fields in ``saved``, each of the type it is declared with."""
    values = {}
    for name, kind in get_type_hints(cls).items():
        value = saved.get(name) if isinstance(saved, dict) else None
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(0.0, kind):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is {value!r:.40}")
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
        values[name] = value
    return cls(**values)


def identity_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs' identities, one sentence each."""
    names = sorted(then.keys() | now.keys())
    return [f"{name} was {then.get(name)}, now {now.get(name)}" for name in names if then.get(name) != now.get(name)]


def warmup_steps(settings: TrainingSettings, total_steps: int) -> int:
    """Steps of warm-up: as given, or a share of the run.

    Raises:
        UserError: longer than the run, in which the learning rate would never get where it should.
    """
    if settings.warmup_steps is None:
        return max(1, round(_WARMUP_SHARE * total_steps))
    if settings.warmup_steps >= total_steps:
        raise UserError(f"--warmup_steps {settings.warmup_steps} is not shorter than the run of {total_steps} steps")
    return settings.warmup_steps


def total_steps(settings: TrainingSettings, batches: BatchSource) -> int:
    """Optimizer steps of the run: up to the first of the limits that are set."""
    limits = []
    if settings.max_steps:
        limits.append(settings.max_steps)
    if settings.max_tokens:
        limits.append(round(settings.max_tokens / batches.tokens_per_batch))
    if settings.max_bytes:
        limits.append(round(settings.max_bytes / batches.store.bytes_per_token / batches.tokens_per_batch))
    if settings.num_epochs:
        limits.append(batches.steps_for_epochs(settings.num_epochs))
    return max(1, min(limits))
