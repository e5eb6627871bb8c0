"""``--max_hours``: a run times its steps, then fixes its number of steps once, so that it ends within the limit.

Until then no step may depend on that number. Checkpoints store it, or the timings so far, so that a resumed run ends at
the same step as an uninterrupted one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from mvlm_core.training.state import Overhead

MEASURED_SECONDS = 60.0  # or _MEASURED_SHARE of a short budget
_MEASURED_SHARE = 0.1
_UNTIMED_STEPS = 3  # at the start of a process: compilation, memory allocation, a cold page cache
_MIN_MEASURED_STEPS = 7
_MAX_STEPS = 10**9


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
    eval_interval: int,
    checkpoint_interval: int,
) -> int:
    """Largest total number of steps that can be completed in ``seconds`` after ``done`` steps; at least one more.

    Args:
        step, evaluation, checkpoint: seconds for each; every evaluation is assumed to be the best so far and saved.
    """

    def needed(total: int) -> float:
        evaluations = -(-total // eval_interval) - done // eval_interval
        checkpoints = total // checkpoint_interval - done // checkpoint_interval
        return (total - done) * step + evaluations * (evaluation + checkpoint) + checkpoints * checkpoint

    return done + max(1, bisect_right(range(done + 1, _MAX_STEPS), seconds, key=needed))
