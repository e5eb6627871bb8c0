"""Enhanced SIM-ONE: a decoder with rotary positions, SwiGLU, RMSNorm and governance heads, as a transformers model.

Training reads ``EnhancedSIMONEModel.hidden_states`` and ``EnhancedSIMONEBlock``.

This file and the two beside it travel inside every exported model, so they import nothing else of this repository.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    Pointing,
    RotaryEmbedding,
    point,
)

# How far above every token of the context the pointer's sentinel starts: with almost all of the prediction.
POINTER_START = 4.0
COPIED = "share of the token's probability that was copied from a like place earlier in the text"


class EnhancedSIMONEConfig(PreTrainedConfig):
    """Shape and switches of the model.

    Attributes:
        intermediate_size: SwiGLU's own inner width (``swiglu_width`` gives it from a classic width); 0: of four widths.
        policy_head, memory_head: the governance heads that change what is computed; off costs nothing.
        trace_head: whether ``output_traces=True`` may be asked for.
        hidden_dropout: on the embedding and on what each half layer adds, in training only.
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


class EnhancedSIMONEBlock(GradientCheckpointingLayer):
    """One layer: governed attention, then SwiGLU, each on the normalised stream and added back to it.

    With a memory head SwiGLU also reads the attention's value of the previous token, by a learned gain (after the
    short convolutions of Canon layers, Allen-Zhu 2025, but of what the cache holds anyway).
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
        """The residual stream ``[batch, seq, hidden_size]`` after this layer, and the first layer's values."""
        attended, value_residual, previous = self.attention(self.attention_norm(x), rotary, value_residual, context)
        x = x + F.dropout(attended, self.dropout, self.training)
        normalised = self.feed_forward_norm(x)
        if self.previous_gain is not None:
            normalised = normalised + self.previous_gain * previous
        return x + F.dropout(self.feed_forward(normalised), self.dropout, self.training), value_residual


def run_layer(
    layer: EnhancedSIMONEBlock,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    value_residual: Tensor | None,
    context: ForwardContext,
) -> tuple[Tensor, Tensor]:
    """``layer(...)`` as a function, which can be compiled once for all layers of a model."""
    return layer(x, rotary, value_residual, context)


@dataclass
class EnhancedSIMONEOutput(CausalLMOutputWithPast):
    """As any causal language model's output, and, with ``output_traces=True``, a tuple per layer of

    - ``policy_logits``: ``[batch, seq, heads]``, or None where the head is off,
    - ``memory_signals``: ``[batch, seq, heads]``, or None (always in the first layer),
    - ``traces``: ``[batch, seq, heads, 4]``, fields as in ``rope_attention.TRACE_FIELDS``;

    and of the memory head's pointer (None without that head)

    - ``pointing``: log probabilities of what it points at, a ``rope_attention.Pointing``.
    """

    policy_logits: tuple[Tensor | None, ...] | None = None
    memory_signals: tuple[Tensor | None, ...] | None = None
    traces: tuple[Tensor, ...] | None = None
    pointing: Pointing | None = None


class EnhancedSIMONEModel(PreTrainedModel, GenerationMixin):
    """The causal language model."""

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
        point_function: Callable[..., Pointing] = point,
    ) -> tuple[Tensor, Pointing | None]:
        """The normalised last hidden states ``[batch, seq, hidden_size]`` and where the pointer head points, None
        without one: what the training loss reads.

        Args:
            layer_function, point_function: ``run_layer`` and ``point``, or what training has compiled them to.
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
        key = context.remember(key, input_ids)
        x, _ = layer_function(self.layers[-1], x, rotary, value_residual, context)
        key, ids, visible = context.recall(key, input_ids)
        pointing = None if ids is None else point_function(query, key, sentinel, ids, visible)
        return self.final_norm(x), pointing

    def predict(self, hidden: Tensor, pointing: Pointing | None) -> Tensor:
        """Logits, or with a pointer log probabilities, ``[batch, seq, vocab]``, by what ``hidden_states`` returned."""
        logits = self.lm_head(hidden)
        return logits if pointing is None else pointing.mixed_with(logits)

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
        """Next-token logits ``[batch, seq, vocab]`` (of the last ``logits_to_keep`` positions where given).

        Args:
            labels: ``[batch, seq]`` as ``input_ids``, -100 ignored; shifted here, as in every transformers model.
            output_traces: fill ``policy_logits``, ``memory_signals`` and ``traces``.
        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``; traces asked of a model without them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_traces and not self.config.trace_head:
            raise ValueError("this model was made with trace_head=False: it reports no traces")
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        context = self._context(embeddings, attention_mask, position_ids, self._cache(past_key_values, use_cache))
        context.head_outputs = [] if output_traces else None
        hidden, pointing = self.hidden_states(input_ids, inputs_embeds=embeddings, context=context)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.predict(hidden[:, kept], None if pointing is None else pointing.last(kept))
        output = EnhancedSIMONEOutput(logits=logits, past_key_values=context.cache)
        if labels is not None:
            output.loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_traces:
            output.policy_logits, output.memory_signals, output.traces = zip(*context.head_outputs or (), strict=True)
            output.pointing = pointing
        return output

    def _context(
        self, embeddings: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> ForwardContext:
        """What ``forward`` was given beside the tokens, as the layers read it."""
        context = ForwardContext(position_ids, cache=cache)
        places = torch.arange(embeddings.shape[1], device=embeddings.device)
        if cache is not None:
            places = context.cache_position = places + cache.get_seq_length()
        if position_ids is None:
            context.position_ids = places[None]
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
            context.mask = mask if mask.dtype == torch.bool else mask == 0  # a float mask is added to the scores
            own = places.view(1, -1, 1).expand(mask.shape[0], -1, -1)
            context.padding = ~context.mask[:, 0].gather(-1, own).squeeze(-1)  # padding may not see itself
        return context

    @property
    def trace_fields(self) -> dict[str, str]:
        """Name and meaning of each field of ``traces``, in their order; empty where the model reports none."""
        return dict(TRACE_FIELDS) if self.config.trace_head else {}

    @torch.inference_mode()
    def token_traces(self, input_ids: Tensor) -> dict[str, tuple[str, list[float]]]:
        """Of a text ``[1, seq]``, by name: what a field says, and its value at each token.

        The fields of ``traces``, averaged over layers and heads, and with a pointer "copied".
        """
        output = self(input_ids, output_traces=True, use_cache=False)
        means = torch.stack(output.traces).float().mean(dim=(0, 3))[0]
        columns = means.T.tolist()
        found = {name: (says, values) for (name, says), values in zip(TRACE_FIELDS.items(), columns, strict=True)}
        if output.pointing is not None:
            targets = input_ids[:, 1:]
            copied = output.pointing.last(slice(-1)).at(targets)
            whole = output.logits[:, :-1].gather(-1, targets[..., None]).squeeze(-1)
            found["copied"] = COPIED, [0.0, *(copied - whole).exp()[0].tolist()]
        return found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # matrices normal by initializer_range, biases 0, norms 1
        if isinstance(module, EnhancedSIMONEBlock) and module.previous_gain is not None:
            # Through torch.nn.init, which transformers patches while it loads weights: what came from a file stays.
            nn.init.zeros_(module.previous_gain)
        if isinstance(module, PointerHead):
            nn.init.constant_(module.sentinel, POINTER_START)
            if module.policy_head is not None:
                nn.init.zeros_(module.policy_head.weight)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache a forward pass fills: the one it is given, a new one where one is wanted, or None."""
        if self.training and self.gradient_checkpointing:
            return None  # the backward pass runs each layer again, which would fill the cache twice
        wanted = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache(config=self.config) if given is None and wanted and not self.training else given


EnhancedSIMONEConfig.register_for_auto_class()
EnhancedSIMONEModel.register_for_auto_class("AutoModelForCausalLM")
