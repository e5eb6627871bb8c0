"""Identity of a run: the settings and text that define it. A checkpoint or export of another run is refused."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from mvlm_core.errors import UserError
from mvlm_core.export.manifest import (
    CHECKPOINTS,
    TEACHERS,
    ended_by_time,
    manifest_sha256,
    training_config,
    verify_folder,
)
from mvlm_core.files import read_json
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
        UserError: the run has other settings or another number of teachers, or ``--resume_from`` names no checkpoint.
    """
    if settings.resume_from is not None:
        named_checkpoint(settings.resume_from)
    what, recorded = _recorded_identity(output_dir)
    if recorded:
        check_settings(what, recorded, settings, len(settings.teacher) or settings.num_models - 1)


def lost_teachers(output_dir: Path, settings: TrainingSettings) -> str | None:
    """The recorded hashes of a run's own teachers if these are no longer in its folder, or damaged; else None.

    Trained again they would not be the same, and the run could not go on with them.
    """
    recorded = _recorded_identity(output_dir)[1].get(TEACHERS_KEY)
    if settings.num_models == 1 or not recorded:
        return None
    own = [output_dir / TEACHERS / str(number) for number in range(settings.num_models - 1)]
    intact = [folder for folder in own if not verify_folder(folder, loaded_only=True, code=False)]
    return None if recorded == ",".join(map(manifest_sha256, intact)) else recorded


def _recorded_identity(output_dir: Path) -> tuple[str, dict[str, Any]]:
    """What the folder holds, for messages, and its identity; {} if it holds no run."""
    recorded, what = training_config(output_dir, "identity").get("identity"), f"{output_dir} holds a finished model"
    if recorded is None:
        for folder in checkpoint_folders(output_dir / CHECKPOINTS)[-1:]:
            recorded, what = read_json(folder / "state.json").get("identity"), f"{folder} is"
    return what, recorded if isinstance(recorded, dict) else {}


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
    if problems := verify_folder(output_dir, code=False):
        log.warning("the finished model does not match its manifest: %s", "; ".join(problems[:3]))
    return is_long_enough and not problems
