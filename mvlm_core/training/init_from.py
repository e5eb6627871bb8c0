"""Further training (``--init_from``): open the export a run starts from and check the run's settings against it.

No code from the export is run: config and tokenizer are JSON, weights are safetensors, and the model is built by this
repository's own code.
"""

from __future__ import annotations

import atexit
import math
from contextlib import ExitStack
from dataclasses import Field, dataclass, fields
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.errors import UserError
from mvlm_core.export.archive import opened
from mvlm_core.export.manifest import (
    MANIFEST,
    TRAINING_CONFIG,
    corpus_choice,
    manifest_sha256,
    read_manifest,
    training_config,
    verify_folder,
)
from mvlm_core.settings import PRESET_NAMES, TrainingSettings

NEEDED = ("model.safetensors", "tokenizer.json", TRAINING_CONFIG)
_unpacked = ExitStack()
atexit.register(_unpacked.close)


@dataclass(frozen=True)
class PretrainedExport:
    """A finished export that passed its checks, to start from (``--init_from``) or to distill from (``--teacher``).

    Attributes:
        folder: contains its files; an unpacked archive is deleted when this process ends.
        name: model name.
        sha256: of the manifest, which lists the SHA-256 of every file.
        config: content of ``training_config.json``.
    """

    folder: Path
    name: str
    sha256: str
    config: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Recorded training time; 0 if the record is unusable."""
        seconds = self.config.get("results", {}).get("seconds")
        return seconds if isinstance(seconds, int | float) and 0 <= seconds < math.inf else 0.0

    @cached_property
    def corpus(self) -> Corpus | None:
        """The corpus it was trained on; None if that is not on this machine or has changed since."""
        data = self.config["data"]
        try:
            corpus = self.corpus_in(Path(str(data.get("data_dir"))))
        except UserError:
            return None
        return corpus if corpus.fingerprint == data.get("fingerprint") else None

    def corpus_in(self, folder: Path) -> Corpus:
        """Load a corpus from ``folder`` as for this export: the same subfolder and validation text, where they exist.

        Raises:
            UserError: no usable text, or an invalid path is recorded.
        """
        choice = corpus_choice(self.folder)
        places = {"only": folder / (choice["only"] or ""), "validation_dir": Path(choice["validation_dir"] or "")}
        try:
            here = {name: choice[name] if path.is_dir() else None for name, path in places.items()}
            return load_corpus(folder, **choice | here)
        except (OSError, ValueError) as error:  # of an invalid path
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class Replay:
    """``--replay``: a corpus and the share of sequences drawn from its training split."""

    folder: Path
    share: Fraction


def open_export(path: str, flag: str = "--init_from") -> PretrainedExport:
    """Open and check the export at ``path``, a folder or a ``.tar.gz``; unpacked at most once per process.

    Args:
        flag: flag name for error messages.

    Raises:
        UserError: missing, unfinished or damaged export, or an archive that fails its checks.
    """
    resolved = Path(path).resolve()
    file = resolved / MANIFEST if resolved.is_dir() else resolved
    try:
        return _open(resolved, file.stat().st_mtime_ns if file.exists() else 0)
    except UserError as error:
        raise UserError([f"{flag} {problem}" for problem in error.problems]) from None


@cache
def _open(path: Path, _written: int) -> PretrainedExport:
    folder = _unpacked.enter_context(opened(path))
    manifest = read_manifest(folder)
    problems = [f"{path}: {name} is missing" for name in NEEDED if name not in manifest["files"]]
    if problems := problems + verify_folder(folder, loaded_only=True, code=False):
        raise UserError(problems)
    config = training_config(folder, "settings", "data", "tokenizer")
    if not config:
        raise UserError(f"{path}: {TRAINING_CONFIG} is damaged")
    return PretrainedExport(folder, manifest["name"], manifest_sha256(folder), config)


def base_export(settings: TrainingSettings) -> PretrainedExport | None:
    """Open the export that a run with these settings starts from; None if it trains from scratch."""
    return None if settings.init_from is None else open_export(settings.init_from)


def replay_of(settings: TrainingSettings) -> Replay | None:
    """Parse ``--replay``.

    Raises:
        UserError: not FOLDER=SHARE, a share outside (0, 1), or a folder without text.
    """
    if settings.replay is None:
        return None
    folder, _, number = settings.replay.rpartition("=")
    try:
        share = Fraction(number)  # exact, so that the number of replayed sequences does not drift in a long run
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    problems = [] if folder and 0 < share < 1 else ["expected FOLDER=SHARE with a share between 0 and 1, such as 0.2"]
    if folder and not Path(folder).is_dir():
        problems.append("no such folder")
    elif folder and not any(Path(folder).rglob("*.txt")):
        problems.append("no .txt file in that folder")
    if problems:
        raise UserError([f"--replay {settings.replay}: {problem}" for problem in problems])
    return Replay(Path(folder), share)


def inherit(settings: TrainingSettings, name: str) -> list[str]:
    """Copy preset and model shape from the export of ``--init_from`` into settings that are still unset.

    Args:
        name: name of the model to train.
    Returns:
        Conflicts with the export, one sentence each.
    """
    problems: list[str] = []
    try:
        if replay_of(settings) and settings.init_from is None:
            problems.append("--replay needs --init_from: a model trained from scratch has nothing to forget")
    except UserError as error:
        problems += error.problems
    if settings.init_from is None:
        return problems
    if settings.tokenizer_path is not None:
        problems.append("--tokenizer_path cannot be used with --init_from, which uses the export's tokenizer")
    try:
        base = open_export(settings.init_from)
    except UserError as error:
        return [*problems, *error.problems]
    if settings.output_dir is not None and Path(settings.output_dir).resolve().is_relative_to(base.folder.resolve()):
        problems.append(f"--output_dir {settings.output_dir} is in the export of --init_from; choose another folder")
    if base.name != name:
        return [*problems, f"--init_from {settings.init_from} is an export of {base.name}, not of {name}"]
    if settings.preset in (None, "auto") and base.config.get("preset") in PRESET_NAMES:
        settings.preset = base.config["preset"]
    for entry in fields(settings):
        if entry.metadata["group"] in ("model", "governance") and entry.name != "dropout":
            problems += _take(settings, entry, base)
    return problems


def _take(settings: TrainingSettings, entry: Field[Any], base: PretrainedExport) -> list[str]:
    """Take one shape setting from the export, or report how the given value conflicts with it."""
    recorded, default = base.config["settings"], entry.metadata["default"]
    value = recorded.get(entry.name, default)
    if entry.name == "vocab_size":
        value = base.config["tokenizer"].get("vocab_size")
    if type(value) is not type(default):
        return [f"--init_from {settings.init_from}: {TRAINING_CONFIG} has no usable {entry.name}"]
    given = getattr(settings, entry.name)
    if given is None:
        setattr(settings, entry.name, value)
    elif entry.name == "max_length" and isinstance(given, int) and given <= value:
        return []  # a shorter context needs no additional weights
    elif given != value:
        more = "at most " if entry.name == "max_length" else ""
        return [f"--{entry.name} {given}: the export of --init_from has {value}; omit it or give {more}that value"]
    return []
