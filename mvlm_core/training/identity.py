"""Identity of a run: the settings and text that define it. A checkpoint or export of another run is refused."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from mvlm_core.errors import UserError
from mvlm_core.export.manifest import (
    CHECKPOINTS,
    MANIFEST,
    TEACHERS,
    ended_by_time,
    training_config,
    verify_folder,
)
from mvlm_core.files import read_json, sha256_file
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.checkpoint import checkpoint_folders, named_checkpoint
from mvlm_core.training.preparation import PreparedText

log = logging.getLogger("mvlm")
TEACHERS_KEY = "--teacher, its manifest"  # the teachers' hashes, separated by commas
TEACHER_COUNT = "number of teachers"


def settings_identity(settings: TrainingSettings) -> dict[str, Any]:
    """The part of a run's identity that the settings determine."""
    names = [entry.name for entry in fields(settings) if entry.metadata["identity"]]
    values = {"preset": settings.preset} | {name: getattr(settings, name) for name in names}
    values["batch_size × gradient_accumulation_steps"] = settings.sequences_per_step
    return {f"--{name}": value for name, value in values.items()}


def run_identity(settings: TrainingSettings, text: PreparedText) -> dict[str, Any]:
    """Settings and fingerprints that define a run; a checkpoint with a different identity is refused."""
    fingerprints = {"corpus": text.corpus.fingerprint, "tokenizer": text.tokenizer.sha256}
    if text.base is not None:
        fingerprints["--init_from, its manifest"] = text.base.sha256
    if text.teachers:
        fingerprints[TEACHERS_KEY] = ",".join(teacher.sha256 for teacher in text.teachers)
    if text.old is not None and text.batches.replay is not None:
        fingerprints["--replay"] = f"{text.batches.replay_share} of {text.old.corpus.fingerprint}"
    return settings_identity(settings) | fingerprints


def check_identity(what: str, recorded: Any, current: dict[str, Any]) -> None:
    """Check that the identity recorded in ``what`` (for the message) matches the current run's.

    Raises:
        UserError: lists every value that differs.
    """
    old = recorded if isinstance(recorded, dict) else {}
    differing = [name for name in sorted(old.keys() | current.keys()) if old.get(name) != current.get(name)]
    if differing:
        problems = [
            f"{what} from a different run: {name} was {old.get(name)}, now {current.get(name)}" for name in differing
        ]
        length = "give --num_epochs instead of --max_hours, " if TEACHER_COUNT in differing else ""
        advice = (
            f"restore those values, {length}choose another --output_dir (train_all_models.py: --work_dir), or start "
            "over with --fresh"
        )
        raise UserError([*problems, advice])


def check_settings(what: str, recorded: dict[str, Any], settings: TrainingSettings, teachers: int) -> None:
    """Check the part of a recorded identity that is known before the teachers are trained, including their number.

    Raises:
        UserError: lists every value that differs.
    """
    expected = settings_identity(settings) | {TEACHER_COUNT: teachers}
    known = {name: value for name, value in recorded.items() if name in expected}
    hashes = recorded.get(TEACHERS_KEY)
    check_identity(what, known | {TEACHER_COUNT: len(str(hashes).split(",")) if hashes else 0}, expected)


def check_earlier_run(output_dir: Path, settings: TrainingSettings) -> None:
    """Check, before the text is read and teachers are trained, that the folder does not hold another run.

    Raises:
        UserError: the run has other settings or another number of teachers, its teachers are no longer there, or
            ``--resume_from`` names no checkpoint.
    """
    if settings.resume_from is not None:
        named_checkpoint(settings.resume_from)
    recorded, what = training_config(output_dir, "identity").get("identity"), f"{output_dir} holds a finished model"
    if recorded is None:
        for folder in checkpoint_folders(output_dir / CHECKPOINTS)[-1:]:
            recorded, what = read_json(folder / "state.json").get("identity"), f"{folder} is"
    if isinstance(recorded, dict):
        check_settings(what, recorded, settings, len(settings.teacher) or settings.num_models - 1)
        own = [output_dir / TEACHERS / str(number) / MANIFEST for number in range(settings.num_models - 1)]
        if own and recorded.get(TEACHERS_KEY) != ",".join(sha256_file(file) for file in own if file.is_file()):
            raise UserError(
                f"{output_dir}: its model was trained with teachers that are no longer in {output_dir / TEACHERS}: put "
                "them back, choose another --output_dir (train_all_models.py: --work_dir), or start over with --fresh"
            )


def is_finished(output_dir: Path, identity: dict[str, Any], steps: int | None, settings: TrainingSettings) -> bool:
    """Whether the folder already holds this run's complete export.

    Args:
        steps: number of steps that it must have (None: any), unless ``--max_hours`` or ``--patience`` ended it earlier.

    Raises:
        UserError: the folder holds the export of another run.
    """
    config = training_config(output_dir, "identity", "results")
    if not config:
        return False
    check_identity(f"{output_dir} holds a finished model", config["identity"], identity)
    results = config["results"]
    is_long_enough = results.get("steps", 0) >= (steps or 0)
    if settings.max_hours is not None:
        is_long_enough = is_long_enough or ended_by_time(results)
    if settings.patience and results.get("stopped_early"):
        is_long_enough = is_long_enough or results.get("evaluations_since_best", 0) >= settings.patience
    if damage := verify_folder(output_dir, code=False):
        log.warning("the finished model is damaged and will be made again: %s", "; ".join(damage[:3]))
    return is_long_enough and not damage
