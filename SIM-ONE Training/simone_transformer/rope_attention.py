# Copyright (c) 2026 The SIM-ONE Training authors. SPDX-License-Identifier: MIT
"""Causal self-attention with rotary embeddings and three governance heads: policy, memory and trace.

Read down to ``pointer_distribution`` for the architecture. The rest of the file, from ``ForwardContext`` on, handles
the KV cache, padding, traces and the choice of attention kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modern_layers import RMSNorm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

# Fields of the last dimension of the traces, in order, with their descriptions.
TRACE_FIELDS = {
    "policy": "gate on each attention head's output (0 to 2)",
    "memory": "weight of the first layer's values in later layers (0 to 1)",
    "entropy": "attention entropy, in nats",
    "distance": "mean attention distance, in tokens",
}
_TRACE_QUERY_ROWS = 128
_POLICY_INPUTS = 12  # hidden dimensions that the gates read


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary position embeddings (Su et al., arXiv 2104.09864).

    Computed once per forward pass instead of kept in a buffer: transformers 5 replaces non-persistent buffers with
    uninitialized memory when it loads a model (transformers#48892).
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Map positions ``[batch or 1, seq]`` to two ``[batch or 1, 1, seq, head_dim]``, computed in float32."""
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32) / self.head_dim
        angles = position_ids[:, None, :, None].float() * self.theta**-exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[batch, heads, seq, head_dim]`` by ``cos`` and ``sin`` ``[batch or 1, 1, seq, head_dim]``.

    Pairs are ``(i, i + head_dim / 2)``.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def shift_tokens(values: Tensor, cache_position: Tensor | None = None) -> Tensor:
    """Shift ``[batch, heads, seq, head_dim]`` right by one token; the first row becomes zero.

    Args:
        cache_position: ``[tokens]``, return only these rows of the result; None means all.
    """
    if cache_position is None:
        return F.pad(values, (0, 0, 1, 0))[:, :, :-1]
    previous = values.index_select(2, (cache_position - 1).clamp(min=0))
    return previous.masked_fill((cache_position == 0).view(-1, 1), 0)


def shift_keys(key: Tensor) -> Tensor:
    """Shift the odd dimensions of the keys ``[batch, heads, seq, head_dim]`` right by one token.

    A variant of the partial key offset of modded-nanogpt (github.com/KellerJordan/modded-nanogpt). This does not split
    rotary pairs: ``i`` and ``i + head_dim / 2`` are both even or both odd.
    """
    odd = torch.arange(key.shape[-1], device=key.device) % 2 == 1
    return torch.where(odd, shift_tokens(key), key)


class EnhancedGovernanceAttention(nn.Module):
    """Multi-head causal attention with governance heads.

    - The **policy** head gates each attention head's output per token. Gates lie in (0, 2), are computed from a narrow
      slice of the hidden state, and start near 1, so training starts near plain attention (gated attention, arXiv
      2505.06708). It also controls how much probability the model's ``PointerHead`` gets.
    - The **memory** head has four parts. (1) Shifted keys: half of each key comes from the *previous* token, so that a
      single layer can find what followed an earlier occurrence of a token (induction, arXiv 2209.11895). (2) The
      previous token's value is passed on to the feed-forward layer. (3) A value residual: each token and head mixes in
      a learned share of the first layer's values (arXiv 2410.17897), except in the first layer. (4) ``PointerHead``.
    - The **trace** head has no weights; on request it reports per token what the other heads and attention did.

    Queries and keys are normalized before the rotation (QK-norm, arXiv 2010.04245), which bounds the attention logits.

    Args:
        config: an ``EnhancedSIMONEConfig``.
        layer_index: index of this layer in the model.
    """

    def __init__(self, config: PreTrainedConfig, layer_index: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads or (width // heads) % 4:
            raise ValueError(f"hidden_size {width} must split into {heads} heads with a dimension divisible by 4")
        if config.attention_backend not in ATTENTION_BACKENDS:
            raise ValueError(f"unknown attention backend {config.attention_backend!r}")
        self.layer_index, self.backend = layer_index, config.attention_backend
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.policy_head = nn.Linear(min(_POLICY_INPUTS, width), heads) if config.policy_head else None
        self.shifts = config.memory_head
        self.memory_head = nn.Linear(width, heads) if config.memory_head and layer_index > 0 else None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], value_residual: Tensor | None, context: ForwardContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute attention.

        Args:
            x: ``[batch, seq, hidden_size]``, normalized.
            rotary: from ``RotaryEmbedding``.
            value_residual: the first layer's values, ``[batch, heads, seq, head_dim]``; None in the first layer.
        Returns:
            The output ``[batch, seq, hidden_size]``, the first layer's values, and the previous tokens' values
            ``[batch, seq, hidden_size]`` (None without a memory head).
        """
        query = apply_rotary(self.q_norm(self._split(self.q_proj(x))), *rotary)
        key = apply_rotary(self.k_norm(self._split(self.k_proj(x))), *rotary)
        value = self._split(self.v_proj(x))
        value_residual = value if value_residual is None else value_residual

        memory_signals = None
        if self.memory_head is not None:
            memory_signals = self.memory_head(x).sigmoid()
            value = torch.lerp(value, value_residual, memory_signals.transpose(1, 2).unsqueeze(-1).to(value.dtype))
        key, value = context.extend(key, value, self.layer_index)
        previous = shift_tokens(value, context.cache_position).transpose(1, 2).flatten(2) if self.shifts else None
        heads = attend(query, key, value, context.mask, shifted=self.shifts, backend=self.backend).transpose(1, 2)

        policy_logits = None
        if self.policy_head is not None:
            policy_logits = self.policy_head(x[..., : self.policy_head.in_features])
            heads = heads * (2 * policy_logits.sigmoid()).unsqueeze(-1).to(heads.dtype)
        if context.head_outputs is not None:
            key = shift_keys(key) if self.shifts else key
            trace = trace_heads(query, key, policy_logits, memory_signals, context)
            context.head_outputs.append((policy_logits, memory_signals, trace))
        return self.o_proj(heads.reshape(x.shape)), value_residual, previous

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class PointerHead(nn.Module):
    """Pointer of the memory head: predicts the next token by copying one from the context.

    A pointer sentinel mixture (Merity et al., arXiv 1609.07843): one softmax over the context tokens and a sentinel,
    whose probability is the vocabulary's share of the prediction. A token's key is computed from the hidden state
    *before* it, so that a query finds what followed a similar state. The policy head adds a score computed from the
    hidden state to the sentinel's; without a policy head the sentinel's score is constant.

    Reads the input of the last layer. The KV cache of that layer stores the pointer's keys as an extra head.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.sentinel = nn.Parameter(torch.empty(1))
        self.policy_head = nn.Linear(width, 1, bias=False) if config.policy_head else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``[batch, seq, hidden_size]`` to queries and unshifted keys, both ``[batch, 1, seq, head_dim]``, and to
        sentinel scores ``[batch, seq]``."""
        x = self.norm(x)
        query, key = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        # Token scores are cosines times √head_dim, hence at most √head_dim: the sentinel starts above all of them.
        sentinel = (self.sentinel + self.head_dim**0.5).expand(x.shape[:2])
        if self.policy_head is not None:
            sentinel = sentinel + self.policy_head(x).squeeze(-1)
        return query.unsqueeze(1), key.unsqueeze(1), sentinel


class PointerOutput(NamedTuple):
    """Log probabilities from the pointer's softmax.

    Attributes:
        log_vocab_prob: ``[batch, seq]``, of the sentinel: the vocabulary's share of the prediction.
        log_token_probs: ``[batch, seq, keys]``, of each context token; the dtype's minimum where masked.
        ids: ``[batch, keys]``, ids of the context tokens.
    """

    log_vocab_prob: Tensor
    log_token_probs: Tensor
    ids: Tensor

    def log_prob(self, targets: Tensor) -> Tensor:
        """Log probability of copying ``targets [batch, seq]`` from the context, ``[batch, seq]``."""
        same = self.ids[:, None] == targets[..., None]
        return self.log_token_probs.masked_fill(~same, torch.finfo(self.log_token_probs.dtype).min).logsumexp(-1)

    def mix(self, logits: Tensor) -> Tensor:
        """Return log probabilities of vocabulary and pointer combined; both ``[batch, seq, vocab]``."""
        own = logits.log_softmax(-1, dtype=self.log_token_probs.dtype) + self.log_vocab_prob[..., None]
        ids = self.ids[:, None].expand_as(self.log_token_probs)
        copied = torch.zeros_like(own).scatter_add(2, ids, self.log_token_probs.exp())
        return torch.logaddexp(own, copied.clamp(min=torch.finfo(own.dtype).tiny).log())

    def select(self, positions: slice | Tensor) -> PointerOutput:
        """Restrict to these query positions."""
        return PointerOutput(self.log_vocab_prob[:, positions], self.log_token_probs[:, positions], self.ids)


def pointer_distribution(
    query: Tensor, key: Tensor, sentinel: Tensor, ids: Tensor, visible: Tensor | None = None
) -> PointerOutput:
    """Compute a ``PointerHead``'s softmax over the context tokens and the sentinel.

    Args:
        query: ``[batch, 1, seq, head_dim]``.
        key: ``[batch, 1, keys, head_dim]``, unshifted.
        sentinel: ``[batch, seq]``, scores.
        ids: ``[batch, keys]``.
        visible: ``[batch or 1, seq, keys]``, True where a query may attend; None means causal with equal lengths.
    """
    scores = (query @ shift_tokens(key).transpose(-1, -2)).squeeze(1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * key.shape[-1] ** -0.5
    if visible is None:
        positions = torch.arange(scores.shape[-1], device=scores.device)
        visible = positions[:, None] >= positions
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    sentinel = sentinel.to(scores.dtype)
    log_total = torch.logaddexp(scores.logsumexp(-1), sentinel)
    return PointerOutput(sentinel - log_total, scores - log_total[..., None], ids)


@dataclass
class ForwardContext:
    """Per-call inputs other than the tokens; training uses the defaults.

    Attributes:
        position_ids: ``[batch or 1, seq]``; None means 0, 1, 2, ….
        mask: ``[batch, 1, seq, keys]``, True where a query may attend; None means causal.
        padding: ``[batch, seq]``, True for padding tokens; None means no padding.
        cache: any transformers ``Cache``. It stores unshifted keys, and values after the value residual.
        cache_position: ``[seq]``, positions of the tokens in the cache.
        head_outputs: list to which each layer appends its policy logits, memory signals and trace; None to skip.
        pointer_cache: the pointer's keys and token ids, stored as an extra head of the last layer's cache: those of the
            new tokens before that layer runs, those of all tokens afterwards.
    """

    position_ids: Tensor | None = None
    mask: Tensor | None = None
    padding: Tensor | None = None
    cache: Cache | None = None
    cache_position: Tensor | None = None
    head_outputs: list[tuple[Tensor | None, Tensor | None, Tensor]] | None = None
    pointer_cache: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values to the cache and return all of them. Padding is set to zero, so that the
        shift brings nothing into the first real token."""
        if self.padding is not None:
            key, value = (x.masked_fill(self.padding[:, None, :, None], 0) for x in (key, value))
        if self.cache is None:
            return key, value
        if self.pointer_cache is None:
            return self.cache.update(key, value, layer_index)
        key, value = (torch.cat(pair, dim=1) for pair in zip((key, value), self.pointer_cache, strict=True))
        key, value = self.cache.update(key, value, layer_index)
        self.pointer_cache = key[:, -1:], value[:, -1:]
        return key[:, :-1], value[:, :-1]

    def cache_pointer_keys(self, key: Tensor, ids: Tensor | None) -> Tensor:
        """Zero the pointer keys of padding, and queue keys and token ids for the last layer to cache, if there is a
        cache. Without ``ids`` (the call used ``inputs_embeds``) the tokens are marked as unknown."""
        if self.padding is not None:
            key = key.masked_fill(self.padding[:, None, :, None], 0)
        if self.cache is not None:
            self.pointer_cache = key, pack_token_ids(ids, key)
        return key

    def cached_pointer_keys(self, key: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """After the last layer, return pointer keys ``[batch, 1, keys, head_dim]``, token ids ``[batch, keys]`` (None
        if unknown) and the ``visible`` mask for ``pointer_distribution``."""
        visible = None if self.mask is None else self.mask[:, 0]
        if self.pointer_cache is None or self.cache_position is None:
            return key, ids, visible
        key, packed = self.pointer_cache
        if visible is None:
            visible = self.cache_position[:, None] >= torch.arange(key.shape[2], device=key.device)
        known, ids = unpack_token_ids(packed)
        return key, ids, visible & known[:, None]


def pack_token_ids(ids: Tensor | None, like: Tensor) -> Tensor:
    """Pack token ids ``[batch, seq]`` into vectors with the shape and dtype of ``like`` ``[batch, 1, seq, head_dim]``:
    a 1 and three base-256 digits, which are exact even in bf16; zeros for unknown tokens."""
    if ids is None:
        return torch.zeros_like(like)
    digits = torch.stack((torch.ones_like(ids), ids % 256, ids // 256 % 256, ids // 65536), dim=-1)
    return F.pad(digits, (0, like.shape[-1] - 4)).unsqueeze(1).to(like.dtype)


def unpack_token_ids(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Invert ``pack_token_ids``: a mask of known tokens and their ids, both ``[batch, keys]``."""
    known, low, middle, high = packed[:, 0, :, :4].long().unbind(-1)
    return known == 1, low + 256 * middle + 65536 * high


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, shifted: bool, backend: str) -> Tensor:
    """Softmax attention with the kernel of ``backend``; returns ``[batch, heads, seq, head_dim]``.

    Without a mask, attention is causal with equal lengths, or a single query attends to the whole cache; fused kernels
    handle both without an S×S matrix. A mask (padding, static cache, chunked prefill) is supported by "sdpa" and
    "eager" only; the other backends fall back to "sdpa", as they do where ``_fits_fused_kernels`` is false.

    Args:
        query: ``[batch, heads, seq, head_dim]``.
        key, value: ``[batch, heads, keys, head_dim]``.
        mask: ``[batch, 1, seq, keys]``, True where a query may attend.
        shifted: apply ``shift_keys`` to the keys.
    """
    if shifted and backend == "sdpa" and mask is None and query.shape[2] == 1:
        return attend_shifted_decode(query, key, value)
    key = shift_keys(key) if shifted else key
    if backend == "eager":
        positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)
        return attention_probabilities(query, key, mask, positions).to(value.dtype) @ value
    causal = mask is None and query.shape[2] > 1
    if mask is None and backend in _FUSED_KERNELS and _fits_fused_kernels(query):
        return _FUSED_KERNELS[backend](query, key, value, causal)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def _fits_fused_kernels(query: Tensor) -> bool:
    """Whether flash-attn and xformers support this tensor: half precision on a GPU, unlike evaluations in float32."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def attend_shifted_decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Decode step: attend from one query ``[batch, heads, 1, head_dim]`` to ``shift_keys(key)``, without copying keys.

    Even query dimensions are scored against each key and odd ones against the previous key, so two narrow products and
    a shift of the scores give the same result.
    """
    halves = torch.eye(2, dtype=query.dtype, device=query.device).repeat(1, query.shape[-1] // 2)
    own, previous = (((query * halves) @ key.transpose(-1, -2)).float() * key.shape[-1] ** -0.5).split(1, dim=2)
    return (own + F.pad(previous[..., :-1], (1, 0))).softmax(dim=-1).to(value.dtype) @ value


def attention_probabilities(query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Attention probabilities ``[batch, heads, seq, keys]`` in float32.

    Args:
        key: ``[batch, heads, keys, head_dim]``.
        positions: ``[seq]``, of the queries; without a mask, attention is causal.
    """
    visible = positions[:, None] >= torch.arange(key.shape[2], device=key.device) if mask is None else mask
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    attention = importlib.import_module("flash_attn").flash_attn_func
    return attention(*(x.transpose(1, 2) for x in (query, key, value)), causal=causal).transpose(1, 2)


def _xformers(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    operations = importlib.import_module("xformers.ops")
    bias = operations.LowerTriangularMask() if causal else None
    inputs = (x.transpose(1, 2) for x in (query, key, value))
    return operations.memory_efficient_attention(*inputs, attn_bias=bias).transpose(1, 2)


_FUSED_KERNELS: dict[str, Callable[..., Tensor]] = {"flash_attn": _flash_attn, "xformers": _xformers}
ATTENTION_BACKENDS = ("sdpa", "eager", *_FUSED_KERNELS)


@torch.no_grad()
def trace_heads(
    query: Tensor, key: Tensor, policy_logits: Tensor | None, memory_signals: Tensor | None, context: ForwardContext
) -> Tensor:
    """Return the trace ``[batch, seq, heads, 4]`` with the fields of ``TRACE_FIELDS``.

    Computes attention probabilities for a block of query rows at a time, to avoid an S×S matrix.

    Args:
        query, key: ``[batch, heads, seq or keys, head_dim]``, keys already shifted.
        policy_logits, memory_signals: ``[batch, seq, heads]``, of a layer with these heads.
    """
    columns, blocks = torch.arange(key.shape[2], device=key.device), []
    positions = columns if context.cache_position is None else context.cache_position
    for start in range(0, query.shape[2], _TRACE_QUERY_ROWS):
        rows = slice(start, start + _TRACE_QUERY_ROWS)
        mask = None if context.mask is None else context.mask[:, :, rows]
        probabilities = attention_probabilities(query[:, :, rows], key, mask, positions[rows])
        distances = (positions[rows, None] - columns).clamp(min=0)
        blocks.append((torch.special.entr(probabilities).sum(-1), (probabilities * distances).sum(-1)))
    entropy, distance = (torch.cat(parts, dim=2).transpose(1, 2) for parts in zip(*blocks, strict=True))
    policy = torch.ones_like(entropy) if policy_logits is None else 2 * policy_logits.float().sigmoid()
    memory = torch.zeros_like(entropy) if memory_signals is None else memory_signals.float()
    return torch.stack((policy, memory, entropy, distance), dim=-1)
