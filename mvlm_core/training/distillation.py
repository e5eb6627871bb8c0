"""Knowledge distillation: a student learns from the text and from its teachers' next-token distributions.

``--num_models K`` trains K − 1 teachers and then the exported model as their student (Hinton et al., arXiv 1503.02531).
When a text is repeated for many epochs, soft targets add information that the one-hot next token lacks. Measurements:
benchmarks/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mvlm_core.errors import UserError
from mvlm_core.export.manifest import TEACHERS
from mvlm_core.settings import TrainingSettings

if TYPE_CHECKING:  # `teacher_and_student_settings` must not import torch
    from transformers import PreTrainedModel

    from mvlm_core.training.init_from import PretrainedExport

DISTILLATION_WEIGHT = 0.7  # share of the loss that comes from the teacher
Model = TypeVar("Model", bound="PreTrainedModel")


def teacher_and_student_settings(settings: TrainingSettings) -> list[TrainingSettings]:
    """Return the settings of each model of ``--num_models``: teachers, then their student, which is exported.

    Each teacher has its own seed and is trained for ``--teacher_epochs``, or as long as the student if that is shorter.
    ``--max_hours`` covers all models; each teacher gets at most that divided by the number of teachers plus 4.
    """
    count = settings.num_models - 1
    if not count:
        return [settings]
    assert settings.output_dir is not None  # refused by run_training
    root = Path(settings.output_dir) / TEACHERS
    shorter: dict[str, Any] = {"num_models": 1, "no_test_score": True, "resume_from": None}
    shorter["num_epochs"] = min(settings.num_epochs or math.inf, settings.teacher_epochs)
    if settings.max_hours is not None:
        shorter["max_hours"] = settings.max_hours / (count + 4)
    teachers = [
        replace(settings, output_dir=str(root / str(number)), seed=(settings.seed + number + 1) % 2**32, **shorter)
        for number in range(count)
    ]
    student = replace(settings, num_models=1, teacher=tuple(str(teacher.output_dir) for teacher in teachers))
    return [*teachers, student]


def with_time_left(student: TrainingSettings, seconds: float) -> TrainingSettings:
    """Return the student's settings with its teachers' ``seconds`` subtracted from ``--max_hours``."""
    if student.max_hours is None:
        return student
    return replace(student, max_hours=max(0.01 * student.max_hours, student.max_hours - seconds / 3600))


def relative_step_cost(settings: TrainingSettings) -> float:
    """Cost of a training step relative to one without a teacher; a teacher adds its forward pass."""
    return 4 / 3 if settings.teacher else 1


def load_teachers(exports: Iterable[PretrainedExport], model_class: type[Model], device: str) -> list[Model]:
    """Load exports as frozen models of ``model_class`` on ``device``, without running the exports' code.

    Raises:
        UserError: an export is not a ``model_class``.
    """
    models: list[Model] = []
    for export in exports:
        try:
            model: Any = model_class.from_pretrained(export.folder, local_files_only=True, use_safetensors=True)
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"--teacher {export.folder}: not a {model_class.__name__}: {error}") from None
        models.append(model.eval().requires_grad_(False).to(device))
    return models


def draw_teacher(teachers: Sequence[Model]) -> Model | None:
    """Draw one teacher for a micro-batch; None without teachers.

    In expectation, the gradient is that of the teachers' mean distribution, at the cost of a single teacher. The draw
    depends only on the seed that the loop sets for each micro-batch, so a resumed run repeats it.
    """
    import torch

    return teachers[torch.initial_seed() % len(teachers)] if teachers else None
