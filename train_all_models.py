#!/usr/bin/env python3
"""Train both models, compare them, pack them and check what came out.

    corpus -> model 1 -> model 2 -> test scores, text probes and comparison -> archives -> validation
    -> report

Run it again after an interruption and it goes on where it stopped: finished stages are kept, a stopped
training is resumed from its last checkpoint. Ctrl-C (or SIGTERM) lets the running trainer write a checkpoint
first; Ctrl-C twice ends at once. A closed terminal ends nothing: the work goes on, into the log files.

Exit codes: 0 done, 1 something failed (the other model still ran), 2 bad arguments or input, 130/143 stopped
by a signal.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import get_args, get_type_hints

from mvlm_core.console import outlive_terminal, setup_logging
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import RunLock, output_folder_problems
from mvlm_core.hardware import resolve_preset, set_process_environment
from mvlm_core.pipeline.child_process import ResourceLog, Signals, note
from mvlm_core.pipeline.stages import (
    Summary,
    child_command,
    log,
    make_page,
    pack_models,
    probe_text,
    score_parts,
    train_model,
    validate,
)
from mvlm_core.run_layout import Layout, training_config, training_history
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR, PRESET_NAMES, REPOSITORY_ROOT, TrainingSettings

# In the order in which they run.
TRAINERS = {
    "mvlm_gpt2": REPOSITORY_ROOT / "mvlm_trainer.py",
    "simone_enhanced": REPOSITORY_ROOT / "SIM-ONE Training" / "enhanced_train.py",
}
VALIDATOR = REPOSITORY_ROOT / "validate_models.py"
REPORTER = REPOSITORY_ROOT / "make_report.py"
TEXT_PROBES = REPOSITORY_ROOT / "evaluate_models.py"
# Settings of both trainers that this command hands on as they are given.
HANDED_ON = (
    "batch_size",
    "max_length",
    "max_steps",
    "max_tokens",
    "max_bytes",
    "num_epochs",
    "seed",
    "device",
    "processes",
    "precision",
    "attention_backend",
    "validation_split",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "no_mixed_precision",
    "no_compile",
    "tensorboard",
    "quiet",
)


# --- arguments ----------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--preset",
        default="auto",
        metavar="TEXT",
        help=f"one of {', '.join(PRESET_NAMES)}; auto: h200 with a CUDA device, else cpu [default auto]",
    )
    parser.add_argument(
        "--data_dir",
        default=str(DEFAULT_DATA_DIR),
        metavar="TEXT",
        help="folder of .txt files; the default one is built when it is missing or damaged",
    )
    parser.add_argument(
        "--work_dir",
        default=str(REPOSITORY_ROOT),
        metavar="TEXT",
        help="where models/, logs/ and models_for_download/ go [default: this repository]",
    )
    parser.add_argument(
        "--models",
        default=",".join(TRAINERS),
        metavar="TEXT",
        help=f"which ones, with commas between [default {','.join(TRAINERS)}]",
    )
    parser.add_argument("--fresh", action="store_true", help="throw away what there is of these models and start again")
    parser.add_argument("--dry_run", action="store_true", help="show what would run, and run nothing")
    group = parser.add_argument_group("handed on to both trainers (their --help tells defaults and presets)")
    hints = get_type_hints(TrainingSettings)
    for entry in fields(TrainingSettings):
        if entry.name not in HANDED_ON:
            continue
        kind = next((part for part in get_args(hints[entry.name]) if part is not type(None)), hints[entry.name])
        if kind is bool:
            group.add_argument(f"--{entry.name}", action="store_true", default=None, help=entry.metadata["help"])
        else:
            group.add_argument(
                f"--{entry.name}",
                type=kind,
                default=None,
                metavar={int: "N", float: "X"}.get(kind, "TEXT"),
                help=entry.metadata["help"],
            )
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises UserError with every problem at once."""
    options = make_parser().parse_args(arguments)
    options.handed_on = {name: value for name in HANDED_ON if (value := getattr(options, name)) is not None}
    problems = []
    if options.preset not in PRESET_NAMES:
        problems.append(f"--preset {options.preset}: unknown; choose one of {', '.join(PRESET_NAMES)}")
    names = [name.strip() for name in options.models.split(",") if name.strip()]
    problems += [
        f"--models {name}: unknown; choose from {', '.join(TRAINERS)}" for name in names if name not in TRAINERS
    ]
    if not names:
        problems.append(f"--models: names no model; choose from {', '.join(TRAINERS)}")
    options.names = [name for name in TRAINERS if name in names]
    if not Path(options.data_dir).is_dir() and not _is_default(options.data_dir):
        problems.append(f"--data_dir {options.data_dir}: no such folder")
    preset = options.preset if options.preset in PRESET_NAMES else "smoke"
    problems += TrainingSettings(preset=preset, **options.handed_on).problems()
    problems += output_folder_problems(options.work_dir, "--work_dir")
    layout = Layout(Path(options.work_dir).absolute())
    if not problems:
        for folder in (layout.models, layout.logs, layout.downloads, *map(layout.export, options.names)):
            problems += output_folder_problems(folder, "--work_dir:")
    if problems:
        raise UserError(problems)
    if options.preset == "auto" and options.handed_on.get("device") == "cpu":
        options.preset, options.preset_reason = "cpu", "--device cpu"
    else:
        options.preset, options.preset_reason = resolve_preset(options.preset)
    options.layout = layout
    return options


def _is_default(data_dir: str) -> bool:
    return Path(data_dir).resolve() == DEFAULT_DATA_DIR.resolve()


def trainer_command(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of one trainer."""
    command = [
        sys.executable,
        str(TRAINERS[name]),
        "--preset",
        options.preset,
        "--data_dir",
        options.data_dir,
        "--output_dir",
        str(options.layout.export(name)),
        "--log_file",
        str(options.layout.log_file(name)),
    ]
    for flag, value in options.handed_on.items():
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return [*command, "--fresh"] if options.fresh else command


# --- before anything runs -----------------------------------------------------------------------------------


def differences(options: argparse.Namespace, load) -> list[str]:
    """How the finished models differ from what is asked for now; `load(only)` gives the corpus."""
    found = []
    for name in options.names if not options.fresh else ():
        config = training_config(options.layout.export(name))
        if not config:
            continue
        settings, data = config.get("settings") or {}, config.get("data") or {}
        if config.get("preset") != options.preset:
            found.append(f"{name}: finished with --preset {config.get('preset')}, asked for now: {options.preset}")
        for flag in ("seed", "max_length"):
            asked, made = options.handed_on.get(flag), settings.get(flag)
            if asked is not None and made is not None and asked != made:
                found.append(f"{name}: finished with --{flag} {made}, asked for now: {asked}")
        if config.get("preset") == options.preset and (corpus := load(data.get("only"))) is not None:
            if data.get("fingerprint") != corpus.fingerprint:
                found.append(
                    f"{name}: finished with other text ({data.get('train_documents')} training documents of "
                    f"{data.get('data_dir')}), asked for now: {len(corpus.split('train'))} of "
                    f"{options.data_dir}"
                )
    if found:
        found.append("give --fresh to throw these models away and start again, or another --work_dir to keep them")
    return found


HARDWARE_PROBE = """
import json, sys
from mvlm_core.errors import UserError
from mvlm_core.hardware import choose_hardware, describe
try:
    hardware = choose_hardware(**json.loads(sys.argv[1]))
    device = f"{hardware.device}: {hardware.name}"
    print(json.dumps({"device": device, "lines": describe(hardware), "problems": []}))
except UserError as error:
    print(json.dumps({"problems": error.problems}))
"""


def probe_hardware(options: argparse.Namespace) -> dict:
    """What the trainers will run on. Asked in another process: CUDA would hold GPU memory in this one."""
    keys = ("device", "precision", "attention_backend", "no_mixed_precision", "no_compile")
    asked = json.dumps({key: options.handed_on[key] for key in keys if key in options.handed_on})
    answer = subprocess.run(
        [sys.executable, "-c", HARDWARE_PROBE, asked],
        cwd=REPOSITORY_ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    ).stdout
    try:
        found = json.loads(answer.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"device": "unknown", "lines": ["the hardware could not be asked; the trainers will say more"]}
    if found["problems"]:
        raise UserError(found["problems"])
    return found


class CorpusLoader:
    """Loads the corpus of this run, once for each part of it that is asked for."""

    def __init__(self, options: argparse.Namespace):
        self._options, self._loaded = options, {}

    def __call__(self, only: str | None = None):
        from mvlm_core.data.corpus import load_corpus

        if only not in self._loaded:
            given = self._options.handed_on.get("validation_split")
            rest = {} if given is None else {"validation_split": given}
            self._loaded[only] = load_corpus(self._options.data_dir, only=only, **rest)
        return self._loaded[only]


def ensure_default_corpus(quiet: bool) -> None:
    """Build the corpus that ships with this repository where it is missing or not whole."""
    from bible_corpus import build

    problems = build.corpus_problems(DEFAULT_DATA_DIR)
    if problems:
        log.info("corpus: %s%s", problems[0], f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
        log.info("corpus: building it; this takes a few minutes once")
        build.build_corpus(DEFAULT_DATA_DIR, quiet=quiet)


def show_plan(options: argparse.Namespace) -> None:
    """What would run. Spends nothing and writes nothing."""
    print(f"preset:   {options.preset} ({options.preset_reason})")
    from bible_corpus import build

    missing = _is_default(options.data_dir) and build.corpus_problems(DEFAULT_DATA_DIR)
    print(f"corpus:   {options.data_dir}{' (to be built)' if missing else ''}")
    for name in options.names:
        export = options.layout.export(name)
        results = training_config(export).get("results", {})
        checkpoints = sorted(path.name for path in (export / "checkpoints").glob("*") if path.is_dir())
        if options.fresh:
            state = "starts from nothing (--fresh)"
        elif all(isinstance(results.get(key), int) for key in ("parameters", "steps")):
            state = f"finished: {results['parameters']:,} parameters, {results['steps']:,} steps; kept"
        else:
            state = f"goes on from its checkpoints ({len(checkpoints)})" if checkpoints else "starts from nothing"
        print(f"\n{name}: {state}\n  output:  {export}\n  log:     {options.layout.log_file(name)}")
        command = trainer_command(name, options)
        print(f"  command: {shlex.join(command)}", flush=True)
        if not missing:
            found = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=False)
            told = found.stdout if found.returncode == 0 else f"no estimate: {found.stderr.strip()[-500:]}"
            print("".join(f"  {line}\n" for line in told.splitlines()), end="")
    print(f"\nthen:     comparison -> {options.layout.plot}\n          archives   -> {options.layout.downloads}")
    print(f"          validation -> {options.layout.report}\n          report     -> {options.layout.page}")


# --- the run ------------------------------------------------------------------------------------------------


def score_and_compare(
    options: argparse.Namespace, summary: Summary, corpus_of: CorpusLoader, signals: Signals
) -> list[str]:
    """Comparison and plot of the finished models into the summary; returns the table's lines."""
    from mvlm_core.pipeline import comparison

    configs = {name: training_config(options.layout.export(name)) for name in TRAINERS if name in summary.finished()}
    configs = {name: config for name, config in configs.items() if config.get("preset") == options.preset}
    data = {name: config.get("data", {}) for name, config in configs.items()}
    first = next((data[name] for name in options.names if name in data), None)
    if first is None:
        return ["no finished model to compare"]
    names = [name for name in configs if data[name].get("fingerprint") == first.get("fingerprint")]
    anchors = comparison.compressor_anchors(corpus_of(first.get("only")), CACHE_DIR)
    probes = probe_text(TEXT_PROBES, options.layout, names, probe_flags(options), signals)
    parts = {name: score_parts(configs[name]) for name in names}
    result = comparison.compare(summary.models, names, anchors, probes, parts)
    summary.value["comparison"] = result
    summary.save()
    histories = {name: training_history(options.layout.export(name)) for name in names}
    comparison.plot(result, histories, options.layout.plot)
    return comparison.table(result, names)


def probe_flags(options: argparse.Namespace) -> list[str]:
    """What the text probes are asked: the test books; of which text, they find in the models' own records."""
    flags = ["--data_dir", options.data_dir, "--split", "test", "--no_bits_per_byte"]
    if device := options.handed_on.get("device"):
        flags += ["--device", device]
    if options.preset == "smoke":
        flags += ["--verses", "40", "--prompts", "8", "--words", "24", "--pairs", "20"]
    return flags


def run_stages(
    options: argparse.Namespace, log_file: Path, signals: Signals, hardware: dict, corpus_of: CorpusLoader
) -> int:
    layout = options.layout
    log.info("preset %s (%s)", options.preset, options.preset_reason)
    for line in hardware["lines"]:
        log.info("%s", line)
    if _is_default(options.data_dir):
        ensure_default_corpus(options.handed_on.get("quiet", False))
        signals.check()
        if problems := differences(options, corpus_of):
            raise UserError(problems)
    corpus = corpus_of()
    log.info(
        "corpus: %d documents for training, %d for validation, %d for the test; %d files skipped",
        *(len(corpus.split(split)) for split in ("train", "validation", "test")),
        len(corpus.skipped),
    )
    summary = Summary(layout, options.names, preset=options.preset, device=hardware["device"])
    codes = []
    with ResourceLog(log_file):
        for number, name in enumerate(options.names, 1):
            log.info("=== training %d of %d: %s (log: %s)", number, len(options.names), name, layout.log_file(name))
            codes.append(train_model(name, trainer_command(name, options), layout, summary, signals))
            signals.check()
    log.info("=== comparison")
    lines = score_and_compare(options, summary, corpus_of, signals)
    log.info("=== archives")
    pack_models(layout, summary, signals)
    log.info("=== validation")
    device = options.handed_on.get("device")
    validated = validate(layout, summary, child_command(VALIDATOR, layout, options.data_dir, device), signals)
    summary.close()
    log.info("=== report")
    make_page(child_command(REPORTER, layout, options.data_dir, device), signals)
    report_end(layout, summary, lines, log_file)
    if codes and all(code == 2 for code in codes):
        return 2
    return 0 if validated and not summary.failed() else 1


def report_end(layout: Layout, summary: Summary, lines: list[str], log_file: Path) -> None:
    log.info("=== done")
    for line in lines:
        log.info("%s", line)
    for name, entry in summary.models.items():
        if entry["status"] == "failed":
            log.error("FAILED: %s: %s", name, entry["error"].splitlines()[-1])
        elif entry["archive"]:
            log.info("archive: %s", layout.root / entry["archive"])
    log.info("summary: %s, plot: %s, validation: %s, log: %s", layout.summary, layout.plot, layout.report, log_file)
    if layout.page.is_file():
        log.info("to look at, in a browser: %s", layout.page)
    if any(entry["archive"] for entry in summary.models.values()):
        log.info(
            "next, on your own machine:  scp -r %s@%s:%s .",
            os.environ.get("USER", "root"),
            os.uname().nodename,
            shlex.quote(str(layout.downloads)),
        )
        log.info("then follow %s", layout.downloads / "DOWNLOAD_INSTRUCTIONS.md")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    outlive_terminal()
    set_process_environment()
    if options.dry_run:
        show_plan(options)
        return 0
    with Signals() as signals:
        hardware = probe_hardware(options)
        corpus_of = CorpusLoader(options)
        if not _is_default(options.data_dir):  # a folder of the user's own is judged before anything is written
            corpus_of()
            if problems := differences(options, corpus_of):
                raise UserError(problems)
        layout = options.layout
        with RunLock(layout.models, str(layout.root)):
            layout.logs.mkdir(parents=True, exist_ok=True)
            log_file = layout.logs / f"h200_training_{datetime.now():%Y%m%d_%H%M%S}.log"
            setup_logging(log_file)
            log.info("train_all_models.py in %s, process %d", layout.root, os.getpid())
            try:
                return run_stages(options, log_file, signals, hardware, corpus_of)
            except BaseException as error:  # the console gets it anyway, but may be closed by now
                note(log_file, f"=== ended: {type(error).__name__}: {error}")
                raise


if __name__ == "__main__":
    run_main(main)
