"""A training run of either model: corpus → tokenizer → tokens → training loop → export → test scores."""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mvlm_core import cost_estimate
from mvlm_core.console import silence_transformers
from mvlm_core.errors import TrainingError, UserError
from mvlm_core.export.file_checks import renew_modeling_files
from mvlm_core.export.folder import delete_run, finish_export, stage_model
from mvlm_core.export.manifest import CHECKPOINTS, TEACHERS, training_config
from mvlm_core.export.model_card import model_card
from mvlm_core.files import RunLock
from mvlm_core.hardware import HARDWARE_FLAGS, caution, choose_hardware, describe, missing_gpu
from mvlm_core.settings import TrainingSettings
from mvlm_core.signals import StopRequest
from mvlm_core.training import results
from mvlm_core.training.checkpoint import delete_checkpoints
from mvlm_core.training.distillation import teacher_and_student_settings, with_time_left
from mvlm_core.training.distributed import Ranks, init_ranks
from mvlm_core.training.identity import TEACHERS_KEY, check_earlier_run, is_finished, lost_teachers, run_identity
from mvlm_core.training.loop import TrainingLoop
from mvlm_core.training.plan import plan_run
from mvlm_core.training.preparation import PreparedText, prepare_text
from mvlm_core.training.recipe import Recipe
from mvlm_core.training.run_length import run_length
from mvlm_core.training.state import LoopState
from mvlm_core.training.supervisor import FOLDER_VARIABLE, rank_count
from mvlm_core.training.task import Run, TrainingTask, build_task

log = logging.getLogger("mvlm")


def run_training(recipe: Recipe, settings: TrainingSettings) -> Path:
    """Train, export and score one model; return the export folder. A dry run only prints the estimated cost.

    Raises:
        UserError: bad settings or input; nothing has been written to the output folder.
        Stopped: a signal arrived; the same call resumes from the checkpoint.
        TrainingError: the run cannot continue.
    """
    if settings.output_dir is None:
        raise UserError([*settings.problems(), "output_dir: name a folder for the model"])
    settings.check()
    output_dir = Path(settings.output_dir)
    flags = {name: getattr(settings, name) for name in HARDWARE_FLAGS}
    if recipe.only_sdpa and (backend := settings.attention_backend) not in ("auto", "sdpa"):
        log.info("--attention_backend %s: not used by %s, which has sdpa only", backend, recipe.title)
        flags["attention_backend"] = "sdpa"
    hardware = choose_hardware(**flags)
    kept = not settings.fresh and training_config(output_dir, "results")
    trains = not (settings.dry_run or settings.prepare_only or settings.init_from or kept)
    if trains and (problem := missing_gpu(hardware, settings.preset, automatic=settings.preset_is_automatic)):
        raise UserError(problem)
    silence_transformers()
    if not (settings.fresh or settings.prepare_only):
        check_earlier_run(output_dir, settings)
    if settings.dry_run:
        print(plan_run(recipe, settings, hardware).text())
        return output_dir
    *teachers, student = [settings] if settings.prepare_only else teacher_and_student_settings(settings)
    hardware.apply()
    if (world_size := rank_count(settings)) > 1:
        if settings.processes > 1 or settings.gpus:
            raise UserError(
                f"{world_size} processes can only be started from a trainer's command line, not from Python"
            )
        log.warning(
            "this process uses only one of several GPUs; start the trainer from the command line to use all of them"
        )
    with StopRequest() as stop:
        if not settings.fresh and (lost := lost_teachers(output_dir, settings)):
            alone = replace(student, teacher=())
            return _run(Run(recipe, alone, hardware, init_ranks(hardware.device)), stop, lost=lost)
        for number, teacher in enumerate(teachers, 1):
            log.info("teacher %s of %s: %s", number, len(teachers), teacher.output_dir)
            ranks = init_ranks(hardware.device)
            folder = _run(Run(recipe, teacher, hardware, ranks), stop, student=student)
            if ranks.is_main:
                delete_checkpoints(folder / CHECKPOINTS)  # the student needs only the export
            hardware.release()
        return _run(Run(recipe, student, hardware, init_ranks(hardware.device)), stop, own_teachers=bool(teachers))


def _run(
    run: Run,
    stop: StopRequest,
    *,
    student: TrainingSettings | None = None,
    own_teachers: bool = False,
    lost: str | None = None,
) -> Path:
    """Prepare, train and export one model, on one rank.

    Args:
        student: for a teacher, its student, whose output folder is also locked and, with --fresh, cleared.
        own_teachers: whether this run trained the teachers, which have used part of ``--max_hours``.
        lost: hashes of teachers that are no longer there: the run is kept if it is finished, else refused.
    """
    settings, ranks = run.settings, run.ranks
    _log_hardware(run)
    started = time.perf_counter()
    text = prepare_text(settings, run.recipe.tokenizer_class, ranks)
    prepared = time.perf_counter() - started
    if own_teachers:
        settings = with_time_left(settings, sum(teacher.seconds for teacher in text.teachers))
        run = replace(run, settings=settings)
    if settings.prepare_only:
        log.info("prepared: tokenizer and tokens are in %s", settings.cache_dir)
        return run.output_dir
    _check_batch(text, ranks)
    identity, steps = run_identity(settings, text), run_length(settings, text.batches).limit
    identity |= {TEACHERS_KEY: lost} if lost is not None else {}
    needed = steps if student is None else None  # a teacher that time has shortened serves a longer student as well
    with ExitStack() as locks:
        for owner in (student, settings):
            if owner is not None and ranks.is_main:
                folder = Path(str(owner.output_dir))
                locks.enter_context(RunLock(folder))
                if settings.fresh:
                    delete_run(folder, keep=[Path(teacher) for teacher in (student or settings).teacher])
        if _is_kept(run, identity, needed, renew=student is None):
            ranks.destroy()  # a student may still have to be trained
            return run.output_dir
        if lost is not None:
            raise UserError(
                f"{run.output_dir}: its teachers are no longer in {run.output_dir / TEACHERS}, or damaged: put them "
                "back, choose another --output_dir (train_all_models.py: --work_dir), or start over with --fresh"
            )
        task = build_task(run, text)
        loop = TrainingLoop(run, task)
        _announce(run, task, steps)
        loop.run(stop)
        peak_memory_bytes = loop.peak_memory()
        ranks.destroy()
        stop.raise_at_once()
        if ranks.is_main:
            try:
                _export(run, text, task, loop, peak_memory_bytes, prepared)
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"training finished, but the export cannot be written: {error}; free some space and run again"
                ) from None
    return run.output_dir


def _check_batch(text: PreparedText, ranks: Ranks) -> None:
    if text.batches.batch_size < ranks.world_size:
        raise UserError(
            f"cannot split a batch of {text.batches.batch_size} sequences across {ranks.world_size} processes: start "
            "fewer, or raise --batch_size or --gradient_accumulation_steps"
        )


def _is_kept(run: Run, identity: dict[str, Any], steps: int | None, *, renew: bool) -> bool:
    """Whether the run is already finished, and so kept; ``renew``: with this version's modeling files."""
    settings, ranks = run.settings, run.ranks
    finished = ranks.is_main and not settings.fresh and is_finished(run.output_dir, identity, steps, settings)
    if finished and renew and run.recipe.modeling_folder is not None:
        renew_modeling_files(run.output_dir, run.recipe.modeling_folder)
    if kept := ranks.broadcast(finished and settings.resume_from is None):
        longer = "to train longer, give a larger --num_epochs, --max_steps or --patience; to start over, --fresh"
        log.info("already finished: %s (%s)", run.output_dir, longer)
    return kept


def _log_hardware(run: Run) -> None:
    """Log the hardware and the number of processes, on the main rank only if all share one console."""
    unsupervised = FOLDER_VARIABLE not in os.environ
    if not run.ranks.is_main and unsupervised:  # torchrun has one console for all ranks
        log.setLevel(logging.ERROR)
    log.info("preset: %s", run.settings.preset)
    for line in describe(run.hardware):
        log.info(line)
    if warning := caution(run.hardware, run.settings.preset):
        log.warning(warning)
    if run.ranks.world_size > 1 and unsupervised:
        log.info("each batch is split across %s processes", run.ranks.world_size)


def _announce(run: Run, task: TrainingTask, steps: int | None) -> None:
    """Log the model's size and the run's length."""
    settings = run.settings
    length = "steps" if steps is None else f"{steps:,} steps ({task.batches.epoch_at(steps):.2f} epochs)"
    at_most = "" if steps is None else "at most "
    limit = "" if settings.max_hours is None else f", {at_most}as many as fit into {settings.max_hours:.3g} hours"
    log.info(
        f"{run.recipe.title}: {task.model.num_parameters():,} parameters, {length} of "
        f"{settings.sequences_per_step} sequences of {settings.max_length} tokens{limit}"
    )


def _costs(state: LoopState, prepared: float, exported: float) -> dict[str, float]:
    """Seconds of the items of the dry run's estimate, without teachers; compilation is not timed."""
    return {
        cost_estimate.PREPARATION: prepared,
        cost_estimate.STEPS: state.step_seconds,
        cost_estimate.EVALUATIONS: state.spent.evaluation_seconds,
        cost_estimate.CHECKPOINTS: state.spent.checkpoint_seconds,
        cost_estimate.EXPORT: exported,
    }


def _export(
    run: Run, text: PreparedText, task: TrainingTask, loop: TrainingLoop, peak_memory_bytes: int, prepared: float
) -> None:
    """Export the best weights by validation and score the exported files on the test split.

    Args:
        prepared: seconds spent preparing the text.
    """
    recipe, started = run.recipe, time.perf_counter()
    loop.checkpoints.load_best(loop.state)
    tokenizer = text.tokenizer.for_transformers(run.settings.max_length)
    staging = stage_model(task.model, tokenizer, loop.history(), recipe.title, run.output_dir)
    score = results.score_test(staging, run, text.corpus)
    measured = results.collect_metrics(task.model, text, loop.state, score)
    measured["memorization"] = results.measure_memorization(run, task.model, tokenizer, text, loop.state)
    if text.base is not None:
        measured |= {f"{name}_before": value for name, value in vars(loop.state.before).items()}
        measured["old_test_bpb"] = results.score_old(staging, run, text)
    measured["peak_memory_bytes"] = peak_memory_bytes
    measured["seconds"] += sum(teacher.seconds for teacher in text.teachers)
    config = results.training_config_content(run, text, task.identity, measured)
    config["test_nats"] = {path: document.nats for path, document in score.documents.items()}
    config["costs"] = _costs(loop.state, prepared, time.perf_counter() - started)
    log.info("seconds: " + ", ".join(f"{name} {seconds:,.1f}" for name, seconds in config["costs"].items()))
    card = model_card(
        config,
        title=recipe.title,
        description=recipe.description,
        sources=results.describe_text(text),
        licenses=results.licenses_of(text),
        remote_code=recipe.modeling_folder is not None,
    )
    finish_export(staging, config, card, run.output_dir)
    results.log_scores(measured, score, text.corpus)
    log.info("exported to %s", run.output_dir)
