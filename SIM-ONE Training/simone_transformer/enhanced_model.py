"""Enhanced SIM-ONE: a decoder with rotary positions, SwiGLU, RMSNorm and governed attention, as a transformers model.

``EnhancedSIMONEModel`` is one decoder, ``EnhancedSIMONECommittee`` several in one, whose probabilities are averaged.

This file and the two beside it travel inside every exported model, so they import nothing else of this repository.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .modern_layers import RMSNorm, SwiGLU, swiglu_width
from .rope_attention import TRACE_FIELDS, EnhancedGovernanceAttention, rotary_tables


class EnhancedSIMONEConfig(PreTrainedConfig):
    """Shape and switches of the model.

    Args:
        intermediate_size: SwiGLU's own inner width (``swiglu_width`` gives it from a classic width).
        policy_head, memory_head: the governance heads that change what is computed; off costs nothing.
        trace_head: whether ``output_traces=True`` may be asked for.
        hidden_dropout: on the embedding and on what each half layer adds, in training only.
        attention_backend: "sdpa", "flash_attn", "xformers" or "eager".
    """

    model_type = "simone_enhanced"
    keys_to_ignore_at_inference = ["past_key_values", "policy_logits", "memory_signals", "traces"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 1024,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        hidden_dropout: float = 0.0,
        policy_head: bool = True,
        memory_head: bool = True,
        trace_head: bool = True,
        attention_backend: str = "sdpa",
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = swiglu_width(4 * hidden_size) if intermediate_size is None else intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.hidden_dropout = hidden_dropout
        self.policy_head = policy_head
        self.memory_head = memory_head
        self.trace_head = trace_head
        self.attention_backend = attention_backend
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )


class EnhancedSIMONECommitteeConfig(EnhancedSIMONEConfig):
    """Shape of a committee: a class of its own, because transformers finds a model's class by its configuration's.

    Args:
        num_members: models in it; ``num_hidden_layers`` is of all of them together.
    """

    model_type = "simone_enhanced_committee"

    def __init__(self, num_members: int = 2, **kwargs) -> None:
        self.num_members = num_members
        super().__init__(**kwargs)

    def of_a_member(self) -> EnhancedSIMONEConfig:
        """The shape of one member.

        Raises:
            ValueError: the layers do not split among the members.
        """
        layers, left_over = divmod(self.num_hidden_layers, self.num_members)
        if left_over:
            raise ValueError(f"{self.num_hidden_layers} layers do not split among {self.num_members} members")
        own = ("model_type", "auto_map", "architectures", "num_members")
        shape = {name: value for name, value in self.to_dict().items() if name not in own}
        return EnhancedSIMONEConfig(**{**shape, "num_hidden_layers": layers})


@dataclass
class EnhancedSIMONEOutput(CausalLMOutputWithPast):
    """As any causal language model's output, and, with ``output_traces=True``, a tuple per layer (of a committee's
    members one after the other) of

    - ``policy_logits``: ``[batch, seq, heads]``, or None where the head is off,
    - ``memory_signals``: ``[batch, seq, heads]``, or None (always in the first layer),
    - ``traces``: ``[batch, seq, heads, 4]``, fields as in ``rope_attention.TRACE_FIELDS``.
    """

    policy_logits: tuple[Tensor | None, ...] | None = None
    memory_signals: tuple[Tensor | None, ...] | None = None
    traces: tuple[Tensor, ...] | None = None


_HEADS_SAY = ("policy_logits", "memory_signals", "traces")


def _padding(mask: Tensor | None, slots: Tensor) -> Tensor | None:
    """Which tokens only fill up, ``[batch, seq]``: by the mask they may not see themselves.

    Args:
        mask: ``[batch, 1, seq, keys]``, boolean (True is seen) or added to the scores; None hides nothing.
        slots: ``[seq]``, the tokens' places among the keys.
    """
    if mask is None:
        return None
    own = slots.view(1, -1, 1).expand(mask.shape[0], -1, -1)
    itself = mask[:, 0].gather(-1, own).squeeze(-1)
    return ~itself if itself.dtype == torch.bool else itself != 0


class EnhancedSIMONEBlock(GradientCheckpointingLayer):
    """One layer: governed attention, then SwiGLU, each on the normalised stream and added back to it.

    With a memory head SwiGLU also reads the attention's value of the token before, by a learned gain (after the
    short convolutions of Canon layers, Allen-Zhu 2025, but of what the cache holds anyway).
    """

    def __init__(self, config: EnhancedSIMONEConfig, layer_index: int, cache_index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = EnhancedGovernanceAttention(
            config.hidden_size,
            config.num_attention_heads,
            layer_index,
            policy_head=config.policy_head,
            memory_head=config.memory_head,
            norm_eps=config.rms_norm_eps,
            backend=config.attention_backend,
            cache_index=cache_index,
        )
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)
        self.previous_gain = nn.Parameter(torch.zeros(config.hidden_size)) if config.memory_head else None
        self.dropout = config.hidden_dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, first_values: Tensor | None, **attention_arguments):
        attended, first_values, previous, said = self.attention(
            self.attention_norm(x), cos, sin, first_values, **attention_arguments
        )
        x = x + F.dropout(attended, self.dropout, self.training)
        normalised = self.feed_forward_norm(x)
        if self.previous_gain is not None:
            normalised = normalised + self.previous_gain * previous
        fed = self.feed_forward(normalised)
        return x + F.dropout(fed, self.dropout, self.training), first_values, said


class EnhancedSIMONEPreTrainedModel(PreTrainedModel):
    """What a model and a committee tell transformers about themselves, and how their weights start."""

    config_class = EnhancedSIMONEConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["EnhancedSIMONEBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @property
    def trace_fields(self) -> dict[str, str]:
        """Name and meaning of each field of ``traces``, in their order; empty where the model reports none."""
        return dict(TRACE_FIELDS) if self.config.trace_head else {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Through torch.nn.init, which transformers patches while it loads weights: what came from a file stays.
        if isinstance(module, EnhancedGovernanceAttention):
            nn.init.zeros_(module.o_proj.weight)
            for head in (module.policy_head, module.memory_head):
                if head is not None:
                    nn.init.zeros_(head.weight)
                    nn.init.zeros_(head.bias)
        elif isinstance(module, EnhancedSIMONEBlock):
            if module.previous_gain is not None:
                nn.init.zeros_(module.previous_gain)
        elif isinstance(module, SwiGLU):
            nn.init.zeros_(module.down_proj.weight)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache a forward pass fills: the one it is given, a new one where one is wanted, or None."""
        wanted = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache(config=self.config) if given is None and wanted and not self.training else given

    def _output(
        self,
        logits: Tensor,
        cache: Cache | None,
        heads: dict[str, tuple[Tensor | None, ...]],
        labels: Tensor | None,
        return_dict: bool | None,
        **kwargs,
    ) -> EnhancedSIMONEOutput | tuple:
        """A forward pass's answer in the form that is asked for, with the loss where there are labels."""
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = EnhancedSIMONEOutput(loss=loss, logits=logits, past_key_values=cache, **heads)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


class EnhancedSIMONEModel(EnhancedSIMONEPreTrainedModel, GenerationMixin):
    """The causal language model.

    Args:
        first_layer: where a committee's cache has this member's first layer.
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: EnhancedSIMONEConfig, first_layer: int = 0) -> None:
        super().__init__(config)
        self.first_layer = first_layer
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            EnhancedSIMONEBlock(config, index, first_layer + index) for index in range(config.num_hidden_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        trace: bool = False,
    ) -> tuple[Tensor, list[dict[str, Tensor | None]]]:
        """The normalised last hidden states ``[batch, seq, hidden]`` and what each layer's heads said."""
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        slots = torch.arange(embeddings.shape[1], device=embeddings.device)
        if past_key_values is not None:
            slots = slots + past_key_values.get_seq_length(self.first_layer)
        if position_ids is None:
            position_ids = slots[None]
        mask = padding = None
        if attention_mask is not None or past_key_values is not None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                layer_idx=self.first_layer,
            )
            padding = _padding(mask, slots)
        config = self.config
        x = F.dropout(self.embed_norm(embeddings), config.hidden_dropout, self.training)
        cos, sin = rotary_tables(
            position_ids, config.hidden_size // config.num_attention_heads, config.rope_theta, x.dtype
        )
        context = {"mask": mask, "padding": padding, "past_key_values": past_key_values, "trace": trace}
        if past_key_values is not None:
            context["slots"] = slots
        first_values, said = None, []
        for layer in self.layers:
            x, first_values, heads_said = layer(x, cos, sin, first_values, **context)
            said.append(heads_said)
        return self.final_norm(x), said

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
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> EnhancedSIMONEOutput | tuple:
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
        past_key_values = self._cache(past_key_values, use_cache)
        hidden, said = self.hidden_states(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            trace=output_traces,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden if isinstance(keep, int) else hidden[:, keep])
        heads = {name: tuple(layer[name] for layer in said) for name in _HEADS_SAY} if output_traces else {}
        return self._output(logits, past_key_values, heads, labels, return_dict, **kwargs)


class EnhancedSIMONECommittee(EnhancedSIMONEPreTrainedModel, GenerationMixin):
    """Several models of one shape in one, trained side by side from other weights; their probabilities are averaged.

    For text that is short and read often, where models of the same text differ much in what they get wrong (deep
    ensembles, Lakshminarayanan et al., arXiv 1612.01474; for language models on little text, Kim et al., arXiv
    2509.14786).
    The cache holds the members' layers one after the other, so any kind of cache will do.
    """

    config_class = EnhancedSIMONECommitteeConfig

    def __init__(self, config: EnhancedSIMONECommitteeConfig) -> None:
        super().__init__(config)
        shape = config.of_a_member()
        self.members = nn.ModuleList(
            EnhancedSIMONEModel(shape, number * shape.num_hidden_layers) for number in range(config.num_members)
        )
        # Named here: while weights are loaded, transformers ties what the outermost model names and nothing below it.
        self._tied_weights_keys = {
            f"members.{number}.{name}": f"members.{number}.{source}"
            for number, member in enumerate(self.members)
            for name, source in member._tied_weights_keys.items()
        }
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.members[0].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.members[0].get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Every member's (see ``PreTrainedModel.resize_token_embeddings``); returns the first one's."""
        resized = [member.resize_token_embeddings(*args, **kwargs) for member in self.members]
        self.config.vocab_size = self.members[0].config.vocab_size
        return resized[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_traces: bool = False,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> EnhancedSIMONEOutput | tuple:
        """The logarithm of the members' mean probabilities as ``logits``; the rest as in ``EnhancedSIMONEModel``."""
        past_key_values = self._cache(past_key_values, use_cache)
        said = [
            member(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                output_traces=output_traces,
                return_dict=True,
                logits_to_keep=logits_to_keep,
            )
            for member in self.members
        ]
        each = torch.stack([output.logits.log_softmax(dim=-1, dtype=torch.float32) for output in said])
        logits = each.logsumexp(dim=0) - math.log(len(said))
        heads = {name: sum((member[name] for member in said), ()) for name in _HEADS_SAY} if output_traces else {}
        return self._output(logits, past_key_values, heads, labels, return_dict, **kwargs)


EnhancedSIMONEConfig.register_for_auto_class()
EnhancedSIMONECommitteeConfig.register_for_auto_class()
EnhancedSIMONEModel.register_for_auto_class("AutoModelForCausalLM")
EnhancedSIMONECommittee.register_for_auto_class("AutoModelForCausalLM")
