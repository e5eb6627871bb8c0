"""The loop both models are trained by: step, evaluate, log, checkpoint, stop.

What a step does follows from its number alone: the batch (see ``batches``), the learning rate and the random numbers
of dropout, which are seeded anew for each micro-batch. So a checkpoint needs weights, optimizer state and a few
counters, and a resumed run equals an undisturbed one to the bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvlm_core.console import progress
from mvlm_core.errors import Stopped, TrainingFailed, UserError
from mvlm_core.files import fsync_path
from mvlm_core.hardware import Hardware
from mvlm_core.monitor import gpu_load, memory_in_use
from mvlm_core.settings import TrainingSettings
from mvlm_core.signals import StopRequest
from mvlm_core.training import checkpoint as checkpoints
from mvlm_core.training.distributed import ALONE, Ranks
from mvlm_core.training.divergence import ROLLBACKS_AT_MOST
from mvlm_core.training.history import HISTORY_NAME, append_records, truncate_history
from mvlm_core.training.optimizer import learning_rate_scale
from mvlm_core.training.state import LoopState, TrainingTask, identity_differences, warmup_steps

log = logging.getLogger("mvlm")


class TrainingLoop:
    """One run: ``run()`` trains from where the newest checkpoint left off to the end.

    Args:
        total_steps: optimizer steps of the whole run.
        output_dir: ``checkpoints/`` and ``training_history.jsonl`` are kept below it.
        listener: is given the records that were added to the history.
    """

    def __init__(
        self,
        task: TrainingTask,
        settings: TrainingSettings,
        hardware: Hardware,
        output_dir: Path,
        total_steps: int,
        ranks: Ranks = ALONE,
        listener: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> None:
        self.listener = listener
        self.task, self.settings, self.hardware, self.total_steps = task, settings, hardware, total_steps
        self.ranks = ranks
        self.warmup_steps = warmup_steps(settings, total_steps)
        self.checkpoint_root = output_dir / "checkpoints"
        self.history_path = output_dir / HISTORY_NAME
        self.state = LoopState(micro_batch=settings.batch_size)
        self._pending: list[dict[str, Any]] = []  # steps whose figures are still on the device
        self._pending_seconds = 0.0
        self._records: list[dict[str, Any]] = []  # read, not yet in the history file
        self._saved_step: int | None = None

    def run(self, stop: StopRequest) -> LoopState:
        """Train to the end.

        Raises:
            Stopped: a signal came; the checkpoint is written.
            TrainingFailed: the numbers break again and again, or the smallest micro-batch does not fit.
        """
        self._resume()
        if self.state.step >= self.total_steps or (self.state.stopped_early and self.state.finished):
            return self.state
        self.state.finished = False
        stop.defer()
        self._try_micro_batch()
        if self.state.step == 0:
            self._save()  # a disk that is full or cannot be written is found now, not after an hour
        tokens = self.task.batches.tokens_per_batch
        with progress(
            self.total_steps * tokens,
            "training",
            "tok",
            initial=self.state.step * tokens,
            quiet=self.settings.quiet or not self.ranks.is_main,
            unit_scale=True,
        ) as bar:
            while not self.state.finished:
                stopping = self._step(stop)
                bar.update(tokens)
                self._after_step(stopping, bar)
                if stopping and not self.state.finished:
                    log.info(
                        "stopped at step %s of %s; the same command goes on from here",
                        self.state.step,
                        self.total_steps,
                    )
                    raise Stopped(stop.number)
        return self.state

    def _after_step(self, stopping: bool, bar: Any) -> None:
        """Whatever is due after this step: read the figures, evaluate, write a checkpoint, or go back."""
        step, settings = self.state.step, self.settings
        ending = step >= self.total_steps
        evaluating = ending or step % settings.eval_interval == 0
        due = step % settings.checkpoint_interval == 0
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
        if evaluating:
            self.state.stopped_early = self._should_stop_early() and not ending
            self.state.finished = ending or self.state.stopped_early
        # While the numbers are bad, the checkpoints from before must not be rotated away.
        wanted = self.state.finished or improved or (due and self.state.guard.trouble_since is None)
        if wanted or stopping:
            self._save(for_signal_only=not wanted)

    # -- one step ---------------------------------------------------------------------------------------------------

    def _step(self, stop: StopRequest) -> bool:
        """One optimizer step. Returns whether any rank wants to stop after it."""
        started = time.perf_counter()
        state, optimizers = self.state, self.task.optimizers
        scale = learning_rate_scale(state.step, self.total_steps, self.warmup_steps, self.settings.lr_schedule)
        learning_rate = optimizers.set_scale(scale * state.guard.rate_factor)
        while True:
            try:
                figures, text_bytes = self._accumulate(state.step / self.total_steps)
                break
            except torch.OutOfMemoryError:
                self._halve_micro_batch()
        parameters = [p for group in optimizers.groups() for p in group["params"] if p.grad is not None]
        self.ranks.sum_on_device([*(p.grad for p in parameters), *figures.values()])
        text_bytes, stopping = self.ranks.sum_numbers(text_bytes, stop.wanted())
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
        skipped = (~(norm.isfinite() & figures["train_loss"].isfinite())).float()
        optimizers.step(found_inf=skipped)
        optimizers.zero_grad()
        state.step += 1
        if self.task.average is not None:
            self.task.average.update(state.step)
        state.tokens += self.task.batches.tokens_per_batch
        state.bytes += int(text_bytes)
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
        self._pending_seconds += time.perf_counter() - started
        return bool(stopping)

    def _accumulate(self, share_done: float) -> tuple[dict[str, Tensor], int]:
        """Gradients of this rank's part of the batch, micro-batch by micro-batch, and what the loss reports."""
        sums: dict[str, Tensor] = {}
        text_bytes = 0
        mine = self.ranks.part(self.task.batches.sequences)
        for first in range(mine.start, mine.stop, self.state.micro_batch):
            count = min(self.state.micro_batch, mine.stop - first)
            figures, size = self._micro_batch(first, count, share_done)
            for name, value in figures.items():
                sums[name] = sums[name] + value if name in sums else value
            text_bytes += size
        return sums, text_bytes

    def _micro_batch(self, first: int, count: int, share_done: float) -> tuple[dict[str, Tensor], int]:
        """Forward and backward of some sequences; the figures are weighted by their share of the batch."""
        batches, device = self.task.batches, self.hardware.device
        batch = batches.batch(self.state.step, first, count)
        tensors = [_to_device(array, device) for array in (batch.inputs, batch.targets, batch.weights)]
        torch.manual_seed(_step_seed(self.settings.seed, self.state.step, first))
        share = count / batches.sequences
        with self.hardware.autocast():
            loss = self.task.loss(*tensors, share_done)
        (loss.total * share).backward()
        figures = {"train_loss": loss.train_loss, **loss.parts}
        return {name: value.detach() * share for name, value in figures.items()}, batch.text_bytes

    # -- out of memory ----------------------------------------------------------------------------------------------

    def _try_micro_batch(self) -> None:
        """Find a micro-batch that fits before the first step, by one that leaves no trace.

        Room is held for the optimizer's state where there is none yet: it would be missing later.
        """
        optimizers = self.task.optimizers
        empty = not optimizers.state_tensors()
        while True:
            held: list[Tensor] = []
            try:
                if empty:
                    held = [torch.empty_like(p) for g in optimizers.groups() for p in g["params"] for _ in range(2)]
                count = min(self.state.micro_batch, len(self.ranks.part(self.task.batches.sequences)))
                self._micro_batch(0, count, self.state.step / self.total_steps)
                return
            except torch.OutOfMemoryError:
                held.clear()
                self._halve_micro_batch()
            finally:
                optimizers.zero_grad()

    def _halve_micro_batch(self) -> None:
        self.task.optimizers.zero_grad()
        if self.state.micro_batch == 1:
            raise TrainingFailed(
                "out of memory with one sequence at a time: choose a smaller --max_length, --hidden_dim or --num_layers"
            )
        self.state.micro_batch = -(-self.state.micro_batch // 2)
        if self.hardware.device == "cuda":
            torch.cuda.empty_cache()
        log.warning(
            "out of memory: micro-batch halved to %s sequences; the batch of %s per step stays",
            self.state.micro_batch,
            self.task.batches.sequences,
        )

    # -- what is read off the device --------------------------------------------------------------------------------

    def _flush(self, bar: Any) -> str | None:
        """Read the pending steps' figures off the device, the only wait for it, and make their records.

        Returns why the run must go back, where the guard says so.
        """
        if not self._pending:
            return None
        started = time.perf_counter()
        lines = [_read_figures(record) for record in self._pending]
        self._pending_seconds += time.perf_counter() - started
        state, count = self.state, len(lines)
        rate = count * self.task.batches.tokens_per_batch / self._pending_seconds
        load = gpu_load(self.hardware.device)
        resources = {"memory_bytes": memory_in_use(self.hardware.device)} | ({} if load is None else {"gpu_load": load})
        trouble = None
        for number, line in enumerate(lines, 1):
            line["seconds"] = state.seconds + self._pending_seconds * number / count
            line["tokens_per_second"] = rate
            line |= resources
            skipped = bool(line.pop("skipped"))
            if skipped:
                log.warning("step %s skipped: its loss or gradient is no finite number", line["step"])
            trouble = trouble or state.guard.observe(line["step"], line["train_loss"], skipped)
            if skipped:
                lines[number - 1] = {k: v for k, v in line.items() if math.isfinite(v)} | {"skipped": True}
        self._records += lines
        state.seconds += self._pending_seconds
        self._pending, self._pending_seconds = [], 0.0
        self._report(lines[-1], bar)
        return trouble

    def _report(self, line: dict[str, Any], bar: Any) -> None:
        loss = line.get("train_loss", math.nan)
        shown = {"loss": f"{loss:.3f}", "lr": f"{line['learning_rate']:.2g}"}
        if self.state.best_bpb is not None:
            shown["bits/byte"] = f"{self.state.best_bpb:.4f}"
        shown["mem"] = f"{line['memory_bytes'] / 2**30:.1f}G"
        if "gpu_load" in line:
            shown["gpu"] = f"{line['gpu_load']}%"
        bar.set_postfix(shown, refresh=False)
        left = (self.total_steps - line["step"]) * self.task.batches.tokens_per_batch / line["tokens_per_second"]
        log.debug(
            "step %d/%d  epoch %.2f  loss %.4f  grad norm %.2f  lr %.3g  %s tok/s  %.0f MB  %s left",
            line["step"],
            self.total_steps,
            line["epoch"],
            loss,
            line.get("grad_norm", math.nan),
            line["learning_rate"],
            f"{line['tokens_per_second']:,.0f}",
            line["memory_bytes"] / 1e6,
            _clock(left),
        )

    def _evaluate(self) -> tuple[bool, str | None]:
        """Score the validation part: whether it is the best so far, and why the run must go back, if it must."""
        state = self.state
        with self.task.evaluated():
            value = self.task.evaluate()
        if not math.isfinite(value):
            state.guard.trouble_since = state.guard.trouble_since or state.step
            return False, f"validation bits per byte of step {state.step} is {value}, no finite number"
        self._records[-1]["validation_bpb"] = value
        improved = state.best_bpb is None or value < state.best_bpb
        if improved:
            state.best_step, state.best_bpb, state.evaluations_since_best = state.step, value, 0
        else:
            state.evaluations_since_best += 1
        log.info(
            "step %d/%d  validation %.4f bits per byte%s",
            state.step,
            self.total_steps,
            value,
            "  (best)" if improved else "",
        )
        return improved, None

    def _write_history(self) -> None:
        if not self.ranks.is_main:
            self._records = []
            return
        try:
            self._append_records()
        except OSError as error:
            log.error("the history cannot be written (%s); training goes on and tries again later", error)

    def _append_records(self) -> None:
        append_records(self.history_path, self._records)
        if self.listener is not None:
            self.listener(self._records)
        self._records = []

    def _should_stop_early(self) -> bool:
        state, settings = self.state, self.settings
        if not settings.patience or state.evaluations_since_best < settings.patience:
            return False
        if self.task.batches.epoch_at(state.step) < settings.min_epochs:
            return False
        log.info("no better validation in %d evaluations: stopping early", state.evaluations_since_best)
        return True

    # -- where it is kept, where it starts and where it goes back to ------------------------------------------------

    def _save(self, for_signal_only: bool = False) -> None:
        """Write a checkpoint of this moment, then delete what rotation no longer keeps.

        Args:
            for_signal_only: an undisturbed run would have written none here; a rollback does not go back to it, so
                that it goes where that of an undisturbed run would have gone.
        """
        if self._saved_step == self.state.step or not self.ranks.is_main:
            return
        state = {**asdict(self.state), "identity": self.task.identity, "for_signal_only": for_signal_only}
        try:
            self._append_records()  # what a checkpoint has behind it must be on the disk
            fsync_path(self.history_path)
            checkpoints.save_checkpoint(self.checkpoint_root, self.state.step, self.task.state_tensors(), state)
        except OSError as error:
            if self.state.step == 0 or self.state.finished:
                raise TrainingFailed(
                    f"no checkpoint can be written to {self.checkpoint_root} ({error}); free some space and run again"
                ) from None
            log.error("no checkpoint at step %s (%s); training goes on and tries again later", self.state.step, error)
            return
        self._saved_step = self.state.step
        checkpoints.rotate_checkpoints(self.checkpoint_root, self.settings.keep_checkpoints)

    def _resume(self) -> None:
        """Start from ``resume_from`` or the newest whole checkpoint; from the beginning where there is none."""
        found = None
        if self.ranks.is_main:
            if self.settings.resume_from:
                found = checkpoints.named_checkpoint(self.settings.resume_from)
                self._check_identity(found)
                checkpoints.set_aside_later(self.checkpoint_root, found.step)
            else:
                found = checkpoints.newest_checkpoint(self.checkpoint_root, may_use=self._check_identity)
            if found is None:
                self.history_path.unlink(missing_ok=True)
        if self._restore(found):
            self._saved_step = self.state.step
            if found is not None and 0 < self.state.step < self.total_steps:
                log.info("continuing from %s (step %s of %s)", found.folder, found.step, self.total_steps)

    def _restore(self, found: checkpoints.Checkpoint | None) -> bool:
        """Take weights, optimizer and counters from a checkpoint of the main rank's; False where it has none."""
        state = self.ranks.share(found.state if found else None)
        if state is None:
            return False
        weights = self.ranks.share_tensors(found.tensors("model") if found else {})
        moments = self.ranks.share_tensors(found.tensors("optimizer") if found else {})
        average = None
        if self.task.average is not None:
            average = self.ranks.share_tensors(found.tensors("average") if found else {})
        try:
            self.state = LoopState.of(state)
            if self.state.step > 0 and not moments:
                raise ValueError("it holds no optimizer state")
            self.task.load_weights(weights)
            self.task.optimizers.load_state_tensors(moments)
            if average is not None:
                self.task.average.load(average)
        except (KeyError, ValueError, RuntimeError) as error:
            where = found.folder if found else "the checkpoint"
            raise UserError(f"{where} does not fit this model: {error}; start over with --fresh") from None
        self.state.micro_batch = min(self.state.micro_batch, self.settings.sequences_per_step)
        if self.ranks.is_main:
            truncate_history(self.history_path, self.state.step)
        return True

    def _roll_back(self, trouble: str, bar: Any) -> None:
        """Go back to the newest checkpoint from before the trouble, with a lower learning rate.

        Raises:
            TrainingFailed: it was tried often enough.
        """
        broken = self.state
        advice = "start again with a lower --learning_rate, and look at the training text around the last steps"
        if broken.guard.rollbacks >= ROLLBACKS_AT_MOST:
            raise TrainingFailed(f"{trouble}, after {broken.guard.rollbacks} rollbacks: {advice}")
        found = None
        if self.ranks.is_main:
            found = checkpoints.newest_good_checkpoint(self.checkpoint_root, before=broken.guard.trouble_since)
            if found is not None:
                checkpoints.set_aside_later(self.checkpoint_root, found.step)
        self._pending, self._pending_seconds, self._records = [], 0.0, []
        if not self._restore(found):
            raise TrainingFailed(f"{trouble}, and no checkpoint from before is left: {advice}")
        self.state.guard = broken.guard.after_rollback(self.state.guard)
        self.state.micro_batch = min(broken.micro_batch, self.state.micro_batch)
        self._saved_step = self.state.step
        bar.update((self.state.step - broken.step) * self.task.batches.tokens_per_batch)
        log.warning(
            "%s: back to step %s with %s of the learning rate (rollback %s of at most %s)",
            trouble,
            self.state.step,
            self.state.guard.rate_factor,
            self.state.guard.rollbacks,
            ROLLBACKS_AT_MOST,
        )

    def _check_identity(self, found: checkpoints.Checkpoint) -> None:
        identity = found.state.get("identity")
        differences = identity_differences(identity if isinstance(identity, dict) else {}, self.task.identity)
        if differences:
            raise UserError(
                [f"{found.folder} belongs to another run: {difference}" for difference in differences]
                + ["go back to those values, choose another --output_dir, or start over with --fresh"]
            )


def _read_figures(record: dict[str, Any]) -> dict[str, Any]:
    figures = record.pop("figures")
    return {**record, **{name: float(value) for name, value in figures.items()}}


def _to_device(array: Any, device: str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def _step_seed(seed: int, step: int, first_sequence: int) -> int:
    """A seed of its own for each micro-batch (splitmix64's mixing, so that neighbours are unlike)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + first_sequence * 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (mixed ^ (mixed >> 32)) % 2**63


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
