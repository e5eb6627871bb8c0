"""Contents of a checkpoint other than tensors: the run's progress, and its identity, which must match to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from mvlm_core.errors import UserError
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.divergence import GuardState
from mvlm_core.training.preparation import PreparedText

TEACHERS_KEY = "--teacher, its manifest"  # of an identity: the teachers' hashes, separated by commas


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
        timed_steps, timed_seconds: steps timed for ``--max_hours`` before the length is fixed, and their seconds.
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
        nested = {"guard": GuardState, "spent": Overhead, "before": ScoresBefore}
        return _typed(cls, saved | {name: _typed(part, saved.get(name)) for name, part in nested.items()})


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


def settings_identity(settings: TrainingSettings) -> dict[str, Any]:
    """The part of a run's identity that the settings determine."""
    return {"--preset": settings.preset} | {f"--{name}": value for name, value in settings.identity().items()}


def check_settings(what: str, recorded: dict[str, Any], settings: TrainingSettings, teachers: int) -> None:
    """Check the part of a recorded identity that is known before the teachers are trained, including their number.

    Raises:
        UserError: lists every value that differs.
    """
    expected = settings_identity(settings) | {"number of teachers": teachers}
    known = {name: value for name, value in recorded.items() if name in expected}
    hashes = recorded.get(TEACHERS_KEY)
    check_identity(what, known | {"number of teachers": len(str(hashes).split(",")) if hashes else 0}, expected)


def run_identity(settings: TrainingSettings, text: PreparedText) -> dict[str, Any]:
    """Settings and fingerprints that define a run; a checkpoint with a different identity is refused."""
    fingerprints = {"corpus": text.corpus.fingerprint, "tokenizer": text.tokenizer.sha256}
    if text.base is not None:
        fingerprints["--init_from, its manifest"] = text.base.sha256
    if text.teachers:
        fingerprints[TEACHERS_KEY] = ",".join(teacher.sha256 for teacher in text.teachers)
    if text.old is not None and text.batches.replay is not None:
        fingerprints["--replay"] = f"{text.batches.replay_share} of {text.old.corpus.fingerprint}"
    return settings_identity(settings) | fingerprints


def check_identity(what: str, recorded: Any, current: dict[str, Any]) -> None:
    """Check that the identity recorded in ``what`` (for the message) matches the current run's.

    Raises:
        UserError: lists every value that differs.
    """
    old = recorded if isinstance(recorded, dict) else {}
    differing = [name for name in sorted(old.keys() | current.keys()) if old.get(name) != current.get(name)]
    if differing:
        problems = [
            f"{what} from a different run: {name} was {old.get(name)}, now {current.get(name)}" for name in differing
        ]
        raise UserError([*problems, "restore those values, choose another --output_dir, or start over with --fresh"])
