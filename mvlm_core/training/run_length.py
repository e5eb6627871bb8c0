"""Length of a run in steps, from its settings or fixed by ``--max_hours``, and its learning rate schedule.

With ``--max_hours``, a run times its steps, then fixes its number of steps once, so that it ends within the limit.
Until then no step may depend on that number. If other settings limit the length as well, the schedule is theirs unless
time turns out to be shorter; otherwise the learning rate warms up over a fixed number of steps and stays at its peak,
and the progress of the run counts as 0. From then on, the schedule runs to the end as if it began there: a learning
rate that has begun to decay returns to its peak, which is at most a tenth higher. Checkpoints store the number, or the
timings so far, so that a resumed run ends at the same step as an uninterrupted one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from mvlm_core.data.batches import BatchSource
from mvlm_core.errors import UserError
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.state import Overhead

_COSINE_FLOOR = 0.1
MEASURED_SECONDS = 60.0  # or _MEASURED_SHARE of a short budget
_MEASURED_SHARE = 0.1
_UNTIMED_STEPS = 3  # at the start of a process: compilation, memory allocation, a cold page cache
_MIN_MEASURED_STEPS = 7
_MAX_STEPS = 10**9


@dataclass(frozen=True)
class RunLength:
    """Length of a run in steps, and its learning rate schedule.

    Attributes:
        limit: steps allowed by all settings but ``--max_hours``; None if only time limits the run.
        warmup: warm-up steps.
        fixed_at, fixed_steps: step at which ``--max_hours`` was translated into steps, and their number; None before.
    """

    limit: int | None
    warmup: int
    fixed_at: int | None = None
    fixed_steps: int | None = None

    @property
    def total(self) -> int | None:
        """Total steps of the run, as far as known; None before ``--max_hours`` has fixed a run without other limits."""
        return min((steps for steps in (self.limit, self.fixed_steps) if steps is not None), default=None)

    @property
    def _shortened_at(self) -> int | None:
        """Step at which ``--max_hours`` set the length; None if it has not, or allows more than the other limits."""
        return self.fixed_at if self.total != self.limit else None

    def is_reached(self, step: int) -> bool:
        """Whether the run is over after ``step`` steps."""
        return self.total is not None and step >= self.total

    def progress(self, step: int) -> float:
        """Completed fraction of the schedule before ``step``."""
        start = self._shortened_at or 0
        return 0.0 if self.total is None or step < start else (step - start) / (self.total - start)

    def learning_rate_scale(self, step: int, schedule: str) -> float:
        """Fraction of the peak learning rate at step ``step`` (from 0)."""
        start = self.warmup if self._shortened_at is None else self._shortened_at
        if self.total is None or step < start:
            return self._warmed_up(step)
        return min(self._warmed_up(step), decay((step - start) / max(1, self.total - start), schedule))

    def _warmed_up(self, step: int) -> float:
        """Completed fraction of the warm-up; if the run is shortened, the rest takes its share of the steps left."""
        start = self._shortened_at
        if self.limit is None or self.total is None or start is None or step < start:
            return min(1.0, (step + 1) / max(1, self.warmup))
        before = min(1.0, start / max(1, self.warmup))
        rest = self.warmup / self.limit * (self.total - start)
        return min(1.0, before + (1 - before) * (step + 1 - start) / max(1.0, rest))

    def __str__(self) -> str:
        return "?" if self.total is None else str(self.total)


def decay(share: float, schedule: str) -> float:
    """Fraction of the peak learning rate after ``share`` of the steps that follow the warm-up.

    ``linear`` decays to zero, which beats a cosine to a tenth by about 0.8 % (arXiv 2502.15938); ``cosine`` decays to
    a tenth, as in GPT-2's successors.
    """
    share = min(1.0, share)
    if schedule == "linear":
        return 1 - share
    return _COSINE_FLOOR + (1 - _COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * share))


def run_length(settings: TrainingSettings, batches: BatchSource) -> RunLength:
    """Length of the run, before ``--max_hours`` has fixed it.

    Raises:
        UserError: the warm-up is not shorter than the run.
    """
    total = total_steps(settings, batches.bytes_per_token, batches.steps_for_epochs)
    warmup = settings.warmup_steps
    if warmup is None:
        share, steps = settings.WARMUP
        return RunLength(total, steps if total is None else max(1, round(share * total)))
    if total is not None and warmup >= total:  # the learning rate would never reach its peak
        raise UserError(f"--warmup_steps {warmup} is not shorter than the run of {total} steps")
    return RunLength(total, warmup)


def total_steps(
    settings: TrainingSettings, bytes_per_token: float, steps_for_epochs: Callable[[float], int]
) -> int | None:
    """Optimizer steps until the first limit is reached; None if only ``--max_hours`` limits the run."""
    tokens, limits = settings.sequences_per_step * settings.max_length, []
    if settings.max_steps:
        limits.append(settings.max_steps)
    if settings.max_tokens:
        limits.append(round(settings.max_tokens / tokens))
    if settings.max_bytes:
        limits.append(round(settings.max_bytes / bytes_per_token / tokens))
    if settings.num_epochs:
        limits.append(steps_for_epochs(settings.num_epochs))
    return max(1, min(limits)) if limits else None


# --- the time limit -----------------------------------------------------------------------------------------


class TimeBudget:
    """Times the steps of a run with a time limit.

    Args:
        used: seconds used by earlier processes of this run.
        clock: returns seconds since an arbitrary start.
        timed: number of steps timed by earlier processes, and their seconds.
    """

    def __init__(
        self, hours: float, used: float, clock: Callable[[], float], timed: tuple[int, float] = (0, 0.0)
    ) -> None:
        self.seconds = hours * 3600
        self.measuring = min(MEASURED_SECONDS, _MEASURED_SHARE * self.seconds)
        self._clock, self._started, self._used, self._earlier = clock, clock(), used, timed
        self._steps = 0
        self._timed_from = 0.0
        self._excluded = 0.0  # seconds of evaluations and checkpoints between the timed steps

    @property
    def used(self) -> float:
        """Seconds used so far."""
        return self._used + self._clock() - self._started

    @property
    def timed(self) -> tuple[int, float]:
        """Number of timed steps and their seconds, including earlier processes; call after synchronizing the device."""
        steps, seconds = self._earlier
        if self._steps > _UNTIMED_STEPS:
            steps += self._steps - _UNTIMED_STEPS
            seconds += max(0.0, self._clock() - self._timed_from - self._excluded)
        return steps, seconds

    @property
    def step_seconds(self) -> float:
        """Average seconds per timed step."""
        steps, seconds = self.timed
        return seconds / max(1, steps)

    def count_step(self, wait: Callable[[], None]) -> None:
        """Count one step; ``wait`` synchronizes the device before the first timed one."""
        self._steps += 1
        if self._steps == _UNTIMED_STEPS:
            wait()
            self._timed_from, self._excluded = self._clock(), 0.0

    def exclude(self, seconds: float) -> None:
        """Exclude ``seconds`` spent on something other than steps."""
        self._excluded += seconds

    def due(self, step: int, limit: int | None, spent: Overhead) -> tuple[bool, bool, bool]:
        """Whether to time an evaluation, whether to time a checkpoint, and whether to fix the run's length now.

        The first two normally coincide. A checkpoint written for a signal cannot record its own duration, so another
        one is timed after the resume.
        """
        evaluated, saved = spent.evaluations > 0, spent.checkpoints > 0
        half, whole = (self._share_measured(step, limit) >= share for share in (0.5, 1))
        return half and not evaluated, half and not saved, whole and evaluated and saved

    def durations(self, spent: Overhead) -> dict[str, float]:
        """Average seconds of an evaluation and of a checkpoint."""
        return {
            "evaluation": spent.evaluation_seconds / max(1, spent.evaluations),
            "checkpoint": spent.checkpoint_seconds / max(1, spent.checkpoints),
        }

    def _share_measured(self, step: int, limit: int | None) -> float:
        """Completed share of the measurement, by time or by steps; it is complete at 1 or more."""
        if step < _MIN_MEASURED_STEPS or self.timed[0] == 0:
            return 0.0
        return max(self.used / self.measuring, step / (_MEASURED_SHARE * limit) if limit else 0.0)


def steps_within(
    seconds: float,
    done: int,
    *,
    step: float,
    evaluation: float,
    checkpoint: float,
    evaluation_interval: int,
    checkpoint_interval: int,
) -> int:
    """Largest total number of steps that can be completed in ``seconds`` after ``done`` steps; at least one more.

    Args:
        step, evaluation, checkpoint: seconds for each; every evaluation is assumed to be the best so far and saved.
    """

    def needed(total: int) -> float:
        evaluations = -(-total // evaluation_interval) - done // evaluation_interval
        checkpoints = total // checkpoint_interval - done // checkpoint_interval
        return (total - done) * step + evaluations * (evaluation + checkpoint) + checkpoints * checkpoint

    return done + max(1, bisect_right(range(done + 1, _MAX_STEPS), seconds, key=needed))
