"""The checkpoints of a run: saved in the background, found again, and restored on every rank.

Tensors are copied to host memory and a thread writes the copy, so training waits only for the copy, not for hashing or
disk writes. Saves run one at a time and none is skipped, so the set of checkpoints does not depend on disk speed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from mvlm_core.errors import TrainingError, UserError
from mvlm_core.export.manifest import CHECKPOINTS, NO_CHECKPOINTS, training_config, verify_folder
from mvlm_core.files import fsync_path
from mvlm_core.settings import TrainingSettings
from mvlm_core.training import checkpoint as checkpoints
from mvlm_core.training.checkpoint import Checkpoint
from mvlm_core.training.history import StepLog, truncate_history
from mvlm_core.training.identity import check_identity
from mvlm_core.training.state import LoopState
from mvlm_core.training.task import Run, TrainingTask

NamedTensors = dict[str, dict[str, Tensor]]
log = logging.getLogger("mvlm")


class CheckpointWriter:
    """Copies tensors and passes the copy to a function that runs in a background thread."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether a save has ended and ``wait`` has not yet collected its result."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, tensors: NamedTensors, write: Callable[[NamedTensors], None]) -> None:
        """Copy ``tensors`` and call ``write`` with the copy in a thread.

        CUDA copies are enqueued on the current stream, so work enqueued later, such as the next step, cannot change
        them; only the thread waits for them to complete.
        """
        self.wait()
        copy = {file: {name: _copy(tensor) for name, tensor in named.items()} for file, named in tensors.items()}
        copied = None
        if any(tensor.is_cuda for named in tensors.values() for tensor in named.values()):
            copied = torch.cuda.Event()
            copied.record()

        def work() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                write(copy)
            except BaseException as error:  # re-raised by ``wait``, where the loop can handle it
                self._error = error

        self._thread = Thread(target=work, name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, if any, and re-raise its exception."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory, pinned for CUDA tensors; torch caches pinned memory for the next save."""
    try:
        memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except RuntimeError as error:
        log.warning("no pinned memory for a checkpoint (%s): the copy is slower", str(error).splitlines()[0])
        memory = torch.empty(tensor.shape, dtype=tensor.dtype)
    return memory.copy_(tensor.detach(), non_blocking=True)


def disk_bytes(settings: TrainingSettings, steps: int | None, weights: int, optimizer: int) -> int:
    """Size of a run's folder while the last checkpoint is written: checkpoints, best weights and a copy for the export.

    Args:
        steps: length of the run, if known.
        weights, optimizer: bytes of the weights and of the optimizer's state.
    """
    kept = settings.keep_checkpoints
    if steps is not None:
        kept = min(kept, steps // settings.checkpoint_interval + 1)
    return (kept + 1) * (weights + optimizer) + 2 * weights


class Checkpointer:
    """Saves and restores the checkpoints of one run. Only the main rank reads and writes files.

    Args:
        on_failure: called with the error if a checkpoint cannot be written.

    Attributes:
        saved_step: step of the newest checkpoint, which may not be complete yet.
    """

    def __init__(self, run: Run, task: TrainingTask, step_log: StepLog, on_failure: Callable[[OSError], None]) -> None:
        self.root = run.output_dir / CHECKPOINTS
        self.saved_step: int | None = None
        self._settings, self._ranks, self._task, self._step_log = run.settings, run.ranks, task, step_log
        self._writer, self._on_failure = CheckpointWriter(), on_failure

    def check_space(self, steps: int | None) -> None:
        """Check that the disk has room for the checkpoints and the export of a run of ``steps`` (None if unknown), now
        and not after an hour.

        Raises:
            TrainingError: it has not.
        """
        weights = sum(tensor.nbytes for tensor in self._task.weights().values())
        needed = disk_bytes(self._settings, steps, weights, self._task.optimizers.state_bytes)
        folders = checkpoints.checkpoint_folders(self.root)
        needed -= sum(file.stat().st_size for folder in folders for file in folder.iterdir())
        if (free := shutil.disk_usage(self.root.parent).free) < needed:
            raise TrainingError(
                f"{self.root.parent}: {free / 1e9:,.2f} GB of disk are free, but this run needs up to "
                f"{needed / 1e9:,.2f} GB more for checkpoints and its export: free some space, or choose a "
                "folder on another disk"
            )

    # -- save -------------------------------------------------------------------------------------------------------

    def save(self, state: LoopState, for_signal_only: bool, weights_only: bool, in_background: bool) -> None:
        """Write a checkpoint, then rotate older ones. Call ``finish`` first.

        Args:
            for_signal_only: an uninterrupted run would not have written this checkpoint, so a rollback ignores it and
                returns to the same step as an uninterrupted run would.
            weights_only: save only what ``load_best`` needs; the run cannot resume from it.
            in_background: continue training while it is written; otherwise return once it is on disk.
        """
        flags = {"for_signal_only": for_signal_only, "weights_only": weights_only}
        content = {**asdict(state), "identity": self._task.identity, **flags}
        self.saved_step = state.step
        try:
            self._step_log.write()
            tensors = self._task.state_tensors()
            if weights_only:
                del tensors["optimizer"]
            if in_background:
                self._writer.start(tensors, partial(self._write, content))
            else:
                self._write(content, tensors)
        except OSError as error:
            self._on_failure(error)

    def finish(self, *, wait: bool) -> None:
        """Handle the result of the save in progress, if it has ended or after waiting for it (``wait``)."""
        if wait or self._writer.ended:
            try:
                self._writer.wait()
            except OSError as error:
                self._on_failure(error)

    def _write(self, content: dict[str, Any], tensors: NamedTensors) -> None:
        fsync_path(self._step_log.path)  # the history must be on disk before the checkpoint
        checkpoints.save_checkpoint(self.root, content["step"], tensors, content)
        try:
            checkpoints.rotate_checkpoints(self.root, self._settings.keep_checkpoints)
        except OSError as error:
            log.error("cannot delete old checkpoints (%s); training continues", error)

    # -- find and restore -------------------------------------------------------------------------------------------

    def find(self) -> Checkpoint | None:
        """Return the checkpoint to resume from: that of ``--resume_from``, or the newest intact one.

        Raises:
            UserError: it belongs to another run, ``--resume_from`` is not a checkpoint, or a finished, shorter run has
                none any more.
        """
        if named := self._settings.resume_from:
            checkpoint: Checkpoint | None = checkpoints.named_checkpoint(named)
        else:
            checkpoint = checkpoints.newest_checkpoint(self.root)
        if checkpoint is None:
            output_dir = self.root.parent
            if training_config(output_dir) and not verify_folder(output_dir, loaded_only=True, code=False):
                raise UserError(f"{output_dir} holds a finished model, {NO_CHECKPOINTS}")
            self._step_log.path.unlink(missing_ok=True)
            return None
        check_identity(f"{checkpoint.folder} is", checkpoint.state.get("identity"), self._task.identity)
        if named:
            checkpoints.set_aside_newer(self.root, checkpoint.step)
        return checkpoint

    def find_before(self, trouble_since: int | None) -> Checkpoint | None:
        """Return the newest good checkpoint from before the divergence, setting later ones aside.

        Args:
            trouble_since: step of the first bad loss. It was computed with the weights of the step before, so that one
                is not trusted either. None if unknown.
        """
        before = None if trouble_since is None else max(1, trouble_since - 1)
        checkpoint = checkpoints.newest_good_checkpoint(self.root, before)
        if checkpoint is not None:
            checkpoints.set_aside_newer(self.root, checkpoint.step)
        return checkpoint

    def has_best(self, checkpoint: Checkpoint, state: LoopState) -> bool:
        """Whether the best weights so far, if there are any, are intact and here, not where ``--resume_from`` is."""
        if state.best_step is None:
            return True
        if checkpoint.folder.parent.resolve() != self.root.resolve():
            return False
        try:
            checkpoints.open_checkpoint(checkpoints.checkpoint_folder(self.root, state.best_step))
        except checkpoints.CheckpointError:
            return False
        return True

    def restore(self, checkpoint: Checkpoint | None) -> LoopState | None:
        """Load the main rank's checkpoint on every rank and return its state; None if it has none.

        Raises:
            UserError: the checkpoint does not fit the model.
            CheckpointError: its files, which were intact when it was found, can no longer be read.
        """
        saved = self._ranks.broadcast(checkpoint.state if checkpoint else None)
        if saved is None:
            return None
        files = self._task.state_tensors()
        tensors = {n: self._ranks.broadcast_tensors(checkpoint.tensors(n) if checkpoint else {}) for n in files}
        try:
            state = LoopState.of(saved)
            if state.step > 0 and not tensors["optimizer"]:
                raise ValueError("it holds no optimizer state")
            self._task.load_state_tensors(tensors)
        except (ValueError, RuntimeError) as error:
            where = checkpoint.folder if checkpoint else "the checkpoint"
            raise UserError(f"{where} does not fit this model: {error}; start over with --fresh") from None
        state.micro_batch = min(state.micro_batch, self._settings.batch_size)
        self.saved_step = state.step
        if self._ranks.is_main:
            truncate_history(self._step_log.path, state.step)
        return state

    def load_best(self, state: LoopState) -> None:
        """Load the best weights by validation into the model; the last weights stay in the newest checkpoint.

        Raises:
            TrainingError: they are damaged.
        """
        step = state.best_step
        if step is not None and step != state.step:
            try:
                best = checkpoints.open_checkpoint(checkpoints.checkpoint_folder(self.root, step))
                self._task.load_state_tensors({"model": best.tensors("model")})
            except checkpoints.CheckpointError as damage:
                raise TrainingError(
                    f"the best checkpoint is damaged: {damage}; run the same command again to export the last weights"
                ) from None
