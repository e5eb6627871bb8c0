#!/usr/bin/env python3
"""Train, compare, package and validate both models.

    corpus -> model 1 -> model 2 -> test scores, evaluation suite and comparison -> archives -> validation
    -> report

If interrupted, run the same command again, without --fresh: finished stages are skipped and training resumes from its
latest checkpoint. Ctrl-C (or SIGTERM) lets the running trainer save a checkpoint first; a second Ctrl-C stops at once.
Closing the terminal does not stop the job; output continues in the log files.

Exit codes: 0 done, 1 something failed (the other model is still trained), 2 bad arguments or input, 130/143
stopped by a signal.
"""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from mvlm_core.command_line import CommandLine
from mvlm_core.console import outlive_terminal, setup_logging
from mvlm_core.errors import UserError, run_main
from mvlm_core.export.formats import NO_GGUF, PACKAGES, missing_packages
from mvlm_core.files import RunLock, empty_path_problems, output_folder_problems
from mvlm_core.hardware import resolve_preset, set_process_environment
from mvlm_core.pipeline.child_process import SignalForwarder, log_to_file
from mvlm_core.pipeline.job import Job, probe_hardware, show_plan
from mvlm_core.run_layout import Layout
from mvlm_core.settings import (
    DEFAULT_DATA_DIR,
    PRESET_NAMES,
    REPOSITORY_ROOT,
    TrainingSettings,
    add_options,
    is_default_corpus,
)
from mvlm_core.training.supervisor import rank_count

# In execution order.
TRAINERS = {
    "mvlm_gpt2": REPOSITORY_ROOT / "mvlm_trainer.py",
    "simone_enhanced": REPOSITORY_ROOT / "SIM-ONE Training" / "enhanced_train.py",
}
SCRIPTS = {
    "evaluate": REPOSITORY_ROOT / "evaluate_models.py",
    "formats": REPOSITORY_ROOT / "export_formats.py",
    "validate": REPOSITORY_ROOT / "validate_models.py",
    "report": REPOSITORY_ROOT / "make_report.py",
}
PROMPT = "In the beginning God"  # for the download instructions
# Trainer settings that this command passes on unchanged.
PASSED_ON = (
    "batch_size max_length max_steps max_tokens max_bytes num_epochs num_models seed device processes gpus precision "
    "attention_backend validation_split eval_interval log_interval checkpoint_interval keep_checkpoints "
    "no_mixed_precision no_compile loss_kernel deterministic tensorboard quiet"
).split()
log = logging.getLogger("mvlm")


def make_parser() -> argparse.ArgumentParser:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    presets = f"one of {', '.join(PRESET_NAMES)}; auto: h200 with a CUDA device, else cpu [default auto]"
    add("--preset", default="auto", metavar="NAME", help=presets)
    text = "folder of .txt files; the default one is built if missing or damaged"
    add("--data_dir", metavar="PATH", default=str(DEFAULT_DATA_DIR), help=text)
    text = "parent of models/, logs/ and models_for_download/ [this repository]"
    add("--work_dir", metavar="PATH", default=str(REPOSITORY_ROOT), help=text)
    text = f"also export to {' or '.join(PACKAGES)}, or both (onnx,gguf); see export_formats.py"
    add("--formats", metavar="LIST", default=(), type=comma_separated, help=text)
    text = f"models to train, comma-separated [default {','.join(TRAINERS)}]"
    add("--models", metavar="LIST", default=tuple(TRAINERS), type=comma_separated, help=text)
    text = "total training time of all models in hours, split equally between them; see the trainers' --help"
    add("--max_hours", type=float, metavar="X", help=text)
    add("--fresh", action="store_true", help="delete existing results of these models and start over")
    add("--dry_run", action="store_true", help="show what would run without running it")
    title = "passed on to both trainers (their --help has defaults and presets)"
    add_options(parser, TrainingSettings, PASSED_ON, title=title)
    return parser


def comma_separated(text: str) -> tuple[str, ...]:
    """Split a comma-separated list into unique names."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        UserError: with all problems at once.
    """
    options = make_parser().parse_args(arguments)
    options.settings = {name: value for name in PASSED_ON if (value := getattr(options, name)) is not None}
    if options.max_hours is not None:
        options.settings["max_hours"] = options.max_hours / max(1, len(options.models))
    problems = [
        f"--{flag} {name}: unknown; choose from {', '.join(choices)}"
        for flag, choices in (("models", TRAINERS), ("formats", PACKAGES))
        for name in getattr(options, flag)
        if name not in choices
    ]
    if not options.models:
        problems.append(f"--models: no model given; choose from {', '.join(TRAINERS)}")
    problems += [f"--formats {problem}" for problem in missing_packages(PACKAGES.keys() & {*options.formats})]
    if options.formats == ("gguf",) and "mvlm_gpt2" not in options.models:
        problems.append(f"--formats gguf: {NO_GGUF}")
    problems += empty_path_problems({"--work_dir": options.work_dir})
    problems += TrainingSettings(preset=options.preset, data_dir=options.data_dir, **options.settings).problems()
    problems += output_folder_problems(options.work_dir, "--work_dir")
    options.names = [name for name in TRAINERS if name in options.models]
    options.layout = layout = Layout(Path(options.work_dir).absolute())
    if not problems:
        for folder in (layout.models, layout.logs, layout.downloads, *map(layout.export, options.names)):
            problems += output_folder_problems(folder, "--work_dir:")
    if problems:
        raise UserError(problems)
    return options


def make_job(options: argparse.Namespace) -> Job:
    preset, reason = resolve_preset(options.preset, options.settings.get("device"))
    default = is_default_corpus(options.data_dir)
    return Job(
        layout=options.layout,
        trainers=TRAINERS,
        names=options.names,
        preset=preset,
        preset_reason=reason,
        preset_is_automatic=options.preset == "auto",
        data_dir=options.data_dir,
        settings=options.settings,
        fresh=options.fresh,
        build_corpus=partial(build_corpus, options.settings.get("quiet", False)) if default else None,
        scripts=SCRIPTS,
        prompt=PROMPT,
        formats=options.formats,
    )


def build_corpus(quiet: bool) -> None:
    """Build the default corpus if it is missing or damaged."""
    from bible_corpus import build

    if problems := build.corpus_problems(DEFAULT_DATA_DIR):
        log.info("corpus: %s%s", problems[0], f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
        log.info("corpus: building it; about a minute on two cores, the first time only")
        build.build_corpus(DEFAULT_DATA_DIR, quiet=quiet)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    outlive_terminal()
    set_process_environment()
    job = make_job(options)
    if job.settings.get("processes", 1) > 1:  # also refused by the trainers, but only after the corpus is built
        rank_count(TrainingSettings(preset=job.preset, **job.settings))
    if options.dry_run:
        from bible_corpus import build

        ready = not (job.build_corpus and build.corpus_problems(DEFAULT_DATA_DIR))
        return show_plan(job, corpus_is_ready=ready)
    from mvlm_core.pipeline.stages import check_locks, run_stages

    with SignalForwarder() as signals:
        hardware = probe_hardware(job)
        if not job.build_corpus:  # check the user's own corpus before writing anything
            job.corpus()
            job.check_finished_models()
        layout = job.layout
        setup_logging()
        check_locks(job)
        with RunLock(layout.models, str(layout.root)):
            layout.logs.mkdir(parents=True, exist_ok=True)
            log_file = layout.logs / f"h200_training_{datetime.now():%Y%m%d_%H%M%S}.log"
            setup_logging(log_file)
            log.info("train_all_models.py in %s, process %d", layout.root, os.getpid())
            try:
                return run_stages(job, hardware, log_file, signals)
            except BaseException as error:  # also shown on the console, but that may be closed by now
                with suppress(OSError):  # the disk may be full
                    log_to_file(log_file, f"=== ended: {type(error).__name__}: {error}")
                raise


if __name__ == "__main__":
    run_main(main)
