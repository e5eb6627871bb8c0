"""Dry run: an itemized estimate of a run's time and memory."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from mvlm_core.cost_estimate import (
    CHECKPOINTS,
    COMPILATION,
    EVALUATIONS,
    EXPORT,
    PREPARATION,
    STEPS,
    TEACHERS,
    Item,
    Plan,
)
from mvlm_core.data.corpus import Corpus
from mvlm_core.hardware import Hardware
from mvlm_core.settings import LENGTHS, TrainingSettings
from mvlm_core.training.checkpointer import disk_bytes
from mvlm_core.training.cost import OVERHEAD, StepCost, fitting_micro_batch, step_cost
from mvlm_core.training.distillation import relative_step_cost, teacher_and_student_settings, with_time_left
from mvlm_core.training.forecast import TEXT_PER_PARAMETER, UNIT_EPOCHS
from mvlm_core.training.preparation import check_held_out, read_corpus
from mvlm_core.training.recipe import Recipe
from mvlm_core.training.run_length import total_steps
from mvlm_core.training.supervisor import describe_gpus, planned_gpus
from mvlm_core.training.text_plan import TextPlan, plan_text
from mvlm_core.training.time_limit import steps_within

# Assumptions; those that an estimate uses are printed with it.
GPU_PEAK = 989e12  # FLOP/s of an H200 or H100, bf16 without sparsity
GPU_MFU = 0.35  # plain GPT-2 training at this size reached 0.29 to 0.40 of the bf16 peak on A100 and H100
CPU_MFU = {"fp32": 0.45, "bf16": 0.75}  # of the fp32 matmul rate, by precision (benchmarks/LOG.md)
COMPILE_SECONDS = 90.0
HOST_COPY_BYTES_PER_SECOND = 5e9  # a checkpoint, copied to host memory while training waits; a thread writes it
BPE_TRAINING_BYTES_PER_SECOND = 4e6  # text, per core (benchmarks/README.md)
TOKENIZATION_BYTES_PER_SECOND = 2.5e6  # text, per core
EXPORT_SECONDS = 20.0
GPU_MEMORY = (8e9, 16e9, 24e9, 80e9, 141e9)
TIMED = (STEPS, EVALUATIONS, CHECKPOINTS)  # what --max_hours covers


def plan_run(recipe: Recipe, settings: TrainingSettings, hardware: Hardware) -> Plan:
    """Plan a run with these settings. Writes nothing.

    Raises:
        UserError: the corpus is missing or unusable, or the base or a teacher was trained on its held-out text.
    """
    corpus, _ = read_corpus(settings)
    check_held_out(settings, corpus)
    text = plan_text(settings, recipe.tokenizer_class, corpus)
    on_gpu = settings.preset == "h200" or hardware.device == "cuda"
    hardware = _planned_hardware(settings, hardware)
    one, two = (step_cost(recipe.build, settings, hardware, sequences) for sequences in (1, 2))
    per_sequence = two.memory.activations - one.memory.activations
    matrix = 0.0 if on_gpu else matmul_flops()
    ranks, gpus = planned_gpus(settings, here=hardware.device == "cuda") if on_gpu else (1, 0)
    rate = GPU_PEAK * GPU_MFU * ranks if on_gpu else matrix * CPU_MFU[hardware.precision]
    score_rate = rate / 2 if on_gpu else rate
    items_of = partial(_items, cost=one, rate=rate, score_rate=score_rate, hardware=hardware)
    *teachers, student = teacher_and_student_settings(settings)
    cached = replace(text, has_tokenizer=True, has_tokens=True, test_bytes=0)
    estimates = [items_of(teacher, cached) for teacher in teachers]
    teacher_items = _compiled_once([items for _, items in estimates])
    student = with_time_left(student, _timed(teacher_items))
    steps, items = items_of(student, text)
    expected: list[str] = []
    if _law_applies(settings, corpus, text, one.parameters):
        single = _limited_to(settings, num_epochs=UNIT_EPOCHS, num_models=1)  # the forecast's unit of compute
        unit = _timed(items_of(single, cached)[1])
        expected = recipe.law.describe(one.parameters, _timed([*teacher_items, *items]), unit)
    if teachers:
        each = f"{len(teachers)} × {estimates[0][0]:,} steps"
        items.insert(1, Item(TEACHERS, sum(item.seconds for item in teacher_items), each))
    assumptions = _assumptions(hardware, on_gpu, matrix)
    if ranks > 1:
        assumptions.append(f"{ranks} GPUs are {ranks} times as fast as one (an upper limit, not measured)")
    lines = [
        describe_gpus(settings),
        *_describe(settings, one, per_sequence, text, steps, hardware),
        *(_gpu_sizes(settings, one, per_sequence) if on_gpu else []),
        *expected,
    ]
    return Plan(
        lines,
        items,
        steps=planned_steps(student, text),
        by_time=student.max_hours is not None,
        assumptions=assumptions,
        gpus=gpus,
        export_bytes=one.memory.weights,
    )


def _planned_hardware(settings: TrainingSettings, hardware: Hardware) -> Hardware:
    """The hardware to plan for: this machine's, or, if it has no GPU, a GPU for the h200 preset."""
    if hardware.device == "cuda" or settings.preset != "h200":
        return hardware
    exact = settings.no_mixed_precision or settings.precision == "fp32"
    return replace(hardware, precision="fp32" if exact else "bf16", compile=not settings.no_compile)


def planned_steps(settings: TrainingSettings, text: TextPlan) -> int | None:
    """Number of steps until the first limit is reached; None if only ``--max_hours`` limits the run."""
    per_epoch = text.epoch_bytes / text.bytes_per_token / (settings.sequences_per_step * settings.max_length)
    return total_steps(settings, text.bytes_per_token, lambda epochs: round(epochs * per_epoch))


def _steps_in_time(
    settings: TrainingSettings, text: TextPlan, step: float, evaluation: float, checkpoint: float
) -> int:
    """Number of steps, at most those that fit into ``--max_hours``.

    Args:
        step, evaluation, checkpoint: seconds for each.
    """
    steps = planned_steps(settings, text)
    if settings.max_hours is not None:
        fitting = steps_within(
            settings.max_hours * 3600,
            0,
            step=step,
            evaluation=evaluation,
            checkpoint=checkpoint,
            eval_interval=settings.eval_interval,
            checkpoint_interval=settings.checkpoint_interval,
        )
        steps = min(steps or fitting, fitting)
    return steps or 1


def _items(
    settings: TrainingSettings, text: TextPlan, *, cost: StepCost, rate: float, score_rate: float, hardware: Hardware
) -> tuple[int, list[Item]]:
    """Return the number of steps and the itemized estimate.

    Args:
        rate, score_rate: FLOP/s of training and of scoring.
    """
    tokens = settings.sequences_per_step * settings.max_length
    model, optimizer = cost.flops_per_token * tokens, cost.optimizer_flops
    model *= relative_step_cost(settings)

    def scoring(size: int) -> tuple[float, float]:
        """Tokens and FLOPs to score ``size`` bytes: windows overlap by half; a forward pass costs a third of a step."""
        count = 2 * size / text.bytes_per_token
        return count, count * cost.flops_per_token / 3

    scored, score_flops = scoring(text.validation_bytes)
    # Worst case: every evaluation is the best so far and saves its weights.
    best, regular = cost.memory.weights, cost.memory.weights + cost.memory.optimizer
    step_seconds = (model + optimizer) / rate
    steps = _steps_in_time(settings, text, step_seconds, score_flops / score_rate, regular / HOST_COPY_BYTES_PER_SECOND)
    evaluations = -(-steps // settings.eval_interval)
    saves = steps // settings.checkpoint_interval
    test_tokens, test_flops = scoring(text.test_bytes)
    per_core = text.train_bytes / hardware.threads
    learning = 0.0 if text.has_tokenizer else per_core / BPE_TRAINING_BYTES_PER_SECOND
    encoding = 0.0 if text.has_tokens else per_core / TOKENIZATION_BYTES_PER_SECOND
    cached = "from the cache" if text.has_tokens else f"{text.train_bytes / 1e6:,.1f} MB"
    items = [
        Item(PREPARATION, learning + encoding, cached),
        Item(COMPILATION, COMPILE_SECONDS if hardware.compile else 0.0),
        Item(
            STEPS,
            steps * step_seconds,
            f"{steps:,} × ({model:.3g} FLOP for the model + {optimizer:.2g} for Muon's Newton-Schulz iteration)",
        ),
        Item(
            EVALUATIONS,
            evaluations * score_flops / score_rate,
            f"{evaluations} × {scored / 1e6:.2f} M tokens, {score_flops:.2g} FLOP",
        ),
        Item(
            CHECKPOINTS,
            (saves * regular + evaluations * best) / HOST_COPY_BYTES_PER_SECOND,
            f"{saves} × {regular / 1e9:.2f} GB, and at most {evaluations} × {best / 1e9:.2f} GB for the best weights",
        ),
        Item(
            EXPORT,
            EXPORT_SECONDS + test_flops / score_rate,
            f"{test_tokens / 1e6:.2f} M tokens, {test_flops:.2g} FLOP",
        ),
    ]
    return steps, items


def _assumptions(hardware: Hardware, on_gpu: bool, matrix: float) -> list[str]:
    """Describe what the estimate assumes; ``matrix`` is the measured rate of an fp32 matmul on a CPU, in FLOP/s."""
    return [
        f"MFU of {GPU_MFU:.0%} ({GPU_PEAK / 1e12:.0f} TFLOP/s), half of that for evaluations in fp32"
        if on_gpu
        else f"{CPU_MFU[hardware.precision]:.0%} of the {matrix / 1e9:.0f} GFLOP/s just measured for an fp32 matmul, "
        f"in {hardware.precision}",
        f"checkpoints copied at {HOST_COPY_BYTES_PER_SECOND / 1e9:.0f} GB/s, written in the background",
        f"tokenizer training at {BPE_TRAINING_BYTES_PER_SECOND / 1e6:.0f} MB/s and tokenization at "
        f"{TOKENIZATION_BYTES_PER_SECOND / 1e6:.1f} MB/s per core ({hardware.threads} cores)",
        f"{COMPILE_SECONDS:.0f} s to compile" if hardware.compile else _not_compiled(hardware),
        f"{EXPORT_SECONDS:.0f} s to export",
        f"{OVERHEAD / 1e9:.0f} GB of memory besides tensors, activations as in an uncompiled run",
        "no early stopping",
    ]


def _not_compiled(hardware: Hardware) -> str:
    if hardware.device != "cuda":
        return "not compiled"
    return f"not compiled ({hardware.reasons['compile']}): slower than estimated here, by an amount not measured"


def _compiled_once(teachers: list[list[Item]]) -> list[Item]:
    """Items of all teachers: these have the same compiled graphs, while the student's step has graphs of its own."""
    return [item for n, items in enumerate(teachers) for item in items if n == 0 or item.name != COMPILATION]


def _timed(items: list[Item]) -> float:
    """Total seconds of the items that ``--max_hours`` covers."""
    return sum(item.seconds for item in items if item.name in TIMED)


def _law_applies(settings: TrainingSettings, corpus: Corpus, text: TextPlan, parameters: int) -> bool:
    """Whether the run is similar to those that the recipe's law was measured on."""
    low, high = TEXT_PER_PARAMETER
    has_translations = corpus.primary_translation is not None
    from_scratch = settings.init_from is None and not settings.teacher and settings.preset == "h200"
    return from_scratch and has_translations and low <= text.train_bytes / parameters <= high


def _limited_to(settings: TrainingSettings, **values: Any) -> TrainingSettings:
    """Replace ``values``, with no limit on the run's length other than theirs."""
    changes: dict[str, Any] = dict.fromkeys(LENGTHS) | values
    return replace(settings, **changes)


def _describe(
    settings: TrainingSettings, one: StepCost, per_sequence: int, text: TextPlan, steps: int, hardware: Hardware
) -> list[str]:
    """Describe the run; ``per_sequence``: bytes of activations that each sequence after the first adds."""
    batch = settings.batch_size
    memory = replace(one.memory, activations=one.memory.activations + (batch - 1) * per_sequence)
    step_tokens = settings.sequences_per_step * settings.max_length
    flops = one.flops_per_token
    teachers = (settings.num_models - 1) * one.memory.weights
    disk = disk_bytes(settings, steps, one.memory.weights, one.memory.optimizer) + teachers
    return [
        f"{one.parameters:,} parameters; {flops / 1e6:,.0f} MFLOP per token (forward, backward, {hardware.precision})",
        f"about {steps * step_tokens / 1e6:,.1f} M tokens ({step_tokens:,} per step), {steps} steps, "
        f"{steps * step_tokens * text.bytes_per_token / text.epoch_bytes:.2f} epochs, "
        f"{flops * steps * step_tokens:.2g} FLOP",
        f"{text.bytes_per_token:.3f} bytes per token, {text.source}",
        f"memory with a micro-batch of {batch}: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in vars(memory).items())
        + f", total {memory.total / 1e9:.2f} GB",
        f"disk: at most {disk / 1e9:.2f} GB, for checkpoints, best weights and exports",
    ]


def _gpu_sizes(settings: TrainingSettings, one: StepCost, per_sequence: int) -> list[str]:
    """List the micro-batch that fits GPUs of several sizes."""
    fits = {size: fitting_micro_batch(one.memory, per_sequence, size, settings.batch_size) for size in GPU_MEMORY}
    return [
        f"{size / 1e9:.0f} GB: " + (f"a micro-batch of {count} fits" if count else "not even one sequence fits")
        for size, count in fits.items()
    ]


def matmul_flops(precision: str = "fp32", size: int = 1024) -> float:
    """Measure the FLOP/s of a square matmul ("fp32" or "bf16") on this CPU, the best of five."""
    import torch

    best, a = 0.0, torch.ones(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
