"""The stages of the main job: training, comparison, archives, validation, report.

Knows no model and no text: names, scripts and corpus come with the `Job`. Every file it writes is complete or absent,
so the job can be stopped or killed anywhere and started again.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from mvlm_core.data.corpus import SPLITS
from mvlm_core.errors import Stopped
from mvlm_core.evaluation.compression import compression_baselines
from mvlm_core.export.archive import matches_export, write_archive
from mvlm_core.export.formats import NO_GGUF, formats_of, supported
from mvlm_core.export.manifest import ArchiveError, training_config
from mvlm_core.files import read_json, sha256_file, template, write_atomic
from mvlm_core.monitor import resource_lines
from mvlm_core.pipeline import plots
from mvlm_core.pipeline.child_process import TAIL_LINES, Signals, note, run_child
from mvlm_core.pipeline.comparison import compare, scores_by_part, table
from mvlm_core.pipeline.job import Job
from mvlm_core.pipeline.summary import Summary
from mvlm_core.run_layout import Layout, training_history
from mvlm_core.settings import CACHE_DIR
from mvlm_core.signals import PARENT_VARIABLE

INSTRUCTIONS = Path(__file__).with_name("download_instructions.md")
# What the evaluation suite is asked at `smoke`: enough to see that it works.
SMOKE_SUITE = ("--verses", "40", "--prompts", "8", "--words", "24", "--pairs", "20")
log = logging.getLogger("mvlm")


def run_stages(job: Job, hardware: dict[str, Any], log_file: Path, signals: Signals) -> int:
    """Every stage in order; returns the exit code.

    Raises:
        UserError: the corpus, or what is there already, does not fit this run.
        Stopped: by a signal.
    """
    log.info("preset %s (%s)", job.preset, job.preset_reason)
    for line in hardware["lines"]:
        log.info("%s", line)
    prepare_corpus(job, signals)
    summary = Summary(job.layout, job.names, preset=job.preset, device=hardware["device"])
    codes = train_models(job, summary, log_file, signals)
    compared = compare_models(job, summary, signals)
    pack_models(job, summary, signals)
    packed = pack_formats(job, summary, signals)
    validated = validate_models(job, summary, signals)
    summary.close()
    make_report(job, signals)
    log_results(job.layout, summary, compared, log_file)
    if codes and all(code == 2 for code in codes):
        return 2
    return 0 if validated and packed and not summary.with_status("failed") else 1


# --- corpus and training ------------------------------------------------------------------------------------


def prepare_corpus(job: Job, signals: Signals) -> None:
    if job.build_corpus:
        job.build_corpus()
        signals.check()
        job.check_finished_models()
    corpus = job.corpus()
    counts = ", ".join(f"{len(corpus.split(split))} {split}" for split in SPLITS)
    log.info("corpus: %s documents; %d files skipped", counts, len(corpus.skipped))


def train_models(job: Job, summary: Summary, log_file: Path, signals: Signals) -> list[int]:
    """Train one model after the other, a failure does not stop the next one; returns their exit codes."""
    codes = []
    with resource_lines(lambda line: note(log_file, line)):  # on the console it would break the progress bar
        for number, name in enumerate(job.names, 1):
            log.info("=== training %d of %d: %s (log: %s)", number, len(job.names), name, job.layout.log_file(name))
            codes.append(train_model(job, name, summary, signals))
            signals.check()
    return codes


def train_model(job: Job, name: str, summary: Summary, signals: Signals) -> int:
    """Run one trainer and record how it ended; returns its exit code. Raises Stopped after a signal."""
    summary.update(name, status="running")
    start = time.monotonic()
    try:
        wait_for_orphans(job.layout.export(name))
        code, tail = run_child(job.trainer_command(name), signals)
        if code:
            signals.check(code)
    except Stopped:
        summary.update(name, status="interrupted")
        raise
    if code == 0:
        try:
            summary.take_results(name)
            log.info("%s: finished after %.0f s", name, time.monotonic() - start)
            return 0
        except (ArchiveError, OSError) as error:
            code, tail = 1, [f"the trainer reported success, but its export is not complete: {error}"]
    if code > 128:
        tail.append(f"ended by {next((s.name for s in signal.Signals if s == code - 128), 'an unknown signal')}")
        if code == 128 + signal.SIGKILL:
            tail.append("(the system kills a process this way when memory runs out: try a smaller --batch_size)")
    append_tail(job.layout.log_file(name), code, tail)
    summary.update(name, status="failed", error="\n".join(tail[-TAIL_LINES:]))
    log.error("%s: FAILED with exit code %d; the end of its output:", name, code)
    for line in tail:
        log.error("    %s", line)
    return code


def wait_for_orphans(export: Path) -> None:
    """A trainer whose pipeline was killed ends by itself after a checkpoint: wait, or its lock is in the way."""
    orphans = [process for process in psutil.process_iter() if _is_orphan(process, export)]
    for process in orphans:
        log.info("waiting for process %d, left over from a killed run, to end after a checkpoint", process.pid)
    psutil.wait_procs(orphans)


def _is_orphan(process: psutil.Process, export: Path) -> bool:
    """Whether a pipeline that is gone started this process to write into `export`."""
    try:
        if str(export) not in process.cmdline():
            return False
        starter = process.environ().get(PARENT_VARIABLE, "")
        return starter.isdecimal() and process.ppid() != int(starter)
    except (psutil.Error, OSError):
        return False


def append_tail(log_file: Path, code: int, tail: list[str]) -> None:
    """Into the model's log what only reached the console: a traceback, a library's last message."""
    known = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    missing = [line for line in tail if line not in known]
    with log_file.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in [f"--- ended with exit code {code}", *missing])


# --- comparison ---------------------------------------------------------------------------------------------


def compare_models(job: Job, summary: Summary, signals: Signals) -> list[str]:
    """Comparison and plot of the finished models of this preset and text; returns the table's lines."""
    log.info("=== comparison")
    finished = summary.with_status("finished")
    configs = {name: training_config(job.layout.export(name)) for name in job.trainers if name in finished}
    configs = {name: config for name, config in configs.items() if config.get("preset") == job.preset}
    data = {name: config.get("data", {}) for name, config in configs.items()}
    first = next((data[name] for name in job.names if name in data), None)
    if first is None:
        return ["no finished model to compare"]
    names = [name for name in configs if data[name].get("fingerprint") == first.get("fingerprint")]
    baselines = compression_baselines(job.corpus(only=first.get("only")), CACHE_DIR)
    suite = evaluate_suite(job, names, signals)
    result = compare(summary.models, names, baselines, suite, {name: scores_by_part(configs[name]) for name in names})
    result["bill"] = {name: configs[name]["bill"] for name in names if "bill" in configs[name]}
    summary.value["comparison"] = result
    summary.save()
    histories = {name: training_history(job.layout.export(name)) for name in names}
    plots.plot_comparison(result, histories, job.layout.plot)
    return table(result, names)


def evaluate_suite(job: Job, names: list[str], signals: Signals) -> dict[str, dict[str, Any]]:
    """The evaluation suite's results by model name; {} where it failed."""
    exports = {name: str(job.layout.export(name)) for name in names}
    flags = ["--split", "test", "--no_bits_per_byte", "--json", job.layout.evaluation_suite]
    flags += SMOKE_SUITE if job.preset == "smoke" else ()
    command = job.script_command("evaluate", *exports.values(), *flags)
    if not _run_optional("the evaluation suite", command, signals):
        return {}
    results = read_json(job.layout.evaluation_suite).get("results", {})
    return {name: results[export] for name, export in exports.items() if export in results}


def _run_optional(what: str, command: list[str], signals: Signals) -> bool:
    """Whether a script succeeded whose results no model needs to ship: a failure is logged and ends nothing."""
    code, tail = run_child(command, signals)
    signals.check()
    if code:
        log.error("%s failed with exit code %d: %s", what, code, tail[-1] if tail else "no output")
    return code == 0


# --- archives and validation --------------------------------------------------------------------------------


def pack_models(job: Job, summary: Summary, signals: Signals) -> None:
    """An archive of every finished model; one that already holds exactly its export is kept."""
    log.info("=== archives")
    layout = job.layout
    layout.downloads.mkdir(parents=True, exist_ok=True)
    for name in summary.with_status("finished"):
        signals.check()
        archive = layout.archive(name)
        try:
            pack(layout.export(name), archive)
        except ArchiveError as error:
            log.error("%s: not packed: %s", name, error)
            summary.update(name, status="failed", error=f"not packed: {error}", archive=None)
            archive.unlink(missing_ok=True)
            continue
        summary.update(name, archive=str(archive.relative_to(layout.root)))
    write_download_notes(job, summary)


def pack(folder: Path, archive: Path) -> None:
    if matches_export(archive, folder):
        log.info("%s: kept, it already holds this export", archive.name)
    else:
        write_archive(folder, archive)
        log.info("%s: written, %.1f MB", archive.name, archive.stat().st_size / 1e6)


def pack_formats(job: Job, summary: Summary, signals: Signals) -> bool:
    """An archive of every finished model in the other programs' formats that are asked for and that it has.

    What an earlier run made of the same export is kept. Returns whether all are there; a model is good without them.
    """
    layout, good = job.layout, True
    if job.formats:
        log.info("=== other formats: %s", ", ".join(job.formats))
    for name in summary.with_status("finished"):
        export, folder, archive = layout.export(name), layout.formats(name), layout.formats_archive(name)
        wanted = supported(export, job.formats)
        if wanted != sorted(job.formats):
            log.info("%s: not as gguf: %s", name, NO_GGUF)
        made = formats_of(folder, export)
        if not made or not set(wanted) <= set(made):
            shutil.rmtree(folder, ignore_errors=True)
            archive.unlink(missing_ok=True)
            if not wanted:
                continue
            command = [sys.executable, str(job.scripts["formats"]), str(export), "--output", str(folder)]
            if not _run_optional(f"{name} as {', '.join(wanted)}", [*command, *(f"--{k}" for k in wanted)], signals):
                good = False
                continue
        pack(folder, archive)
    write_download_notes(job, summary)
    return good


def write_download_notes(job: Job, summary: Summary) -> None:
    """SHA256SUMS, the summary and the instructions beside the archives that are there."""
    layout, instructions = job.layout, job.layout.downloads / "DOWNLOAD_INSTRUCTIONS.md"
    for name in summary.with_status("failed"):  # never offer the archive of an earlier run as this one's
        layout.archive(name).unlink(missing_ok=True)
        layout.formats_archive(name).unlink(missing_ok=True)
    offered = [name for name in summary.with_status("finished") if layout.archive(name).is_file()]
    if offered:
        archives = [layout.archive(name) for name in offered]
        archives += [other for name in offered if (other := layout.formats_archive(name)).is_file()]
        write_atomic(layout.checksums, "".join(f"{sha256_file(archive)}  {archive.name}\n" for archive in archives))
        write_atomic(instructions, download_instructions(offered, layout, job.prompt))
    else:
        layout.checksums.unlink(missing_ok=True)
        instructions.unlink(missing_ok=True)
    summary.copy_to_downloads()


def validate_models(job: Job, summary: Summary, signals: Signals) -> bool:
    """Run the validator; a model that does not pass is withdrawn from the downloads."""
    log.info("=== validation")
    layout = job.layout
    layout.report.unlink(missing_ok=True)
    code, tail = run_child(job.script_command("validate", "--work_dir", layout.root), signals)
    signals.check(code)
    found = read_json(layout.report).get("models", {})
    for name in summary.with_status("finished"):
        if found.get(name, {}).get("passed") is True:
            continue
        checks = found.get(name, {}).get("checks", [])
        failed = "; ".join(f"{check['name']}: {check['detail']}" for check in checks if not check["passed"])
        error = "validation: " + (failed or "\n".join(tail) or "no report was written")
        summary.update(name, status="failed", archive=None, error=error)
        log.error("%s: failed its validation and was withdrawn from %s", name, layout.downloads)
    write_download_notes(job, summary)
    return code == 0


# --- report -------------------------------------------------------------------------------------------------


def make_report(job: Job, signals: Signals) -> None:
    """`models/report.html`."""
    log.info("=== report")
    _run_optional("the report", job.script_command("report", "--work_dir", job.layout.root), signals)


def log_results(layout: Layout, summary: Summary, compared: list[str], log_file: Path) -> None:
    """The comparison, what failed, and where everything is."""
    log.info("=== done")
    for line in compared:
        log.info("%s", line)
    for name, entry in summary.models.items():
        if entry["status"] == "failed":
            log.error("FAILED: %s: %s", name, entry["error"].splitlines()[-1])
        elif entry["archive"]:
            log.info("archive: %s", layout.root / entry["archive"])
    log.info("summary: %s, plot: %s, validation: %s, log: %s", layout.summary, layout.plot, layout.report, log_file)
    if layout.page.is_file():
        log.info("open in a browser: %s", layout.page)
    if any(entry["archive"] for entry in summary.models.values()):
        place = f"{os.environ.get('USER', 'root')}@{os.uname().nodename}"
        log.info("next, on your own machine:  scp -r %s:%s .", place, shlex.quote(str(layout.downloads)))
        log.info("then follow %s", layout.downloads / "DOWNLOAD_INSTRUCTIONS.md")


def download_instructions(names: list[str], layout: Layout, prompt: str) -> str:
    """Commands that work as written in the folder that holds the archives."""
    return template(INSTRUCTIONS).render(
        folder=layout.downloads,
        archives=[layout.archive(name).name for name in names],
        formats=[path.name for name in names if (path := layout.formats_archive(name)).is_file()],
        folders=json.dumps([f"./{name}" for name in names]),
        prompt=json.dumps(prompt),
        coded=[name for name in names if list(layout.export(name).glob("*.py"))],
    )
