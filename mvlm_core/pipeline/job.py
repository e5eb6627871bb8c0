"""The main job: its options, and what is determined before it starts (hardware, finished models, plan)."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from mvlm_core.cost_estimate import (
    CORPUS_SECONDS,
    EXPORT,
    JSON_VARIABLE,
    PACKAGES_SECONDS,
    PACKING_BYTES_PER_SECOND,
    REPORT_SECONDS,
    RESCORED_SHARE,
    SUITE_SECONDS,
    VERIFICATION_BYTES_PER_SECOND,
    Item,
    Plan,
    format_costs,
)
from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, UserError
from mvlm_core.export.manifest import CHECKPOINTS, NO_CHECKPOINTS, ended_by_time, training_config
from mvlm_core.hardware import HARDWARE_FLAGS, choose_hardware, describe, missing_gpu
from mvlm_core.pipeline.summary import finished_models
from mvlm_core.run_layout import Layout

KEEP_OR_REPLACE = "use --fresh to delete these models and start over, or another --work_dir to keep them"
ONE_TEXT = "models packed together must share their text: train them together, or use another --work_dir"


@dataclass(frozen=True, eq=False)
class Job:
    """One invocation of the main job.

    Attributes:
        trainers: training script of each model, in training order.
        names: requested models, in the same order.
        preset_is_automatic: whether the preset was chosen for this machine instead of requested.
        settings: explicitly given trainer settings, by flag name.
        build_corpus: builds the default corpus if it is missing or damaged; None for a user's own folder.
        scripts: scripts of the stages "evaluate", "formats", "validate" and "report".
        prompt: example prompt for the download instructions.
        formats: additional formats in which to pack the models.
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
    preset_is_automatic: bool = False

    @cached_property
    def corpus(self) -> Callable[..., Corpus]:
        """`load_corpus` with this run's options, cached for each subfolder (``only=``)."""
        split = {key: value for key, value in self.settings.items() if key == "validation_split"}
        return cache(partial(load_corpus, self.data_dir, **split))

    def trainer_command(self, name: str) -> list[str]:
        paths = {"output_dir": self.layout.export(name), "log_file": self.layout.log_file(name)}
        command = [sys.executable, str(self.trainers[name])]
        for flag, value in ({"preset": self.preset, "data_dir": self.data_dir} | paths | self.settings).items():
            command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        return [*command, "--fresh"] if self.fresh else command

    def script_command(self, stage: str, *arguments: Any) -> list[str]:
        """Command line of a script that runs after training, by stage."""
        device = ["--device", self.settings["device"]] if "device" in self.settings else []
        return [sys.executable, str(self.scripts[stage]), *map(str, arguments), "--data_dir", self.data_dir, *device]

    def check_finished_models(self) -> None:
        """Check that finished models fit the request.

        Raises:
            UserError: one differs in preset, settings or text, or one that was not requested differs in text.
        """
        differences = [line for name in self.names for line in self.differences(name)]
        problems = [*differences, KEEP_OR_REPLACE] if differences else []
        if problems := problems + self.other_texts():
            raise UserError(problems)

    def differences(self, name: str, *, compare_text: bool = True) -> list[str]:
        """List differences between a finished model and the request; empty if there is no finished model to keep.

        Args:
            compare_text: False if the corpus is not built yet.
        """
        config = training_config(self.layout.export(name))
        if not config or self.fresh:
            return []
        settings, data = config.get("settings") or {}, config.get("data") or {}
        finished = {"preset": config.get("preset"), **{flag: settings.get(flag) for flag in ("seed", "max_length")}}
        requested = {"preset": self.preset, **self.settings}
        differences = [
            f"{name}: finished with --{flag} {value}; this run asks for {requested[flag]}"
            for flag, value in finished.items()
            if requested.get(flag, value) != value and (flag == "preset" or value is not None)
        ]
        if compare_text and config.get("preset") == self.preset:
            differences += self._text_differences(name, data)
        return differences

    def other_texts(self) -> list[str]:
        """List the kept models that were not requested and were trained on different text, with what to do."""
        lines = []
        for name in finished_models(self.layout):
            if name in self.trainers and name not in self.names:
                lines += self._text_differences(name, training_config(self.layout.export(name)).get("data") or {})
        return [*lines, ONE_TEXT] if lines else []

    def _text_differences(self, name: str, data: dict[str, Any]) -> list[str]:
        only = data.get("only")
        try:
            corpus = self.corpus(only=only)
        except UserError:
            if only is None:
                raise
            here = f"no text of {only}"
        else:
            if data.get("fingerprint") == corpus.fingerprint:
                return []
            here = str(len(corpus.split("train")))
        return [
            f"{name}: trained on different text ({data.get('train_documents')} training documents in "
            f"{data.get('data_dir')}); this run has {here} in {self.data_dir}"
        ]


def probe_hardware(job: Job) -> dict[str, Any]:
    """Return the trainers' hardware: `device` and `lines` for the log.

    Runs in a separate process, because CUDA would hold GPU memory in this one for the whole job.

    Raises:
        UserError: lists everything that was requested but is not available, or the job would train on the CPU although
            it should use a GPU.
    """
    flags = {name: job.settings[name] for name in HARDWARE_FLAGS if name in job.settings}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            trains = not all(_finished(job, name) for name in job.names)
            return pool.submit(_hardware, flags, job.preset, job.preset_is_automatic, trains).result()
    except BrokenProcessPool:
        return {"device": "unknown", "lines": ["the hardware probe failed; see the trainers' logs"]}


def _hardware(flags: dict[str, Any], preset: str, preset_is_automatic: bool, trains: bool) -> dict[str, Any]:
    hardware = choose_hardware(**flags)
    if trains and (problem := missing_gpu(hardware, preset, automatic=preset_is_automatic)):
        raise UserError(problem)
    return {"device": f"{hardware.device}: {hardware.name}", "lines": describe(hardware)}


def show_plan(job: Job, *, corpus_is_ready: bool) -> int:
    """Print what would run, with an estimate of time and cost; return the exit code. Writes nothing."""
    plans: dict[str, Plan] = {}
    code = EXIT_DONE
    print(f"preset:   {job.preset} ({job.preset_reason})")
    print(f"corpus:   {job.data_dir}{'' if corpus_is_ready else ' (to be built)'}")
    for name in job.names:
        command = job.trainer_command(name)
        if differences := job.differences(name, compare_text=corpus_is_ready):
            code = EXIT_BAD_INPUT
        plan = trainer_plan(command) if corpus_is_ready else None
        state = _state(job, name, differences, plan)
        print(f"\n{name}: {state}\n  output:  {job.layout.export(name)}")
        print(f"  log:     {job.layout.log_file(name)}\n  command: {shlex.join(command)}", flush=True)
        if plan:
            plans[name] = plan
            code = max(code, plan.exit_code)
            print("".join(f"  {line}\n" for line in [*plan.lines, *plan.costs()]), end="", flush=True)
    if not corpus_is_ready:
        print(f"\nfor an estimate, build the corpus first (about {CORPUS_SECONDS:.0f} s): prepare_dataset.py")
    if others := job.other_texts() if corpus_is_ready else []:
        code = EXIT_BAD_INPUT
        print("\n" + _refusal(others))
    if left := {name: plan for name, plan in plans.items() if plan.items and not _kept(job, name, plan)}:
        _show_costs(left)
    print(f"\nthen:     comparison -> {job.layout.comparison_plot}\n          archives   -> {job.layout.downloads}")
    if job.formats:
        print(f"          {', '.join(job.formats)} -> {job.layout.downloads}")
    print(f"          validation -> {job.layout.validation_report}\n          report     -> {job.layout.report}")
    return code


def trainer_plan(command: list[str]) -> Plan:
    """Run a trainer's dry run and return its plan."""
    environment = os.environ | {JSON_VARIABLE: "1"}
    done = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        code = max(EXIT_FAILED, done.returncode)  # negative after a signal
        return Plan([f"no estimate: {done.stderr.strip()[-500:]}"], exit_code=code)
    *log_lines, last = done.stdout.splitlines()
    plan = Plan.of_json(last)
    return replace(plan, lines=[*log_lines, *plan.lines])


def _show_costs(plans: dict[str, Plan]) -> None:
    """Print the total for the models to be trained and the other stages."""
    gpus = max(plan.gpus for plan in plans.values())
    size, count = sum(plan.export_bytes for plan in plans.values()), len(plans)
    items = [Item("packages", PACKAGES_SECONDS, "on a fresh machine")] if gpus else []
    items += [Item(name, sum(item.seconds for item in plan.items)) for name, plan in plans.items()]
    scoring = sum(item.seconds for plan in plans.values() for item in plan.items if item.name == EXPORT)
    checking = scoring * RESCORED_SHARE + size / VERIFICATION_BYTES_PER_SECOND
    items += [
        Item("evaluation suite", SUITE_SECONDS * count, f"{count} models"),
        Item("archives", size / PACKING_BYTES_PER_SECOND, f"{size / 1e9:.2f} GB of weights"),
        Item("validation", checking, "archives read, scores from a sample"),
        Item("comparison and report", REPORT_SECONDS),
    ]
    print("\ntotal:")
    print("".join(f"  {line}\n" for line in format_costs(items, gpus=gpus)), end="")
    assumptions = dict.fromkeys(text for plan in plans.values() for text in plan.assumptions)
    own = (
        f"{PACKAGES_SECONDS:.0f} s for packages, {SUITE_SECONDS:.0f} s per model for the suite, archives written at "
        f"{PACKING_BYTES_PER_SECOND / 1e6:.0f} MB/s and read at {VERIFICATION_BYTES_PER_SECOND / 1e6:.0f} MB/s, "
        f"{REPORT_SECONDS:.0f} s for the report"
    )
    print("\nassumed:  " + ";\n          ".join([*assumptions, own]))


def _finished(job: Job, name: str) -> dict[str, Any]:
    """Results of a finished model that is not deleted; {} if there is none."""
    results = {} if job.fresh else training_config(job.layout.export(name)).get("results", {})
    return results if all(isinstance(results.get(key), int) for key in ("parameters", "steps")) else {}


def _kept(job: Job, name: str, plan: Plan) -> bool:
    """Whether the model is finished and as long as the requested run, whose number of steps is an estimate."""
    if not (results := _finished(job, name)):
        return False
    ended_earlier = results.get("stopped_early") is True or (plan.by_time and ended_by_time(results))
    return ended_earlier or results["steps"] >= 0.95 * (plan.steps or 0)


def _refusal(problems: Sequence[str]) -> str:
    return "\n  ".join(["REFUSED: the run would end with exit code 2 before training", *problems])


def _state(job: Job, name: str, differences: list[str], plan: Plan | None) -> str:
    if job.fresh:
        return "starts from scratch (--fresh)"
    if differences:
        return _refusal([*differences, KEEP_OR_REPLACE])
    if results := _finished(job, name):
        size = f"finished: {results['parameters']:,} parameters, {results['steps']:,} steps"
        if plan is None or _kept(job, name, plan):
            return f"{size}; kept"
        if not any((job.layout.export(name) / CHECKPOINTS).glob("step-*")):
            return _refusal([f"{size}, {NO_CHECKPOINTS}"])
        return f"{size}; continues to {plan.steps:,} (estimate: all steps)"
    checkpoints = len(list((job.layout.export(name) / CHECKPOINTS).rglob("step-*")))
    return f"resumes from its checkpoints ({checkpoints})" if checkpoints else "starts from scratch"
