#!/usr/bin/env python3
"""Validate trained models and their archives; exit 0 only if every check passes.

Without arguments, checks every model that the last run of train_all_models.py was asked to train, and its archive; a
model trained with its own trainer has no archive. Each export is copied to a temporary folder under another name and
loaded in a new process without network access or this repository's code. Writes models/validation_report.json.

Exit codes: 0 all checks passed, 1 a check failed (named), 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mvlm_trainer
from mvlm_core.command_line import CommandLine, device_problems, seed_problems
from mvlm_core.errors import UserError, printable, run_main
from mvlm_core.export.archive import opened
from mvlm_core.export.file_checks import Checks, check_files
from mvlm_core.export.manifest import MANIFEST, training_config
from mvlm_core.export.strict_tar import name_problem
from mvlm_core.export.validation import LOADING, check_formats, check_loading, check_packed, check_scores
from mvlm_core.files import empty_path_problems, output_folder_problems, read_json, write_json_atomic
from mvlm_core.hardware import set_process_environment
from mvlm_core.machine import gpu_count
from mvlm_core.pipeline.parallel import parallel_map
from mvlm_core.pipeline.summary import timestamp
from mvlm_core.run_layout import Layout
from mvlm_core.settings import DEFAULT_DATA_DIR, REPOSITORY_ROOT
from mvlm_core.signals import end_on_sigterm
from prioritary_mvlm.config import MODELING_FILES, NAME

MODELS = (mvlm_trainer.NAME, NAME)
PROMPTS = (
    "In the beginning God",
    "The LORD is my shepherd",
    "Blessed are the",
    "And it came to pass",
    "For God so loved the world",
    "Thou shalt not",
)
NOT_PACKED = f"not packed: train_all_models.py packs {' and '.join(MODELS)}"


def validate_model(
    folder: Path, layout: Layout, options: argparse.Namespace, texts: list[str]
) -> tuple[Checks, list[dict[str, Any]]]:
    """Run all checks on one export; return them and the generated samples."""
    checks = Checks()
    samples: list[dict[str, Any]] = []
    finished = (folder / MANIFEST).is_file()
    if not checks.add("files", "export", finished, f"{folder}{'' if finished else ' is not a finished export'}"):
        return checks, samples
    try:
        files = check_files(folder, checks, MODELING_FILES)
    except OSError as error:
        files = []
        checks.add("files", "manifest", False, f"{folder} cannot be read: {error}")
    if all(check.passed for check in checks):  # never load a modified export: that would run its code
        samples = check_loading(folder, files, checks, prompts=PROMPTS, texts=texts)
        if not options.quick and samples:
            names = ("validation_dir", "device", "seed", "whole")
            given = {name: getattr(options, name) for name in names}
            check_scores(folder, checks, data_dir=options.data_dir or corpus_of(folder), **given)
    else:
        checks.add("loading", LOADING, False, "skipped: the file checks failed")
    if is_own(folder, layout):
        archive = layout.archive(folder.name)
        if archive.is_file() or must_be_packed(folder.name, layout, options):
            check_packed("archive", archive, folder, layout, checks)
        else:
            checks.add("archive", NOT_PACKED, True, f"{archive}: none expected")
        if samples:  # without a loaded model there are no logits to compare
            check_formats(folder.name, folder, layout, checks)
    return checks, samples


def is_own(folder: Path, layout: Layout) -> bool:
    """Whether the export is one of the work folder's models, which its run packs and records."""
    return folder.resolve().parent == layout.models.resolve()


def corpus_of(export: Path) -> str:
    """Return the folder of the text that an export was trained on; the default corpus if it is not on this machine."""
    recorded = training_config(export).get("data", {}).get("data_dir")
    return recorded if isinstance(recorded, str) and os.path.isdir(recorded) else str(DEFAULT_DATA_DIR)


def requested_models(layout: Layout) -> dict[str, Any]:
    """Return the models in the last run's summary; {} without one."""
    models = read_json(layout.summary).get("models")
    return models if isinstance(models, dict) else {}


def must_be_packed(name: str, layout: Layout, options: argparse.Namespace) -> bool:
    """Whether the last run packed the model or, without MODEL_DIR, was asked to."""
    entry = requested_models(layout).get(name)
    return isinstance(entry, dict) and bool(entry.get("archive") or not options.folders)


def sample_texts(data_dir: str) -> list[str]:
    """Return texts for the tokenizer round trip: the prompts and the start of a few corpus files."""
    texts, files = list(PROMPTS), sorted(Path(data_dir).rglob("*.txt"))
    for file in files[:: max(1, len(files) // 12)][:12]:
        try:
            if file.is_file():  # reading a pipe would block
                with file.open(encoding="utf-8", errors="ignore") as text:
                    texts.append(text.read(2000))
        except OSError:
            continue  # this does not check the corpus
    return texts


def print_checks(name: str, checks: Checks) -> None:
    """Print one line per group and one per failed check."""
    for group in dict.fromkeys(check.group for check in checks):
        members = [check for check in checks if check.group == group]
        failed = [check for check in members if not check.passed]
        print(f"{'FAILED' if failed else 'ok    '}  {name}: {group} ({', '.join(check.name for check in members)})")
        for check in failed:
            print(f"        {name}: {check.name}: {check.detail}")
    sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        UserError: with all problems at once.
    """
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        metavar="MODEL_DIR",
        help="export folders or archives [default: the models of the last run]",
    )
    add("--work_dir", help="parent of models/ and models_for_download/ [default: this repository]")
    text = "corpus used to recompute the test scores [default: the one each model was trained on, if it is still there]"
    add("--data_dir", help=text)
    add("--validation_dir", help="the folder of the validation text, if the models were trained with one")
    add("--device", default="auto", help="auto, cpu or cuda, for the scores [default auto]")
    add_scope = parser.add_mutually_exclusive_group().add_argument
    add_scope("--quick", action="store_true", help="do not recompute the test scores")
    add_scope("--whole", action="store_true", help="recompute them on the full test text instead of a sample")
    add("--seed", type=int, metavar="N", help="random seed of that sample [default: random]")
    options = parser.parse_args(arguments)
    paths = {f"--{name}": getattr(options, name) for name in ("work_dir", "data_dir", "validation_dir")}
    problems = empty_path_problems({"MODEL_DIR": options.folders, **paths})
    problems += [f"{folder}: no such folder or archive" for folder in options.folders if not Path(folder).exists()]
    problems += [] if options.seed is None else seed_problems(options.seed)
    problems += device_problems(options.device)
    if options.data_dir is not None and not options.quick and not Path(options.data_dir).is_dir():
        problems.append(f"--data_dir {options.data_dir}: no such folder (or use --quick to skip the scores)")
    work_dir = options.work_dir or REPOSITORY_ROOT
    if not Path(work_dir).is_dir():
        problems.append(f"--work_dir {work_dir}: no such folder")
    problems += output_folder_problems(Path(work_dir) / "models", "--work_dir:")
    if problems:
        raise UserError(problems)
    for name in ("data_dir", "validation_dir"):
        if getattr(options, name) is not None:
            setattr(options, name, str(Path(getattr(options, name)).absolute()))
    if options.seed is None:  # an unpredictable sample
        options.seed = secrets.randbits(32)
    return options


def folders_to_check(options: argparse.Namespace, layout: Layout, stack: ExitStack) -> dict[str, Path]:
    """Return the folders to check, keyed by their name in the report; archives are unpacked until ``stack`` closes."""
    if options.folders:
        given = {path: stack.enter_context(opened(Path(path).absolute())) for path in options.folders}
        names = [folder.name for folder in given.values()]
        return {folder.name if names.count(folder.name) == 1 else path: folder for path, folder in given.items()}
    requested = list(requested_models(layout))
    if not requested:  # no run of the whole job, but perhaps of the trainers
        requested = [name for name in MODELS if layout.export(name).is_dir()] or list(MODELS)
    if invalid := [name for name in requested if "/" in name or name_problem(name)]:
        raise UserError(
            f"{layout.summary}: {ascii(invalid[0])} is not a valid model name; pass the export folders as MODEL_DIR "
            "instead"
        )
    return {name: layout.export(name) for name in requested}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_process_environment()
    layout = Layout(Path(options.work_dir or REPOSITORY_ROOT).absolute())
    models: dict[str, Any] = {}
    failed: list[str] = []
    texts = sample_texts(options.data_dir or str(DEFAULT_DATA_DIR))
    with ExitStack() as stack:
        folders = folders_to_check(options, layout, stack)
        jobs = [(folder, layout, options, texts) for folder in folders.values()]
        results = parallel_map(validate_model, jobs, on_cpu=options.device == "cpu" or not gpu_count())
        for (name, folder), (checks, samples) in zip(folders.items(), results, strict=True):
            print_checks(name, checks)
            failed += [f"{name}: {check.name}: {check.detail}" for check in checks if not check.passed]
            models[name] = {
                "passed": all(check.passed for check in checks),
                "folder": printable(str(folder)),
                "checks": [asdict(check) for check in checks],
                "samples": samples,
            }
    report = {
        "passed": not failed,
        "checked": timestamp(),
        "rescored": not options.quick,
        "models": models,
        "failed": failed,
    }
    count = sum(len(model["checks"]) for model in models.values())
    print(f"{count - len(failed)} of {count} checks passed", end="")
    # The record of this repository's run is not overwritten with checks of other models.
    others = options.folders and not all(is_own(folder, layout) for folder in folders.values())
    if others and options.work_dir is None:
        print(" (no report: give --work_dir for one)")
    else:
        layout.models.mkdir(parents=True, exist_ok=True)
        write_json_atomic(layout.validation_report, report)
        print(f"; report: {layout.validation_report}")
    for line in failed:
        print(f"failed: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    end_on_sigterm()  # also terminates the process that loads or scores a model
    run_main(main)
