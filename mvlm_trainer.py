#!/usr/bin/env python3
"""Train model 1, MVLM-GPT2: a standard GPT-2 as the baseline."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bible_corpus.settings import BibleSettings
from mvlm_core.command_line import trainer_settings
from mvlm_core.errors import run_main
from mvlm_core.hardware import Hardware
from mvlm_core.settings import REPOSITORY_ROOT
from mvlm_core.training.init_from import inherit

if TYPE_CHECKING:  # heavy imports come after argument parsing, so that --help is fast
    from collections.abc import Callable

    from torch import Tensor
    from transformers import GPT2LMHeadModel

    from mvlm_core.data.tokenizer import ByteLevelBPE
    from mvlm_core.training.recipe import BuiltModel, Recipe

NAME = "mvlm_gpt2"
OUTPUT_DIR = REPOSITORY_ROOT / "models" / NAME
EXAMPLES = """examples:
  python mvlm_trainer.py                     train with the preset for this machine
  python mvlm_trainer.py --preset smoke      one-minute smoke test
  python mvlm_trainer.py --num_epochs 2 --learning_rate 6e-4
  python mvlm_trainer.py --init_from models/mvlm_gpt2 --data_dir my_texts --output_dir models/fine_tuned \\
      --replay mvlm_training_dataset_complete=0.2
                                             fine-tune a trained model on your own text
If interrupted, run the same command again, without --fresh: training resumes from the newest checkpoint.
"""


@dataclass
class GPT2Settings(BibleSettings):
    """Settings of model 1: GPT-2's architecture, trained with AdamW, warm-up and cosine decay."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # Uses model 2's vocabulary size to match its parameter count: GPT-2's own 50,257 entries would add 14 %.
        "h200": {"learning_rate": 3e-4, "weight_decay": 0.4, "dropout": 0.0},
        # num_layers and ff_dim match the parameter count of model 2, which has a second embedding matrix.
        # Batch size 4: AdamW gains from twice as many steps, Muon (model 2) less than they cost (benchmarks/LOG.md).
        "cpu": {
            "learning_rate": 4.5e-3,
            "batch_size": 4,
            "num_layers": 6,
            "ff_dim": 616,
            "eval_interval": 100,
            "checkpoint_interval": 200,
        },
        "smoke": {"learning_rate": 4e-3, "num_layers": 3, "ff_dim": 304},
    }

    # With less, AdamW's first steps at these learning rates can do lasting damage (benchmarks/LOG.md, 2026-11-30).
    WARMUP: ClassVar[tuple[float, int]] = (0.1, 200)

    def inherit(self) -> list[str]:
        return inherit(self, NAME)


def tokenizer_class() -> type[ByteLevelBPE]:
    """Return the tokenizer class: GPT-2's pre-tokenizer, and ``<|endoftext|>`` (the last id) before each document."""
    from tokenizers import pre_tokenizers

    from mvlm_core.data.tokenizer import ByteLevelBPE

    class GPT2BPETokenizer(ByteLevelBPE):
        SPECIAL_TOKENS: ClassVar[dict[str, str]] = dict.fromkeys(
            ("bos_token", "eos_token", "pad_token"), "<|endoftext|>"
        )
        SPECIAL_TOKENS_LAST: ClassVar[bool] = True
        END_ROLE: ClassVar[str | None] = None  # a document ends at the next one's <|endoftext|>

        @classmethod
        def pre_tokenizer(cls) -> pre_tokenizers.PreTokenizer:
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    return GPT2BPETokenizer


def run_layer(block: Any, x: Tensor, heads: int, rate: float) -> Tensor:
    """Map the residual stream ``x`` ``[batch, seq, hidden]`` to that after one GPT-2 layer, with dropout ``rate``."""
    from torch.nn.functional import dropout, gelu, scaled_dot_product_attention

    qkv = block.attn.c_attn(block.ln_1(x))
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    attended = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
    attended = block.attn.c_proj(attended)
    x = x + (dropout(attended, rate, block.training) if rate else attended)
    mlp = block.mlp.c_proj(gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    return x + (dropout(mlp, rate, block.training) if rate else mlp)


def hidden_states(
    model: GPT2LMHeadModel, input_ids: Tensor, layer: Callable[[Any, Tensor, int, float], Tensor] = run_layer
) -> Tensor:
    """Run a ``GPT2LMHeadModel`` on token ids ``[batch, seq]``; return the last hidden states ``[batch, seq, hidden]``.

    Matches transformers' forward to 1e-5 (tested) but is faster: causal attention is fused and needs no mask, GELU is
    one kernel, and disabled dropout costs nothing.

    Args:
        layer: ``run_layer`` or its compiled version.
    """
    import torch
    from torch.nn.functional import dropout

    transformer: Any = model.transformer
    heads, rate = model.config.n_head, model.config.resid_pdrop
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    x = transformer.wte(input_ids) + transformer.wpe(positions)
    x = dropout(x, rate, model.training) if rate else x
    for block in transformer.h:
        x = layer(block, x, heads, rate)
    return transformer.ln_f(x)


def build(settings: GPT2Settings, tokenizer: ByteLevelBPE, hardware: Hardware) -> BuiltModel:
    """Build a new GPT-2 with its optimizer and loss."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from mvlm_core.training.cross_entropy import linear_cross_entropy
    from mvlm_core.training.distillation import DISTILLATION_WEIGHT
    from mvlm_core.training.distillation_loss import Prediction, distillation_loss
    from mvlm_core.training.optimizer import build_optimizers
    from mvlm_core.training.recipe import BuiltModel, StepLoss

    end = tokenizer.start_id
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=settings.max_length,
        n_embd=settings.hidden_dim,
        n_layer=settings.num_layers,
        n_head=settings.num_heads,
        n_inner=settings.ff_dim,
        embd_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
        attn_pdrop=0.0,  # attention dropout would slow down the fused kernel
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    layer = hardware.compiled(run_layer)

    def loss(
        inputs: Tensor,
        targets: Tensor,
        _weights: Tensor,
        _progress: float,
        teacher: GPT2LMHeadModel | None = None,
    ) -> StepLoss:
        hidden, weight = hidden_states(model, inputs, layer), model.lm_head.weight
        if teacher is None:
            total, nll = linear_cross_entropy(hidden, weight, targets, kernel=hardware.loss_kernel)
            return StepLoss(total, nll.mean())
        with torch.no_grad():
            teacher_prediction = Prediction(hidden_states(teacher, inputs, layer), teacher.lm_head.weight)
        total, nll, soft = distillation_loss(
            Prediction(hidden, weight), teacher_prediction, targets, DISTILLATION_WEIGHT, kernel=hardware.loss_kernel
        )
        return StepLoss(total, nll.mean(), {"distillation_loss": soft})

    optimizers = build_optimizers(
        ((f"model.{name}", parameter) for name, parameter in model.named_parameters()),
        kind=settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        embedding_names=("wte", "wpe", "lm_head"),
        transposed=True,  # transformers' Conv1D
        qkv_name="c_attn",
        muon_dtype=hardware.muon_dtype,
    )
    return BuiltModel(model, {"model": model}, loss, optimizers)


def recipe() -> Recipe:
    """Return model 1's recipe for the shared training run."""
    from mvlm_core.training.forecast import ScalingLaw
    from mvlm_core.training.recipe import Recipe

    return Recipe(
        name=NAME,
        title="MVLM-GPT2",
        description="A standard GPT-2",
        modeling_folder=None,
        tokenizer_class=tokenizer_class(),
        build=build,
        law=ScalingLaw(
            scores=((247_552, 3.1755), (889_984, 2.5378), (3_749_376, 2.1666)),
            score_ratios=((1, 1.0), (3, 0.995), (11, 0.963), (30, 0.955)),
            ratio_error=0.017,
            reached=(60_000_000, 1.59),  # 1.9 M parameters, 38 MB: test 1.5629, which is 2 % below validation
        ),
        only_sdpa=True,
    )


def main() -> int:
    settings = trainer_settings(GPT2Settings, None, description=__doc__, epilog=EXAMPLES, output_dir=OUTPUT_DIR)
    from mvlm_core.training.launch import train

    return train(recipe, settings, [__file__, *sys.argv[1:]])


if __name__ == "__main__":
    run_main(main)
