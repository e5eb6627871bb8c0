"""Stages of the main job: training, comparison, archives, validation, report.

Independent of particular models and text: names, scripts and corpus come from the `Job`. Every file is written
atomically, so the job can be stopped or killed at any point and restarted.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from mvlm_core.data.corpus import NO_TEST_TEXT, SPLITS
from mvlm_core.errors import (
    COMPILATION_FAILED,
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    Stopped,
    UserError,
    describe_os_error,
)
from mvlm_core.evaluation.compression import compression_baselines
from mvlm_core.export.folder import delete_run
from mvlm_core.export.manifest import CHECKPOINTS, MANIFEST, TEACHERS, ArchiveError, training_config
from mvlm_core.files import LOCK_NAME, RunLock, read_json, write_atomic
from mvlm_core.monitor import resource_lines
from mvlm_core.pipeline import plots
from mvlm_core.pipeline.child_process import TAIL_LINES, SignalForwarder, log_to_file, run_child, run_optional
from mvlm_core.pipeline.comparison import compare, scores_by_part, table
from mvlm_core.pipeline.job import Job, trainer_plan
from mvlm_core.pipeline.packing import pack_formats, pack_models, write_download_notes
from mvlm_core.pipeline.summary import Summary
from mvlm_core.run_layout import Layout, training_history
from mvlm_core.signals import PARENT_VARIABLE, signal_name

UNVERIFIED = (
    "validation could not run, so the archives are unverified: free some space or set TMPDIR, then run the same "
    "command again"
)
# Sizes of the evaluation suite by preset, in proportion to the training; other presets use the script's defaults.
SUITE_SIZES = {
    "cpu": ("--verses", "100", "--prompts", "40", "--pairs", "60"),
    "smoke": ("--verses", "40", "--prompts", "8", "--words", "24", "--pairs", "20"),
}
RETRIES = 2
ORPHAN_SECONDS = 300.0
log = logging.getLogger("mvlm")


def run_stages(job: Job, hardware: dict[str, Any], log_file: Path, signals: SignalForwarder) -> int:
    """Run every stage in order; return the exit code.

    Raises:
        UserError: the corpus or existing models do not fit this run.
        Stopped: a signal arrived.
    """
    log.info("preset %s (%s)", job.preset, job.preset_reason)
    for line in hardware["lines"]:
        log.info("%s", line)
    prepare_corpus(job, signals)
    if job.fresh:
        delete_earlier_runs(job)
    summary = Summary(job.layout, job.names, preset=job.preset, device=hardware["device"])
    codes = train_models(job, summary, log_file, signals)
    if all(code == EXIT_BAD_INPUT for code in codes):
        summary.restore()
        return EXIT_BAD_INPUT
    page = job.layout.report
    for outdated in (page, job.layout.downloads / page.name):
        outdated.unlink(missing_ok=True)
    compared = compare_if_possible(job, summary, signals)
    pack_models(job, summary, signals)
    packed = pack_formats(job, summary, signals)
    validated = validate_models(job, summary, signals)
    summary.close()
    make_report(job, signals)
    log_results(job.layout, summary, compared or ["comparison failed; see the error above"], log_file)
    good = compared and validated and packed and not any(codes) and not summary.with_status("failed")
    return EXIT_DONE if good else EXIT_FAILED


# --- corpus and training ------------------------------------------------------------------------------------


def check_locks(job: Job) -> None:
    """Wait for trainers of a killed job, then check all locks of this one: its own, the models' and their teachers'.

    Raises:
        UserError: names every folder in use.
    """
    folders = [job.layout.models]
    for export in map(job.layout.export, job.names):
        wait_for_orphans(export)
        folders += [export, *(path.parent for path in sorted((export / CHECKPOINTS).rglob(LOCK_NAME)))]
    if problems := [problem for folder in folders for problem in RunLock(folder).problems()]:
        raise UserError(problems)


def prepare_corpus(job: Job, signals: SignalForwarder) -> None:
    if job.build_corpus:
        job.build_corpus()
        signals.check()
        job.check_finished_models()
    corpus = job.corpus()
    counts = ", ".join(f"{len(corpus.split(split))} {split}" for split in SPLITS)
    log.info("corpus: %s documents; %d files skipped", counts, len(corpus.skipped))
    if not corpus.split("test"):
        log.warning("corpus: %s", NO_TEST_TEXT)


def delete_earlier_runs(job: Job) -> None:
    """Delete the earlier runs of all requested models, so that an interrupted job with ``--fresh`` resumes without it.

    Raises:
        UserError: a trainer would refuse these settings, or a model is being trained; nothing has been deleted.
    """
    folders = [job.layout.export(name) for name in job.names]
    plans = [trainer_plan(job.trainer_command(folder.name)) for folder in folders if folder.is_dir()]
    if problems := [line for plan in plans if plan.exit_code for line in plan.lines]:
        raise UserError(problems)
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(RunLock(folder))
        for folder in folders:
            delete_run(folder)


def train_models(job: Job, summary: Summary, log_file: Path, signals: SignalForwarder) -> list[int]:
    """Train the models one after another, continuing after a failure; return their exit codes."""
    codes = []
    with resource_lines(partial(log_to_file, log_file)):  # not on the console, where they would break progress bars
        for number, name in enumerate(job.names, 1):
            log.info("=== training %d of %d: %s (log: %s)", number, len(job.names), name, job.layout.log_file(name))
            codes.append(train_model(job, name, summary, signals))
            signals.check()
    return codes


def train_model(job: Job, name: str, summary: Summary, signals: SignalForwarder) -> int:
    """Run one trainer and record the outcome; return its exit code. Raises Stopped after a signal."""
    summary.update(name, status="running")
    start = time.monotonic()
    try:
        code, tail = run_trainer(job, name, signals)
    except Stopped:
        summary.update(name, status="interrupted")
        raise
    if code == 0:
        try:
            summary.take_results(name)
            log.info("%s: finished after %.0f s", name, time.monotonic() - start)
            return 0
        except (ArchiveError, OSError) as error:
            code, tail = 1, [f"the trainer reported success, but its export is incomplete: {error}"]
    if code > 128:
        tail.append(f"killed by {signal_name(code - 128)}")
        if code == 128 + signal.SIGKILL:
            tail.append("(often the kernel's out-of-memory killer: end other programs and run again,")
            tail.append("or start over with --fresh and a smaller --batch_size)")
    append_tail(job.layout.log_file(name), code, tail)
    summary.update(name, status="failed", error="\n".join(tail[-TAIL_LINES:]) or "no output")
    log.error("%s: FAILED with exit code %d; the end of its output:", name, code)
    for line in tail:
        log.error("    %s", line)
    if code == EXIT_BAD_INPUT and training_config(job.layout.export(name)):  # the trainer has changed nothing
        with suppress(ArchiveError, OSError):
            summary.take_results(name)
            log.error("%s: the finished model in %s is kept", name, job.layout.export(name))
    return code


def run_trainer(job: Job, name: str, signals: SignalForwarder) -> tuple[int, list[str]]:
    """Run a trainer; return its exit code and last lines. Raises Stopped after a signal.

    One that failed or was killed is started again, at most ``RETRIES`` times: a transient fault, such as of a GPU, must
    not cost an unattended job the model. It must have got further since its last start; a fault that does not depend on
    chance prevents that. One whose model cannot be compiled is started again without compilation.
    """
    export, log_file, retries = job.layout.export(name), job.layout.log_file(name), 0
    while True:
        before = progress(export)
        code, tail = run_child(job.trainer_command(name), signals)
        if code:
            signals.check(code)
        may_pass = code == EXIT_FAILED or code > 128
        if not may_pass or retries == RETRIES or not wait_for_orphans(export, ORPHAN_SECONDS):
            return code, tail
        compiled = not job.settings.get("no_compile")
        uncompilable = [line for line in tail if compiled and COMPILATION_FAILED in line]
        if not uncompilable and progress(export) <= before:
            return code, tail
        retries += 1
        append_tail(log_file, code, tail)
        killed = f" (killed by {signal_name(code - 128)})" if code > 128 else ""
        last = (uncompilable or tail or ["none"])[-1]
        log.warning("%s: ended with exit code %d%s; its last output: %s", name, code, killed, last)
        how = "without torch.compile, more slowly" if uncompilable else "from its newest checkpoint"
        log.warning("%s: restarting %s (retry %d of %d)", name, how, retries, RETRIES)
        changes = {"no_compile": True, "loss_kernel": "blocks"} if uncompilable else {}
        job = replace(job, fresh=False, settings=job.settings | changes)


def progress(export: Path) -> tuple[int, int, int]:
    """How far a run has got: finished teachers, the newest step to resume from, and that of a teacher in training."""
    teachers = [*(export / TEACHERS).glob("*")]
    finished = sum((teacher / MANIFEST).is_file() for teacher in teachers)
    return finished, _newest_step(export), max(map(_newest_step, teachers), default=0)


def _newest_step(run: Path) -> int:
    """Step of the newest checkpoint with the optimizer's state, which resuming needs; 0 if there is none."""
    files = (run / CHECKPOINTS).glob("step-*/optimizer.safetensors")
    steps = [file.parent.name.removeprefix("step-") for file in files]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def wait_for_orphans(export: Path, seconds: float | None = None) -> bool:
    """Wait for trainers of a killed pipeline, which hold the run's lock until they exit after a checkpoint.

    Returns whether they have ended; False only after ``seconds``.
    """
    orphans = [process for process in psutil.process_iter() if _is_orphan(process, export)]
    for process in orphans:
        log.info("waiting for process %d of a killed run to exit after its checkpoint", process.pid)
    return not psutil.wait_procs(orphans, timeout=seconds)[1]


def _is_orphan(process: psutil.Process, export: Path) -> bool:
    """Whether this process writes to `export` and was started by a pipeline that has since ended."""
    try:
        if str(export) not in process.cmdline():
            return False
        starter = process.environ().get(PARENT_VARIABLE, "")
        return starter.isdecimal() and process.ppid() != int(starter)
    except (psutil.Error, OSError):
        return False


def append_tail(log_file: Path, code: int, tail: list[str]) -> None:
    """Append output that only reached the console, such as a traceback, to the model's log."""
    logged = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    missing = [line for line in tail if line not in logged]
    with log_file.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in [f"--- ended with exit code {code}", *missing])


# --- comparison ---------------------------------------------------------------------------------------------


def compare_if_possible(job: Job, summary: Summary, signals: SignalForwarder) -> list[str]:
    """Compare the models; log a fault in it instead of raising, as it must not cost the archives, and return []."""
    try:
        return compare_models(job, summary, signals)
    except Stopped:
        raise
    except Exception:
        log.exception("the comparison failed; archives and validation follow without it")
        return []


def compare_models(job: Job, summary: Summary, signals: SignalForwarder) -> list[str]:
    """Compare and plot the finished models of this preset and text; return the table's lines."""
    log.info("=== comparison")
    job.layout.comparison_plot.unlink(missing_ok=True)
    finished = summary.with_status("finished")
    configs = {name: training_config(job.layout.export(name)) for name in job.trainers if name in finished}
    configs = {name: config for name, config in configs.items() if config.get("preset") == job.preset}
    data = {name: config.get("data", {}) for name, config in configs.items()}
    first = next((data[name] for name in job.names if name in data), None)
    if first is None:
        return ["no finished model to compare"]
    names = [name for name in configs if data[name].get("fingerprint") == first.get("fingerprint")]
    corpus = job.corpus(only=first.get("only"))
    baselines = compression_baselines(corpus)
    suite = evaluate_suite(job, names, signals) if corpus.split("test") else {}
    result = compare(summary.models, names, baselines, suite, {name: scores_by_part(configs[name]) for name in names})
    result["costs"] = {name: configs[name]["costs"] for name in names if "costs" in configs[name]}
    summary.value["comparison"] = result
    summary.save()
    histories = {name: training_history(job.layout.export(name)) for name in names}
    plots.plot_comparison(result, histories, job.layout.comparison_plot)
    return table(result, names)


def evaluate_suite(job: Job, names: list[str], signals: SignalForwarder) -> dict[str, dict[str, Any]]:
    """Run the evaluation suite; return results by model name, {} if it failed."""
    exports = {name: str(job.layout.export(name)) for name in names}
    flags = ["--split", "test", "--no_bits_per_byte", "--json", job.layout.evaluation_suite]
    flags += SUITE_SIZES.get(job.preset, ())
    command = job.script_command("evaluate", *exports.values(), *flags)
    if not run_optional("the evaluation suite", command, signals):
        return {}
    results = read_json(job.layout.evaluation_suite).get("results", {})
    return {name: results[export] for name, export in exports.items() if export in results}


# --- validation ---------------------------------------------------------------------------------------------


def validate_models(job: Job, summary: Summary, signals: SignalForwarder) -> bool:
    """Run the validator; remove models that its report fails from the downloads. Returns whether all passed."""
    log.info("=== validation")
    layout = job.layout
    layout.validation_report.unlink(missing_ok=True)
    code, tail = run_child(job.script_command("validate", "--work_dir", layout.root), signals)
    signals.check(code)
    reports = read_json(layout.validation_report).get("models", {})
    for name in summary.with_status("finished"):
        if name not in reports or reports[name].get("passed") is True:
            continue
        checks = reports[name].get("checks", [])
        failed = "; ".join(f"{check['name']}: {check['detail']}" for check in checks if not check["passed"])
        summary.update(name, status="failed", archive=None, error=f"validation: {failed}")
        log.error("%s: failed validation and was withdrawn from %s", name, layout.downloads)
    write_download_notes(job, summary)
    if not reports:  # for example, the disk is full: no reason to delete the archives
        log.error("no validation report was written (exit code %d): %s", code, tail[-1] if tail else "no output")
    return code == 0 and bool(reports)


# --- report -------------------------------------------------------------------------------------------------


def make_report(job: Job, signals: SignalForwarder) -> None:
    """Write `models/report.html` and copy it to the downloads."""
    log.info("=== report")
    page = job.layout.report
    if run_optional("the report", job.script_command("report", "--work_dir", job.layout.root), signals):
        try:
            write_atomic(job.layout.downloads / page.name, page.read_bytes())
        except OSError as error:
            log.error("the report cannot be copied to the downloads: %s", describe_os_error(error))


def log_results(layout: Layout, summary: Summary, compared: list[str], log_file: Path) -> None:
    """Log the comparison, failures, and the paths of all results."""
    log.info("=== done")
    for line in compared:
        log.info("%s", line)
    for name, entry in summary.models.items():
        if entry["status"] == "failed":
            log.error("FAILED: %s: %s", name, entry["error"].splitlines()[-1])
        elif entry["archive"]:
            log.info("archive: %s", layout.root / entry["archive"])
    files = layout.summary, layout.comparison_plot, layout.validation_report, log_file
    log.info("summary: %s, plot: %s, validation: %s, log: %s", *files)
    if not layout.validation_report.is_file():
        log.error("%s", UNVERIFIED)
    if layout.report.is_file():
        log.info("open in a browser: %s", layout.report)
    if any(entry["archive"] for entry in summary.models.values()):
        host = f"{os.environ.get('USER', 'root')}@{os.uname().nodename}"
        log.info("next, on your own machine:  scp -r %s:%s .", host, shlex.quote(str(layout.downloads)))
        log.info("then follow %s", layout.downloads / "DOWNLOAD_INSTRUCTIONS.md")
        log.info("to train longer later, copy %s as well: the archives hold no checkpoints", layout.models)
