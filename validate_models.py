#!/usr/bin/env python3
"""Check trained models and their archives, list the checks, and exit 0 only if all of them passed.

Without arguments: every model that the last run of train_all_models.py was asked to make. With folders:
those. Each export is copied elsewhere under another name and loaded by a fresh process that has no network
and nothing of this repository. The findings go to models/validation_report.json.

Exit codes: 0 every check passed, 1 a check failed (named), 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvlm_core.console import command_line
from mvlm_core.errors import UserError, printable, run_main
from mvlm_core.export.file_checks import Checks, check_files
from mvlm_core.export.manifest import MANIFEST
from mvlm_core.export.strict_tar import name_problem
from mvlm_core.export.validation import LOADING, check_formats, check_loading, check_packed, check_scores
from mvlm_core.files import output_folder_problems, read_json, write_json_atomic
from mvlm_core.hardware import DEVICES, gpu_count, set_process_environment
from mvlm_core.pipeline.parallel import parallel_map
from mvlm_core.pipeline.summary import now
from mvlm_core.run_layout import Layout
from mvlm_core.settings import DEFAULT_DATA_DIR, REPOSITORY_ROOT
from mvlm_core.signals import end_on_sigterm
from prioritary_mvlm.config import MODELLING_FILES

MODELS = ("mvlm_gpt2", "simone_enhanced")
PROMPTS = (
    "In the beginning God",
    "The LORD is my shepherd",
    "Blessed are the",
    "And it came to pass",
    "For God so loved the world",
    "Thou shalt not",
)


def validate_model(
    folder: Path, layout: Layout, options: argparse.Namespace, texts: list[str]
) -> tuple[Checks, list[dict[str, Any]]]:
    """All checks of one export, and the texts that it generated."""
    checks = Checks()
    samples: list[dict[str, Any]] = []
    finished = (folder / MANIFEST).is_file()
    if not checks.add("files", "export", finished, f"{folder}{'' if finished else ' holds no finished export'}"):
        return checks, samples
    try:
        files = check_files(folder, checks, MODELLING_FILES)
    except OSError as error:
        files = []
        checks.add("files", "manifest", False, f"{folder} cannot be read: {error}")
    if all(check.passed for check in checks):  # what was tampered with is not loaded: its code would run
        samples = check_loading(folder, files, checks, prompts=PROMPTS, texts=texts)
        if not options.quick and samples:
            how = {name: getattr(options, name) for name in ("data_dir", "device", "seed", "whole")}
            check_scores(folder, checks, **how)
    else:
        checks.add("loading", LOADING, False, "not tried: its files are not what they should be")
    if folder.parent == layout.models:
        check_packed("archive", layout.archive(folder.name), folder, layout, checks)
        if samples:  # what could not be loaded has no logits to compare
            check_formats(folder.name, folder, layout, checks)
    return checks, samples


def sample_texts(data_dir: str) -> list[str]:
    """Some real text for the round trip: the beginnings of a few files of the corpus."""
    texts, files = list(PROMPTS), sorted(Path(data_dir).rglob("*.txt"))
    for file in files[:: max(1, len(files) // 12)][:12]:
        try:
            if file.is_file():  # a pipe would be waited for
                with file.open(encoding="utf-8", errors="ignore") as text:
                    texts.append(text.read(2000))
        except OSError:
            continue  # what the corpus holds is not judged here
    return texts


def print_checks(name: str, checks: Checks) -> None:
    """A line for each group, and one for each failed check."""
    for group in dict.fromkeys(check.group for check in checks):
        made = [check for check in checks if check.group == group]
        failed = [check for check in made if not check.passed]
        print(f"{'FAILED' if failed else 'ok    '}  {name}: {group} ({', '.join(check.name for check in made)})")
        for check in failed:
            print(f"        {name}: {check.name}: {check.detail}")
    sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: every problem with it.
    """
    parser = command_line(__doc__)
    add = parser.add_argument
    add("folders", nargs="*", metavar="MODEL_DIR", help="export folders [default: what the last run made]")
    add("--work_dir", default=str(REPOSITORY_ROOT), help="where models/ and models_for_download/ are")
    add("--data_dir", default=str(DEFAULT_DATA_DIR), help="the corpus, to compute the test scores again")
    add("--device", default="auto", help="auto, cpu or cuda, for the scores [default auto]")
    how_much = parser.add_mutually_exclusive_group().add_argument
    how_much("--quick", action="store_true", help="do not compute the test scores again")
    how_much("--whole", action="store_true", help="compute them from all of the test text, not from a sample of it")
    add("--seed", type=int, metavar="N", help="seed of that sample [default: another one each time]")
    options = parser.parse_args(arguments)
    problems = [f"{folder}: no such folder" for folder in options.folders if not Path(folder).is_dir()]
    if options.device not in DEVICES:
        problems.append(f"--device {options.device}: unknown; choose one of {', '.join(DEVICES)}")
    if not options.quick and not Path(options.data_dir).is_dir():
        problems.append(f"--data_dir {options.data_dir}: no such folder (or give --quick to leave the scores out)")
    if not Path(options.work_dir).is_dir():
        problems.append(f"--work_dir {options.work_dir}: no such folder")
    problems += output_folder_problems(Path(options.work_dir) / "models", "--work_dir:")
    if problems:
        raise UserError(problems)
    options.data_dir = str(Path(options.data_dir).absolute())
    if options.seed is None:  # a sample that nobody could have known
        options.seed = secrets.randbits(32)
    return options


def wanted_folders(options: argparse.Namespace, layout: Layout) -> dict[str, Path]:
    """What to check, by the name it has in the report."""
    if options.folders:
        folders = [Path(folder).absolute() for folder in options.folders]
        return {
            folder.name if sum(other.name == folder.name for other in folders) == 1 else str(folder): folder
            for folder in folders
        }
    asked = read_json(layout.summary).get("models")
    asked = list(asked) if isinstance(asked, dict) and asked else MODELS
    if odd := [name for name in asked if "/" in name or name_problem(name)]:
        raise UserError(f"{layout.summary}: {ascii(odd[0])} is not a model; name the folders to check instead")
    return {name: layout.export(name) for name in asked}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_process_environment()
    layout = Layout(Path(options.work_dir).absolute())
    models: dict[str, Any] = {}
    failed: list[str] = []
    texts = sample_texts(options.data_dir)
    wanted = wanted_folders(options, layout)
    each = [(folder, layout, options, texts) for folder in wanted.values()]
    found = parallel_map(validate_model, each, on_cpu=options.device == "cpu" or not gpu_count())
    for (name, folder), (checks, samples) in zip(wanted.items(), found, strict=True):
        print_checks(name, checks)
        failed += [f"{name}: {check.name}: {check.detail}" for check in checks if not check.passed]
        models[name] = {
            "passed": all(check.passed for check in checks),
            "folder": printable(str(folder)),
            "checks": [asdict(check) for check in checks],
            "samples": samples,
        }
    report = {"passed": not failed, "checked": now(), "rescored": not options.quick, "models": models, "failed": failed}
    layout.models.mkdir(parents=True, exist_ok=True)
    write_json_atomic(layout.report, report)
    count = sum(len(model["checks"]) for model in models.values())
    print(f"{count - len(failed)} of {count} checks passed; report: {layout.report}")
    for line in failed:
        print(f"failed: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    end_on_sigterm()  # and the process that loads or scores a model with it
    run_main(main)
