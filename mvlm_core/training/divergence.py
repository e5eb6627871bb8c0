"""Divergence guard: skip a non-finite step, then roll back to a good checkpoint, then give up.

The optimizers skip a step on the device (``Optimizers.step``), without synchronizing with the host. The guard sees the
metrics later, in step order, when the loop reads them anyway; its decisions do not depend on when they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

# Consecutive skipped steps, and consecutive steps far above the running mean, after which the run rolls back.
_SKIPPED_IN_A_ROW = 5
_HIGH_IN_A_ROW = 50
# "Far above" means by this many mean absolute deviations and at least this many nats per token. A bad batch of real
# text stays below both; a diverged run is several nats above and stays there.
_DEVIATIONS, _MIN_NATS = 8.0, 0.7
_EMA_DECAY = 0.98  # of the running mean and deviation
_STEPS_BEFORE_JUDGING = 50

MAX_ROLLBACKS = 3
LEARNING_RATE_AFTER_ROLLBACK = 0.5


@dataclass
class GuardState:
    """State of the guard, saved in full in every checkpoint.

    Attributes:
        skipped: steps skipped so far.
        skipped_in_a_row, high_in_a_row: lengths of the current streaks.
        trouble_since: first step of the current streak; checkpoints before it are good.
        judged: good steps so far.
        mean, deviation: running mean and mean absolute deviation of the loss over good steps, in nats per token.
        rollbacks: number of rollbacks so far.
        rate_factor: current learning rate multiplier.
    """

    skipped: int = 0
    skipped_in_a_row: int = 0
    high_in_a_row: int = 0
    trouble_since: int | None = None
    judged: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    rollbacks: int = 0
    rate_factor: float = 1.0

    def observe(self, step: int, train_loss: float, skipped: bool) -> str | None:
        """Update with one step, in step order; return the reason for a rollback, or None."""
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.trouble_since = self.trouble_since or step
            if self.skipped_in_a_row >= _SKIPPED_IN_A_ROW:
                return f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient"
            return None
        self.skipped_in_a_row = 0
        limit = self.mean + max(_DEVIATIONS * self.deviation, _MIN_NATS)
        if self.judged >= _STEPS_BEFORE_JUDGING and train_loss > limit:
            self.high_in_a_row += 1
            self.trouble_since = self.trouble_since or step
            if self.high_in_a_row >= _HIGH_IN_A_ROW:
                return (
                    f"the loss stayed above {limit:.2f} for {self.high_in_a_row} steps (it was {self.mean:.2f} before)"
                )
            return None
        self.high_in_a_row, self.trouble_since = 0, None
        self._update_ema(train_loss)
        return None

    def _update_ema(self, train_loss: float) -> None:
        self.judged += 1
        # A plain mean at first, then an exponential moving average, so that early losses are soon forgotten.
        weight = max(1 / self.judged, 1 - _EMA_DECAY)
        self.deviation += weight * (abs(train_loss - self.mean) * (self.judged > 1) - self.deviation)
        self.mean += weight * (train_loss - self.mean)

    def after_rollback(self, restored: GuardState) -> GuardState:
        """Return the state to continue with; ``restored`` comes from the checkpoint that the run rolled back to."""
        rollbacks = self.rollbacks + 1
        return GuardState(
            skipped=self.skipped,
            judged=restored.judged,
            mean=restored.mean,
            deviation=restored.deviation,
            rollbacks=rollbacks,
            rate_factor=LEARNING_RATE_AFTER_ROLLBACK**rollbacks,
        )
