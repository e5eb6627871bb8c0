"""The model-specific part of training: how to build the model, its loss and its optimizers, and its expected score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mvlm_core.data.tokenizer import ByteLevelBPE
from mvlm_core.hardware import Hardware
from mvlm_core.training.forecast import ScalingLaw
from mvlm_core.training.optimizer import Optimizers


@dataclass(frozen=True)
class StepLoss:
    """The loss of one micro-batch: ``total`` is minimized, the rest is detached and logged. All are 0-dim, in
    nats per token."""

    total: Tensor
    train_loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BuiltModel:
    """A model with everything needed to train it.

    Attributes:
        model: the transformers causal language model to export.
        modules: every module with trainable weights, by name: "model", then those that may get no gradient.
        loss: (inputs, targets, document weights, each ``[batch, seq]``; progress, teacher) → ``StepLoss``; progress is
            the completed fraction of the run, the teacher a frozen model of the same class to distill from, or None.
    """

    model: Any
    modules: dict[str, nn.Module]
    loss: Callable[..., StepLoss]
    optimizers: Optimizers


@dataclass(frozen=True)
class Recipe:
    """The model-specific part of training.

    Attributes:
        name: used for the export folder and the archive.
        description: of the architecture, for the model card.
        modeling_folder: contains the modeling files that ship with the export; None if transformers has the class.
        build: (settings, tokenizer, hardware) → newly initialized model on the CPU; the generator is already seeded.
        law: forecasts the score of the ``h200`` preset.
        only_sdpa: whether the model has no attention kernel other than PyTorch's.
    """

    name: str
    title: str
    description: str
    modeling_folder: Path | None
    tokenizer_class: type[ByteLevelBPE]
    build: Callable[[Any, ByteLevelBPE, Hardware], BuiltModel]
    law: ScalingLaw
    only_sdpa: bool = False
