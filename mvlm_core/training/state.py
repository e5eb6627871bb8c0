"""Progress of a run: what its checkpoints hold besides tensors and the run's identity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from mvlm_core.training.divergence import GuardState


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
        tokens, bytes: training tokens so far, and the UTF-8 bytes of their text.
        seconds: wall time since the first step, including evaluations and checkpoints, excluding interruptions.
        step_seconds: time in training steps only, for throughput.
        best_step, best_bpb: best evaluation so far.
        evaluations_since_best: for early stopping.
        micro_batch: sequences per forward pass that fit in memory.
        finished: the run reached its end (or stopped early) at this step.
        guard: state of the divergence guard.
        fixed_at, fixed_steps: step at which ``--max_hours`` was translated into steps, and their number.
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
