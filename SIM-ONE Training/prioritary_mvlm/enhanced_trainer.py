"""The trainer of model 2: what is its own, handed to the run both models share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mvlm_core.data.tokenizer import ByteLevelBPE
from mvlm_core.hardware import Hardware
from mvlm_core.training.optimizer import build_optimizers
from mvlm_core.training.run import run_training
from mvlm_core.training.state import BuiltModel, Recipe
from prioritary_mvlm.advanced_losses import ComprehensiveTrainingLoss, LossParts, mean_loss
from prioritary_mvlm.advanced_tokenizer import AdvancedBPETokenizer
from prioritary_mvlm.config import PrioritaryConfig
from simone_transformer import (
    EnhancedSIMONECommittee,
    EnhancedSIMONECommitteeConfig,
    EnhancedSIMONEConfig,
    EnhancedSIMONEModel,
    swiglu_width,
)

NAME = "simone_enhanced"


def model_config(
    config: PrioritaryConfig, tokenizer: ByteLevelBPE, attention_backend: str = "sdpa"
) -> EnhancedSIMONEConfig:
    """The model's shape from the run's settings."""
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": config.hidden_dim,
        "num_hidden_layers": config.num_members * config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": swiglu_width(config.ff_dim),
        "max_position_embeddings": config.max_length,
        "hidden_dropout": config.dropout,
        "policy_head": config.policy_head,
        "memory_head": config.memory_head,
        "trace_head": config.trace_head,
        "attention_backend": attention_backend,
        "tie_word_embeddings": config.output_head == "tied",
        "pad_token_id": tokenizer.token_id("pad_token"),
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
    }
    if config.num_members > 1:
        return EnhancedSIMONECommitteeConfig(num_members=config.num_members, **shape)
    return EnhancedSIMONEConfig(**shape)


def _loss(config: PrioritaryConfig) -> ComprehensiveTrainingLoss:
    return ComprehensiveTrainingLoss(
        config.hidden_dim,
        accuracy_weight=config.accuracy_weight,
        alignment_weight=config.alignment_weight,
        coherence_weight=config.coherence_weight,
        coherence_until=config.coherence_until,
        z_loss_weight=config.z_loss_weight,
    )


def build(config: PrioritaryConfig, tokenizer: ByteLevelBPE, hardware: Hardware) -> BuiltModel:
    """A fresh model, or committee of them, with its loss and optimizers."""
    shape = model_config(config, tokenizer, hardware.attention_backend)
    if isinstance(shape, EnhancedSIMONECommitteeConfig):
        model = EnhancedSIMONECommittee(shape)
        members = list(model.members)
    else:
        model = EnhancedSIMONEModel(shape)
        members = [model]
    losses = nn.ModuleList(_loss(config) for _ in members)
    modules = {"model": model, "loss": losses}
    forwards = [torch.compile(m.hidden_states) if hardware.compile else m.hidden_states for m in members]

    def loss(inputs: Tensor, targets: Tensor, document_weights: Tensor, share_done: float) -> LossParts:
        return mean_loss(
            [
                score(forward(inputs)[0], member.lm_head.weight, targets, document_weights, share_done)
                for member, forward, score in zip(members, forwards, losses, strict=True)
            ]
        )

    optimizers = build_optimizers(
        ((f"{prefix}.{name}", p) for prefix, module in modules.items() for name, p in module.named_parameters()),
        kind=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adamw_learning_rate=config.adamw_learning_rate,
        embedding_names=("embed_tokens", "lm_head", "policy_head", "memory_head"),
        muon_dtype=hardware.muon_dtype,
    )
    return BuiltModel(model, modules, loss, optimizers)


RECIPE = Recipe(
    name=NAME,
    title="Enhanced SIM-ONE",
    description=(
        "A decoder with rotary positions, SwiGLU, RMSNorm and governed attention (policy, memory and trace heads), "
        "trained from nothing on English Bible translations in the public domain."
    ),
    remote_code=True,
    tokenizer_class=AdvancedBPETokenizer,
    build=build,
)


class EnhancedPrioritaryTrainer:
    """``EnhancedPrioritaryTrainer(config, data_dir, output_dir).train()`` trains, exports and scores model 2.

    Args:
        config: the settings; its own ``data_dir`` and ``output_dir`` are replaced by the two that follow.
    """

    def __init__(self, config: PrioritaryConfig, data_dir: Path | str, output_dir: Path | str) -> None:
        self.config = replace(config, data_dir=str(data_dir), output_dir=str(output_dir))

    def train(self) -> Path:
        """Train to the end, or go on where an earlier call was interrupted; returns the export folder.

        Raises:
            UserError: bad settings or input, every problem named.
            Stopped: SIGINT or SIGTERM came; the checkpoint is written.
            TrainingFailed: the run cannot go on.
        """
        return run_training(RECIPE, self.config)
