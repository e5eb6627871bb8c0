"""The training loop of both models: step, evaluate, log, checkpoint, stop.

A step is determined by its number alone: the batch (see ``batches``), the learning rate, and the random numbers of
dropout, which are reseeded for each micro-batch. So a checkpoint needs weights, optimizer state and a few counters,
and a resumed run equals an uninterrupted one to the bit; on CUDA with ``--deterministic``, else to rounding.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mvlm_core.console import progress
from mvlm_core.errors import Stopped, TrainingFailed, UserError
from mvlm_core.files import fsync_path
from mvlm_core.hardware import compiled_so_far
from mvlm_core.monitor import gpu_load, memory_in_use, peak_memory
from mvlm_core.signals import StopRequest
from mvlm_core.training import checkpoint as checkpoints
from mvlm_core.training.checkpoint_writer import CheckpointWriter, NamedTensors
from mvlm_core.training.divergence import ROLLBACKS_AT_MOST
from mvlm_core.training.gradient_sync import GradientSync
from mvlm_core.training.history import HISTORY_NAME, append_records, read_history, truncate_history
from mvlm_core.training.state import LoopState, Run, Spent, TrainingTask, check_identity, run_length
from mvlm_core.training.tensorboard import TENSORBOARD_FOLDER, TensorBoardWriter
from mvlm_core.training.time_budget import RunLength, TimeBudget, steps_within

log = logging.getLogger("mvlm")


class TrainingLoop:
    """One run: ``run()`` trains from the newest checkpoint to the end.

    ``checkpoints/`` and ``training_history.jsonl`` are kept in the run's output folder.
    """

    def __init__(self, run: Run, task: TrainingTask) -> None:
        self.task, self.settings, self.hardware, self.ranks = task, run.settings, run.hardware, run.ranks
        self._length = run_length(run.settings, task.batches)
        self._budget: TimeBudget | None = None
        self.clock = time.perf_counter
        self.checkpoint_root = run.output_dir / "checkpoints"
        self.history_path = run.output_dir / HISTORY_NAME
        self.tensorboard: TensorBoardWriter | None = None
        if run.settings.tensorboard and run.ranks.is_main:
            self.tensorboard = TensorBoardWriter(run.output_dir / TENSORBOARD_FOLDER)
        self.state = LoopState(micro_batch=run.settings.batch_size)
        self._pending: list[dict[str, Any]] = []  # steps whose figures are still on the device
        self._pending_since = 0.0  # wall time of the run at the start of the first of them
        self._pending_seconds = 0.0
        self._records: list[dict[str, Any]] = []  # read, not yet in the history file
        self._saved_step: int | None = None  # the newest checkpoint, which may still be on its way to the disk
        self._writer = CheckpointWriter()
        self._clock_start = 0.0  # what the clock would have shown at the first step, had nothing interrupted the run
        self._compiled = (0, 0.0)  # graphs and seconds so far
        self._unused: frozenset[Tensor] = frozenset()  # parameters that get no gradient
        self._sync: GradientSync | None = None  # of several ranks

    def run(self, stop: StopRequest) -> LoopState:
        """Train to the end.

        Raises:
            Stopped: by a signal; the checkpoint is written.
            TrainingFailed: training diverges again and again, or the smallest micro-batch does not fit.
        """
        self._resume()
        if self.state.step == 0:
            self.state.before = self.task.score_before()
        if self.length.is_reached(self.state.step) or (self.state.stopped_early and self.state.finished):
            return self.state
        self.state.finished = False
        stop.defer()
        self._try_micro_batch()
        self._report_compilation()
        if self.state.step == 0:
            self._save(beside=False)  # a full or read-only disk is found now, not after an hour
            self.state.spent = Spent()  # it holds no optimizer state: no measure for the others
        self._clock_start = self.clock() - self.state.seconds
        if self.settings.max_hours and self.state.fixed_steps is None:
            timed = self.state.timed_steps, self.state.timed_seconds
            self._budget = TimeBudget(self.settings.max_hours, self.state.seconds, self.clock, timed)
        try:
            self._train(stop)
        finally:
            self._finish_save(wait=True)
        return self.state

    def _train(self, stop: StopRequest) -> None:
        tokens = self.task.batches.tokens_per_batch
        first_step = True
        quiet, done = self.settings.quiet or not self.ranks.is_main, self.state.step * tokens
        total = self.length.total and self.length.total * tokens
        with progress(total, "training", "tok", initial=done, quiet=quiet, unit_scale=True) as bar:
            while not self.state.finished:
                stopping = self._step(stop)
                if first_step:
                    self.ranks.limit_waiting()
                    first_step = False
                bar.update(tokens)
                self._after_step(stopping, bar)
                if stopping and not self.state.finished:
                    log.info(f"stopped at step {self.state.step} of {self.length}; the same command resumes here")
                    raise Stopped(stop.number)

    @property
    def length(self) -> RunLength:
        """How long this run is, as far as that is known by now."""
        return replace(self._length, fixed_at=self.state.fixed_at, fixed_steps=self.state.fixed_steps)

    def history(self) -> list[dict[str, Any]]:
        """The records of all steps."""
        return read_history(self.history_path)

    def peak_memory(self) -> int:
        """Bytes, over all processes of the run."""
        return int(self.ranks.sum_numbers(peak_memory(self.hardware.device))[0])

    def load_best(self) -> None:
        """Put the best weights by validation into the model; the last ones stay in the newest checkpoint."""
        step = self.state.best_step
        if step is not None and step != self.state.step:
            try:
                best = checkpoints.open_checkpoint(checkpoints.checkpoint_folder(self.checkpoint_root, step))
                self.task.load_state_tensors({"model": best.tensors("model")})
            except checkpoints.DamagedCheckpoint as damage:
                raise UserError(f"the best checkpoint is damaged: {damage}; run again with --fresh") from None

    def _after_step(self, stopping: bool, bar: Any) -> None:
        """Do what is due after this step: read the figures, evaluate, write a checkpoint, or roll back."""
        self._finish_save(wait=False)
        step, settings = self.state.step, self.settings
        ending = self.length.is_reached(step)
        rehearsing, unsaved, fixing = self._measure()
        evaluating = ending or rehearsing or step % settings.eval_interval == 0
        due = rehearsing or unsaved or fixing or step % settings.checkpoint_interval == 0
        if not (evaluating or stopping or due or step % settings.log_interval == 0):
            return
        trouble = self._flush(bar)
        improved = False
        if evaluating and not trouble:
            improved, trouble = self._evaluate()
        if trouble:
            self._roll_back(trouble, bar)
            return
        self._write_history()
        if fixing:
            self._fix_length(bar)
        if evaluating:
            self.state.stopped_early = self._should_stop_early() and not ending
            self.state.finished = ending or self.state.stopped_early
        # While training is in trouble, the checkpoints from before must not be rotated away.
        regular = self.state.finished or (due and self.state.guard.trouble_since is None)
        if regular or stopping:
            self._save(for_signal_only=not regular, beside=not (self.state.finished or stopping))
        elif improved:
            self._save(weights_only=True)
        else:
            return
        self.ranks.wait_for_main(f"save {step}")  # however slow its disk is

    # -- one step ---------------------------------------------------------------------------------------------------

    def _step(self, stop: StopRequest) -> bool:
        """One optimizer step. Returns whether any rank wants to stop after it."""
        started = self.clock()
        state, optimizers = self.state, self.task.optimizers
        length = self.length
        if not self._pending:
            self._pending_since = self._seconds()
        scale = length.learning_rate_scale(state.step, self.settings.lr_schedule)
        learning_rate = optimizers.set_scale(scale * state.guard.rate_factor)
        figures, all_bytes, stopping = self._gradients(length.share(state.step), stop)
        parameters = [p for p in optimizers.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
        skipped = (~(norm.isfinite() & figures["train_loss"].isfinite())).float()
        optimizers.step(found_inf=skipped)
        optimizers.zero_grad()
        state.step += 1
        state.tokens += self.task.batches.tokens_per_batch
        state.bytes += int(all_bytes)
        self._pending.append(
            {
                "step": state.step,
                "epoch": self.task.batches.epoch_at(state.step),
                "tokens": state.tokens,
                "bytes": state.bytes,
                "learning_rate": learning_rate,
                "figures": {**figures, "grad_norm": norm, "skipped": skipped},
            }
        )
        self._pending_seconds += self.clock() - started
        return stopping

    def _gradients(self, share_done: float, stop: StopRequest) -> tuple[dict[str, Tensor], float, bool]:
        """Gradients and figures of the whole batch, its text bytes, and whether any rank wants to stop.

        A rank that runs out of memory halves its micro-batch and starts the step again. Where it has exchanged a part
        of its gradients by then, the others must start again as well.
        """
        while True:
            self._prepare_sync(share_done)
            try:
                figures, text_bytes = self._accumulate(share_done)
                failed = False
            except torch.OutOfMemoryError:
                figures, text_bytes, failed = {}, 0, True
            if failed:  # outside the except: the failed step's tensors are free now
                self._halve_micro_batch()
                if self._sync is None or not self._sync.exchanging:
                    continue
                self._sync.finish_exchange()
            all_bytes, stopping, failures = self.ranks.sum_numbers(text_bytes, stop.wanted(), failed)
            if not failures:
                self.ranks.sum_on_device(figures.values())
                return figures, all_bytes, bool(stopping)
            self.task.optimizers.zero_grad()
            self._close_sync()

    def _prepare_sync(self, share_done: float) -> None:
        """Where there are several ranks: have gradients summed, of those parameters that get one now."""
        if self.ranks.world == 1:
            return
        idle = self._unused.union(self.task.idle(share_done))
        if self._sync is not None and self._sync.idle != idle:
            self._close_sync()
        if self._sync is None:
            self._sync = GradientSync(self.task.modules, self.task.loss, self.ranks, idle)

    def _close_sync(self) -> None:
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    def _accumulate(self, share_done: float) -> tuple[dict[str, Tensor], int]:
        """Gradients of this rank's part of the batch, micro-batch by micro-batch; returns figures and text bytes."""
        sums: dict[str, Tensor] = {}
        text_bytes = 0
        mine = self.ranks.part(self.task.batches.sequences)
        for first in range(mine.start, mine.stop, self.state.micro_batch):
            count = min(self.state.micro_batch, mine.stop - first)
            last = first + count == mine.stop
            figures, size = self._micro_batch(first, count, share_done, last)
            for name, value in figures.items():
                sums[name] = sums[name] + value if name in sums else value
            text_bytes += size
        return sums, text_bytes

    def _micro_batch(
        self, first: int, count: int, share_done: float, last: bool = False
    ) -> tuple[dict[str, Tensor], int]:
        """Forward and backward of some sequences; the figures are weighted by their share of the batch.

        Args:
            last: this rank's last ones of the step, after which gradients are sums over all ranks.
        """
        batches, device = self.task.batches, self.hardware.device
        batch = batches.batch(self.state.step, first, count)
        inputs, targets, weights = (_to_device(array, device) for array in (batch.inputs, batch.targets, batch.weights))
        torch.manual_seed(_step_seed(self.settings.seed, self.state.step, first))
        share = count / batches.sequences
        score = self.task.loss if self._sync is None else self._sync.loss
        with nullcontext() if self._sync is None else self._sync.micro_batch(last):
            with self.hardware.autocast():
                loss = score(inputs, targets, weights, share_done)
            (loss.total * share).backward()
        figures = {"train_loss": loss.train_loss, **loss.parts}
        return {name: value.detach() * share for name, value in figures.items()}, batch.text_bytes

    # -- out of memory ----------------------------------------------------------------------------------------------

    def _try_micro_batch(self) -> None:
        """Find a micro-batch that fits before the first step, by a trial that leaves no trace.

        It reserves memory for the optimizer state where there is none yet, which would be missing later, and for the
        gradients that several ranks exchange. It also shows which parameters get no gradient.
        """
        optimizers = self.task.optimizers
        empty = not optimizers.state_tensors()
        while True:
            reserved: list[Tensor] = []
            try:
                copies = 2 * empty + (self.ranks.world > 1)
                reserved = [torch.empty_like(p) for p in optimizers.parameters() for _ in range(copies)]
                count = min(self.state.micro_batch, len(self.ranks.part(self.task.batches.sequences)))
                self._micro_batch(0, count, self.length.share(self.state.step))
                self._unused = frozenset(p for p in optimizers.parameters() if p.grad is None)
                return
            except torch.OutOfMemoryError:
                reserved.clear()
            finally:
                optimizers.zero_grad()
            self._halve_micro_batch()

    def _halve_micro_batch(self) -> None:
        self.task.optimizers.zero_grad()
        if self.state.micro_batch == 1:
            raise TrainingFailed(
                "out of memory with one sequence at a time: choose a smaller --max_length, --hidden_dim or --num_layers"
            )
        self.state.micro_batch = -(-self.state.micro_batch // 2)
        self.hardware.release()
        log.warning(
            f"out of memory: micro-batch halved to {self.state.micro_batch} sequences; "
            f"each step still has {self.task.batches.sequences}"
        )

    # -- figures, evaluation and history ----------------------------------------------------------------------------

    def _seconds(self) -> float:
        """Wall time since the first step, without the time between an interruption and the resumption."""
        return self.clock() - self._clock_start

    def _flush(self, bar: Any) -> str | None:
        """Read the pending steps' figures off the device, the only wait for it, and make their records.

        Returns why the run must roll back, if the divergence guard says so.
        """
        if not self._pending:
            return None
        self._report_compilation()
        started = self.clock()
        records = [_read_figures(record) for record in self._pending]
        self._pending_seconds += self.clock() - started
        state, count = self.state, len(records)
        speed = count * self.task.batches.tokens_per_batch / self._pending_seconds
        load = gpu_load(self.hardware.device)
        resources = {"memory_bytes": memory_in_use(self.hardware.device)} | ({} if load is None else {"gpu_load": load})
        trouble = None
        for number, record in enumerate(records, 1):
            record["seconds"] = self._pending_since + self._pending_seconds * number / count
            record["tokens_per_second"] = speed
            record |= resources
            skipped = bool(record.pop("skipped"))
            trouble = trouble or state.guard.observe(record["step"], record["train_loss"], skipped)
            if skipped:
                log.warning("step %s skipped: non-finite loss or gradient", record["step"])
                records[number - 1] = {k: v for k, v in record.items() if math.isfinite(v)} | {"skipped": True}
        self._records += records
        state.step_seconds += self._pending_seconds
        self._pending, self._pending_seconds = [], 0.0
        self._report(records[-1], bar)
        return trouble

    def _report(self, record: dict[str, Any], bar: Any) -> None:
        """Show the newest figures on the progress bar and in the log."""
        loss, learning_rate = record.get("train_loss", math.nan), record["learning_rate"]
        shown = {"loss": f"{loss:.3f}", "lr": f"{learning_rate:.2g}"}
        if self.state.best_bpb is not None:
            shown["bits/byte"] = f"{self.state.best_bpb:.4f}"
        shown["mem"] = f"{record['memory_bytes'] / 2**30:.1f}G"
        if "gpu_load" in record:
            shown["gpu"] = f"{record['gpu_load']}%"
        bar.set_postfix(shown, refresh=False)
        step, speed = record["step"], record["tokens_per_second"]
        total = self.length.total
        seconds = None if total is None else (total - step) * self.task.batches.tokens_per_batch / speed
        left = "" if seconds is None else f"{tqdm.format_interval(seconds)} left"
        log.debug(
            f"step {step}/{self.length}  epoch {record['epoch']:.2f}  loss {loss:.4f}  "
            f"grad norm {record.get('grad_norm', math.nan):.2f}  lr {learning_rate:.3g}  {speed:,.0f} tok/s  "
            f"{record['memory_bytes'] / 1e6:.0f} MB  {left}"
        )

    def _report_compilation(self) -> None:
        """Log the graphs compiled since the last time: after the first step there should be none."""
        if self.hardware.compiles:
            before, self._compiled = self._compiled, compiled_so_far()
            if graphs := self._compiled[0] - before[0]:
                log.info(f"step {self.state.step}: compiled {graphs} graphs in {self._compiled[1] - before[1]:.1f} s")

    def _evaluate(self) -> tuple[bool, str | None]:
        """Score the validation text: whether it is the best so far, and why the run must roll back, if it must."""
        with self._spending("evaluation"):
            state, value = self.state, self.task.evaluate()
        if not math.isfinite(value):
            state.guard.trouble_since = state.guard.trouble_since or state.step
            return False, f"validation bits per byte of step {state.step} is non-finite ({value})"
        self._records[-1]["validation_bpb"] = value
        improved = state.best_bpb is None or value < state.best_bpb
        if improved:
            state.best_step, state.best_bpb, state.evaluations_since_best = state.step, value, 0
        else:
            state.evaluations_since_best += 1
        best = "  (best)" if improved else ""
        log.info(f"step {state.step}/{self.length}  validation {value:.4f} bits per byte{best}")
        return improved, None

    def _write_history(self) -> None:
        if not self.ranks.is_main:
            self._records = []
            return
        try:
            self._append_records()
        except OSError as error:
            log.error("the history cannot be written (%s); training continues and tries again later", error)

    def _append_records(self) -> None:
        append_records(self.history_path, self._records)
        if self.tensorboard is not None:
            self.tensorboard.add(self._records)
        self._records = []

    def _should_stop_early(self) -> bool:
        state, settings = self.state, self.settings
        if not settings.patience or state.evaluations_since_best < settings.patience:
            return False
        if self.task.batches.epoch_at(state.step) < settings.min_epochs:
            return False
        log.info("no better validation in %d evaluations: stopping early", state.evaluations_since_best)
        return True

    # -- a run that ends in its time ---------------------------------------------------------------------------------

    @contextmanager
    def _spending(self, what: str) -> Iterator[None]:
        """Note that the steps wait for an evaluation or a checkpoint, and for how long."""
        started, spent = self.clock(), self.state.spent
        try:
            yield
        finally:
            seconds = self.clock() - started
            setattr(spent, f"{what}s", getattr(spent, f"{what}s") + 1)
            setattr(spent, f"{what}_seconds", getattr(spent, f"{what}_seconds") + seconds)
            if self._budget is not None:
                self._budget.leave_out(seconds)

    def _measure(self) -> tuple[bool, bool, bool]:
        """Whether an evaluation or a checkpoint is due to be measured, and whether the length is to be fixed now.

        Both are due at once, but a checkpoint for a signal does not know its own seconds: then another one is due.
        """
        budget, spent = self._budget, self.state.spent
        if budget is None:
            return False, False, False
        budget.count_step(self._wait_for_device)
        # The clocks of the ranks differ, and all must take the same step; only the main one saves.
        measured = budget.share_measured(self.state.step, self.length.limit), spent.checkpoints == 0
        share, unsaved = self.ranks.broadcast(measured)
        evaluated = spent.evaluations > 0
        return share >= 0.5 and not evaluated, share >= 0.5 and unsaved, share >= 1 and evaluated and not unsaved

    def _fix_length(self, bar: Any) -> None:
        """Fix the number of steps by what steps, evaluations and checkpoints have taken so far."""
        state, settings, budget = self.state, self.settings, self._budget
        assert budget is not None
        spent = state.spent
        takes = {
            "step": budget.step_seconds + self._later_seconds(),
            "evaluation": spent.evaluation_seconds / max(1, spent.evaluations),
            "checkpoint": spent.checkpoint_seconds / max(1, spent.checkpoints),
        }
        reachable = steps_within(
            budget.seconds - budget.used,
            state.step,
            **takes,
            evaluation_interval=settings.eval_interval,
            checkpoint_interval=settings.checkpoint_interval,
        )
        state.fixed_at, state.fixed_steps, self._budget = state.step, self.ranks.broadcast(reachable), None
        total = self.length.total or 0
        bar.total = total * self.task.batches.tokens_per_batch
        bar.refresh()
        log.info(
            f"measured: {', '.join(f'{what} {seconds:.3g} s' for what, seconds in takes.items())}. {total:,} steps "
            f"({self.task.batches.epoch_at(total):.2f} epochs) end in {settings.max_hours:g} hours; fixed from now on"
        )

    def _later_seconds(self) -> float:
        """What a later step takes more than one at the start (a loss part may fade), on average; leaves no trace."""
        count = len(self.ranks.part(self.task.batches.sequences))
        micro_batch = min(self.state.micro_batch, count)

        def seconds(share: float) -> float:
            started = self.clock()
            self._micro_batch(0, micro_batch, share)
            self._wait_for_device()
            return self.clock() - started

        shares = (0.0, 0.125, 0.375, 0.625, 0.875)
        rounds = [[seconds(share) for share in shares] for _ in range(3)]
        self.task.optimizers.zero_grad()
        first, *later = (min(times) for times in zip(*rounds, strict=True))
        return (sum(later) / len(later) - first) * -(-count // micro_batch)

    def _wait_for_device(self) -> None:
        if self.hardware.device == "cuda":
            torch.cuda.synchronize()

    # -- checkpoints: save, resume, roll back -----------------------------------------------------------------------

    def _save(self, *, for_signal_only: bool = False, weights_only: bool = False, beside: bool = True) -> None:
        """Write a checkpoint, then delete those that rotation no longer keeps.

        Args:
            for_signal_only: an uninterrupted run would not have written it; a rollback passes over it, so that it
                goes where an uninterrupted run would have gone.
            weights_only: what ``load_best`` needs, and nothing to resume from.
            beside: the training goes on meanwhile; otherwise the checkpoint is on the disk on return.
        """
        if self._saved_step == self.state.step or not self.ranks.is_main:
            return
        if self._budget is not None:
            self.state.timed_steps, self.state.timed_seconds = self._budget.timed
        with self._spending("checkpoint"):
            self._finish_save(wait=True)
            self._start_save(for_signal_only, weights_only, beside)

    def _start_save(self, for_signal_only: bool, weights_only: bool, beside: bool) -> None:
        self.state.seconds = self._seconds() if self.state.step else 0.0
        marks = {"for_signal_only": for_signal_only, "weights_only": weights_only}
        state = {**asdict(self.state), "identity": self.task.identity, **marks}
        self._saved_step = self.state.step
        try:
            self._append_records()
            tensors = self.task.state_tensors()
            if weights_only:
                del tensors["optimizer"]
            if beside:
                self._writer.start(tensors, partial(self._write_checkpoint, state))
            else:
                self._write_checkpoint(state, tensors)
        except OSError as error:
            self._answer_failed_save(error)

    def _write_checkpoint(self, state: dict[str, Any], tensors: NamedTensors) -> None:
        fsync_path(self.history_path)  # the history up to a checkpoint must be on the disk before it
        checkpoints.save_checkpoint(self.checkpoint_root, state["step"], tensors, state)
        try:
            checkpoints.rotate_checkpoints(self.checkpoint_root, self.settings.keep_checkpoints)
        except OSError as error:
            log.error("earlier checkpoints cannot be deleted (%s); training continues", error)

    def _finish_save(self, *, wait: bool) -> None:
        """Answer the outcome of the save in progress, if it has ended; ``wait`` for its end."""
        if wait or self._writer.ended:
            try:
                self._writer.wait()
            except OSError as error:
                self._answer_failed_save(error)

    def _answer_failed_save(self, error: OSError) -> None:
        step, self._saved_step = self._saved_step, None
        if step == 0 or (self.state.finished and step == self.state.step):
            raise TrainingFailed(
                f"no checkpoint can be written to {self.checkpoint_root} ({error}); free some space and run again"
            ) from None
        log.error("no checkpoint at step %s (%s); training continues and tries again later", step, error)

    def _resume(self) -> None:
        """Start from ``resume_from`` or the newest intact checkpoint; from the beginning where there is none."""
        found = None
        if self.ranks.is_main:
            if named := self.settings.resume_from:
                found = checkpoints.named_checkpoint(named)
            else:
                found = checkpoints.newest_checkpoint(self.checkpoint_root)
            if found is None:
                self.history_path.unlink(missing_ok=True)
            else:
                check_identity(f"{found.folder} is", found.state.get("identity"), self.task.identity)
                if named:
                    checkpoints.set_aside_later(self.checkpoint_root, found.step)
        if self._restore(found) and found is not None and self.state.step > 0:
            if not self.length.is_reached(self.state.step):
                log.info("continuing from %s (step %s of %s)", found.folder, found.step, self.length)

    def _restore(self, found: checkpoints.Checkpoint | None) -> bool:
        """Load the main rank's checkpoint on every rank; False if it has none."""
        state = self.ranks.broadcast(found.state if found else None)
        if state is None:
            return False
        files = self.task.state_tensors()
        tensors = {name: self.ranks.broadcast_tensors(found.tensors(name) if found else {}) for name in files}
        try:
            self.state = LoopState.of(state)
            if self.state.step > 0 and not tensors["optimizer"]:
                raise ValueError("it holds no optimizer state")
            self.task.load_state_tensors(tensors)
        except (ValueError, RuntimeError) as error:
            where = found.folder if found else "the checkpoint"
            raise UserError(f"{where} does not fit this model: {error}; start over with --fresh") from None
        self.state.micro_batch = min(self.state.micro_batch, self.settings.sequences_per_step)
        self._saved_step = self.state.step
        if self.ranks.is_main:
            truncate_history(self.history_path, self.state.step)
        return True

    def _roll_back(self, trouble: str, bar: Any) -> None:
        """Return to the newest checkpoint from before the trouble, with a lower learning rate.

        Raises:
            TrainingFailed: after too many rollbacks, or without such a checkpoint.
        """
        broken = self.state
        advice = "start again with a lower --learning_rate, and look at the training text around the last steps"
        if broken.guard.rollbacks >= ROLLBACKS_AT_MOST:
            raise TrainingFailed(f"{trouble}, after {broken.guard.rollbacks} rollbacks: {advice}")
        self._finish_save(wait=True)
        found = None
        if self.ranks.is_main:
            found = checkpoints.newest_good_checkpoint(self.checkpoint_root, before=broken.guard.trouble_since)
            if found is not None:
                checkpoints.set_aside_later(self.checkpoint_root, found.step)
        self._pending, self._pending_seconds, self._records = [], 0.0, []
        if not self._restore(found):
            raise TrainingFailed(f"{trouble}, and no checkpoint from before is left: {advice}")
        guard = self.state.guard = broken.guard.after_rollback(self.state.guard)
        self.state.fixed_at, self.state.fixed_steps = broken.fixed_at, broken.fixed_steps
        self.state.micro_batch = min(broken.micro_batch, self.state.micro_batch)
        bar.update((self.state.step - broken.step) * self.task.batches.tokens_per_batch)
        log.warning(
            f"{trouble}: rolled back to step {self.state.step} with {guard.rate_factor} times the learning rate "
            f"(rollback {guard.rollbacks} of at most {ROLLBACKS_AT_MOST})"
        )


def _read_figures(record: dict[str, Any]) -> dict[str, Any]:
    figures = record.pop("figures")
    return {**record, **{name: float(value) for name, value in figures.items()}}


def _to_device(array: Any, device: str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def _step_seed(seed: int, step: int, first_sequence: int) -> int:
    """A distinct seed for each micro-batch (splitmix64's mixing, so that neighbouring ones are unrelated)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + first_sequence * 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (mixed ^ (mixed >> 32)) % 2**63
