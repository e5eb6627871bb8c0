"""Causal self-attention with rotary positions and three governance heads: policy, memory and trace."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modern_layers import RMSNorm

# The last dimension of the traces, in order: what each field says.
TRACE_FIELDS = {
    "policy": "how much of what attention read is let through (0 to 2)",
    "memory": "share of the first layer's values in the later layers' (0 to 1)",
    "entropy": "how widely attention is spread, in nats",
    "distance": "how far back attention looks, in tokens",
}
_TRACE_QUERY_ROWS = 128


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al., arXiv 2104.09864).

    Computed in each forward pass, never kept in a buffer: transformers 5 replaces non-persistent buffers with
    uninitialised memory when it loads a model (transformers#48892). It costs one table per pass, not per layer.

    Args:
        position_ids: ``[batch or 1, seq]``.
    Returns:
        Two tensors ``[batch or 1, 1, seq, head_dim]``, computed in float32 and given in ``dtype``.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[batch, heads, seq, head_dim]`` by its positions; pairs are ``(i, i + head_dim / 2)``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def of_previous(values: Tensor, slots: Tensor | None = None) -> Tensor:
    """For some tokens, what ``values [batch, heads, seq, head_dim]`` hold of the token before (zero for the first).

    Args:
        slots: ``[tokens]``, the tokens' places in ``values``; None means all.
    """
    if slots is None:
        return F.pad(values, (0, 0, 1, 0))[:, :, :-1]
    before = values.index_select(2, (slots - 1).clamp(min=0))
    return before.masked_fill((slots == 0).view(-1, 1), 0)


def remember_previous(key: Tensor) -> Tensor:
    """Keys ``[batch, heads, seq, head_dim]`` whose odd dimensions are those of the token before (zero for the first).

    Rotary pairs are whole: the partners ``i`` and ``i + head_dim / 2`` are both even or both odd.
    """
    odd = torch.arange(key.shape[-1], device=key.device) % 2 == 1
    return torch.where(odd, of_previous(key), key)


def attend_remembering(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One new query ``[batch, heads, 1, head_dim]`` over all that is cached, as over ``remember_previous(key)``.

    Its even dimensions ask each key, its odd ones the key before: two narrow products and a shift of the scores in
    place of a copy of all keys.
    """
    halves = torch.eye(2, dtype=query.dtype, device=query.device).repeat(1, query.shape[-1] // 2)
    own, before = (((query * halves) @ key.transpose(-1, -2)).float() * key.shape[-1] ** -0.5).split(1, dim=2)
    return (own + F.pad(before[..., :-1], (1, 0))).softmax(dim=-1).to(value.dtype) @ value


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: str = "sdpa") -> Tensor:
    """Softmax attention, all tensors ``[batch, heads, seq, head_dim]``.

    Without a mask it is causal over equal lengths, or one new query over everything cached: the calls that fused
    kernels serve without an S×S matrix. A mask (padding, a static cache) always goes through PyTorch's own SDPA.
    """
    causal = query.shape[2] > 1
    if mask is not None or backend == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal and mask is None)
    if backend == "flash_attn":
        attention = importlib.import_module("flash_attn").flash_attn_func
        return attention(*(x.transpose(1, 2) for x in (query, key, value)), causal=causal).transpose(1, 2)
    if backend == "xformers":
        operations = importlib.import_module("xformers.ops")
        bias = operations.LowerTriangularMask() if causal else None
        inputs = (x.transpose(1, 2) for x in (query, key, value))
        return operations.memory_efficient_attention(*inputs, attn_bias=bias).transpose(1, 2)
    if backend == "eager":
        return _attention_rows(query, key, 0, causal).to(value.dtype) @ value
    raise ValueError(f"unknown attention backend {backend!r}")


def _attention_rows(query: Tensor, key: Tensor, first_position: int, causal: bool) -> Tensor:
    """Attention probabilities ``[batch, heads, rows, keys]`` of some query rows, in float32."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if causal:
        rows = torch.arange(query.shape[2], device=query.device) + first_position
        columns = torch.arange(key.shape[2], device=query.device)
        scores = scores.masked_fill(columns[None, :] > rows[:, None], float("-inf"))
    return scores.softmax(dim=-1)


class EnhancedGovernanceAttention(nn.Module):
    """Multi-head causal attention whose heads are governed.

    - The **policy** head decides, per token and head, how much of that head's reading is let through: a gate in
      (0, 2) on the attention output (after gated attention, arXiv 2505.06708; it starts at 1, so that training begins
      from plain attention).
    - The **memory** head keeps three things at hand. Half of each key stands for the token *before* its own, so a
      query can ask, in a single layer, for what followed such a token earlier (induction, arXiv 2209.11895, by a
      partial offset of the keys); how much it asks that way is its own choice. The value of the token before is
      returned for the feed-forward layer to read. And the first layer's values are carried forward: the head decides,
      per token and head, how much of them to use in place of this layer's own (value residual learning, arXiv
      2410.17897, with a mix that depends on the token); the first layer has none to carry.
    - The **trace** head has no weights. On request it reports per token what the other two and the attention did.

    Queries and keys are normalised before the rotation (arXiv 2010.04245), which bounds the attention logits.

    Args:
        layer_index: of the model's layers; the first one has no values to carry.
        cache_index: of the cache's layers, ``layer_index`` where not given.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        layer_index: int,
        *,
        policy_head: bool = True,
        memory_head: bool = True,
        norm_eps: float = 1e-6,
        backend: str = "sdpa",
        cache_index: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads or (hidden_dim // num_heads) % 4:
            raise ValueError(f"hidden_dim {hidden_dim} must split into {num_heads} heads of a width divisible by 4")
        self.num_heads, self.head_dim = num_heads, hidden_dim // num_heads
        self.cache_index, self.backend = layer_index if cache_index is None else cache_index, backend
        self.q_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.k_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.v_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.o_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, norm_eps)
        self.k_norm = RMSNorm(self.head_dim, norm_eps)
        self.policy_head = nn.Linear(hidden_dim, num_heads) if policy_head else None
        self.remembers = memory_head
        self.memory_head = nn.Linear(hidden_dim, num_heads) if memory_head and layer_index > 0 else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        first_values: Tensor | None = None,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        past_key_values=None,
        slots: Tensor | None = None,
        trace: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor | None]]:
        """Attend.

        Args:
            x: ``[batch, seq, hidden_dim]``, normalised.
            cos, sin: from ``rotary_tables``.
            first_values: the first layer's values of these tokens, ``[batch, heads, seq, head_dim]``.
            mask: broadcastable to ``[batch, heads, seq, keys]``; None means causal.
            padding: ``[batch, seq]``, True where a token only fills up; None means nowhere.
            past_key_values: a transformers ``Cache``. It holds each token's own key and its mixed value; what a key
                remembers of the token before is put together when it is read, so any kind of cache will do.
            slots: ``[seq]``, the tokens' places in the cache.
            trace: also report ``traces``.
        Returns:
            The output ``[batch, seq, hidden_dim]``; the first layer's values; the values of the tokens before
            ``[batch, seq, hidden_dim]``, None without a memory head; and what the heads said: ``policy_logits`` and
            ``memory_signals`` ``[batch, seq, heads]`` (None where switched off) and ``traces`` ``[batch, seq, heads,
            4]`` with the fields of ``TRACE_FIELDS``.
        """
        query = apply_rotary(self.q_norm(self._split(self.q_proj(x))), cos, sin)
        key = apply_rotary(self.k_norm(self._split(self.k_proj(x))), cos, sin)
        value = self._split(self.v_proj(x))
        first_values = value if first_values is None else first_values

        memory_signals = None
        if self.memory_head is not None:
            memory_signals = self.memory_head(x).sigmoid()
            value = torch.lerp(value, first_values, memory_signals.transpose(1, 2).unsqueeze(-1).to(value.dtype))
        if padding is not None:  # the first real token has nothing to remember
            key, value = (x.masked_fill(padding[:, None, :, None], 0) for x in (key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.cache_index)
        previous = None
        keys_as_they_are = self.remembers and query.shape[2] == 1 and mask is None and not trace
        if self.remembers:
            key = key if keys_as_they_are else remember_previous(key)
            previous = of_previous(value, slots).transpose(1, 2).flatten(2)
        if keys_as_they_are:
            heads = attend_remembering(query, key, value).transpose(1, 2)
        else:
            heads = causal_attention(query, key, value, mask, self.backend).transpose(1, 2)

        policy_logits = None
        if self.policy_head is not None:
            policy_logits = self.policy_head(x)
            heads = heads * (2 * policy_logits.sigmoid()).unsqueeze(-1).to(heads.dtype)
        output = self.o_proj(heads.reshape(x.shape))

        said = {"policy_logits": policy_logits, "memory_signals": memory_signals, "traces": None}
        if trace:
            said["traces"] = self._trace(query, key, mask, policy_logits, memory_signals)
        return output, first_values, previous, said

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    @torch.no_grad()
    def _trace(
        self, query: Tensor, key: Tensor, mask: Tensor | None, policy_logits: Tensor | None, signals: Tensor | None
    ) -> Tensor:
        """The gate, the share of first-layer values, the attention's entropy (nats) and mean distance (tokens).

        The probabilities are formed for a few query rows at a time: here too there is no S×S matrix.
        """
        queries, keys = query.shape[2], key.shape[2]
        shift = keys - queries
        columns = torch.arange(keys, device=query.device)
        entropy, distance = [], []
        for start in range(0, queries, _TRACE_QUERY_ROWS):
            rows = query[:, :, start : start + _TRACE_QUERY_ROWS]
            if mask is None:
                probabilities = _attention_rows(rows, key, shift + start, causal=True)
            else:
                scores = (rows @ key.transpose(-1, -2)).float() * self.head_dim**-0.5
                part = mask[:, :, start : start + _TRACE_QUERY_ROWS]
                scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
                probabilities = scores.softmax(dim=-1)
            positions = torch.arange(rows.shape[2], device=query.device) + shift + start
            entropy.append(torch.special.entr(probabilities).sum(-1))
            distance.append((probabilities * (positions[:, None] - columns[None, :]).clamp(min=0)).sum(-1))
        entropy, distance = (torch.cat(parts, dim=2).transpose(1, 2) for parts in (entropy, distance))
        policy = torch.ones_like(entropy) if policy_logits is None else 2 * policy_logits.float().sigmoid()
        memory = torch.zeros_like(entropy) if signals is None else signals.float()
        return torch.stack((policy, memory, entropy, distance), dim=-1)
