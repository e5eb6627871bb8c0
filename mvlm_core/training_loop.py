"""The loop both models are trained by: step, evaluate, log, checkpoint, stop.

What a step does follows from its number alone: the batch (see ``batches``), the learning rate and the random numbers
of dropout, which are seeded anew for each micro-batch. So a checkpoint needs weights, optimizer state and a few
counters, and a resumed run equals an undisturbed one to the bit.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvlm_core import checkpoint as checkpoints
from mvlm_core.batches import BatchSource
from mvlm_core.console import progress
from mvlm_core.errors import Stopped, TrainingFailed, UserError
from mvlm_core.files import fsync_path
from mvlm_core.hardware import Hardware, memory_in_use
from mvlm_core.optimizer import Optimizers, learning_rate_scale
from mvlm_core.settings import TrainingSettings

HISTORY_NAME = "training_history.jsonl"
PARENT_VARIABLE = "MVLM_PARENT_PID"
_WARMUP_SHARE = 0.02
log = logging.getLogger("mvlm")


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
        identity: what a checkpoint must agree on to be continued: settings, data, tokenizer.
    """

    modules: dict[str, nn.Module]
    loss: Callable[[Tensor, Tensor, Tensor, float], Any]
    optimizers: Optimizers
    batches: BatchSource
    evaluate: Callable[[], float]
    identity: dict[str, Any]

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


@dataclass
class LoopState:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        seconds: spent in training steps, evaluations and checkpoints not counted.
        best_step, best_bpb: of the evaluations so far.
        evaluations_since_best: for early stopping.
        micro_batch: sequences that fit the device at a time.
        finished: the run reached its end (or stopped early) at this step.
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


class StopRequest:
    """SIGINT and SIGTERM as a wish: noted by ``defer`` until the loop has written its checkpoint.

    A second SIGINT leaves at once: checkpoints are whole or not there, so nothing is harmed. Where a parent process
    is named in the environment, its disappearance is taken for SIGTERM, so that no trainer outlives its pipeline.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._parent = int(os.environ.get(PARENT_VARIABLE) or 0)

    def defer(self) -> None:
        """From now on a signal only leaves a note."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def raise_at_once(self) -> None:
        """From now on a signal raises ``Stopped`` where it arrives; raises now for one that was noted."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._raise)
        if self.signal_number is not None:
            raise Stopped(self.signal_number)

    def wanted(self) -> bool:
        if self.signal_number is None and self._parent and os.getppid() != self._parent:
            log.warning("the process that started this run is gone: stopping after a checkpoint")
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def _note(self, number: int, _frame: Any) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal_number = number
        with suppress(OSError):  # the log may be in the middle of a line; a plain write is safe in a handler
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then a checkpoint\n".encode())

    def _raise(self, number: int, _frame: Any) -> None:
        raise Stopped(number)


class TrainingLoop:
    """One run: ``run()`` trains from where the newest checkpoint left off to the end.

    Args:
        total_steps: optimizer steps of the whole run.
        output_dir: ``checkpoints/`` and ``training_history.jsonl`` are kept below it.
    """

    def __init__(
        self, task: TrainingTask, settings: TrainingSettings, hardware: Hardware, output_dir: Path, total_steps: int
    ) -> None:
        self.task, self.settings, self.hardware, self.total_steps = task, settings, hardware, total_steps
        self.warmup_steps = warmup_steps(settings, total_steps)
        self.checkpoint_root = output_dir / "checkpoints"
        self.history_path = output_dir / HISTORY_NAME
        self.state = LoopState(micro_batch=settings.batch_size)
        self._pending: list[dict[str, Any]] = []  # steps whose figures are still on the device
        self._pending_seconds = 0.0
        self._saved_step: int | None = None

    def run(self, stop: StopRequest) -> LoopState:
        """Train to the end.

        Raises:
            Stopped: a signal came; the checkpoint is written.
            TrainingFailed: the loss is no number any more, or the smallest micro-batch does not fit.
        """
        self._resume()
        state = self.state
        if state.step >= self.total_steps or (state.stopped_early and state.finished):
            return state
        state.finished = False
        stop.defer()
        tokens = self.task.batches.tokens_per_batch
        with progress(
            self.total_steps * tokens,
            "training",
            "tok",
            initial=state.step * tokens,
            quiet=self.settings.quiet,
            unit_scale=True,
        ) as bar:
            while not state.finished:
                self._step()
                bar.update(tokens)
                ending = state.step >= self.total_steps
                if state.step % self.settings.log_interval == 0:
                    self._flush(bar)
                improved = False
                if ending or state.step % self.settings.eval_interval == 0:
                    improved = self._evaluate(bar)
                    state.stopped_early = self._should_stop_early() and not ending
                    state.finished = ending or state.stopped_early
                if state.finished or improved or stop.wanted() or state.step % self.settings.checkpoint_interval == 0:
                    self._flush(bar)
                    self.save()
                if stop.wanted() and not state.finished:
                    log.info(
                        "stopped at step %s of %s; the same command goes on from here", state.step, self.total_steps
                    )
                    raise Stopped(stop.signal_number)
        return state

    # -- one step ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        started = time.perf_counter()
        state, optimizers = self.state, self.task.optimizers
        scale = learning_rate_scale(state.step, self.total_steps, self.warmup_steps, self.settings.lr_schedule)
        learning_rate = optimizers.set_scale(scale)
        while True:
            try:
                figures, text_bytes = self._accumulate(state.step / self.total_steps)
                break
            except torch.OutOfMemoryError:
                self._halve_micro_batch()
        limit = self.settings.max_grad_norm or math.inf
        parameters = [p for group in optimizers.groups() for p in group["params"] if p.grad is not None]
        figures["grad_norm"] = nn.utils.clip_grad_norm_(parameters, limit)
        optimizers.step()
        optimizers.zero_grad()
        state.step += 1
        state.tokens += self.task.batches.tokens_per_batch
        state.bytes += text_bytes
        self._pending.append(
            {
                "step": state.step,
                "epoch": self.task.batches.epoch_at(state.step),
                "tokens": state.tokens,
                "bytes": state.bytes,
                "learning_rate": learning_rate,
                "figures": figures,
            }
        )
        self._pending_seconds += time.perf_counter() - started

    def _accumulate(self, share_done: float) -> tuple[dict[str, Tensor], int]:
        """Gradients of the whole batch, micro-batch by micro-batch, and the mean of what the loss reports."""
        batches, device = self.task.batches, self.hardware.device
        sums: dict[str, Tensor] = {}
        text_bytes = 0
        for first in range(0, batches.sequences, self.state.micro_batch):
            count = min(self.state.micro_batch, batches.sequences - first)
            batch = batches.batch(self.state.step, first, count)
            tensors = [_to_device(array, device) for array in (batch.inputs, batch.targets, batch.weights)]
            torch.manual_seed(_step_seed(self.settings.seed, self.state.step, first))
            share = count / batches.sequences
            with self.hardware.autocast():
                loss = self.task.loss(*tensors, share_done)
            (loss.total * share).backward()
            for name, value in {"train_loss": loss.train_loss, **loss.parts}.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
            text_bytes += batch.text_bytes
        return sums, text_bytes

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

    # -- what is written --------------------------------------------------------------------------------------------

    def _flush(self, bar: Any) -> None:
        """Read the pending steps' figures off the device, the only wait for it, and write their history lines."""
        if not self._pending:
            return
        started = time.perf_counter()
        lines = [_read_figures(record) for record in self._pending]
        self._pending_seconds += time.perf_counter() - started
        state, count = self.state, len(lines)
        rate = count * self.task.batches.tokens_per_batch / self._pending_seconds
        memory = memory_in_use(self.hardware.device)
        with open(self.history_path, "a", encoding="utf-8") as file:
            for number, line in enumerate(lines, 1):
                line["seconds"] = state.seconds + self._pending_seconds * number / count
                line["tokens_per_second"] = rate
                line["memory_bytes"] = memory
                if not math.isfinite(line["train_loss"]) or not math.isfinite(line["grad_norm"]):
                    raise TrainingFailed(self._not_finite(line))
                file.write(json.dumps(line) + "\n")
        state.seconds += self._pending_seconds
        self._pending, self._pending_seconds = [], 0.0
        self._report(lines[-1], bar)

    def _report(self, line: dict[str, Any], bar: Any) -> None:
        bar.set_postfix(loss=f"{line['train_loss']:.3f}", lr=f"{line['learning_rate']:.2g}", refresh=False)
        left = (self.total_steps - line["step"]) * self.task.batches.tokens_per_batch / line["tokens_per_second"]
        log.debug(
            "step %d/%d  epoch %.2f  loss %.4f  grad norm %.2f  lr %.3g  %s tok/s  %.0f MB  %s left",
            line["step"],
            self.total_steps,
            line["epoch"],
            line["train_loss"],
            line["grad_norm"],
            line["learning_rate"],
            f"{line['tokens_per_second']:,.0f}",
            line["memory_bytes"] / 1e6,
            _clock(left),
        )

    def _not_finite(self, line: dict[str, Any]) -> str:
        return (
            f"the loss ({line['train_loss']}) or the gradient norm ({line['grad_norm']}) of step {line['step']} is no "
            f"finite number; the last checkpoint in {self.checkpoint_root} is good: start again with a lower "
            "--learning_rate"
        )

    def _evaluate(self, bar: Any) -> bool:
        """Score the validation part, add it to the step's history line, and say whether it is the best so far."""
        self._flush(bar)
        state = self.state
        value = self.task.evaluate()
        if not math.isfinite(value):
            raise TrainingFailed(f"validation bits per byte of step {state.step} is {value}, no finite number")
        _amend_last_line(self.history_path, {"validation_bpb": value})
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
        return improved

    def _should_stop_early(self) -> bool:
        state, settings = self.state, self.settings
        if not settings.patience or state.evaluations_since_best < settings.patience:
            return False
        if self.task.batches.epoch_at(state.step) < settings.min_epochs:
            return False
        log.info("no better validation in %d evaluations: stopping early", state.evaluations_since_best)
        return True

    def save(self) -> None:
        """Write a checkpoint of this moment, then delete what rotation no longer keeps."""
        if self._saved_step == self.state.step:
            return
        if self.history_path.exists():
            fsync_path(self.history_path)
        tensors = {"model": self.task.weights(), "optimizer": self.task.optimizers.state_tensors()}
        state = {**asdict(self.state), "identity": self.task.identity}
        try:
            checkpoints.save_checkpoint(self.checkpoint_root, self.state.step, tensors, state)
        except OSError as error:
            log.error("no checkpoint at step %s (%s); training goes on and tries again later", self.state.step, error)
            if self.state.finished:
                raise TrainingFailed(
                    f"the last checkpoint could not be written: {error}; free some space and run again"
                ) from None
            return
        self._saved_step = self.state.step
        checkpoints.rotate_checkpoints(self.checkpoint_root, self.settings.keep_checkpoints)

    # -- where it starts --------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        if self.settings.resume_from:
            found = checkpoints.named_checkpoint(self.settings.resume_from)
            self._check_identity(found)
            checkpoints.set_aside_later(self.checkpoint_root, found.step)
        else:
            found = checkpoints.newest_checkpoint(self.checkpoint_root, may_use=self._check_identity)
        if found is None:
            self.history_path.unlink(missing_ok=True)
            return
        known = {name: found.state[name] for name in asdict(self.state) if name in found.state}
        self.state = LoopState(**known)
        self.state.micro_batch = min(self.state.micro_batch, self.settings.sequences_per_step)
        self.task.load_weights(found.tensors("model"))
        self.task.optimizers.load_state_tensors(found.tensors("optimizer"))
        self._saved_step = found.step
        _truncate_history(self.history_path, found.step)
        if self.state.step < self.total_steps:
            log.info("continuing from %s (step %s of %s)", found.folder, found.step, self.total_steps)

    def _check_identity(self, found: checkpoints.Checkpoint) -> None:
        differences = identity_differences(found.state.get("identity", {}), self.task.identity)
        if differences:
            raise UserError(
                [f"{found.folder} belongs to another run: {difference}" for difference in differences]
                + ["go back to those values, choose another --output_dir, or start over with --fresh"]
            )


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


def read_history(path: Path) -> list[dict[str, Any]]:
    """The history's records; a last line that was being written when the run died is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def _truncate_history(path: Path, step: int) -> None:
    """Drop what a dead run wrote after its checkpoint: it will be written again."""
    kept = [json.dumps(record) + "\n" for record in read_history(path) if record["step"] <= step]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(kept)


def _amend_last_line(path: Path, values: dict[str, Any]) -> None:
    """Add values to the newest record, in place: only the last line is read or written."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - (1 << 16))
        file.seek(start)
        tail = file.read().rstrip(b"\n")
        begin = start + tail.rfind(b"\n") + 1
        record = json.loads(tail[tail.rfind(b"\n") + 1 :])
        file.seek(begin)
        file.write((json.dumps({**record, **values}) + "\n").encode())
        file.truncate()


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
