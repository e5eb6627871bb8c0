"""``--max_hours``: a run measures itself, then fixes its number of steps once, so that it ends in its time.

Until then nothing that a step computes may depend on that number: the learning rate warms up over a fixed number of
steps and stays at its peak, and the share of the run that is done counts as 0. From there to the end the schedule runs
as in any other run. The number stands in the checkpoints, and until it is fixed the measurements do, so a resumed run
ends where the uninterrupted one does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from mvlm_core.training.optimizer import learning_rate_scale

MEASURED_SECONDS = 60.0  # or this share of a short budget
_MEASURED_SHARE = 0.1
_UNTIMED_STEPS = 3  # the first ones of a process: compilation, the memory pool, the page cache
_MEASURED_STEPS = 7  # of the run, at least
WARMUP_STEPS = 50  # about 2 % of a usual run; the length is not known yet
_MOST_STEPS = 10**9


@dataclass(frozen=True)
class RunLength:
    """How long a run is, and where in it a step stands.

    Attributes:
        limit: steps by all other settings; None where only the time limits the run.
        warmup: steps.
        by_time: whether ``--max_hours`` is given.
        fixed_at, fixed_steps: after how many steps the run fixed how many steps it takes by its time; None before.
    """

    limit: int | None
    warmup: int
    by_time: bool = False
    fixed_at: int | None = None
    fixed_steps: int | None = None

    @property
    def total(self) -> int | None:
        """Steps of the run; None as long as that is open."""
        if not self.by_time:
            return self.limit
        return None if self.fixed_steps is None else min(self.fixed_steps, self.limit or self.fixed_steps)

    def is_reached(self, step: int) -> bool:
        """Whether the run is over after ``step`` steps."""
        end = self.total or self.limit
        return end is not None and step >= end

    def share(self, step: int) -> float:
        """Which share of the schedule lies before ``step``."""
        start = self.fixed_at or 0
        return 0.0 if self.total is None or step < start else (step - start) / (self.total - start)

    def learning_rate_scale(self, step: int, schedule: str) -> float:
        """The share of the peak learning rate for step ``step``, from 0."""
        start = self.fixed_at or 0
        if self.total is None or step < start:
            return min(1.0, (step + 1) / max(1, self.warmup))
        return learning_rate_scale(step - start, self.total - start, 0 if self.by_time else self.warmup, schedule)

    def __str__(self) -> str:
        return "?" if self.total is None else str(self.total)


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
    """The largest total of steps whose end is reached in ``seconds`` from ``done`` steps on; at least one more.

    Args:
        step, evaluation, checkpoint: seconds that each takes; every evaluation counts as one that is saved, the best so
            far.
    """

    def needed(total: int) -> float:
        evaluations = -(-total // evaluation_interval) - done // evaluation_interval
        checkpoints = total // checkpoint_interval - done // checkpoint_interval
        return (total - done) * step + evaluations * (evaluation + checkpoint) + checkpoints * checkpoint

    return done + max(1, bisect_right(range(done + 1, _MOST_STEPS), seconds, key=needed))


class TimeBudget:
    """The time of a run, and what its steps take of it.

    Args:
        used: seconds that earlier processes of this run have trained.
        clock: seconds from any start.
        timed: steps that earlier processes have timed, and their seconds.
    """

    def __init__(
        self, hours: float, used: float, clock: Callable[[], float], timed: tuple[int, float] = (0, 0.0)
    ) -> None:
        self.seconds = hours * 3600
        self.measuring = min(MEASURED_SECONDS, _MEASURED_SHARE * self.seconds)
        self._clock, self._opened, self._used, self._earlier = clock, clock(), used, timed
        self._steps = 0
        self._timed_from = 0.0
        self._outside = 0.0  # evaluations and checkpoints among the timed steps

    @property
    def used(self) -> float:
        """Seconds of the run so far."""
        return self._used + self._clock() - self._opened

    @property
    def timed(self) -> tuple[int, float]:
        """Steps that were timed, and their seconds, with those of earlier processes; the device has done them."""
        steps, seconds = self._earlier
        if self._steps > _UNTIMED_STEPS:
            steps += self._steps - _UNTIMED_STEPS
            seconds += max(0.0, self._clock() - self._timed_from - self._outside)
        return steps, seconds

    @property
    def step_seconds(self) -> float:
        """Of a step, the untimed ones left out."""
        steps, seconds = self.timed
        return seconds / max(1, steps)

    def count_step(self, wait: Callable[[], None]) -> None:
        """One more step was taken; ``wait`` for the device before the first timed one."""
        self._steps += 1
        if self._steps == _UNTIMED_STEPS:
            wait()
            self._timed_from, self._outside = self._clock(), 0.0

    def leave_out(self, seconds: float) -> None:
        """``seconds`` since the last step went into something else."""
        self._outside += seconds

    def share_measured(self, step: int, limit: int | None) -> float:
        """How much of the measuring is done, by time or by steps; 1 and more is enough."""
        if step < _MEASURED_STEPS or self.timed[0] == 0:
            return 0.0
        return max(self.used / self.measuring, step / (_MEASURED_SHARE * limit) if limit else 0.0)
