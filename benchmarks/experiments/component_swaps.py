"""Component swaps for ablations: model 2 with one component replaced by its classic counterpart, or removed, at a
similar parameter count.

Each function changes a built model. The exported modeling files do not match the resulting weights, so
only the figures of such an export can be used, with ``no_test_score``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mvlm_core.data.tokenizer import ByteLevelBPE
from mvlm_core.hardware import Hardware
from mvlm_core.training.recipe import BuiltModel, Recipe
from prioritary_mvlm.config import PrioritaryConfig
from prioritary_mvlm.enhanced_trainer import add_training, model_config
from simone_transformer import EnhancedSIMONEModel


class _LayerNorm(nn.LayerNorm):
    """LayerNorm with the call signature of ``RMSNorm``."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return super().forward(x)


def layer_norm(model: EnhancedSIMONEModel) -> None:
    """Replace RMSNorm with LayerNorm with gain and bias, except on queries and keys."""
    for module in [model, *model.layers]:
        for name in ("embed_norm", "attention_norm", "feed_forward_norm", "final_norm"):
            if hasattr(module, name):
                setattr(module, name, _LayerNorm(model.config.hidden_size, model.config.rms_norm_eps))


def gelu(model: EnhancedSIMONEModel) -> None:
    """Replace SwiGLU with GPT-2's feed-forward layer, 1.5 times as wide."""
    width, inner = model.config.hidden_size, model.config.intermediate_size * 3 // 2
    for layer in model.layers:
        up, down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        layer.feed_forward = nn.Sequential(up, nn.GELU("tanh"), down).apply(model._init_weights)


def no_pointer(model: EnhancedSIMONEModel) -> None:
    """Remove the pointer but keep the rest of the memory head."""
    model.pointer = None


def plain_queries(model: EnhancedSIMONEModel) -> None:
    """Remove the normalization of queries and keys."""
    for layer in model.layers:
        layer.attention.q_norm = layer.attention.k_norm = nn.Identity()


def learned_positions(model: EnhancedSIMONEModel) -> None:
    """Replace rotary with learned position embeddings. Does not support cached decoding."""
    config, embed = model.config, model.embed_tokens
    positions = torch.empty(config.max_position_embeddings, config.hidden_size).normal_(std=config.initializer_range)
    embed.positions = nn.Parameter(positions)
    embed.register_forward_hook(lambda _module, _ids, tokens: tokens + embed.positions[: tokens.shape[1]])
    model.rotary.register_forward_hook(lambda *call: (torch.ones_like(call[2][0]), torch.zeros_like(call[2][1])))


COMPONENT_SWAPS: dict[str, Callable[[EnhancedSIMONEModel], None]] = {
    swap.__name__: swap for swap in (layer_norm, gelu, no_pointer, plain_queries, learned_positions)
}


def with_component_swap(recipe: Recipe, name: str) -> Recipe:
    """Return model 2's recipe with one of ``COMPONENT_SWAPS``."""

    def build(config: PrioritaryConfig, tokenizer: ByteLevelBPE, hardware: Hardware) -> BuiltModel:
        model = EnhancedSIMONEModel(model_config(config, tokenizer, hardware.attention_backend))
        COMPONENT_SWAPS[name](model)
        return add_training(model, config, hardware)

    return replace(recipe, build=build)
