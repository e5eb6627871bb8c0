# Copyright (c) 2026 The SIM-ONE Training authors. SPDX-License-Identifier: MIT
"""Enhanced SIM-ONE as a transformers model: a decoder with rotary embeddings, SwiGLU, RMSNorm and governance heads.

Training calls ``EnhancedSIMONEModel.hidden_states`` and ``EnhancedSIMONEBlock``; inference calls ``forward``.

This file and the two others in this folder ship inside each export, so they import nothing else from this repository.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4):  # create_causal_mask has another signature
    raise ImportError(
        f"this model needs transformers 5.4 or newer, not {transformers.__version__}: "
        "python -m pip install 'transformers>=5.4'"
    )

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .modern_layers import RMSNorm, SwiGLU, product_dtype, swiglu_width
from .rope_attention import (
    TRACE_FIELDS,
    EnhancedGovernanceAttention,
    ForwardContext,
    PointerHead,
    PointerOutput,
    RotaryEmbedding,
    pointer_distribution,
)

# Initial logit of the pointer's sentinel above the highest possible token score, so that training starts with almost
# all probability mass on the vocabulary.
POINTER_START = 4.0
COPIED = "share of the token's probability that the pointer copied from the context"


class EnhancedSIMONEConfig(PreTrainedConfig):
    """Model shape and switches.

    Attributes:
        intermediate_size: SwiGLU width; 0 means ``swiglu_width(4 * hidden_size)``.
        policy_head, memory_head: enable the governance heads that change the output; a disabled head costs nothing.
        trace_head: allow ``output_traces=True``.
        hidden_dropout: dropout on the embedding and on each residual branch, in training only.
        attention_backend: "sdpa", "flash_attn", "xformers" or "eager".
    """

    model_type = "simone_enhanced"
    keys_to_ignore_at_inference = ["past_key_values", "policy_logits", "memory_signals", "traces"]

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 0
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    policy_head: bool = True
    memory_head: bool = True
    trace_head: bool = True
    attention_backend: str = "sdpa"
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.intermediate_size or swiglu_width(4 * self.hidden_size)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Leave out the attention backend, which depends on the machine: a saved model uses the default."""
        return {name: value for name, value in super().to_dict().items() if name != "attention_backend"}


class EnhancedSIMONEBlock(GradientCheckpointingLayer):
    """Pre-norm transformer layer: attention with governance heads, then SwiGLU, each with a residual connection.

    With the memory head, SwiGLU also reads the previous token's attention value, scaled by a learned gain. This follows
    the short convolutions of Canon layers (Allen-Zhu 2025), but uses only what the KV cache already holds.
    """

    def __init__(self, config: EnhancedSIMONEConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = EnhancedGovernanceAttention(config, layer_index)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)
        self.previous_gain = nn.Parameter(torch.zeros(config.hidden_size)) if config.memory_head else None
        self.dropout = config.hidden_dropout

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], value_residual: Tensor | None, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream ``[batch, seq, hidden_size]`` after this layer, and the first layer's values."""
        attended, value_residual, previous = self.attention(self.attention_norm(x), rotary, value_residual, context)
        x = x + F.dropout(attended, self.dropout, self.training)
        normalized = self.feed_forward_norm(x)
        if self.previous_gain is not None:
            normalized = normalized + self.previous_gain * previous
        return x + F.dropout(self.feed_forward(normalized), self.dropout, self.training), value_residual


def run_layer(
    layer: EnhancedSIMONEBlock,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    value_residual: Tensor | None,
    context: ForwardContext,
) -> tuple[Tensor, Tensor]:
    """Call ``layer``, as a function that can be compiled once for all layers of a model."""
    return layer(x, rotary, value_residual, context)


@dataclass
class EnhancedSIMONEOutput(CausalLMOutputWithPast):
    """Causal LM output; ``output_traces=True`` also fills the fields below (tuples have one entry per layer).

    Attributes:
        policy_logits: ``[batch, seq, heads]``, or None if the policy head is off.
        memory_signals: ``[batch, seq, heads]``, or None if the memory head is off; always None in the first layer.
        traces: ``[batch, seq, heads, 4]``, with the fields of ``rope_attention.TRACE_FIELDS``.
        pointer_output: the pointer's log probabilities, or None if the memory head is off.
    """

    policy_logits: tuple[Tensor | None, ...] | None = None
    memory_signals: tuple[Tensor | None, ...] | None = None
    traces: tuple[Tensor, ...] | None = None
    pointer_output: PointerOutput | None = None


class EnhancedSIMONEModel(PreTrainedModel, GenerationMixin):
    """Enhanced SIM-ONE with a language-modeling head."""

    config_class = EnhancedSIMONEConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _no_split_modules = ["EnhancedSIMONEBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: EnhancedSIMONEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.hidden_size // config.num_attention_heads, config.rope_theta)
        self.layers = nn.ModuleList(EnhancedSIMONEBlock(config, index) for index in range(config.num_hidden_layers))
        self.pointer = PointerHead(config) if config.memory_head else None
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        context: ForwardContext | None = None,
        layer_function: Callable[..., tuple[Tensor, Tensor]] = run_layer,
        pointer_function: Callable[..., PointerOutput] = pointer_distribution,
    ) -> tuple[Tensor, PointerOutput | None]:
        """Return the normalized last hidden states ``[batch, seq, hidden_size]`` and the pointer head's output, if any.

        Args:
            input_ids: ``[batch, seq]``.
            inputs_embeds: ``[batch, seq, hidden_size]``, instead of ids.
            layer_function, pointer_function: ``run_layer`` and ``pointer_distribution``, or their compiled versions.
        """
        context = context or ForwardContext()
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = F.dropout(self.embed_norm(x, x.dtype), self.config.hidden_dropout, self.training)
        positions = context.position_ids
        rotary = self.rotary(
            torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions, product_dtype(x)
        )
        value_residual = None
        for layer in self.layers[:-1]:
            x, value_residual = layer_function(layer, x, rotary, value_residual, context)
        if self.pointer is None:
            x, _ = layer_function(self.layers[-1], x, rotary, value_residual, context)
            return self.final_norm(x), None
        query, key, sentinel = self.pointer(x)
        key = context.cache_pointer_keys(key, input_ids)
        x, _ = layer_function(self.layers[-1], x, rotary, value_residual, context)
        key, ids, visible = context.cached_pointer_keys(key, input_ids)
        pointer_output = None if ids is None else pointer_function(query, key, sentinel, ids, visible)
        return self.final_norm(x), pointer_output

    def predict(self, hidden: Tensor, pointer_output: PointerOutput | None) -> Tensor:
        """Return logits, or log probabilities if the model has a pointer, ``[batch, seq, vocab]``."""
        logits = self.lm_head(hidden)
        return logits if pointer_output is None else pointer_output.mix(logits)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_traces: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> EnhancedSIMONEOutput:
        """Compute next-token logits ``[batch, seq, vocab]``, of the last ``logits_to_keep`` positions if not 0.

        Args:
            input_ids: ``[batch, seq]``.
            attention_mask: ``[batch, keys]``, 1 for real tokens.
            position_ids: ``[batch, seq]``.
            inputs_embeds: ``[batch, seq, hidden_size]``, instead of ids.
            labels: ``[batch, seq]``, -100 is ignored; shifted internally, as in other transformers models.
            output_traces: fill ``policy_logits``, ``memory_signals``, ``traces`` and ``pointer_output``.
        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds`` was given, or ``output_traces=True`` on a
                model without a trace head.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("specify exactly one of input_ids or inputs_embeds")
        if output_traces and not self.config.trace_head:
            raise ValueError("output_traces=True needs a model with trace_head=True")
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        context = self._context(embeddings, attention_mask, position_ids, self._cache(past_key_values, use_cache))
        context.head_outputs = [] if output_traces else None
        hidden, pointer_output = self.hidden_states(input_ids, inputs_embeds=embeddings, context=context)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.predict(hidden[:, kept], None if pointer_output is None else pointer_output.select(kept))
        output = EnhancedSIMONEOutput(logits=logits, past_key_values=context.cache)
        if labels is not None:
            output.loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_traces:
            output.policy_logits, output.memory_signals, output.traces = zip(*context.head_outputs or (), strict=True)
            output.pointer_output = pointer_output
        return output

    def _context(
        self, embeddings: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> ForwardContext:
        """Build the layers' context from the arguments of ``forward``."""
        context = ForwardContext(position_ids, cache=cache)
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)
        if cache is not None:
            positions = context.cache_position = positions + cache.get_seq_length()
        if position_ids is None:
            context.position_ids = positions[None]
        if attention_mask is None and cache is None:
            return context
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=context.position_ids,
        )
        if mask is not None:
            context.mask = mask if mask.dtype == torch.bool else mask == 0  # float masks are additive
            own = positions.view(1, -1, 1).expand(mask.shape[0], -1, -1)
            context.padding = ~context.mask[:, 0].gather(-1, own).squeeze(-1)  # only padding cannot attend to itself
        return context

    @property
    def trace_fields(self) -> dict[str, str]:
        """Name and description of each field of ``traces``, in order; empty without a trace head."""
        return dict(TRACE_FIELDS) if self.config.trace_head else {}

    @torch.inference_mode()
    def token_traces(self, input_ids: Tensor) -> dict[str, tuple[str, list[float]]]:
        """Return the description and the per-token values of each trace field, for one text ``[1, seq]``.

        Values are averaged over layers and heads. A model with a pointer adds the field "copied".
        """
        output = self(input_ids, output_traces=True, use_cache=False)
        means = torch.stack(output.traces).float().mean(dim=(0, 3))[0]
        columns = means.T.tolist()
        traces = {name: (text, values) for (name, text), values in zip(TRACE_FIELDS.items(), columns, strict=True)}
        if output.pointer_output is not None:
            targets = input_ids[:, 1:]
            copied = output.pointer_output.select(slice(-1)).log_prob(targets)
            total = output.logits[:, :-1].gather(-1, targets[..., None]).squeeze(-1)
            traces["copied"] = COPIED, [0.0, *(copied - total).exp()[0].tolist()]
        return traces

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # matrices normal with std initializer_range, biases 0, norms 1
        if isinstance(module, EnhancedSIMONEBlock) and module.previous_gain is not None:
            # Use torch.nn.init: transformers patches it during loading so that loaded weights are not reset.
            nn.init.zeros_(module.previous_gain)
        if isinstance(module, PointerHead):
            nn.init.constant_(module.sentinel, POINTER_START)
            if module.policy_head is not None:
                nn.init.zeros_(module.policy_head.weight)

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """Return the KV cache to fill: the given one, a new one if ``use_cache``, or None."""
        if self.training and self.gradient_checkpointing:
            return None  # recomputation in the backward pass would fill the cache twice
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache(config=self.config) if cache is None and use_cache and not self.training else cache


EnhancedSIMONEConfig.register_for_auto_class()
EnhancedSIMONEModel.register_for_auto_class("AutoModelForCausalLM")
