"""Building blocks of a training run: the recipe, the training task, the loop's state, and the run's length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mvlm_core.data.batches import BatchSource
from mvlm_core.data.corpus import Document, validation_subset
from mvlm_core.data.tokenizer import ByteLevelBPE
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import bits_per_byte, score_documents
from mvlm_core.hardware import Hardware
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.distributed import ALONE, Ranks
from mvlm_core.training.divergence import GuardState
from mvlm_core.training.forecast import Law
from mvlm_core.training.init_from import Source
from mvlm_core.training.optimizer import Optimizers, copy_named
from mvlm_core.training.preparation import PreparedText
from mvlm_core.training.time_budget import WARMUP_STEPS, RunLength

_WARMUP_SHARE = 0.02
# Defaults for settings missing from a recorded identity: removed since, or added after the checkpoint was written.
_UNNAMED = {"--ema_decay": 0.0, "--z_loss_weight": 1e-4, "--num_members": 1, "--validation_text": "primary"}


@dataclass(frozen=True)
class StepLoss:
    """The loss of one micro-batch: ``total`` is minimised, the rest is detached and logged."""

    total: Tensor
    train_loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BuiltModel:
    """A model with everything that trains it.

    Attributes:
        model: the transformers causal language model to export.
        modules: every module with trainable weights, by name; includes the model as "model".
        loss: (inputs, targets, document weights, share of the run done) → ``StepLoss`` or an object like it.
        idle: share of the run done → parameters that get no gradient from then on, if that changes during a run.
    """

    model: Any
    modules: dict[str, nn.Module]
    loss: Callable[[Tensor, Tensor, Tensor, float], Any]
    optimizers: Optimizers
    idle: Callable[[float], Iterable[Tensor]] = field(default=lambda share_done: (), kw_only=True)


@dataclass(frozen=True)
class Recipe:
    """The model-specific part of training.

    Attributes:
        name: used for the export folder and the archive.
        build: (settings, tokenizer, hardware) → newly initialized model on the CPU; the generator is already seeded.
        law: what to expect of the ``h200`` preset.
    """

    name: str
    title: str
    description: str
    remote_code: bool
    tokenizer_class: type[ByteLevelBPE]
    build: Callable[[Any, ByteLevelBPE, Hardware], BuiltModel]
    law: Law


@dataclass(frozen=True)
class Run:
    """The model to train, its settings and hardware, and this process's rank."""

    recipe: Recipe
    settings: TrainingSettings
    hardware: Hardware
    ranks: Ranks = ALONE

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir or "")


@dataclass(frozen=True)
class TrainingTask(BuiltModel):
    """Everything the training loop needs.

    Attributes:
        evaluate: returns validation bits per byte of the current weights.
        identity: settings, data and tokenizer; a checkpoint resumes only if its identity is equal.
        score_before: returns scores of an export's weights before the first step of further training.
    """

    batches: BatchSource
    evaluate: Callable[[], float]
    identity: dict[str, Any]
    score_before: Callable[[], ScoresBefore]

    def weights(self) -> dict[str, Tensor]:
        """All weights by ``<module>.<parameter>``; tied weights appear once."""
        return named_weights({f"{prefix}.": module for prefix, module in self.modules.items()})

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of a checkpoint, by file name."""
        return {"model": self.weights(), "optimizer": self.optimizers.state_tensors()}

    def load_state_tensors(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Restore what ``state_tensors`` returned, or some of its files.

        Raises:
            ValueError: names or shapes do not match.
        """
        copy_named(self.weights(), tensors["model"], "weights")
        if "optimizer" in tensors:
            self.optimizers.load_state_tensors(tensors["optimizer"])


def named_weights(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Weights of modules by ``<prefix><name>``; tied weights appear once, under their first name."""
    named: dict[str, Tensor] = {}
    seen = set()
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            if tensor.data_ptr() not in seen or tensor.numel() == 0:
                named[f"{prefix}{name}"] = tensor
                seen.add(tensor.data_ptr())
    return named


def load_weights(model: nn.Module, source: Source, context: int) -> None:
    """Copy an export's weights into a model of the same shape, whose ``context`` may be shorter.

    Raises:
        UserError: shapes differ, or the weights cannot be read.
    """
    longer = source.config["settings"].get("max_length")
    try:
        saved = load_file(source.folder / "model.safetensors")
        target = named_weights({"": model})
        for name, tensor in saved.items():
            if name in target and tensor.ndim and len(tensor) == longer and len(target[name]) == context:
                saved[name] = tensor[:context]  # position embeddings: only the first rows are needed
        copy_named(target, saved, "weights")
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"--init_from: {source.folder / 'model.safetensors'} does not fit: {error}") from None


def build_task(run: Run, text: PreparedText) -> TrainingTask:
    """Build the training task; the model has newly initialized weights or an export's and is on its device."""
    settings, ranks = run.settings, run.ranks
    torch.manual_seed(settings.seed)
    built = run.recipe.build(settings, text.tokenizer, run.hardware)
    if text.source is not None:
        load_weights(built.model, text.source, settings.max_length)
    built.optimizers.spread_over(ranks)
    for module in built.modules.values():
        module.to(run.hardware.device).train()
    subset = validation_subset(text.corpus, whole=settings.validation_text == "all")
    validation = own_part([(document.path, part) for document, part in subset], ranks)
    encode = cache(text.tokenizer.encode)  # the same text at every evaluation

    def bpb(documents: list[tuple[str, str]], encode: Callable[[str], list[int]]) -> float:
        score = score_documents(
            built.model,
            encode,
            documents,
            start_id=text.tokenizer.start_id,
            context=settings.max_length,
            device=run.hardware.device,
        )
        return bits_per_byte(*ranks.sum_numbers(score.nats, score.bytes))

    def evaluate() -> float:
        return bpb(validation, encode)

    def test_bpb(documents: list[Document]) -> float | None:
        if settings.no_test_score or not documents:
            return None
        return bpb(own_part([(d.path, d.read()) for d in documents], ranks), text.tokenizer.encode)

    def score_before() -> ScoresBefore:
        if text.source is None:
            return ScoresBefore()
        return ScoresBefore(
            evaluate(), test_bpb(text.corpus.split("test")), test_bpb(text.old.test if text.old else [])
        )

    return TrainingTask(
        **vars(built),
        batches=text.batches,
        evaluate=evaluate,
        identity=run_identity(settings, text),
        score_before=score_before,
    )


def own_part(documents: list[tuple[str, str]], ranks: Ranks) -> list[tuple[str, str]]:
    """This rank's share of (path, text) pairs, balanced by bytes."""
    return [documents[index] for index in ranks.part_by_size([len(text.encode()) for _, text in documents])]


def run_identity(settings: TrainingSettings, text: PreparedText) -> dict[str, Any]:
    """Settings and fingerprints that define a run; a checkpoint with a different identity is refused."""
    flags = {f"--{name}": value for name, value in settings.identity().items()}
    fingerprints = {"corpus": text.corpus.fingerprint, "tokenizer": text.tokenizer.sha256}
    if text.source is not None:
        fingerprints["--init_from, its manifest"] = text.source.sha256
    if text.teachers:
        fingerprints["--teacher, its manifest"] = ",".join(teacher.sha256 for teacher in text.teachers)
    if text.old is not None and text.batches.replay is not None:
        fingerprints["--replay"] = f"{text.batches.replay_share} of {text.old.corpus.fingerprint}"
    return {"--preset": settings.preset} | flags | fingerprints


def check_identity(what: str, recorded: Any, current: dict[str, Any]) -> None:
    """Check that the identity recorded in ``what`` (for the message) is the current run's.

    Raises:
        UserError: lists every value that differs.
    """
    old, new = _UNNAMED | (recorded if isinstance(recorded, dict) else {}), _UNNAMED | current
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differing:
        problems = [f"{what} of another run: {name} was {old.get(name)}, now {new.get(name)}" for name in differing]
        raise UserError([*problems, "restore those values, choose another --output_dir, or start over with --fresh"])


@dataclass
class Overhead:
    """Number of evaluations and checkpoints so far, and the seconds for which they blocked training."""

    evaluations: int = 0
    evaluation_seconds: float = 0.0
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0


@dataclass
class ScoresBefore:
    """Bits per byte of the export that a run starts from, on validation text, test text and the old corpus's test text.
    None where not measured."""

    validation_bpb: float | None = None
    test_bpb: float | None = None
    old_test_bpb: float | None = None


@dataclass
class LoopState:
    """Progress of a run, saved in full in every checkpoint.

    Attributes:
        seconds: wall time since the first step, including evaluations and checkpoints, excluding interruptions.
        step_seconds: time in training steps only, for throughput.
        best_step, best_bpb: best evaluation so far.
        evaluations_since_best: for early stopping.
        micro_batch: sequences per forward pass that fit in memory.
        finished: the run reached its end (or stopped early) at this step.
        guard: state of the divergence guard.
        fixed_at, fixed_steps: step at which ``--max_hours`` fixed the run's length, and that length in steps.
        spent: time for evaluations and checkpoints.
        timed_steps, timed_seconds: step timings of ``--max_hours`` before it fixed the length.
        before: scores of the export that the run starts from.
    """

    step: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    best_step: int | None = None
    best_bpb: float | None = None
    evaluations_since_best: int = 0
    micro_batch: int = 0
    finished: bool = False
    stopped_early: bool = False
    guard: GuardState = field(default_factory=GuardState)
    fixed_at: int | None = None
    fixed_steps: int | None = None
    spent: Overhead = field(default_factory=Overhead)
    timed_steps: int = 0
    timed_seconds: float = 0.0
    before: ScoresBefore = field(default_factory=ScoresBefore)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> LoopState:
        """Read the state from a checkpoint.

        Raises:
            ValueError: a value is missing or has the wrong type.
        """
        # Defaults for fields that older checkpoints lack.
        older = {"step_seconds": saved.get("seconds"), "timed_steps": 0, "timed_seconds": 0.0}
        values = older | {"spent": asdict(Overhead()), "before": asdict(ScoresBefore())} | saved
        nested = {"guard": GuardState, "spent": Overhead, "before": ScoresBefore}
        parts = {name: _typed(part, values.get(name)) for name, part in nested.items()}
        return _typed(cls, values | parts)


def _typed(cls: type, saved: Any) -> Any:
    """Construct dataclass ``cls`` from ``saved``, checking each field against its declared type."""
    values = {}
    for name, hint in get_type_hints(cls).items():
        value = saved.get(name) if isinstance(saved, dict) else None
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(0.0, hint):
            value = float(value)
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{name} is {value!r:.40}")
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
        values[name] = value
    return cls(**values)


def run_length(settings: TrainingSettings, batches: BatchSource) -> RunLength:
    """Length of the run, before ``--max_hours`` has fixed it.

    Raises:
        UserError: the warm-up is not shorter than the run.
    """
    total, warmup = total_steps(settings, batches), settings.warmup_steps
    if settings.max_hours is not None or total is None:
        return RunLength(total, WARMUP_STEPS if warmup is None else warmup, by_time=True)
    if warmup is None:
        warmup = max(1, round(_WARMUP_SHARE * total))
    elif warmup >= total:  # the learning rate would never reach its peak
        raise UserError(f"--warmup_steps {warmup} is not shorter than the run of {total} steps")
    return RunLength(total, warmup)


def total_steps(settings: TrainingSettings, batches: BatchSource) -> int | None:
    """Optimizer steps until the first limit is reached; None if only ``--max_hours`` limits the run."""
    limits = []
    if settings.max_steps:
        limits.append(settings.max_steps)
    if settings.max_tokens:
        limits.append(round(settings.max_tokens / batches.tokens_per_batch))
    if settings.max_bytes:
        limits.append(round(settings.max_bytes / batches.bytes_per_token / batches.tokens_per_batch))
    if settings.num_epochs:
        limits.append(batches.steps_for_epochs(settings.num_epochs))
    return max(1, min(limits)) if limits else None
