"""Trainer of model 2: the model-specific part of the shared training run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mvlm_core.data.tokenizer import ByteLevelBPE
from mvlm_core.hardware import Hardware
from mvlm_core.training.distillation_loss import Prediction
from mvlm_core.training.forecast import ScalingLaw
from mvlm_core.training.optimizer import build_optimizers
from mvlm_core.training.recipe import BuiltModel, Recipe, StepLoss
from mvlm_core.training.run import run_training
from prioritary_mvlm.advanced_losses import ComprehensiveTrainingLoss
from prioritary_mvlm.advanced_tokenizer import AdvancedBPETokenizer
from prioritary_mvlm.config import MODELING_FILES, NAME, PrioritaryConfig
from simone_transformer import EnhancedSIMONEConfig, EnhancedSIMONEModel, swiglu_width
from simone_transformer.enhanced_model import run_layer
from simone_transformer.rope_attention import pointer_distribution


def model_config(config: PrioritaryConfig, tokenizer: ByteLevelBPE, attention_backend: str) -> EnhancedSIMONEConfig:
    """Return the model config for these settings."""
    return EnhancedSIMONEConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=swiglu_width(config.ff_dim),
        max_position_embeddings=config.max_length,
        hidden_dropout=config.dropout,
        policy_head=config.policy_head,
        memory_head=config.memory_head,
        trace_head=config.trace_head,
        attention_backend=attention_backend,
        tie_word_embeddings=config.output_head == "tied",
        pad_token_id=tokenizer.token_id("pad_token"),
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
    )


def build(config: PrioritaryConfig, tokenizer: ByteLevelBPE, hardware: Hardware) -> BuiltModel:
    """Build a new model with its loss and optimizers."""
    model = EnhancedSIMONEModel(model_config(config, tokenizer, hardware.attention_backend))
    return add_training(model, config, hardware)


def add_training(model: EnhancedSIMONEModel, config: PrioritaryConfig, hardware: Hardware) -> BuiltModel:
    """Add the loss and the optimizers to a model."""
    criterion = ComprehensiveTrainingLoss(
        config.hidden_dim,
        accuracy_weight=config.accuracy_weight,
        alignment_weight=config.alignment_weight,
        coherence_weight=config.coherence_weight,
        coherence_until=config.coherence_until,
        loss_kernel=hardware.loss_kernel,
    )
    modules: dict[str, nn.Module] = {"model": model, "loss": criterion}
    layer, pointer = hardware.compiled(run_layer), hardware.compiled(pointer_distribution)
    hidden_states = partial(EnhancedSIMONEModel.hidden_states, layer_function=layer, pointer_function=pointer)

    def loss(
        inputs: Tensor,
        targets: Tensor,
        document_weights: Tensor,
        progress: float,
        teacher: EnhancedSIMONEModel | None = None,
    ) -> StepLoss:
        hidden, pointer_output = hidden_states(model, inputs)
        teacher_prediction = None
        if teacher is not None:
            with torch.no_grad():
                target = hidden_states(teacher, inputs)
            teacher_prediction = Prediction(target[0], teacher.lm_head.weight, target[1])
        return criterion(
            hidden, model.lm_head.weight, targets, document_weights, progress, pointer_output, teacher_prediction
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
        "A decoder with rotary position embeddings, SwiGLU, RMSNorm and governance heads (policy, memory and trace)"
    ),
    modeling_folder=MODELING_FILES,
    tokenizer_class=AdvancedBPETokenizer,
    build=build,
    law=ScalingLaw(
        scores=((246_876, 3.0372), (920_275, 2.3640), (3_776_349, 1.9962)),
        score_ratios=((1, 1.0), (2.3, 0.95), (5, 0.933), (9, 0.928)),
        ratio_error=0.03,
        reached=(60_000_000, 1.42),  # 1.9 M parameters, 30 MB: test 1.3879, which is 2 % below validation
    ),
)


class EnhancedPrioritaryTrainer:
    """Train, export and evaluate model 2: ``EnhancedPrioritaryTrainer(config, data_dir, output_dir).train()``.

    Args:
        config: the settings; ``data_dir`` and ``output_dir`` override its values.
    """

    def __init__(self, config: PrioritaryConfig, data_dir: Path | str, output_dir: Path | str) -> None:
        self.config = replace(config, data_dir=str(data_dir), output_dir=str(output_dir))
        self.config.preset_is_automatic = config.preset_is_automatic  # the copy's preset is already resolved

    def train(self) -> Path:
        """Train to the end, resuming an interrupted run, and return the export folder.

        Raises:
            UserError: invalid settings or input; lists all problems.
            Stopped: SIGINT or SIGTERM, after a checkpoint was saved.
            TrainingError: the run cannot continue.
        """
        return run_training(RECIPE, self.config)
