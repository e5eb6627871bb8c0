"""Length of a run in steps, from its settings or fixed by ``--max_hours``, and its learning rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from mvlm_core.data.batches import BatchSource
from mvlm_core.errors import UserError
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.optimizer import learning_rate_scale

_WARMUP_SHARE = 0.02
_WARMUP_STEPS = 50  # with --max_hours, when the length is not known yet: about 2 % of a typical run


@dataclass(frozen=True)
class RunLength:
    """Length of a run in steps, and its learning rate schedule.

    Attributes:
        limit: steps allowed by all settings but ``--max_hours``; None if only time limits the run.
        warmup: warm-up steps.
        by_time: whether ``--max_hours`` is given.
        fixed_at, fixed_steps: step at which ``--max_hours`` fixed the length, and that length; None before.
    """

    limit: int | None
    warmup: int
    by_time: bool = False
    fixed_at: int | None = None
    fixed_steps: int | None = None

    @property
    def total(self) -> int | None:
        """Total steps of the run; None until known."""
        if not self.by_time:
            return self.limit
        return None if self.fixed_steps is None else min(self.fixed_steps, self.limit or self.fixed_steps)

    def is_reached(self, step: int) -> bool:
        """Whether the run is over after ``step`` steps."""
        end = self.total or self.limit
        return end is not None and step >= end

    def share(self, step: int) -> float:
        """Completed share of the schedule before ``step``."""
        start = self.fixed_at or 0
        return 0.0 if self.total is None or step < start else (step - start) / (self.total - start)

    def learning_rate_scale(self, step: int, schedule: str) -> float:
        """Fraction of the peak learning rate at step ``step`` (from 0)."""
        warmed_up = min(1.0, (step + 1) / max(1, self.warmup))
        if self.total is None or step < (self.fixed_at or 0):
            return warmed_up
        if self.fixed_at is None:
            return learning_rate_scale(step, self.total, self.warmup, schedule)
        return min(warmed_up, learning_rate_scale(step - self.fixed_at, self.total - self.fixed_at, 0, schedule))

    def __str__(self) -> str:
        return "?" if self.total is None else str(self.total)


def run_length(settings: TrainingSettings, batches: BatchSource) -> RunLength:
    """Length of the run, before ``--max_hours`` has fixed it.

    Raises:
        UserError: the warm-up is not shorter than the run.
    """
    total, warmup = total_steps(settings, batches), settings.warmup_steps
    if settings.max_hours is not None:
        return RunLength(total, _WARMUP_STEPS if warmup is None else warmup, by_time=True)
    assert total is not None  # every preset has a length
    if warmup is None:
        warmup = max(1, round(_WARMUP_SHARE * total))
    elif warmup >= total:  # the learning rate would never reach its peak
        raise UserError(f"--warmup_steps {warmup} is not shorter than the run of {total} steps")
    return RunLength(total, warmup)


def total_steps(settings: TrainingSettings, batches: BatchSource) -> int | None:
    """Optimizer steps until the first limit is reached; None if only ``--max_hours`` limits the run."""
    limits = []
    if settings.max_steps:
        limits.append(settings.max_steps)
    if settings.max_tokens:
        limits.append(round(settings.max_tokens / batches.tokens_per_batch))
    if settings.max_bytes:
        limits.append(round(settings.max_bytes / batches.bytes_per_token / batches.tokens_per_batch))
    if settings.num_epochs:
        limits.append(batches.steps_for_epochs(settings.num_epochs))
    return max(1, min(limits)) if limits else None
