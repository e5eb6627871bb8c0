"""The export folder: a finished model in transformers' format, with history, plots, model card and manifest."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvlm_core.export.manifest import (
    CHECKPOINTS,
    HISTORY_LOG,
    MANIFEST,
    TEACHERS,
    TENSORBOARD,
    TRAINING_CONFIG,
    ArchiveError,
    read_manifest,
    write_manifest,
)
from mvlm_core.export.plots import plot_history
from mvlm_core.files import LOCK_NAME, fsync_path, sha256_file, unfinished_writes, write_json_atomic
from mvlm_core.settings import DEFAULT_SAMPLING

STAGING_NAME = ".export"


def software_versions() -> dict[str, str]:
    """Versions of Python and the packages that results depend on."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def stage_model(model: Any, tokenizer: Any, history: list[dict[str, Any]], title: str, output_dir: Path) -> Path:
    """Write weights, tokenizer, history and plots to a staging folder and return it."""
    staging = output_dir / STAGING_NAME
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.generation_config.update(do_sample=True, top_k=0, **asdict(DEFAULT_SAMPLING))  # without top_k: 50
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    _name_tokenizer_class(staging / "tokenizer_config.json")
    write_json_atomic(staging / "training_history.json", history)
    plot_history(history, title, staging / "training_plots.png")
    return staging


def _name_tokenizer_class(path: Path) -> None:
    """Set a tokenizer class that both transformers 4 and 5 support."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json_atomic(path, config)


def finish_export(staging: Path, config: dict[str, Any], card: str, output_dir: Path) -> None:
    """Add training configuration and model card, then move the export into place, with the manifest last.

    A folder without a manifest is not an export, so an interruption leaves the old export or none.
    """
    write_json_atomic(staging / TRAINING_CONFIG, config)
    (staging / "README.md").write_text(card, encoding="utf-8")
    hashes = {path.name: sha256_file(path) for path in sorted(staging.iterdir())}
    remove_export(output_dir)
    for name in hashes:
        fsync_path(staging / name)
        os.replace(staging / name, output_dir / name)
    fsync_path(output_dir)
    write_manifest(output_dir, config["model"], hashes)
    staging.rmdir()


def delete_run(output_dir: Path, keep: Sequence[Path] = ()) -> None:
    """Delete only an earlier run's files from the folder, except the ``keep`` folders and what contains them."""
    output_dir, kept = output_dir.resolve(), [folder.resolve() for folder in keep]
    remove_export(output_dir)
    folders = [*(output_dir / CHECKPOINTS).glob("*"), *(output_dir / TEACHERS).glob("*"), output_dir / TENSORBOARD]
    for folder in folders:
        if not any(below.is_relative_to(folder) for below in kept):
            shutil.rmtree(folder, ignore_errors=True)
    (output_dir / HISTORY_LOG).unlink(missing_ok=True)


def remove_export(output_dir: Path) -> None:
    """Delete the manifest of an earlier export and then only the files it lists, and unfinished writes."""
    names: list[str] = []
    with suppress(ArchiveError):  # a damaged manifest cannot be trusted
        names = [name for name in read_manifest(output_dir)["files"] if name != LOCK_NAME and "/" not in name]
    (output_dir / MANIFEST).unlink(missing_ok=True)
    for path in [*(output_dir / name for name in names), *unfinished_writes(output_dir)]:
        if not path.is_dir():
            path.unlink(missing_ok=True)
