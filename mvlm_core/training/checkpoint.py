"""Atomic checkpoints: one folder per step, with a manifest of SHA-256 checksums written last.

``checkpoints/step-00000500/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``state.json`` and
``manifest.json``. It is written under a temporary name and then renamed, so a crash leaves earlier checkpoints intact.
No pickle: tensors are safetensors, everything else is JSON.

A ``weights_only`` checkpoint has no optimizer state: it holds the weights with the best validation score for the export
and cannot be resumed from.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvlm_core.errors import TrainingError, UserError, printable
from mvlm_core.files import fsync_path, load_json_object, make_folder, read_json, sha256_file, write_json_atomic

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY_PREFIX, _DELETED_PREFIX = ".writing-", ".deleting-"
_DAMAGED_SUFFIX, _NEWER_SUFFIX = ".damaged", ".superseded"
_SPARE_BYTES = 1 << 20  # for the JSON files
log = logging.getLogger("mvlm")


class CheckpointError(TrainingError):
    """A checkpoint folder does not match its manifest; the message names the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        state: as passed to ``save_checkpoint``, plus ``step``.
    """

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load the tensors saved under ``name`` ("model" or "optimizer") to the CPU.

        Raises:
            CheckpointError: safetensors cannot read the file.
        """
        try:
            return load_file(self.folder / f"{name}.safetensors")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / name}.safetensors cannot be read: {error}") from None


def save_checkpoint(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write one checkpoint atomically and return its folder.

    Args:
        tensors: named tensors by file name (without extension).
        state: JSON-serializable.
    Raises:
        OSError: for example, the disk is full; earlier checkpoints are untouched.
    """
    final = checkpoint_folder(root, step)
    temporary = root / f"{_TEMPORARY_PREFIX}{final.name}"
    make_folder(root)
    shutil.rmtree(temporary, ignore_errors=True)
    _check_space(root, sum(tensor.nbytes for named in tensors.values() for tensor in named.values()) + _SPARE_BYTES)
    temporary.mkdir()
    try:
        for name, named in tensors.items():
            path = temporary / f"{name}.safetensors"
            try:
                save_file({key: value.detach().contiguous() for key, value in named.items()}, path)
            except SafetensorError as error:  # raised by safetensors if the disk is full
                raise OSError(f"{path}: {error}") from None
            fsync_path(path)
        write_json_atomic(temporary / "state.json", {"step": step, **state})
        hashes = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        write_json_atomic(temporary / "manifest.json", {"format": FORMAT, "step": step, "files": hashes})
        if final.exists():
            _delete(final)
        os.rename(temporary, final)
        fsync_path(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        message = f"needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB free"
        raise OSError(errno.ENOSPC, message, str(root))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in ``folder`` and check every file against the manifest.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    folder = Path(folder)
    manifest = _read_json(folder / "manifest.json")
    files = manifest.get("files")
    complete = {"state.json", "model.safetensors"}
    if not (isinstance(files, dict) and complete <= files.keys() and manifest.get("format") == FORMAT):
        raise CheckpointError(f"{folder / 'manifest.json'} is not the manifest of a checkpoint of format {FORMAT}")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder / 'manifest.json'} names {printable(name)}, not a file of this folder")
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            if sha256_file(path) != expected:
                raise CheckpointError(f"{path} has changed since it was written (its SHA-256 differs)")
        except OSError as error:  # for example, the name is too long
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    state = _read_json(folder / "state.json")
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{folder / 'state.json'} has no step")
    return Checkpoint(folder, state["step"], state)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return load_json_object(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def checkpoint_folders(root: Path) -> list[Path]:
    """List the checkpoint folders below ``root``, oldest first, without checking them."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)), key=_step_of)


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the path of the checkpoint of ``step``."""
    return root / f"step-{step:08d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None; rename damaged ones with a warning and delete partial ones."""
    _delete_unfinished(root)
    return next(_intact_checkpoints(root), None)


def _delete_unfinished(root: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for prefix in (_TEMPORARY_PREFIX, _DELETED_PREFIX):
        for leftover in root.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def newest_good_checkpoint(root: Path, before: int | None) -> Checkpoint | None:
    """Return the newest intact checkpoint before step ``before``, ignoring those written only because of a signal."""
    for checkpoint in _intact_checkpoints(root):
        if not checkpoint.state.get("for_signal_only") and (before is None or checkpoint.step < before):
            return checkpoint
    return None


def _intact_checkpoints(root: Path) -> Iterator[Checkpoint]:
    """Yield checkpoints that a run can resume from, newest first; rename damaged ones."""
    for folder in reversed(checkpoint_folders(root)):
        if read_json(folder / "state.json").get("weights_only"):
            continue
        try:
            yield open_checkpoint(folder)
        except CheckpointError as damage:
            _set_aside(folder, _DAMAGED_SUFFIX)
            log.warning("damaged checkpoint ignored and renamed to *.damaged: %s", damage)


def named_checkpoint(folder: Path | str) -> Checkpoint:
    """Open the checkpoint given by ``--resume_from``.

    Raises:
        UserError: missing, damaged or without optimizer state; there is no fallback to another checkpoint.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--resume_from {folder}: no such checkpoint folder")
    try:
        checkpoint = open_checkpoint(Path(folder))
    except CheckpointError as damage:
        raise UserError(f"--resume_from {folder}: {damage}") from None
    if checkpoint.state.get("weights_only"):
        raise UserError(
            f"--resume_from {folder} holds only the best weights by validation, no optimizer state: choose a "
            "checkpoint with optimizer.safetensors"
        )
    return checkpoint


def set_aside_newer(root: Path, step: int) -> None:
    """Rename the checkpoints after ``step``, from which the run resumes, so that rotation ignores them."""
    for folder in checkpoint_folders(root):
        if _step_of(folder) > step:
            _set_aside(folder, _NEWER_SUFFIX)
            log.info("renamed %s to *.superseded: the run returns to step %s", folder, step)
    if root.is_dir():
        fsync_path(root)  # before the history is truncated: no checkpoint may be newer than the history


def _set_aside(folder: Path, suffix: str) -> None:
    aside = folder.with_name(folder.name + suffix)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def rotate_checkpoints(root: Path, keep: int) -> None:
    """Keep the ``keep`` newest checkpoints and the best ones they refer to (``best_step``).

    Checkpoints written only because of a signal do not count and are deleted once a newer one exists. Weights-only
    checkpoints do not count either.
    """
    folders = checkpoint_folders(root)
    states = {folder: read_json(folder / "state.json") for folder in folders}
    whole = [folder for folder in folders if not states[folder].get("weights_only")]
    regular = [folder for folder in whole if not states[folder].get("for_signal_only")]
    kept = {*folders[-1:], *whole[-1:], *regular[-keep:]}
    best_steps = (states[folder].get("best_step") for folder in kept)
    best = {checkpoint_folder(root, step) for step in best_steps if isinstance(step, int)}
    for folder in folders:
        if folder not in kept | best:
            _delete(folder)


def delete_checkpoints(root: Path) -> None:
    """Delete every checkpoint below ``root``, also those set aside or unfinished: a finished teacher needs none."""
    _delete_unfinished(root)
    for folder in root.glob("step-*"):
        _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a checkpoint, renaming it first so that a power failure leaves no partial checkpoint under its name."""
    renamed = folder.with_name(_DELETED_PREFIX + folder.name)
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    fsync_path(folder.parent)
    shutil.rmtree(renamed)
