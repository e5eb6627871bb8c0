"""Model 2 with a classic part in the place of a modern one, as many parameters: for trials of what the part is worth.

Each function changes the model's classes in this process, before a model is built. What is exported then holds weights
for a model that its modelling files do not make: such a folder is for its figures alone, with ``no_test_score``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simone_transformer import enhanced_model, rope_attention


class ClassicFeedForward(nn.Module):
    """``down(gelu(up(x)))``, half again as wide as the SwiGLU that it stands for."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, inner_dim * 3 // 2, bias=False)
        self.down_proj = nn.Linear(inner_dim * 3 // 2, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


def layer_norm() -> None:
    """LayerNorm with gain and bias for RMSNorm, but for queries and keys."""
    enhanced_model.RMSNorm = nn.LayerNorm


def gelu() -> None:
    """GPT-2's feed-forward layer for SwiGLU."""
    enhanced_model.SwiGLU = ClassicFeedForward


def plain_queries() -> None:
    """Queries and keys as they are projected, not normalised."""
    rope_attention.RMSNorm = lambda dim, eps: nn.Identity()


def learned_positions() -> None:
    """A learned embedding of each position, added to the token's; nothing is rotated."""

    def unrotated(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = rope_attention.rotary_tables(positions, head_dim, theta, dtype)
        return torch.ones_like(cos), torch.zeros_like(sin)

    class Positioned(enhanced_model.EnhancedSIMONEModel):
        def __init__(self, config: enhanced_model.EnhancedSIMONEConfig) -> None:
            super().__init__(config)
            # "embed_tokens" in the name: AdamW's, as the token embedding is.
            self.embed_tokens_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            nn.init.normal_(self.embed_tokens_positions.weight, std=config.initializer_range)
            self.embed_tokens.register_forward_hook(
                lambda module, inputs, output: output + self.embed_tokens_positions.weight[: output.shape[1]]
            )

    enhanced_model.rotary_tables = unrotated
    from prioritary_mvlm import enhanced_trainer

    enhanced_trainer.EnhancedSIMONEModel = Positioned


CLASSIC_PARTS = {part.__name__: part for part in (layer_norm, gelu, plain_queries, learned_positions)}
