"""What a run of the main job is asked for, and what is known before it starts: hardware, earlier models, plan."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from mvlm_core.bill import (
    CORPUS_SECONDS,
    JSON_VARIABLE,
    PACKAGES_SECONDS,
    PACKED_PER_SECOND,
    READ_PER_SECOND,
    REPORT_SECONDS,
    RESCORED_SHARE,
    SUITE_SECONDS,
    Item,
    bill,
)
from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.errors import UserError
from mvlm_core.export.manifest import training_config
from mvlm_core.hardware import HARDWARE_FLAGS, choose_hardware, describe
from mvlm_core.run_layout import Layout

KEEP_OR_REPLACE = "give --fresh to throw these models away and start again, or another --work_dir to keep them"


@dataclass(frozen=True, eq=False)
class Job:
    """One call of the main job.

    Attributes:
        trainers: the script that trains each model, in the order of training.
        names: the models this run is asked for, in the same order.
        settings: the trainers' settings that were given, by the name of their flag.
        build_corpus: builds the default corpus where it is missing or damaged; None for a folder of the user's own.
        scripts: what runs the stages "evaluate", "formats", "validate" and "report".
        prompt: what the download instructions let the models continue.
        formats: of other programs, in which the models are packed as well.
    """

    layout: Layout
    trainers: dict[str, Path]
    names: list[str]
    preset: str
    preset_reason: str
    data_dir: str
    settings: dict[str, Any]
    fresh: bool
    build_corpus: Callable[[], None] | None
    scripts: dict[str, Path]
    prompt: str
    formats: tuple[str, ...] = ()

    @cached_property
    def corpus(self) -> Callable[..., Corpus]:
        """`load_corpus` with this run's choices, each part (``only=``) read once."""
        split = {key: value for key, value in self.settings.items() if key == "validation_split"}
        return cache(partial(load_corpus, self.data_dir, **split))

    def trainer_command(self, name: str) -> list[str]:
        places = {"output_dir": self.layout.export(name), "log_file": self.layout.log_file(name)}
        command = [sys.executable, str(self.trainers[name])]
        for flag, value in ({"preset": self.preset, "data_dir": self.data_dir} | places | self.settings).items():
            command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        return [*command, "--fresh"] if self.fresh else command

    def script_command(self, stage: str, *arguments: Any) -> list[str]:
        """The command line of the script of a stage that reads what the run has made."""
        device = ["--device", self.settings["device"]] if "device" in self.settings else []
        return [sys.executable, str(self.scripts[stage]), *map(str, arguments), "--data_dir", self.data_dir, *device]

    def check_finished_models(self) -> None:
        """Raises UserError where a finished model is not what is asked for now: other preset, settings or text."""
        found = [line for name in self.names for line in self.differences(name)]
        if found:
            raise UserError([*found, KEEP_OR_REPLACE])

    def differences(self, name: str, *, compare_text: bool = True) -> list[str]:
        """How the finished model of this name differs from what is asked for; nothing where there is none to keep.

        Args:
            compare_text: False where the corpus is not built yet.
        """
        config = training_config(self.layout.export(name))
        if not config or self.fresh:
            return []
        settings, data = config.get("settings") or {}, config.get("data") or {}
        finished = {"preset": config.get("preset"), **{flag: settings.get(flag) for flag in ("seed", "max_length")}}
        asked = {"preset": self.preset, **self.settings}
        found = [
            f"{name}: finished with --{flag} {value}; this run asks for {asked[flag]}"
            for flag, value in finished.items()
            if asked.get(flag, value) != value and (flag == "preset" or value is not None)
        ]
        if compare_text and config.get("preset") == self.preset:
            corpus = self.corpus(only=data.get("only"))
            if data.get("fingerprint") != corpus.fingerprint:
                found.append(
                    f"{name}: finished with other text ({data.get('train_documents')} training documents of "
                    f"{data.get('data_dir')}); this run has {len(corpus.split('train'))} of {self.data_dir}"
                )
        return found


def probe_hardware(job: Job) -> dict[str, Any]:
    """What the trainers will run on: `device` and `lines` for the log.

    Asked in another process, because CUDA would hold GPU memory in this one for as long as the job runs.

    Raises:
        UserError: everything that is asked for and not there.
    """
    asked = {name: job.settings[name] for name in HARDWARE_FLAGS if name in job.settings}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_hardware, asked).result()
    except BrokenProcessPool:
        return {"device": "unknown", "lines": ["the hardware probe failed; the trainers will report what they find"]}


def _hardware(asked: dict[str, Any]) -> dict[str, Any]:
    hardware = choose_hardware(**asked)
    return {"device": f"{hardware.device}: {hardware.name}", "lines": describe(hardware)}


def show_plan(job: Job, *, corpus_is_ready: bool) -> None:
    """Print what would run, and what it would take. Writes nothing."""
    plans: dict[str, dict[str, Any]] = {}
    print(f"preset:   {job.preset} ({job.preset_reason})")
    print(f"corpus:   {job.data_dir}{'' if corpus_is_ready else ' (to be built)'}")
    for name in job.names:
        command = job.trainer_command(name)
        print(f"\n{name}: {_state(job, name, corpus_is_ready)}\n  output:  {job.layout.export(name)}")
        print(f"  log:     {job.layout.log_file(name)}\n  command: {shlex.join(command)}", flush=True)
        if corpus_is_ready:
            plans[name] = plan = _trainer_plan(command)
            told = [*plan["lines"], *(bill(plan["items"], paid=plan["paid"]) if plan["items"] else ())]
            print("".join(f"  {line}\n" for line in told), end="", flush=True)
    if not corpus_is_ready:
        print(f"\nno estimate before the corpus is there, which takes about {CORPUS_SECONDS:.0f} s: prepare_dataset.py")
    if wanted := {name: plan for name, plan in plans.items() if plan["items"] and not _finished(job, name)}:
        _show_bill(wanted)
    print(f"\nthen:     comparison -> {job.layout.plot}\n          archives   -> {job.layout.downloads}")
    if job.formats:
        print(f"          {', '.join(job.formats)} -> {job.layout.downloads}")
    print(f"          validation -> {job.layout.report}\n          report     -> {job.layout.page}")


def _trainer_plan(command: list[str]) -> dict[str, Any]:
    """The plan that a trainer's dry run prints last, as JSON, after the lines of its log; no items where it failed."""
    environment = os.environ | {JSON_VARIABLE: "1"}
    found = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=False, env=environment)
    if found.returncode:
        return {"lines": [f"no estimate: {found.stderr.strip()[-500:]}"], "items": []}
    *before, last = found.stdout.splitlines()
    plan = json.loads(last)
    return plan | {"lines": [*before, *plan["lines"]], "items": [Item(**item) for item in plan["items"]]}


def _show_bill(plans: dict[str, dict[str, Any]]) -> None:
    """The sum over the models that would be trained, and the stages around them."""
    paid = any(plan["paid"] for plan in plans.values())
    size, count = sum(plan["export_bytes"] for plan in plans.values()), len(plans)
    items = [Item("packages", PACKAGES_SECONDS, "on a fresh machine")] if paid else []
    items += [Item(name, sum(item.seconds for item in plan["items"])) for name, plan in plans.items()]
    scoring = sum(plan["items"][-1].seconds for plan in plans.values())
    items += [
        Item("evaluation suite", SUITE_SECONDS * count, f"{count} models"),
        Item("archives", size / PACKED_PER_SECOND, f"{size / 1e9:.2f} GB of weights"),
        Item("validation", scoring * RESCORED_SHARE + size / READ_PER_SECOND, "archives read, scores from a sample"),
        Item("comparison and report", REPORT_SECONDS),
    ]
    print("\ntogether:")
    print("".join(f"  {line}\n" for line in bill(items, paid=paid)), end="")
    assumptions = dict.fromkeys(text for plan in plans.values() for text in plan["assumptions"])
    own = (
        f"{PACKAGES_SECONDS:.0f} s for packages, {SUITE_SECONDS:.0f} s a model for the suite, archives at "
        f"{PACKED_PER_SECOND / 1e6:.0f} MB/s and read at {READ_PER_SECOND / 1e6:.0f} MB/s, {REPORT_SECONDS:.0f} s for "
        "the report"
    )
    print("\nassumed:  " + ";\n          ".join([*assumptions, own]))


def _finished(job: Job, name: str) -> dict[str, Any]:
    """The results of a finished model that is kept; {} where it is trained."""
    results = {} if job.fresh else training_config(job.layout.export(name)).get("results", {})
    return results if all(isinstance(results.get(key), int) for key in ("parameters", "steps")) else {}


def _state(job: Job, name: str, corpus_is_ready: bool) -> str:
    if job.fresh:
        return "starts from scratch (--fresh)"
    if found := job.differences(name, compare_text=corpus_is_ready):
        return "REFUSED: the run would end with exit code 2 before it trains anything\n" + "\n".join(
            f"  {line}" for line in (*found, KEEP_OR_REPLACE)
        )
    if results := _finished(job, name):
        return f"finished: {results['parameters']:,} parameters, {results['steps']:,} steps; kept"
    checkpoints = sum(path.is_dir() for path in (job.layout.export(name) / "checkpoints").glob("*"))
    return f"resumes from its checkpoints ({checkpoints})" if checkpoints else "starts from scratch"
