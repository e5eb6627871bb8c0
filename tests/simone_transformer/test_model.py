"""Enhanced SIM-ONE: causality, caches, pointer, optional heads, attention backends, traces and RMSNorm."""

import importlib
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, StaticCache

from simone_transformer import (
    TRACE_FIELDS,
    EnhancedGovernanceAttention,
    EnhancedSIMONEConfig,
    EnhancedSIMONEModel,
    rope_attention,
    swiglu_width,
)
from simone_transformer.modern_layers import RMSNorm
from simone_transformer.rope_attention import (
    attend,
    attend_shifted_decode,
    pack_token_ids,
    shift_keys,
    unpack_token_ids,
)

SWITCHES = list(itertools.product([True, False], repeat=2))


def make_model(**changes):
    """A model in which every weight has an effect: zero-initialized matrices are filled."""
    torch.manual_seed(0)
    config = EnhancedSIMONEConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            **changes,
        }
    )
    model = EnhancedSIMONEModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().sum() == 0:
                parameter.normal_(std=0.3)
    return model


def tokens(*shape, seed=1):
    return torch.randint(4, 300, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("policy", "memory"), SWITCHES)
@torch.no_grad()
def test_later_tokens_never_change_earlier_logits(policy, memory):
    model = make_model(policy_head=policy, memory_head=memory)
    before, after = tokens(2, 20), tokens(2, 20)
    after[:, 12:] = tokens(2, 8, seed=9)
    for cached in (False, True):
        a, b = (model(ids, use_cache=cached).logits for ids in (before, after))
        assert torch.equal(a[:, :12], b[:, :12])
        assert not torch.allclose(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize(("policy", "memory"), SWITCHES)
@torch.no_grad()
def test_cached_logits_equal_uncached(policy, memory):
    model, ids = make_model(policy_head=policy, memory_head=memory), tokens(2, 24)
    whole = model(ids, use_cache=False).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=40)):
        parts = []
        for begin, end in ((0, 9), (9, 15), (15, 16), (16, 17), (17, 24)):
            output = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)


@torch.no_grad()
def test_output_probabilities_are_a_mixture_of_pointer_and_vocabulary():
    """Recomputed from the pointer's parts: context tokens, each keyed by the state before it, and a sentinel."""
    model, ids = make_model(), tokens(1, 12)
    ids[0, 8] = ids[0, 3]  # a token that occurs twice
    entering = []
    model.layers[-1].register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    output = model(ids, use_cache=False, output_traces=True)
    query, key, sentinel = model.pointer(entering[0])
    vocabulary = (model.lm_head(model.hidden_states(ids)[0])).softmax(-1)
    for at in (0, 1, 11):
        before = torch.cat((torch.zeros(1, 8), key[0, 0, :at]))
        weights = torch.cat((query[0, 0, at] @ before.T / 8**0.5, sentinel[0, at : at + 1])).softmax(0)
        expected = weights[-1] * vocabulary[0, at]
        for place in range(at + 1):
            expected[ids[0, place]] += weights[place]
        torch.testing.assert_close(output.logits[0, at].exp(), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(output.pointer_output.log_vocab_prob[0, at].exp(), weights[-1], rtol=1e-4, atol=1e-7)
    assert output.pointer_output.log_prob(ids[:, 1:2].expand_as(ids))[0, 0] < -1e30, (
        "what is not in the context cannot be copied"
    )


@torch.no_grad()
def test_pointer_selects_the_token_after_an_earlier_occurrence():
    """With keys that depend on the token alone, it points to the token after an earlier copy of the last one."""
    model = make_model(num_hidden_layers=1)
    model.embed_tokens.weight.copy_(torch.eye(300, 32))
    for projection in (model.pointer.q_proj, model.pointer.k_proj):
        projection.weight.copy_(torch.eye(8, 32))
    for norm in (model.pointer.q_norm, model.pointer.k_norm):
        norm.weight.fill_(4.0)
    ids = torch.tensor([[5, 6, 4, 7, 6]])
    pointer_output = model(ids, use_cache=False, output_traces=True).pointer_output
    assert pointer_output.log_token_probs[0, -1].argmax() == 2 and pointer_output.ids[0, 2] == 4
    assert pointer_output.log_token_probs[0, -1, 2].exp() > 0.9


@torch.no_grad()
def test_token_traces_report_which_tokens_were_copied():
    model, ids = make_model(), torch.tensor([[2, 5, 6, 5, 7, 6]])
    found = model.token_traces(ids)
    assert list(found) == [*TRACE_FIELDS, "copied"] and {len(values) for _, values in found.values()} == {6}
    output = model(ids, use_cache=False, output_traces=True)
    torch.testing.assert_close(
        torch.tensor(found["policy"][1]), torch.stack(output.traces)[..., 0].mean(dim=(0, 1, 3)), rtol=0, atol=1e-5
    )
    copied = [value > 0 for value in found["copied"][1]]
    assert copied == [False, False, False, True, False, True], "only what stood there before can be copied"
    weight = output.pointer_output.log_token_probs[0, 2, 1].exp()  # of the first 5, where the second is predicted
    assert found["copied"][1][3] == pytest.approx((weight / output.logits[0, 2, 5].exp()).item(), rel=1e-4)


@torch.no_grad()
def test_positions_given_as_embeddings_are_excluded_from_the_pointer():
    """Embeddings do not reveal token IDs: only the vocabulary predicts, and only later tokens can be copied."""
    model, ids = make_model(), tokens(2, 12)
    embeddings = model.embed_tokens(ids[:, :8])
    assert model(inputs_embeds=embeddings, use_cache=False, output_traces=True).pointer_output is None
    first = model(inputs_embeds=embeddings, use_cache=True)
    later = model(ids[:, 8:], past_key_values=first.past_key_values, output_traces=True).pointer_output
    assert torch.all(later.log_token_probs[:, :, :8] < -1e30) and torch.all(later.ids[:, 8:] == ids[:, 8:])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_token_ids_round_trip_through_caches_of_any_dtype(kind):
    ids = torch.tensor([[0, 255, 256, 31_999, 65_535, 999_999]])
    known, again = unpack_token_ids(pack_token_ids(ids, torch.zeros(1, 1, 6, 8, dtype=kind)))
    assert known.all() and torch.equal(again, ids)


def test_shift_keys_takes_odd_dimensions_from_the_previous_token():
    key = torch.arange(12.0).view(1, 1, 3, 4)
    assert shift_keys(key).tolist() == [[[[0, 0, 2, 0], [4, 1, 6, 3], [8, 5, 10, 7]]]]


@pytest.mark.parametrize("keys", [1, 2, 9])
def test_single_query_decoding_equals_attention_over_shifted_keys(keys):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 1, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    expected = attend(query, shift_keys(key), value, None, shifted=False, backend="sdpa")
    torch.testing.assert_close(attend_shifted_decode(query, key, value), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_feed_forward_layer_and_attention_use_the_previous_token(layers):
    """The memory head: the feed-forward layer reads the previous token's value, attention its key."""
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 8] = 5 if ids[0, 8] != 5 else 6
    model = make_model(num_hidden_layers=layers)
    whole = model(ids, use_cache=False).logits
    model.layers[-1].previous_gain.zero_()
    assert not torch.allclose(model(ids, use_cache=False).logits, whole, atol=0.1)
    keys = []
    kernel = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, *rest, **how: keys.append(k) or kernel(q, k, *rest, **how)
        )
        for row in (ids, changed):
            model(row, use_cache=False)
    before, after = keys[0], keys[layers]
    assert torch.equal(before[:, :, 9, 0::2], after[:, :, 9, 0::2])
    assert not torch.equal(before[:, :, 9, 1::2], after[:, :, 9, 1::2])


@torch.no_grad()
def test_generation_is_the_same_with_any_cache_and_left_padding():
    model, ids = make_model(), tokens(1, 10)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **greedy)[:, 10:]
    assert torch.equal(model.generate(ids, **greedy)[:, 10:], expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **greedy)[:, 10:], expected)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)), dim=1)
    for cache in (None, "static"):
        found = model.generate(padded, attention_mask=mask, cache_implementation=cache, **greedy)
        assert torch.equal(found[:, 15:], expected)


@torch.no_grad()
def test_left_padding_is_not_shifted_into_the_first_token():
    """The first real token has no previous token, whatever the padding, with or without a cache."""
    model, ids = make_model(), tokens(2, 10)
    expected = model(ids, use_cache=False).logits
    for filler in (0, 7):
        padded = torch.cat((torch.full((2, 5), filler), ids), dim=1)
        mask = torch.cat((torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)), dim=1)
        for cached in (False, True):
            # Positions as generation counts them: from the first real token.
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            found = model(padded, attention_mask=mask, position_ids=positions, use_cache=cached).logits[:, 5:]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class FakeKernels:
    """Stand-ins for flash_attn and xformers, whose kernels use ``[batch, seq, heads, head_dim]``."""

    class LowerTriangularMask:
        pass

    def __init__(self):
        self.calls = []

    def flash_attn_func(self, query, key, value, causal):
        self.calls.append(query.shape[1])
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)

    def memory_efficient_attention(self, query, key, value, attn_bias):
        return self.flash_attn_func(query, key, value, isinstance(attn_bias, self.LowerTriangularMask))


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flash_attn", "xformers"])
@torch.no_grad()
def test_attention_backends_match_and_decode_with_their_own_kernel(backend, monkeypatch):
    """In a single pass, in cached decoding, and with padding."""
    ids, rest = tokens(2, 20), tokens(2, 3, seed=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    reference = make_model()
    expected = reference(ids, use_cache=False).logits, reference(ids, attention_mask=mask).logits[:, -1]
    longer = reference(torch.cat((ids, rest), dim=1), use_cache=False).logits[:, -3:]

    kernels, eager, once = FakeKernels(), [], []
    monkeypatch.setattr(rope_attention, "_fits_fused_kernels", lambda query: True)  # as on a GPU in half precision
    monkeypatch.setitem(sys.modules, "flash_attn", kernels)
    monkeypatch.setitem(sys.modules, "xformers.ops", kernels)
    for calls, name in ((eager, "attention_probabilities"), (once, "attend_shifted_decode")):
        own = getattr(rope_attention, name)
        spy = lambda query, *rest, calls=calls, own=own: calls.append(query.shape[2]) or own(query, *rest)  # noqa: E731
        monkeypatch.setattr(rope_attention, name, spy)
    model = make_model(attention_backend=backend)
    found = model(ids, use_cache=False).logits, model(ids, attention_mask=mask).logits[:, -1]
    cache = model(ids, use_cache=True).past_key_values
    for calls in (kernels.calls, eager, once):
        calls.clear()
    decoded = [model(rest[:, place : place + 1], past_key_values=cache).logits for place in range(3)]
    for mine, right in zip((*found, torch.cat(decoded, dim=1)), (*expected, longer), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-4)
    layers = [1] * 3 * model.config.num_hidden_layers
    assert once == (layers if backend == "sdpa" else [])
    assert eager == (layers if backend == "eager" else [])
    assert kernels.calls == (layers if backend in ("flash_attn", "xformers") else [])


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_optional_backends_leave_float32_to_sdpa_and_are_not_saved(backend, tmp_path):
    model = make_model(attention_backend=backend)
    assert torch.equal(model(tokens(2, 20)).logits, make_model()(tokens(2, 20)).logits)
    model.save_pretrained(tmp_path)
    assert "attention_backend" not in (tmp_path / "config.json").read_text()
    assert EnhancedSIMONEModel.from_pretrained(tmp_path).config.attention_backend == "sdpa"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown attention backend 'magic'"):
        make_model(attention_backend="magic")


def test_disabled_heads_have_no_parameters():
    def count(**changes):
        return make_model(**changes).num_parameters()

    both, heads, width, layers = count(), 4, 32, 3
    assert both - count(policy_head=False) == layers * heads * (12 + 1) + width
    assert both - count(memory_head=False) == (
        (layers - 1) * heads * (width + 1)
        + layers * width
        + 2 * width * (width // heads)
        + width
        + 2 * (width // heads)
        + width
        + 1
    )
    assert both == count(trace_head=False)


@torch.no_grad()
def test_traces_match_the_heads_and_leave_logits_unchanged():
    model, ids = make_model(), tokens(2, 20)
    plain, traced = model(ids, use_cache=False), model(ids, use_cache=False, output_traces=True)
    assert torch.equal(plain.logits, traced.logits), "a trace must not change what it watches"
    assert plain.traces is None and len(traced.traces) == 3
    assert model.trace_fields == TRACE_FIELDS and make_model(trace_head=False).trace_fields == {}
    assert traced.memory_signals[0] is None and traced.memory_signals[1].shape == (2, 20, 4)
    fields = dict(zip(TRACE_FIELDS, traced.traces[1].unbind(-1), strict=True))
    torch.testing.assert_close(fields["policy"], 2 * traced.policy_logits[1].sigmoid())
    torch.testing.assert_close(fields["memory"], traced.memory_signals[1])
    assert torch.all(fields["entropy"][:, 0] == 0), "the first token can only look at itself"
    positions = torch.arange(20).view(1, 20, 1)
    assert torch.all(fields["entropy"] <= (positions + 1).log() + 1e-5)
    assert torch.all(fields["distance"] <= positions + 1e-4) and fields["distance"].max() > 1


@torch.no_grad()
def test_traces_are_the_same_with_a_cache_and_refused_when_disabled():
    model, ids = make_model(), tokens(1, 20)
    whole = torch.stack(model(ids, use_cache=False, output_traces=True).traces)
    for cache in (None, StaticCache(config=model.config, max_cache_len=40)):  # which has more slots than tokens
        for begin, end, traced in ((0, 10, True), (10, 12, False), (12, 20, True)):
            output = model(ids[:, begin:end], past_key_values=cache, use_cache=True, output_traces=traced)
            cache = output.past_key_values
            if traced:
                found = torch.stack(output.traces)
                torch.testing.assert_close(found, whole[:, :, begin:end], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="trace_head=True"):
        make_model(trace_head=False)(ids, output_traces=True)


def test_swiglu_width_matches_the_classic_parameter_count():
    assert swiglu_width(3072) == 2048
    assert swiglu_width(1024) == 704
    for ff_dim in (256, 768, 1024, 3072):
        assert 2 * ff_dim <= 3 * swiglu_width(ff_dim) < 2 * ff_dim + 3 * 64


def test_head_dimensions_not_divisible_by_4_are_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        EnhancedGovernanceAttention(EnhancedSIMONEConfig(hidden_size=30, num_attention_heads=10), 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    """Each layer runs twice and must not fill a given cache."""
    model, ids, gradients = make_model().train(), tokens(2, 12), []
    for cache in (None, DynamicCache()):
        if cache is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids, labels=ids, past_key_values=cache).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert cache.get_seq_length() == 0
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_saved_and_loaded_weights_give_the_same_logits(tmp_path):
    model, ids = make_model(tie_word_embeddings=False), tokens(1, 8)
    model.save_pretrained(tmp_path)
    again = EnhancedSIMONEModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rmsnorm_matches_torch_forward_and_backward(dtype, tolerance):
    torch.manual_seed(0)
    norm = RMSNorm(48)
    norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(3, 7, 48, dtype=torch.float64) * 3
    gradient = torch.randn_like(x)
    ours, theirs = (x.to(kind).requires_grad_() for kind in (dtype, torch.float64))
    gain = norm.weight.detach().double().requires_grad_()
    expected = torch.nn.functional.rms_norm(theirs, (48,), gain, norm.eps)
    expected.backward(gradient)
    norm = norm.double() if dtype == torch.float64 else norm
    found = norm(ours)
    found.backward(gradient.to(dtype))
    assert found.dtype == ours.grad.dtype == dtype
    with torch.no_grad():
        assert torch.equal(norm(ours), found)
    for mine, right in ((found, expected), (ours.grad, theirs.grad), (norm.weight.grad, gain.grad)):
        assert (mine.double() - right).norm() < tolerance * right.norm()


def test_autocast_keeps_the_residual_stream_in_float32_and_attention_in_bfloat16():
    model, seen = make_model().train(), {}
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, given, made, n=number: seen.update({n: (given[0].dtype, made[0].dtype)}))
        layer.attention.register_forward_hook(
            lambda _, given, made, n=number: seen.update({f"attention {n}": {t.dtype for t in (*given[:1], *given[1])}})
        )
    with torch.autocast("cpu", torch.bfloat16):
        hidden, pointer_output = model.hidden_states(torch.arange(12)[None])
    assert hidden.dtype == torch.bfloat16, "what the output embedding multiplies"
    assert pointer_output.log_token_probs.dtype == pointer_output.log_vocab_prob.dtype == torch.float32
    for number in range(len(model.layers)):
        assert seen[number] == (torch.float32, torch.float32)
        assert seen[f"attention {number}"] == {torch.bfloat16}, "the fused kernels want one type, tables included"


def test_rmsnorm_accumulates_gradients_in_float32():
    torch.manual_seed(0)
    norm = RMSNorm(160)
    norm.weight.data.normal_()
    x, gradient = torch.randn(512, 160, requires_grad=True), torch.randn(512, 160).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        norm(x).backward(gradient)
    exact = x.detach().double().requires_grad_()
    F.rms_norm(exact, (160,), norm.weight.detach().double(), norm.eps).backward(gradient.double())
    assert (x.grad - exact.grad).norm() < 2.5e-3 * exact.grad.norm(), "2.8e-3 where the sum is rounded to bfloat16"


def test_rmsnorm_output_has_the_autocast_dtype():
    norm, x = RMSNorm(16), torch.randn(2, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, norm.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert norm(x).dtype == torch.float32


@pytest.mark.parametrize("version", ["4.57.1", "5.3.0"])
def test_an_older_transformers_is_refused_with_the_version_needed(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.delitem(sys.modules, "simone_transformer.enhanced_model")
    with pytest.raises(ImportError, match=f"needs transformers 5.4 or newer, not {version}"):
        importlib.import_module("simone_transformer.enhanced_model")
