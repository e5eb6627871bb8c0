"""What to do about numbers that break: skip the step, then go back to a good checkpoint, then give up.

Whether a step is skipped is decided on the device, inside the optimizers (``Optimizers.step``), so no step waits for
the host. Here the figures are judged later, in the order of the steps, when the loop reads them anyway; so the
decision depends on the steps alone and not on when they were read.
"""

from __future__ import annotations

from dataclasses import dataclass

# Skipped steps in a row, and steps in a row far above the running mean, after which the run goes back.
_SKIPPED_IN_A_ROW = 5
_HIGH_IN_A_ROW = 50
# "Far above": by so many running mean deviations, and by at least so many nats a token. A bad batch of real text stays
# below both; a run that has lost its weights is some nats above and stays there.
_DEVIATIONS, _LEAST_NATS = 8.0, 0.7
_MEMORY = 0.98
_STEPS_BEFORE_JUDGING = 50

ROLLBACKS_AT_MOST = 3
RATE_AFTER_ROLLBACK = 0.5


@dataclass
class GuardState:
    """What the guard remembers; all of it is in every checkpoint.

    Attributes:
        skipped: steps skipped so far.
        skipped_in_a_row, high_in_a_row: the present streaks.
        trouble_since: first step of the present streak; a checkpoint from before it is good.
        mean, deviation: of the training loss of undisturbed steps, running, in nats a token.
        rollbacks: times the run went back.
        rate_factor: what the learning rate is multiplied by since.
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
        """Judge one step; the steps come in order. Returns why the run must go back, or None."""
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.trouble_since = self.trouble_since or step
            if self.skipped_in_a_row >= _SKIPPED_IN_A_ROW:
                return f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is no finite number"
            return None
        self.skipped_in_a_row = 0
        limit = self.mean + max(_DEVIATIONS * self.deviation, _LEAST_NATS)
        if self.judged >= _STEPS_BEFORE_JUDGING and train_loss > limit:
            self.high_in_a_row += 1
            self.trouble_since = self.trouble_since or step
            if self.high_in_a_row >= _HIGH_IN_A_ROW:
                return (
                    f"the loss stayed above {limit:.2f} for {self.high_in_a_row} steps (it was {self.mean:.2f} before)"
                )
            return None
        self.high_in_a_row, self.trouble_since = 0, None
        self._remember(train_loss)
        return None

    def _remember(self, train_loss: float) -> None:
        self.judged += 1
        # The plain mean at first, then an exponential one: early figures must not weigh for long.
        weight = max(1 / self.judged, 1 - _MEMORY)
        self.deviation += weight * (abs(train_loss - self.mean) * (self.judged > 1) - self.deviation)
        self.mean += weight * (train_loss - self.mean)

    def after_rollback(self, restored: GuardState) -> GuardState:
        """The state to go on with from ``restored``, the one of the checkpoint the run went back to."""
        rollbacks = self.rollbacks + 1
        return GuardState(
            skipped=self.skipped,
            judged=restored.judged,
            mean=restored.mean,
            deviation=restored.deviation,
            rollbacks=rollbacks,
            rate_factor=RATE_AFTER_ROLLBACK**rollbacks,
        )
