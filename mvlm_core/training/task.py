"""A run and its training task: the model on its device, with its data, ready for the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mvlm_core.data.batches import BatchSource
from mvlm_core.data.corpus import Document, named_texts, validation_subset
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import bits_per_byte, score_documents
from mvlm_core.hardware import Hardware
from mvlm_core.settings import TrainingSettings
from mvlm_core.training.distillation import load_teachers
from mvlm_core.training.distributed import SINGLE_RANK, Ranks
from mvlm_core.training.identity import run_identity
from mvlm_core.training.init_from import PretrainedExport
from mvlm_core.training.preparation import PreparedText
from mvlm_core.training.recipe import BuiltModel, Recipe
from mvlm_core.training.state import ScoresBefore


@dataclass(frozen=True)
class Run:
    """The model to train, its settings and hardware, and this process's rank."""

    recipe: Recipe
    settings: TrainingSettings
    hardware: Hardware
    ranks: Ranks = SINGLE_RANK

    @property
    def output_dir(self) -> Path:
        assert self.settings.output_dir is not None  # refused by run_training
        return Path(self.settings.output_dir)


@dataclass(frozen=True)
class TrainingTask(BuiltModel):
    """Everything the training loop needs.

    Attributes:
        evaluate: returns validation bits per byte of the current weights.
        identity: settings, data and tokenizer; a checkpoint resumes only if its identity is equal.
        teachers: frozen models on the device, of which each micro-batch distils from one.
        score_before: returns scores of an export's weights before the first step of fine-tuning.
    """

    batches: BatchSource
    evaluate: Callable[[], float]
    identity: dict[str, Any]
    teachers: list[Any]
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


def build_task(run: Run, text: PreparedText) -> TrainingTask:
    """Build the training task; the model is on its device, newly initialized or with an export's weights."""
    settings, ranks = run.settings, run.ranks
    torch.manual_seed(settings.seed)
    built = run.recipe.build(settings, text.tokenizer, run.hardware)
    if text.base is not None:
        load_weights(built.model, text.base, settings.max_length)
    built.optimizers.shard_over(ranks)
    for module in built.modules.values():
        module.to(run.hardware.device).train()
    subset = validation_subset(text.corpus, settings.validation_text)
    validation = own_shard([(document.path, part) for document, part in subset], ranks)
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
        return bits_per_byte(*ranks.all_reduce_scalars(score.nats, score.bytes))

    def evaluate() -> float:
        return bpb(validation, encode)

    def test_bpb(documents: list[Document]) -> float | None:
        if settings.no_test_score or not documents:
            return None
        return bpb(own_shard([*named_texts(documents)], ranks), text.tokenizer.encode)

    def score_before() -> ScoresBefore:
        if text.base is None:
            return ScoresBefore()
        return ScoresBefore(
            evaluate(), test_bpb(text.corpus.split("test")), test_bpb(text.old.test if text.old else [])
        )

    return TrainingTask(
        **vars(built),
        batches=text.batches,
        evaluate=evaluate,
        identity=run_identity(settings, text),
        teachers=load_teachers(text.teachers, type(built.model), run.hardware.device),
        score_before=score_before,
    )


def own_shard(documents: list[tuple[str, str]], ranks: Ranks) -> list[tuple[str, str]]:
    """This rank's share of (path, text) pairs, balanced by bytes."""
    return [documents[index] for index in ranks.balanced_shard([len(text.encode()) for _, text in documents])]


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


@torch.no_grad()
def copy_named(target: dict[str, Tensor], source: dict[str, Tensor], what: str) -> None:
    """Copy tensors by name, in place.

    Raises:
        ValueError: names or shapes differ; nothing has been copied.
    """
    if mismatched := sorted(target.keys() ^ source.keys()):
        raise ValueError(f"{what} do not match the model: {', '.join(mismatched[:3])}")
    for name, tensor in source.items():
        if tensor.shape != target[name].shape:
            raise ValueError(f"{what}: {name} has shape {list(tensor.shape)}, not {list(target[name].shape)}")
    for name, tensor in source.items():
        target[name].copy_(tensor)


def load_weights(model: nn.Module, base: PretrainedExport, context: int) -> None:
    """Copy an export's weights into a model of the same shape, whose ``context`` may be shorter.

    Raises:
        UserError: shapes differ, or the weights cannot be read.
    """
    longer = base.config["settings"].get("max_length")
    try:
        saved = load_file(base.folder / "model.safetensors")
        target = named_weights({"": model})
        for name, tensor in saved.items():
            if name in target and tensor.ndim and len(tensor) == longer and len(target[name]) == context:
                saved[name] = tensor[:context]  # position embeddings: only the first rows are needed
        copy_named(target, saved, "weights")
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"--init_from: {base.folder / 'model.safetensors'} does not fit: {error}") from None
