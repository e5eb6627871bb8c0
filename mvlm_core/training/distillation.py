"""Distillation: a model learns from the text and from what another one, its teacher, predicts at each token of it.

``--num_models K`` trains a chain: each model is the next one's teacher, and the last one is exported (born-again
networks, Furlanello et al., arXiv 1805.04770). Where a text is read many times, a teacher's probabilities say what a
text's own next token cannot: which other ones might have stood there. Measured in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mvlm_core.errors import UserError
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.preparation import teacher_of
from mvlm_core.training.state import StepLoss

TEACHERS = "teachers"  # below the output folder: the models of a chain before the last
TEACHER_SHARE = 0.7  # of the loss
STUDENT_COST = 4 / 3  # of a step, beside one without a teacher: a forward pass more
_BLOCK_BYTES = 512 << 20
Model = TypeVar("Model", bound=PreTrainedModel)


def chain(settings: TrainingSettings) -> list[TrainingSettings]:
    """The settings of each model that ``--num_models`` asks for, the exported one last.

    They differ in their seeds. ``--max_hours`` is the time of all of them together, by what their steps cost.
    """
    count, root = settings.num_models, Path(settings.output_dir or "") / TEACHERS
    costs = [1 if number == 0 and settings.teacher is None else STUDENT_COST for number in range(count)]
    stages: list[TrainingSettings] = []
    for number in range(count):
        last = number == count - 1
        hours = settings.max_hours and settings.max_hours * costs[number] / sum(costs)
        stage = replace(
            settings,
            num_models=1,
            seed=settings.seed + number,
            teacher=stages[-1].output_dir if stages else settings.teacher,
            max_hours=hours,
            output_dir=settings.output_dir if last else str(root / str(number)),
            no_test_score=settings.no_test_score or not last,
        )
        stages.append(stage)
    return stages


def load_teacher(settings: TrainingSettings, kind: type[Model], device: str) -> Model | None:
    """The teacher as a frozen model of this class, on its device; no code of the export is run.

    Raises:
        UserError: an export of another model.
    """
    if (source := teacher_of(settings)) is None:
        return None
    try:
        model: Any = kind.from_pretrained(source.folder, local_files_only=True, use_safetensors=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"--teacher {settings.teacher}: not a model of this kind: {error}") from None
    return model.eval().requires_grad_(False).to(device)


def distilled(
    loss: StepLoss,
    inputs: Tensor,
    vocab_size: int,
    student: Callable[[slice], Tensor],
    teacher: Callable[[slice], Tensor],
) -> StepLoss:
    """A loss of which ``TEACHER_SHARE`` is the cross-entropy against the teacher's predictions, in nats per token.

    Args:
        inputs: ``[sequences, seq]``.
        student, teacher: some of the sequences to log probabilities ``[sequences, seq, vocab_size]``.
    """

    def nats(part: slice) -> Tensor:
        with torch.no_grad():
            wanted = teacher(part).exp()
        return -(wanted * student(part)).sum()

    each = max(1, _BLOCK_BYTES // (4 * inputs.shape[1] * vocab_size))
    parts = [slice(first, first + each) for first in range(0, len(inputs), each)]
    if len(parts) == 1:
        soft = nats(parts[0])
    else:  # whole batches of probabilities would be the largest tensors of the step: each part is computed twice
        soft = torch.stack([checkpoint(nats, part, use_reentrant=False) for part in parts]).sum()
    soft = soft / inputs.numel()
    total = torch.lerp(loss.total, soft, TEACHER_SHARE)
    return StepLoss(total, loss.train_loss, loss.parts | {"distillation_loss": soft.detach()})
