"""Causal self-attention with rotary positions and three governance heads: policy, memory and trace.

Training reads ``EnhancedGovernanceAttention``, ``PointerHead`` and what stands above them. What a cache, padding,
traces and other kernels need stands below, in ``ForwardContext`` and functions of their own.
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

# The last dimension of the traces, in order: what each field says.
TRACE_FIELDS = {
    "policy": "how much of what attention read is let through (0 to 2)",
    "memory": "share of the first layer's values in the later layers' (0 to 1)",
    "entropy": "how widely attention is spread, in nats",
    "distance": "how far back attention looks, in tokens",
}
_TRACE_QUERY_ROWS = 128
_POLICY_INPUTS = 12  # dimensions of a token's state that the gates read


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding (Su et al., arXiv 2104.09864).

    Computed in each forward pass, never kept in a buffer: transformers 5 replaces non-persistent buffers with
    uninitialised memory when it loads a model (transformers#48892). It costs one table per pass, not per layer.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[batch or 1, seq]`` to two tensors ``[batch or 1, 1, seq, head_dim]``, computed in float32."""
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32) / self.head_dim
        angles = position_ids[:, None, :, None].float() * self.theta**-exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[batch, heads, seq, head_dim]`` by its positions; pairs are ``(i, i + head_dim / 2)``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def shift_tokens(values: Tensor, cache_position: Tensor | None = None) -> Tensor:
    """``[batch, heads, seq, head_dim]``, each token's row replaced by the previous token's; the first one's is zero.

    Args:
        cache_position: ``[tokens]``, return the rows of these positions alone; None means all.
    """
    if cache_position is None:
        return F.pad(values, (0, 0, 1, 0))[:, :, :-1]
    previous = values.index_select(2, (cache_position - 1).clamp(min=0))
    return previous.masked_fill((cache_position == 0).view(-1, 1), 0)


def shift_keys(key: Tensor) -> Tensor:
    """Keys ``[batch, heads, seq, head_dim]`` with the odd dimensions shifted by one token.

    Rotary pairs stay whole: the partners ``i`` and ``i + head_dim / 2`` are both even or both odd.
    """
    odd = torch.arange(key.shape[-1], device=key.device) % 2 == 1
    return torch.where(odd, shift_tokens(key), key)


class EnhancedGovernanceAttention(nn.Module):
    """Multi-head causal attention with governance heads.

    - The **policy** head scales each head's output per token: a gate in (0, 2) (after gated attention, arXiv
      2505.06708, by a narrow slice of the token's state) that starts near 1, so that training begins near plain
      attention. It also decides how much of a prediction the model's ``PointerHead`` makes.
    - The **memory** head is four things. Shifted keys: half of each key is the *previous* token's, so that a single
      layer can look for what followed such a token earlier (induction, arXiv 2209.11895). The previous token's value is
      returned for the feed-forward layer to read. And a value residual: per token and head, a learned share of the
      first layer's values in place of this layer's own (arXiv 2410.17897); the first layer itself has none. The
      fourth is the model's ``PointerHead``.
    - The **trace** head has no weights. On request it reports per token what the other two and the attention did.

    Queries and keys are normalised before the rotation (arXiv 2010.04245), which bounds the attention logits.

    Args:
        config: an ``EnhancedSIMONEConfig``.
        layer_index: among the model's layers.
    """

    def __init__(self, config: PreTrainedConfig, layer_index: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads or (width // heads) % 4:
            raise ValueError(f"hidden_size {width} must split into {heads} heads of a width divisible by 4")
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
        """Attend.

        Args:
            x: ``[batch, seq, hidden_size]``, normalised.
            rotary: from ``RotaryEmbedding``.
            value_residual: the first layer's values of these tokens, ``[batch, heads, seq, head_dim]``; None there.
        Returns:
            The output ``[batch, seq, hidden_size]``; the first layer's values; the previous tokens' values ``[batch,
            seq, hidden_size]``, None without a memory head.
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
    """The memory head's last part: predict the next token by pointing at one that the context holds.

    A pointer sentinel mixture (Merity et al., arXiv 1609.07843): one softmax over the context's tokens and a sentinel;
    what falls to the sentinel is the vocabulary's share of the prediction. As in shifted keys, a token's key is the
    state *before* it, so that a query finds what followed a state like its own. The sentinel's score is the policy
    head's, by the token's state; without that head it is the same everywhere.

    The states are those that enter the last layer, where a cache holds the keys as one more head.
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
        """The states ``[batch, seq, hidden_size]`` that enter the last layer to queries, keys (not yet shifted; both
        ``[batch, 1, seq, head_dim]``) and the sentinel's scores ``[batch, seq]``."""
        x = self.norm(x)
        query, key = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        # Cosines times √head_dim are at most √head_dim: the sentinel starts above all of them.
        sentinel = (self.sentinel + self.head_dim**0.5).expand(x.shape[:2])
        if self.policy_head is not None:
            sentinel = sentinel + self.policy_head(x).squeeze(-1)
        return query.unsqueeze(1), key.unsqueeze(1), sentinel


class Pointing(NamedTuple):
    """Where a model points, in log probabilities.

    Attributes:
        vocabulary: ``[batch, seq]``, of the vocabulary's share.
        tokens: ``[batch, seq, keys]``, of each token of the context; the smallest number where it cannot be pointed at.
        ids: ``[batch, keys]``, those tokens.
    """

    vocabulary: Tensor
    tokens: Tensor
    ids: Tensor

    def at(self, targets: Tensor) -> Tensor:
        """Log of the probability that comes to ``targets [batch, seq]`` by pointing, ``[batch, seq]``."""
        same = self.ids[:, None] == targets[..., None]
        return self.tokens.masked_fill(~same, torch.finfo(self.tokens.dtype).min).logsumexp(-1)

    def mixed_with(self, logits: Tensor) -> Tensor:
        """Log probabilities of the whole prediction, from the vocabulary's ``logits``; both ``[batch, seq, vocab]``."""
        own = logits.log_softmax(-1, dtype=self.tokens.dtype) + self.vocabulary[..., None]
        ids = self.ids[:, None].expand_as(self.tokens)
        copied = torch.zeros_like(own).scatter_add(2, ids, self.tokens.exp())
        return torch.logaddexp(own, copied.clamp(min=torch.finfo(own.dtype).tiny).log())

    def last(self, kept: slice | Tensor) -> Pointing:
        """That of these positions alone."""
        return Pointing(self.vocabulary[:, kept], self.tokens[:, kept], self.ids)


def point(query: Tensor, key: Tensor, sentinel: Tensor, ids: Tensor, visible: Tensor | None = None) -> Pointing:
    """The softmax of a ``PointerHead``.

    Args:
        key: ``[batch, 1, keys, head_dim]``, not yet shifted.
        ids: ``[batch, keys]``.
        visible: ``[batch or 1, seq, keys]``, True where a query sees a token; None means causal over equal lengths.
    """
    scores = (query @ shift_tokens(key).transpose(-1, -2)).squeeze(1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * key.shape[-1] ** -0.5
    if visible is None:
        places = torch.arange(scores.shape[-1], device=scores.device)
        visible = places[:, None] >= places
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    sentinel = sentinel.to(scores.dtype)
    whole = torch.logaddexp(scores.logsumexp(-1), sentinel)
    return Pointing(sentinel - whole, scores - whole[..., None], ids)


@dataclass
class ForwardContext:
    """What a forward pass is given beside its tokens; training gives nothing.

    Attributes:
        position_ids: ``[batch or 1, seq]``; None counts from 0.
        mask: ``[batch, 1, seq, keys]``, True where a query sees a key; None means causal.
        padding: ``[batch, seq]``, True where a token is padding; None means nowhere.
        cache: any kind of transformers ``Cache``. It holds each token's own key, which is shifted when it is read, and
            its value after the value residual.
        cache_position: ``[seq]``, the tokens' places in the cache.
        head_outputs: where each layer adds its policy logits, memory signals and trace; None asks for none.
        remembered: the pointer head's keys and tokens, which the last layer's cache holds as one more head: those of
            these tokens before that layer, those of all tokens after it.
    """

    position_ids: Tensor | None = None
    mask: Tensor | None = None
    padding: Tensor | None = None
    cache: Cache | None = None
    cache_position: Tensor | None = None
    head_outputs: list[tuple[Tensor | None, Tensor | None, Tensor]] | None = None
    remembered: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values with the cached ones before them; padding's are zero, so that the first real
        token is shifted in nothing."""
        if self.padding is not None:
            key, value = (x.masked_fill(self.padding[:, None, :, None], 0) for x in (key, value))
        if self.cache is None:
            return key, value
        if self.remembered is None:
            return self.cache.update(key, value, layer_index)
        key, value = (torch.cat(both, dim=1) for both in zip((key, value), self.remembered, strict=True))
        key, value = self.cache.update(key, value, layer_index)
        self.remembered = key[:, -1:], value[:, -1:]
        return key[:, :-1], value[:, :-1]

    def remember(self, key: Tensor, ids: Tensor | None) -> Tensor:
        """The pointer head's keys of these tokens, padding's zero; where there is a cache, they and the tokens are
        written into it by the last layer. Without ``ids`` (embeddings were given) the tokens are unknown."""
        if self.padding is not None:
            key = key.masked_fill(self.padding[:, None, :, None], 0)
        if self.cache is not None:
            self.remembered = key, token_digits(ids, key)
        return key

    def recall(self, key: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Keys ``[batch, 1, keys, head_dim]`` and tokens ``[batch, keys]`` to point at, None if unknown, and
        ``visible`` as for ``point``; after the last layer."""
        visible = None if self.mask is None else self.mask[:, 0]
        if self.remembered is None or self.cache_position is None:
            return key, ids, visible
        key, digits = self.remembered
        if visible is None:
            visible = self.cache_position[:, None] >= torch.arange(key.shape[2], device=key.device)
        known, ids = tokens_of_digits(digits)
        return key, ids, visible & known[:, None]


def token_digits(ids: Tensor | None, like: Tensor) -> Tensor:
    """Token numbers ``[batch, seq]`` as vectors shaped and typed ``like`` ``[batch, 1, seq, head_dim]``, for a cache: a
    1 and three digits of base 256, which even bf16 holds exactly; zeros for unknown ones."""
    if ids is None:
        return torch.zeros_like(like)
    digits = torch.stack((torch.ones_like(ids), ids % 256, ids // 256 % 256, ids // 65536), dim=-1)
    return F.pad(digits, (0, like.shape[-1] - 4)).unsqueeze(1).to(like.dtype)


def tokens_of_digits(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are known, and their numbers, both ``[batch, keys]``, by what ``token_digits`` returned."""
    known, low, middle, high = digits[:, 0, :, :4].long().unbind(-1)
    return known == 1, low + 256 * middle + 65536 * high


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, shifted: bool, backend: str) -> Tensor:
    """Softmax attention by the kernel of ``backend``, all tensors ``[batch, heads, seq, head_dim]``.

    Without a mask it is causal over equal lengths, or one new query over everything cached: the calls that fused
    kernels serve without an S×S matrix. Only "sdpa" and "eager" take a mask (padding, a static cache, a prompt in
    parts): with one, the other two leave the call to "sdpa".

    Args:
        shifted: read the keys through ``shift_keys``.
    """
    if shifted and backend == "sdpa" and mask is None and query.shape[2] == 1:
        return attend_shifted_keys_once(query, key, value)
    key = shift_keys(key) if shifted else key
    if backend == "eager":
        positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)
        return attention_probabilities(query, key, mask, positions).to(value.dtype) @ value
    causal = mask is None and query.shape[2] > 1
    if mask is None and backend in _FUSED_KERNELS:
        return _FUSED_KERNELS[backend](query, key, value, causal)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def attend_shifted_keys_once(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One new query ``[batch, heads, 1, head_dim]`` over all cached keys, as over ``shift_keys(key)``.

    Its even dimensions meet each key, its odd ones the key before: two narrow products and a shift of the scores in
    place of a copy of all keys.
    """
    halves = torch.eye(2, dtype=query.dtype, device=query.device).repeat(1, query.shape[-1] // 2)
    own, previous = (((query * halves) @ key.transpose(-1, -2)).float() * key.shape[-1] ** -0.5).split(1, dim=2)
    return (own + F.pad(previous[..., :-1], (1, 0))).softmax(dim=-1).to(value.dtype) @ value


def attention_probabilities(query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """``[batch, heads, seq, keys]`` in float32; without a mask causal by the queries' ``positions`` ``[seq]``."""
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
    """The trace ``[batch, seq, heads, 4]`` with the fields of ``TRACE_FIELDS``.

    The attention probabilities are formed for a few query rows at a time: here too there is no S×S matrix.
    """
    columns, spread = torch.arange(key.shape[2], device=key.device), []
    places = columns if context.cache_position is None else context.cache_position
    for start in range(0, query.shape[2], _TRACE_QUERY_ROWS):
        rows = slice(start, start + _TRACE_QUERY_ROWS)
        mask = None if context.mask is None else context.mask[:, :, rows]
        probabilities = attention_probabilities(query[:, :, rows], key, mask, places[rows])
        distances = (places[rows, None] - columns).clamp(min=0)
        spread.append((torch.special.entr(probabilities).sum(-1), (probabilities * distances).sum(-1)))
    entropy, distance = (torch.cat(parts, dim=2).transpose(1, 2) for parts in zip(*spread, strict=True))
    policy = torch.ones_like(entropy) if policy_logits is None else 2 * policy_logits.float().sigmoid()
    memory = torch.zeros_like(entropy) if memory_signals is None else memory_signals.float()
    return torch.stack((policy, memory, entropy, distance), dim=-1)
