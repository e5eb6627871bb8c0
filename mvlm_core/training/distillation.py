"""Knowledge distillation: a student learns from the text and from its teacher's next-token distribution.

``--num_models K`` trains a chain: each model is the next one's teacher, and the last one is exported (born-again
networks, Furlanello et al., arXiv 1805.04770). When a text is read many times, the teacher's soft targets add
information that the one-hot next token lacks. Measured in benchmarks/README.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mvlm_core.errors import UserError
from mvlm_core.settings import TrainingSettings

if TYPE_CHECKING:  # `chain` alone must not import torch
    from transformers import PreTrainedModel

TEACHERS = Path("checkpoints", "teachers")  # below the output folder: a chain's models before the last
TEACHER_SHARE = 0.7  # of the loss
TEACHER_LENGTH = 1 / 3  # of the student's training: at full length a model overfits by itself, but not with a teacher
Model = TypeVar("Model", bound="PreTrainedModel")


def chain(settings: TrainingSettings) -> list[TrainingSettings]:
    """Return the settings of each model of ``--num_models``, the exported one last.

    Each has its own seed, the last that of ``--seed``. All but the last are trained for ``TEACHER_LENGTH`` of its
    length. ``--max_hours`` covers the whole chain and is divided by the models' training cost.
    """
    root, last = Path(settings.output_dir or "") / TEACHERS, settings.num_models - 1
    stages: list[TrainingSettings] = []
    for number in range(settings.num_models):
        changes: dict[str, Any] = {"num_models": 1}
        changes["teacher"] = stages[-1].output_dir if stages else settings.teacher
        if number < last:
            seed = (settings.seed + number + 1) % 2**32
            changes |= {"output_dir": str(root / str(number)), "seed": seed, "no_test_score": True}
            for name in ("num_epochs", "max_steps", "max_tokens", "max_bytes"):
                if (length := getattr(settings, name)) is not None:
                    shorter = TEACHER_LENGTH * length
                    changes[name] = shorter if name == "num_epochs" else max(1, round(shorter))
        stages.append(replace(settings, **changes))
    if settings.max_hours is None:
        return stages
    costs = [relative_step_cost(stage) * (1 if stage is stages[-1] else TEACHER_LENGTH) for stage in stages]
    hours = [settings.max_hours * cost / sum(costs) for cost in costs]
    return [replace(stage, max_hours=share) for stage, share in zip(stages, hours, strict=True)]


def relative_step_cost(settings: TrainingSettings) -> float:
    """Cost of a model's training step, relative to one without a teacher: a teacher adds a forward pass."""
    return 1 if settings.teacher is None else 4 / 3


def load_teacher(settings: TrainingSettings, model_class: type[Model], device: str) -> Model | None:
    """Load the teacher as a frozen ``model_class`` on its device; none of the export's code is run.

    Raises:
        UserError: the export holds another model.
    """
    from mvlm_core.training.preparation import teacher_of

    if (source := teacher_of(settings)) is None:
        return None
    try:
        model: Any = model_class.from_pretrained(source.folder, local_files_only=True, use_safetensors=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"--teacher {settings.teacher}: not a {model_class.__name__}: {error}") from None
    return model.eval().requires_grad_(False).to(device)
