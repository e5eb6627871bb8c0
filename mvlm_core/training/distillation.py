"""Distillation: a model learns from the text and from what another one, its teacher, predicts at each token of it.

``--num_models K`` trains a chain: each model is the next one's teacher, and the last one is exported (born-again
networks, Furlanello et al., arXiv 1805.04770). Where a text is read many times, a teacher's probabilities say what a
text's own next token cannot: which other ones might have stood there. Measured in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mvlm_core.errors import UserError
from mvlm_core.settings import TrainingSettings

if TYPE_CHECKING:  # who only asks for a chain's settings does not wait for torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from mvlm_core.training.state import StepLoss

TEACHERS = Path("checkpoints", "teachers")  # below the output folder: a chain's models before the last
TEACHER_SHARE = 0.7  # of the loss
STUDENT_COST = 4 / 3  # of a step, beside one without a teacher: a forward pass more
TEACHER_LENGTH = 1 / 3  # of the last model's training: what overfits alone still learns from a teacher
_BLOCK_BYTES = 512 << 20
Model = TypeVar("Model", bound="PreTrainedModel")


def chain(settings: TrainingSettings) -> list[TrainingSettings]:
    """The settings of each model that ``--num_models`` asks for, the exported one last.

    Each has a seed of its own; those before the last are trained for ``TEACHER_LENGTH`` of its length. ``--max_hours``
    is the time of all of them together, shared out by what their steps cost.
    """
    root, last = Path(settings.output_dir or "") / TEACHERS, settings.num_models - 1
    costs = [
        (1 if number == 0 and settings.teacher is None else STUDENT_COST) * (1 if number == last else TEACHER_LENGTH)
        for number in range(settings.num_models)
    ]
    stages: list[TrainingSettings] = []
    for number, cost in enumerate(costs):
        changes: dict[str, Any] = {"num_models": 1, "seed": settings.seed + number}
        changes["teacher"] = stages[-1].output_dir if stages else settings.teacher
        if settings.max_hours is not None:
            changes["max_hours"] = settings.max_hours * cost / sum(costs)
        if number < last:
            changes |= {"output_dir": str(root / str(number)), "no_test_score": True}
            for name in ("num_epochs", "max_steps", "max_tokens", "max_bytes"):
                if (length := getattr(settings, name)) is not None:
                    shorter = TEACHER_LENGTH * length
                    changes[name] = shorter if name == "num_epochs" else max(1, round(shorter))
        stages.append(replace(settings, **changes))
    return stages


def load_teacher(settings: TrainingSettings, kind: type[Model], device: str) -> Model | None:
    """The teacher as a frozen model of this class, on its device; no code of the export is run.

    Raises:
        UserError: an export of another model.
    """
    from mvlm_core.training.preparation import teacher_of

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
    import torch
    from torch.utils.checkpoint import checkpoint

    from mvlm_core.training.state import StepLoss

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
