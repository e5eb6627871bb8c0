"""The manifest of an export: its files with their SHA-256. It is written last; a folder without it is not an export.

This module also lists the files that every export has and reads `training_config.json`.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mvlm_core.errors import UserError, printable
from mvlm_core.export.strict_tar import ENTRY_LIMIT, PROBLEM_LIMIT, name_problem
from mvlm_core.files import load_json_object, sha256_file, write_json_atomic

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MANIFEST_LIMIT = 1 << 20  # bytes; a real one is a few kilobytes
TRAINING_CONFIG = "training_config.json"
# In the export folder but not part of the export.
CHECKPOINTS, HISTORY_LOG, TENSORBOARD = "checkpoints", "training_history.jsonl", "tensorboard"
TEACHERS = Path(CHECKPOINTS, "teachers")  # the runs of a student's own teachers
NO_CHECKPOINTS = (  # of a finished model that should train longer
    "but no checkpoint to continue from: train it again with --fresh, or fine-tune it into another folder with "
    "--init_from"
)
EXPECTED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    TRAINING_CONFIG,
    "training_history.json",
    "training_plots.png",
)
DOCUMENTS = {"README.md", "training_plots.png"}  # never loaded, so users may edit or delete them
SECTIONS = ("settings", "identity", "data", "tokenizer", "hardware", "results")  # objects in training_config.json
RECORDED: tuple[tuple[str, str, Any, Any], ...] = (  # section, key, type, default
    ("data", "only", str | None, None),
    ("data", "mix", str | None, None),
    ("results", "steps", int, 0),
    ("results", "evaluations_since_best", int, 0),
    ("settings", "validation_split", float | int, 0.05),
    ("settings", "validation_dir", str | None, None),
)
log = logging.getLogger("mvlm")


def exports_in(folder: Path) -> list[Path]:
    """Return the exports directly below ``folder``, sorted by name."""
    found = (manifest.parent for manifest in folder.glob(f"*/{MANIFEST}"))
    return sorted(export for export in found if (export / TRAINING_CONFIG).is_file())  # not a folder of other formats


class ArchiveError(UserError):
    """An archive or export folder that must not be used; `.problems` lists the reasons."""


def write_manifest(folder: Path, name: str, files: dict[str, str]) -> None:
    """Write the manifest of the export ``name``.

    Args:
        files: SHA-256 by file name.
    """
    write_json_atomic(folder / MANIFEST, {"format": MANIFEST_FORMAT, "name": name, "files": files})


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate name")
    return dict(pairs)


def parse_manifest(data: bytes) -> dict[str, Any]:
    """Parse a manifest.

    Raises:
        ArchiveError: not a valid manifest; lists every problem.
    """
    if len(data) > MANIFEST_LIMIT:
        raise ArchiveError(f"{MANIFEST}: larger than {MANIFEST_LIMIT:,} bytes")
    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{MANIFEST}: not valid JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ArchiveError(f"{MANIFEST}: not a manifest of format {MANIFEST_FORMAT}")
    name, files = manifest.get("name"), manifest.get("files")
    problems = []
    if not isinstance(name, str) or "/" in name or name_problem(name):
        problems.append(f"{MANIFEST}: 'name' is not a plain folder name")
    if not isinstance(files, dict) or not files or len(files) > ENTRY_LIMIT:
        raise ArchiveError([*problems, f"{MANIFEST}: 'files' does not map names to their SHA-256"])
    if problems := problems + _file_problems(files):
        raise ArchiveError(problems)
    return manifest


def _file_problems(files: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    folded = {MANIFEST: MANIFEST}
    for file, digest in files.items():
        if (reason := name_problem(file)) or file == MANIFEST:
            problems.append(f"{MANIFEST}: {reason or 'lists itself'}")
        elif not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            problems.append(f"{MANIFEST}: {file} has no SHA-256")
        elif folded.setdefault(file.lower(), file) != file:
            problems.append(f"{MANIFEST}: {file} and {folded[file.lower()]} differ only in case")
        elif any(str(parent) in files for parent in PurePosixPath(file).parents):
            problems.append(f"{MANIFEST}: {file} is below a file")
        if len(problems) >= PROBLEM_LIMIT:
            break
    return problems


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an export folder.

    Raises:
        ArchiveError: missing or damaged.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise ArchiveError(f"{path}: no manifest, so not a finished export")
        with path.open("rb") as file:
            return parse_manifest(file.read(MANIFEST_LIMIT + 1))
    except OSError as error:
        raise ArchiveError(f"{path}: {error.strerror}") from None
    except ArchiveError as error:
        raise ArchiveError([p if str(path) in p else f"{folder}: {p}" for p in error.problems]) from None


def manifest_sha256(folder: Path) -> str:
    """Identify an export by the SHA-256 of its manifest."""
    return sha256_file(folder / MANIFEST)


def export_bytes(folder: Path) -> int:
    """Size of an export: the files of its manifest, and the manifest itself.

    Raises:
        ArchiveError, OSError: the manifest is damaged, or a file is missing.
    """
    return sum((folder / name).stat().st_size for name in (*read_manifest(folder)["files"], MANIFEST))


def verify_folder(folder: Path, *, loaded_only: bool = False, code: bool = True) -> list[str]:
    """Compare an export folder with its manifest; return the problems, [] if every listed file matches its checksum.

    Args:
        loaded_only: leave out the model card and the plots.
        code: False leaves out the modeling files, which can be replaced by the repository's own.
    """
    try:
        files = read_manifest(folder)["files"]
    except ArchiveError as error:
        return list(error.problems)
    problems = []
    for name, digest in sorted(files.items()):
        path = folder / name
        if (loaded_only and name in DOCUMENTS) or (name.endswith(".py") and not code):
            continue
        try:
            if any((folder / part).is_symlink() for part in (name, *PurePosixPath(name).parents)):
                problems.append(f"{path}: a symbolic link, not a file of the export")
            elif not path.is_file():
                problems.append(f"{path}: missing")
            elif sha256_file(path) != digest:
                problems.append(f"{path}: SHA-256 differs from the manifest's")
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
    return problems


def training_config(folder: Path, *required: str) -> dict[str, Any]:
    """Read `training_config.json` of a finished export; {} if it is missing or, with a warning, damaged.

    All sections in the result are objects, and those in ``required`` are present.
    """
    if not (folder / MANIFEST).exists():
        return {}
    try:
        read_manifest(folder)
        config = load_json_object(folder / TRAINING_CONFIG)
        for section in SECTIONS:
            if not isinstance(config.get(section, None if section in required else {}), dict):
                raise ValueError(f"no section '{section}'")
        for section, key, expected, default in RECORDED:
            value = config.get(section, {}).get(key, default)
            if not isinstance(value, expected) or isinstance(value, str) and "\0" in value:
                raise ValueError(f"invalid {section}.{key}: {printable(repr(value), limit=80)}")
    except (ArchiveError, OSError, ValueError, RecursionError) as error:  # repr may recurse too deeply
        log.warning("%s/%s is damaged; the export is treated as unfinished: %s", folder, TRAINING_CONFIG, error)
        return {}
    return config


def corpus_choice(folder: Path, validation_dir: str | None = None) -> dict[str, Any]:
    """Arguments of `load_corpus` for the part of the corpus that an export was trained on.

    Args:
        validation_dir: use this folder instead of the recorded one, which another machine may have elsewhere.

    Raises:
        UserError: the export is not finished, or its record is invalid.
    """
    if not (config := training_config(folder)):
        raise UserError(f"{folder / TRAINING_CONFIG}: not the record of a finished export")
    settings = config.get("settings", {})
    return {
        "validation_split": settings.get("validation_split", 0.05),
        "validation_dir": validation_dir or settings.get("validation_dir"),
        "only": config.get("data", {}).get("only"),
    }


def hardware_name(record: dict[str, Any]) -> str:
    """Name of the device in the "hardware" section of a training_config.json, with the number of GPUs if several."""
    name, gpus = record.get("name", "unknown"), record.get("gpus")
    return f"{gpus} × {name}" if isinstance(gpus, int) and gpus > 1 else str(name)


def ended_by_time(results: dict[str, Any]) -> bool:
    """Whether a run took all steps that its time limit allowed; true of older versions' runs, which do not say."""
    fixed = results.get("fixed_steps", 0)
    return isinstance(fixed, int) and results.get("steps", 0) >= fixed
