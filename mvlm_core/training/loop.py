"""The training loop of both models: step, evaluate, log, checkpoint, stop.

The step number alone determines the batch (see ``batches``), the learning rate, and dropout, whose generator is
reseeded for each micro-batch. A checkpoint therefore needs only weights, optimizer state and a few counters, and a
resumed run is bitwise identical to an uninterrupted one (on CUDA with ``--deterministic``; otherwise equal up to
rounding).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from mvlm_core.console import progress
from mvlm_core.errors import Stopped, TrainingError, UserError
from mvlm_core.hardware import compiled_so_far
from mvlm_core.monitor import peak_memory, reset_peak_memory
from mvlm_core.signals import StopRequest
from mvlm_core.training.checkpointer import Checkpointer
from mvlm_core.training.divergence import MAX_ROLLBACKS
from mvlm_core.training.gradients import GradientAccumulator
from mvlm_core.training.history import StepLog, read_history
from mvlm_core.training.run_length import RunLength, run_length
from mvlm_core.training.state import LoopState, Overhead
from mvlm_core.training.task import Run, TrainingTask
from mvlm_core.training.time_limit import TimeBudget, steps_within

log = logging.getLogger("mvlm")


class TrainingLoop:
    """One training run: ``run()`` trains from the newest checkpoint to the end.

    Writes ``checkpoints/`` and ``training_history.jsonl`` to the run's output folder.
    """

    def __init__(self, run: Run, task: TrainingTask) -> None:
        self.task, self.settings, self.hardware, self.ranks = task, run.settings, run.hardware, run.ranks
        self._length = run_length(run.settings, task.batches)
        self._budget: TimeBudget | None = None
        self.clock = time.perf_counter
        self.state = LoopState(micro_batch=run.settings.batch_size)
        self.gradients = GradientAccumulator(run, task)
        self.step_log = StepLog(run, task.batches.tokens_per_batch)
        self.checkpoints = Checkpointer(run, task, self.step_log, on_failure=self._handle_failed_save)
        self._bar: Any = None
        self._clock_start = 0.0  # clock reading at the first step, shifted so that interruptions do not count
        self._compiled = compiled_so_far() if run.hardware.compiles else (0, 0.0)  # graphs and seconds
        self._best_before: tuple[int | None, float | None] = (None, None)  # step and score before the latest best

    def run(self, stop: StopRequest) -> LoopState:
        """Train to the end.

        Raises:
            Stopped: a signal arrived; a checkpoint has been written.
            UserError: the checkpoint belongs to another run, or to one that these settings would cut short.
            TrainingError: training keeps diverging, or a micro-batch of one sequence does not fit in memory.
        """
        self._resume()
        if self.state.step == 0:
            self.state.before = self.task.score_before()
        if self._is_over:
            return self.state
        if self.ranks.is_main:
            self.checkpoints.check_space(self.length.total)
        self.state.finished = False
        stop.defer()
        self.gradients.find_micro_batch(self.state, self.length.progress(self.state.step))
        reset_peak_memory(self.hardware.device)  # of teachers, preparation and trials that did not fit
        self._report_compilation()
        if self.state.step == 0:
            self._save(in_background=False)  # fail now, not after an hour, if the disk is full or read-only
            self.state.spent = Overhead()  # not timed: it has no optimizer state, so it is cheaper than later ones
        self._clock_start = self.clock() - self.state.seconds
        if self.settings.max_hours and self.state.fixed_steps is None:
            timed = self.state.timed_steps, self.state.timed_seconds
            self._budget = TimeBudget(self.settings.max_hours, self.state.seconds, self.clock, timed)
        try:
            self._train(stop)
        finally:
            self.checkpoints.finish(wait=True)
        return self.state

    def _train(self, stop: StopRequest) -> None:
        tokens = self.task.batches.tokens_per_batch
        first_step = True
        quiet = self.settings.quiet or not self.ranks.is_main
        done = self.state.step * tokens
        total = self.length.total and self.length.total * tokens
        with progress(total, "training", "tok", initial=done, quiet=quiet, unit_scale=True) as bar:
            self._bar = bar
            while not self.state.finished:
                stopping = self.step(stop)
                if first_step:
                    self.ranks.shorten_timeout(self.hardware.compiles)
                    first_step = False
                bar.update(tokens)
                self._after_step(stopping)
                if stopping and not self.state.finished:
                    log.info(
                        f"stopped at step {self.state.step} of {self.length}; run again without --fresh to resume here"
                    )
                    raise Stopped(stop.number)

    @property
    def length(self) -> RunLength:
        """Length of the run; shortened once ``--max_hours`` has fixed the number of steps."""
        if self.settings.max_hours is None:  # a resumed run may have been given another length
            return self._length
        return replace(self._length, fixed_at=self.state.fixed_at, fixed_steps=self.state.fixed_steps)

    @property
    def _is_over(self) -> bool:
        return self.length.is_reached(self.state.step) or (self.state.stopped_early and self._is_out_of_patience)

    @property
    def _is_out_of_patience(self) -> bool:
        patience = self.settings.patience
        if not patience or self.state.evaluations_since_best < patience:
            return False
        return self.task.batches.epoch_at(self.state.step) >= self.settings.min_epochs

    def history(self) -> list[dict[str, Any]]:
        """Return the records of all steps."""
        return read_history(self.step_log.path)

    def peak_memory(self) -> int:
        """Return the peak memory in bytes: of the fullest GPU, or on a CPU the sum over all processes."""
        own = peak_memory(self.hardware.device)
        return int(
            self.ranks.all_reduce_max(own) if self.hardware.device == "cuda" else self.ranks.all_reduce_scalars(own)[0]
        )

    def _after_step(self, stopping: bool) -> None:
        """Read metrics, evaluate, write a checkpoint or roll back, as due after this step."""
        self.checkpoints.finish(wait=False)
        step, settings = self.state.step, self.settings
        ending = self.length.is_reached(step)
        time_evaluation, time_checkpoint, fix_length = self._timing_due()
        evaluating = ending or time_evaluation or step % settings.eval_interval == 0
        due = time_evaluation or time_checkpoint or fix_length or step % settings.checkpoint_interval == 0
        if not (evaluating or stopping or due or step % settings.log_interval == 0):
            return
        reason = self._read_metrics()
        improved = False
        if evaluating and not reason:
            improved, reason = self._evaluate()
        if reason:
            self._roll_back(reason)
            return
        self._write_history()
        if fix_length:
            self._fix_length()
        if evaluating:
            self.state.stopped_early = not ending and self.ranks.broadcast(self._should_stop_early())
            self.state.finished = ending or self.state.stopped_early
        # During a streak of bad steps, save nothing: rotation must not delete the checkpoints from before it.
        regular = self.state.finished or (due and self.state.guard.trouble_since is None)
        if regular or stopping:
            self._save(for_signal_only=not regular, in_background=not (self.state.finished or stopping))
        elif improved:
            self._save(weights_only=True)
        else:
            return
        self._wait_for_disk("save")

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, stop: StopRequest) -> bool:
        """Take one optimizer step; return whether any rank has been asked to stop."""
        started = self.clock()
        state, optimizers = self.state, self.task.optimizers
        length = self.length
        scale = length.learning_rate_scale(state.step, self.settings.lr_schedule)
        learning_rate = optimizers.set_scale(scale * state.guard.rate_factor)
        metrics, all_bytes, stopping = self.gradients.accumulate(state, length.progress(state.step), stop)
        parameters = [p for p in optimizers.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
        skipped = (~(norm.isfinite() & metrics["train_loss"].isfinite())).float()
        optimizers.step(found_inf=skipped)
        optimizers.zero_grad()
        state.step += 1
        state.tokens += self.task.batches.tokens_per_batch
        state.bytes += int(all_bytes)
        record = {
            "step": state.step,
            "epoch": self.task.batches.epoch_at(state.step),
            "tokens": state.tokens,
            "bytes": state.bytes,
            "learning_rate": learning_rate,
        }
        metrics |= {"grad_norm": norm, "skipped": skipped}
        self.step_log.add(record, metrics, since=started - self._clock_start, seconds=self.clock() - started)
        return stopping

    # -- metrics, evaluation and history ----------------------------------------------------------------------------

    def _seconds(self) -> float:
        """Wall time since the first step, excluding time between an interruption and the resume."""
        return self.clock() - self._clock_start

    def _read_metrics(self) -> str | None:
        """Read and show the metrics of the steps since the last call; return the reason for a rollback, if any."""
        self._report_compilation()
        reason = self.step_log.read(self.state, self.clock)
        self.step_log.show(self._bar, self.state, self.length)
        return reason

    def _report_compilation(self) -> None:
        """Log newly compiled graphs; after the first step there should be none."""
        if self.hardware.compiles:
            before, self._compiled = self._compiled, compiled_so_far()
            if graphs := self._compiled[0] - before[0]:
                log.info(f"step {self.state.step}: compiled {graphs} graphs in {self._compiled[1] - before[1]:.1f} s")

    def _evaluate(self) -> tuple[bool, str | None]:
        """Score the validation text; return whether it is the best so far, and the reason for a rollback, if any."""
        with self._timed("evaluation"):
            state, value = self.state, self.task.evaluate()
        if not math.isfinite(value):
            state.guard.trouble_since = state.guard.trouble_since or state.step
            return False, f"validation bits per byte of step {state.step} is non-finite ({value})"
        self.step_log.note(validation_bpb=value)
        improved = state.best_bpb is None or value < state.best_bpb
        if improved:
            self._best_before = state.best_step, state.best_bpb
            state.best_step, state.best_bpb, state.evaluations_since_best = state.step, value, 0
        else:
            state.evaluations_since_best += 1
        best = "  (best)" if improved else ""
        log.info(f"step {state.step}/{self.length}  validation {value:.4f} bits per byte{best}")
        return improved, None

    def _write_history(self) -> None:
        try:
            self.step_log.write()
        except OSError as error:
            log.error("cannot write the history (%s); training continues and will retry", error)

    def _should_stop_early(self) -> bool:
        if self._is_out_of_patience:
            log.info("no improvement in %d evaluations: stopping early", self.state.evaluations_since_best)
        return self._is_out_of_patience

    # -- --max_hours -------------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        """Count an "evaluation" or a "checkpoint" and the seconds for which it blocks training."""
        started, spent = self.clock(), self.state.spent
        try:
            yield
        finally:
            seconds = self.clock() - started
            setattr(spent, f"{kind}s", getattr(spent, f"{kind}s") + 1)
            setattr(spent, f"{kind}_seconds", getattr(spent, f"{kind}_seconds") + seconds)
            if self._budget is not None:
                self._budget.exclude(seconds)

    def _timing_due(self) -> tuple[bool, bool, bool]:
        """Whether to time an evaluation, whether to time a checkpoint, and whether to fix the run's length now."""
        if self._budget is None:
            return False, False, False
        self._budget.count_step(self.hardware.synchronize)
        # The main rank decides: the ranks' clocks differ, and only the main rank saves.
        return self.ranks.broadcast(self._budget.due(self.state.step, self.length.limit, self.state.spent))

    def _fix_length(self) -> None:
        """Fix the number of steps from the measured durations of steps, evaluations and checkpoints."""
        state, settings, budget = self.state, self.settings, self._budget
        assert budget is not None
        step_seconds = budget.step_seconds  # measured until now, without the trial steps of the next line
        step_seconds += self.gradients.extra_step_seconds(state, self.clock)
        durations = {"step": step_seconds} | budget.durations(state.spent)
        reachable = steps_within(
            budget.seconds - budget.used,
            state.step,
            **durations,
            eval_interval=settings.eval_interval,
            checkpoint_interval=settings.checkpoint_interval,
        )
        state.fixed_at, state.fixed_steps, self._budget = state.step, self.ranks.broadcast(reachable), None
        total = self.length.total or 0
        self._bar.total = total * self.task.batches.tokens_per_batch
        self._bar.refresh()
        measured = ", ".join(f"{kind} {seconds:.3g} s" for kind, seconds in durations.items())
        length = f"{total:,} steps ({self.task.batches.epoch_at(total):.2f} epochs)"
        if total == state.fixed_steps:
            log.info(f"measured: {measured}. Length fixed at {length}, to finish within {settings.max_hours:.3g} hours")
        else:
            log.info(f"measured: {measured}. {settings.max_hours:.3g} hours are enough for {length}")

    # -- checkpoints: save, resume, roll back -----------------------------------------------------------------------

    def _save(self, *, for_signal_only: bool = False, weights_only: bool = False, in_background: bool = True) -> None:
        """Write a checkpoint of this step unless there is one; see ``Checkpointer.save``."""
        if self.checkpoints.saved_step == self.state.step or not self.ranks.is_main:
            return
        if self._budget is not None:
            self.state.timed_steps, self.state.timed_seconds = self._budget.timed
        with self._timed("checkpoint"):
            self.checkpoints.finish(wait=True)
            self.state.seconds = self._seconds() if self.state.step else 0.0
            self.checkpoints.save(self.state, for_signal_only, weights_only, in_background)

    def _wait_for_disk(self, work: str) -> None:
        """Wait for the main rank's reading or writing of checkpoints, however long it takes."""
        self.ranks.wait_for_main(f"{work} {self.state.step} {self.state.guard.rollbacks}")  # unique

    def _handle_failed_save(self, error: OSError) -> None:
        step, self.checkpoints.saved_step = self.checkpoints.saved_step, None
        if step == self.state.best_step:
            self.state.best_step, self.state.best_bpb = self._best_before
        if step == 0 or (self.state.finished and (step == self.state.step or self.state.best_step is None)):
            raise TrainingError(
                f"cannot write a checkpoint to {self.checkpoints.root} ({error}); free some space and run again"
            ) from None
        log.error("no checkpoint at step %s (%s); training continues and will retry", step, error)

    def _resume(self) -> None:
        """Resume from ``resume_from`` or the newest intact checkpoint; start from scratch if there is none."""
        checkpoint = self.checkpoints.find() if self.ranks.is_main else None
        if (state := self.checkpoints.restore(checkpoint)) is None:
            return
        self.state = state
        lacks_best = checkpoint is not None and not self.checkpoints.has_best(checkpoint, state)
        if self.ranks.broadcast(lacks_best):
            log.warning("the best weights so far are missing or damaged: the next evaluation counts as the best")
            state.best_step = state.best_bpb = None
            if self._is_over:
                state.best_step, state.best_bpb = state.step, self.task.evaluate()
        self._check_length()
        if checkpoint is not None and state.step > 0 and not self._is_over:
            log.info("resuming from %s (step %s of %s)", checkpoint.folder, checkpoint.step, self.length)
            if self.length.total == state.fixed_steps is not None:
                log.info("its time limit fixed this length; to change it, give --num_epochs or --max_steps instead")

    def _check_length(self) -> None:
        """Check that these settings do not end an unfinished run before its checkpoint, with a high learning rate.

        Raises:
            UserError: the checkpoint was written by a longer run.
        """
        state, hours = self.state, self.settings.max_hours
        if state.finished or state.step == 0:
            return
        if self.length.is_reached(state.step):
            end = f"end at step {self.length.total}"
        elif hours is not None and state.fixed_steps is None and state.seconds > 3600 * hours:
            end = f"end at once, after more than {hours:.3g} hours"
        else:
            return
        raise UserError(
            f"{self.checkpoints.root} holds an unfinished run at step {state.step}, which these settings would {end}: "
            "repeat the length it was started with (--num_epochs, --max_steps or --max_hours), or start over with "
            "--fresh"
        )

    def _roll_back(self, reason: str) -> None:
        """Return to the newest checkpoint from before the divergence, with a lower learning rate.

        Raises:
            TrainingError: too many rollbacks, or no such checkpoint.
        """
        diverged = self.state
        advice = (
            "start over with --fresh and a lower --learning_rate, and check the training text around the last steps"
        )
        if diverged.guard.rollbacks >= MAX_ROLLBACKS:
            raise TrainingError(f"{reason}, after {diverged.guard.rollbacks} rollbacks: {advice}")
        self.checkpoints.finish(wait=True)
        checkpoint = self.checkpoints.find_before(diverged.guard.trouble_since) if self.ranks.is_main else None
        self._wait_for_disk("rollback")
        self.step_log.discard()
        if (state := self.checkpoints.restore(checkpoint)) is None:
            raise TrainingError(f"{reason}, and there is no earlier checkpoint: {advice}")
        self.state = state
        self.state.finished = self.state.stopped_early = False  # it may be the end of a shorter run
        guard = self.state.guard = diverged.guard.after_rollback(self.state.guard)
        self.state.fixed_at, self.state.fixed_steps = diverged.fixed_at, diverged.fixed_steps
        self.state.micro_batch = min(diverged.micro_batch, self.state.micro_batch)
        self._bar.update((self.state.step - diverged.step) * self.task.batches.tokens_per_batch)
        log.warning(
            f"{reason}: rolled back to step {self.state.step}, learning rate scaled by {guard.rate_factor} "
            f"(rollback {guard.rollbacks} of at most {MAX_ROLLBACKS})"
        )
