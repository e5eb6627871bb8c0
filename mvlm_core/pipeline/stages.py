"""What the main job is made of: its folders, its record, training, archives, validation.

Knows no model: names and commands come from the entry script. Everything it writes is whole or not there, so
the job can be stopped or killed at any place and be started again.
"""

import json
import logging
import math
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from mvlm_core.errors import Stopped
from mvlm_core.export.archive import ArchiveError, matches_export, read_manifest, write_archive
from mvlm_core.export.strict_tar import name_problem
from mvlm_core.files import read_json, sha256_file, write_atomic, write_json_atomic
from mvlm_core.pipeline.child_process import TAIL_LINES, Signals, run_child
from mvlm_core.run_layout import Layout, finite_number, training_config
from mvlm_core.signals import PARENT_VARIABLE

RESULT_KEYS = (
    "parameters",
    "tokens",
    "bytes",
    "seconds",
    "tokens_per_second",
    "validation_bpb",
    "test_bpb",
    "test_bpb_kjv",
    "peak_memory_bytes",
)
log = logging.getLogger("mvlm")


# --- the run's record ---------------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value):
    """What JSON can hold: NaN and infinity become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Summary:
    """`models/training_summary.json`, written after every change so that a crash leaves a true record."""

    def __init__(self, layout: Layout, names: list[str], *, preset: str, device: str):
        before = read_json(layout.summary).get("models")
        self.layout = layout
        # A model of an earlier run that this one was not asked for stays in the record while its export is
        # there.
        kept = {
            name: self._known(entry)
            for name, entry in (before.items() if isinstance(before, dict) else ())
            if name not in names
            and not ("/" in name or name_problem(name))
            and isinstance(entry, dict)
            and entry.get("status") == "finished"
            and training_config(layout.export(name))
        }
        self.models = kept | {name: self._empty() for name in names}
        self.value = {
            "device": device,
            "preset": preset,
            "started": now(),
            "finished": None,
            "models": self.models,
            "comparison": {},
        }
        self.save()

    @staticmethod
    def _empty() -> dict:
        return {"status": "waiting"} | dict.fromkeys((*RESULT_KEYS, "size_bytes", "archive"))

    @classmethod
    def _known(cls, entry: dict) -> dict:
        """A finished model's entry of an earlier run, with null for what is damaged."""
        numbers = {key: finite_number(entry.get(key)) for key in (*RESULT_KEYS, "size_bytes")}
        archive = entry.get("archive") if isinstance(entry.get("archive"), str) else None
        return cls._empty() | numbers | {"status": "finished", "archive": archive}

    def update(self, name: str, **values) -> None:
        self.models[name].update({key: _plain(value) for key, value in values.items()})
        self.save()

    def finished(self) -> list[str]:
        return [name for name, entry in self.models.items() if entry["status"] == "finished"]

    def failed(self) -> list[str]:
        return [name for name, entry in self.models.items() if entry["status"] == "failed"]

    def save(self) -> None:
        write_json_atomic(self.layout.summary, self.value)

    def close(self) -> None:
        """The run is over: note the time, also in the copy beside the archives."""
        self.value["finished"] = now()
        self.save()
        write_json_atomic(self.layout.downloads / self.layout.summary.name, self.value)


# --- stages -------------------------------------------------------------------------------------------------


def take_results(name: str, layout: Layout, summary: Summary) -> None:
    """What a finished trainer wrote about itself, into the summary."""
    export = layout.export(name)
    config = training_config(export)
    results = config.get("results") or {}
    files = [export / file for file in (*read_manifest(export)["files"], "manifest.json")]
    summary.models[name].pop("error", None)
    summary.update(
        name,
        status="finished",
        size_bytes=sum(file.stat().st_size for file in files),
        **{key: finite_number(results.get(key)) for key in RESULT_KEYS},
    )
    if (hardware := config.get("hardware") or {}).get("device"):
        summary.value["device"] = f"{hardware['device']}: {hardware.get('name', 'unknown')}"
        summary.save()


def train_model(name: str, command: list[str], layout: Layout, summary: Summary, signals: Signals) -> int:
    """Run one trainer and record how it ended; returns its exit code. Raises Stopped after a signal."""
    log_file = layout.log_file(name)
    summary.update(name, status="running")
    start = time.monotonic()
    try:
        wait_for_orphans(layout.export(name))
        code, tail = run_child(command, signals)
    except Stopped:
        summary.update(name, status="interrupted")
        raise
    if code == 0:
        try:
            take_results(name, layout, summary)
            log.info("%s: finished after %.0f s", name, time.monotonic() - start)
            return 0
        except (ArchiveError, OSError) as error:
            code, tail = 1, [f"the trainer said that it had finished, but its export is not whole: {error}"]
    if signals.number is not None or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        summary.update(name, status="interrupted")
        raise Stopped(signals.number or code - 128)
    if code > 128:
        tail.append(f"ended by {_signal_name(code - 128)}")
        if code == 128 + signal.SIGKILL:
            tail.append("(the system kills a process this way when memory runs out: try a smaller --batch_size)")
    keep_last_words(log_file, code, tail)
    summary.update(name, status="failed", error="\n".join(tail[-TAIL_LINES:]))
    log.error("%s: FAILED with exit code %d; the end of its output:", name, code)
    for line in tail:
        log.error("    %s", line)
    return code


def wait_for_orphans(export: Path) -> None:
    """A trainer whose pipeline was killed ends by itself after a checkpoint: wait, or its lock is in the way."""
    told = False
    while orphans := [process.pid for process in psutil.process_iter() if _is_orphan(process, export)]:
        if not told:
            log.info("waiting for process %d, left over from a killed run, to end after a checkpoint", orphans[0])
            told = True
        time.sleep(0.5)


def _is_orphan(process: psutil.Process, export: Path) -> bool:
    """Whether a pipeline that is gone started this process to write into `export`."""
    try:
        if str(export) not in process.cmdline():
            return False
        starter = process.environ().get(PARENT_VARIABLE, "")
        return starter.isdecimal() and process.ppid() != int(starter)
    except (psutil.Error, OSError):
        return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def keep_last_words(log_file: Path, code: int, tail: list[str]) -> None:
    """Into the model's log what only reached the console: a traceback, a library's last message."""
    known = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    missing = [line for line in tail if line not in known]
    with log_file.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in [f"--- ended with exit code {code}", *missing])


def pack_models(layout: Layout, summary: Summary, signals: Signals) -> None:
    """An archive of every finished model; one that already holds exactly its export is kept."""
    layout.downloads.mkdir(parents=True, exist_ok=True)
    for name in summary.finished():
        signals.check()
        archive = layout.archive(name)
        try:
            if matches_export(archive, layout.export(name)):
                log.info("%s: kept, it holds this export already", archive.name)
            else:
                write_archive(layout.export(name), archive)
                log.info("%s: written, %.1f MB", archive.name, archive.stat().st_size / 1e6)
        except ArchiveError as error:
            log.error("%s: not packed: %s", name, error)
            summary.update(name, status="failed", error=f"not packed: {error}", archive=None)
            archive.unlink(missing_ok=True)
            continue
        summary.update(name, archive=str(archive.relative_to(layout.root)))
    write_download_notes(layout, summary)


def write_download_notes(layout: Layout, summary: Summary) -> None:
    """SHA256SUMS, the summary and the instructions beside the archives that are there."""
    offered = [name for name in summary.finished() if layout.archive(name).is_file()]
    for name in summary.failed():  # never offer the archive of an earlier run as this one's
        layout.archive(name).unlink(missing_ok=True)
    sums = "".join(f"{sha256_file(layout.archive(name))}  {layout.archive(name).name}\n" for name in offered)
    if offered:
        write_atomic(layout.checksums, sums)
        write_atomic(layout.downloads / "DOWNLOAD_INSTRUCTIONS.md", download_instructions(offered, layout))
    else:
        layout.checksums.unlink(missing_ok=True)
        (layout.downloads / "DOWNLOAD_INSTRUCTIONS.md").unlink(missing_ok=True)
    write_json_atomic(layout.downloads / summary.layout.summary.name, summary.value)


def validate(layout: Layout, summary: Summary, command: list[str], signals: Signals) -> bool:
    """Run validate_models.py; what it does not find good is withdrawn from the downloads."""
    layout.report.unlink(missing_ok=True)
    code, tail = run_child(command, signals)
    if signals.number is not None or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stopped(signals.number or code - 128)
    found = read_json(layout.report).get("models", {})
    for name in summary.finished():
        if found.get(name, {}).get("passed") is True:
            continue
        checks = found.get(name, {}).get("checks", [])
        failed = [f"{check['name']}: {check['detail']}" for check in checks if not check["passed"]]
        summary.update(
            name,
            status="failed",
            archive=None,
            error="validation: " + ("; ".join(failed) or "\n".join(tail) or "no report was written"),
        )
        log.error("%s: failed its validation and was withdrawn from %s", name, layout.downloads)
    write_download_notes(layout, summary)
    return code == 0


def probe_text(script: Path, layout: Layout, names: list[str], flags: list[str], signals: Signals) -> dict[str, dict]:
    """The text probes' results by model name; {} where they fail, which ends nothing: they are not needed to ship."""
    exports = {name: str(layout.export(name)) for name in names}
    command = [sys.executable, str(script), *exports.values(), *flags, "--json", str(layout.text_probes)]
    code, tail = run_child(command, signals)
    signals.check()
    if code:
        log.error("the text probes failed with exit code %d: %s", code, tail[-1] if tail else "no output")
        return {}
    results = read_json(layout.text_probes).get("results", {})
    return {name: results[export] for name, export in exports.items() if export in results}


def make_page(command: list[str], signals: Signals) -> None:
    """`models/report.html`. Where it cannot be made this is told, and ends nothing: it is not needed to ship."""
    code, tail = run_child(command, signals)
    signals.check()
    if code:
        log.error("no report: exit code %d: %s", code, tail[-1] if tail else "no output")


def score_parts(config: dict) -> dict[str, dict[str, float]]:
    """Test bits per byte by book and by translation, from a trainer's record; what is damaged is left out."""
    results = config.get("results", {})
    parts = {part: results.get(f"test_bpb_by_{part}") for part in ("book", "translation")}
    return {
        part: {str(name): value for name, value in values.items() if finite_number(value) is not None}
        for part, values in parts.items()
        if isinstance(values, dict)
    }


def child_command(script: Path, layout: Layout, data_dir: str, device: str | None) -> list[str]:
    """The command line of a script that looks at what a run made."""
    return [
        sys.executable,
        str(script),
        "--work_dir",
        str(layout.root),
        "--data_dir",
        data_dir,
        *(["--device", device] if device else []),
    ]


def download_instructions(names: list[str], layout: Layout) -> str:
    """Commands that work as written in the folder that holds the archives."""
    archives = [layout.archive(name).name for name in names]
    unpack = "\n".join(f"tar -xzf {archive}" for archive in archives)
    coded = [name for name in names if list(layout.export(name).glob("*.py"))]
    remote = (
        f"`trust_remote_code=True` lets `{coded[0]}` use the modelling files in its folder; nothing is fetched.\n"
        if coded
        else ""
    )
    return f"""# Downloading and using the models

Copy this folder from the training machine (`USER@HOST` is yours):

    scp -r USER@HOST:{layout.downloads} .

Verify the archives, in this folder:

```bash
sha256sum -c SHA256SUMS
```

Extract them:

```bash
{unpack}
```

Run one with plain transformers (`pip install torch transformers`); no network and nothing else is needed:

```bash
python - <<'END'
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in {json.dumps([f"./{name}" for name in names])}:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer("In the beginning God", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(folder, tokenizer.decode(output[0], skip_special_tokens=True), sep="\\n")
END
```

{remote}`training_summary.json` holds what was trained and how well it scored; each model's `README.md` is its
model card.
"""
