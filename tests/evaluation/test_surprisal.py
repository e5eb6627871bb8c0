"""Surprisal: bits of tokens and sentences agree with bits per byte and with generation."""

import math

import pytest
import torch

from mvlm_core.evaluation.bits_per_byte import encode, score_loaded
from mvlm_core.evaluation.surprisal import (
    Token,
    bits_by_part,
    fit_to_context,
    governance_traces,
    score_tokens,
    sentences,
    stream_tokens,
    words,
)
from tests.evaluation import CONTEXT
from tests.helpers import within

TEXT = "“Fear not,” said he; é 🕊 for unto you!  Behold.\nAnd it came to pass,\n\nthat they went."


@pytest.mark.parametrize("name", ("gpt2", "simone"))
def test_token_bits_add_up_to_the_bits_per_byte_score(make, tokenizer, real_text, name):
    model, text = make(name), real_text[0]
    ids = encode(tokenizer, text)
    tokens = score_tokens(model, tokenizer, ids, batch_size=3)
    assert len(ids) > 3 * CONTEXT and [token.id for token in tokens] == ids
    assert "".join(token.text for token in tokens) == text
    nats = score_loaded(model, tokenizer, [("text", text)]).nats
    assert sum(token.bits for token in tokens) == pytest.approx(nats / math.log(2), rel=1e-5)
    parts = sentences(text)
    assert sum(bits_by_part(tokens, parts)) == pytest.approx(nats / math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", ("gpt2", "simone"))
@pytest.mark.parametrize("temperature", (0, 0.9))
def test_generated_tokens_have_the_same_bits_when_scored_again(make, tokenizer, name, temperature):
    model = make(name)
    ids, length = fit_to_context(model, tokenizer, "In the beginning", 20)
    drawn = list(stream_tokens(model, tokenizer, ids, length, temperature=temperature, top_p=0.95, seed=3))
    again = score_tokens(model, tokenizer, [*ids, *(token.id for token in drawn)])[len(ids) :]
    assert [token.bits for token in drawn] == pytest.approx([token.bits for token in again], abs=1e-3)


def test_generation_is_seeded_and_stops_at_the_end_token(make, tokenizer):
    model = make()
    ids = encode(tokenizer, "In the beginning")

    def text(seed, temperature=1.0):
        return [
            token.id for token in stream_tokens(model, tokenizer, ids, 8, temperature=temperature, top_p=1, seed=seed)
        ]

    assert text(1) == text(1) != text(2) and text(1, 0) == text(2, 0)
    first = text(1, 0)[0]
    model.lm_head.weight.data[tokenizer.eos_token_id] = model.lm_head.weight.data[first] * 100
    ended = text(1, 0)
    assert ended == [tokenizer.eos_token_id]


def test_prompt_and_length_share_the_context(make, tokenizer):
    model = make()
    short, long = "In the", "and it came to pass " * 200
    assert fit_to_context(model, tokenizer, short, 10) == (encode(tokenizer, short), 10)
    ids, length = fit_to_context(model, tokenizer, short, 10_000)
    assert 1 + len(ids) + length == CONTEXT
    for wanted in (1, 10_000):
        ids, length = fit_to_context(model, tokenizer, long, wanted)
        assert 1 + len(ids) + length == CONTEXT and ids == encode(tokenizer, long)[-len(ids) :]
        assert length == min(wanted, (CONTEXT - 1) // 2), "half of the context is the prompt's"
    assert fit_to_context(model, tokenizer, "", 5) == ([], 5)


def test_sentence_splitting_preserves_the_whole_text():
    assert sentences(TEXT) == [
        "“Fear not,” said he; é 🕊 for unto you!",
        "  Behold.\n",
        "And it came to pass,\n\n",
        "that they went.",
    ]
    for text in ("", " \n ", "...", "\n\nA. B", "“Stay.” Go?!", "No end"):
        assert "".join(sentences(text)) == text
    assert sentences("Wait... “Go!” he said. 3.14 is") == ["Wait...", " “Go!”", " he said.", " 3.14 is"]


def test_a_long_run_of_full_stops_takes_linear_time():
    text = "." * 1_000_000 + "a"
    with within(60):  # quadratic time would be hours
        assert sentences(text) == [text]


def test_tokens_count_for_the_sentence_they_begin_in():
    tokens = [Token(0, "", 1.0), Token(1, "é", 2.0), Token(2, ".\n", 4.0), Token(3, "And", 8.0), Token(4, "", 16.0)]
    assert bits_by_part(tokens, ["é.\n", "And"]) == [7.0, 24.0]
    assert bits_by_part([], ["é", "And"]) == [0.0, 0.0]


def test_words_include_the_whitespace_before_them():
    assert words(["In", " the", " be", "ginning", ",", "\n", "And", " ", "é"]) == [[0], [1], [2, 3, 4], [5, 6], [7, 8]]
    assert words([]) == []


def test_governance_traces_are_averaged_over_heads_and_word_tokens(make, tokenizer):
    model = make()
    tokens = score_tokens(model, tokenizer, encode(tokenizer, "In the beginning God created the heaven"))
    found = governance_traces(model, tokenizer, tokens)
    assert "".join(found.words) == "In the beginning God created the heaven" and found.layers == ["layer 1", "layer 2"]
    assert list(found.fields) == ["policy", "memory", "entropy", "distance"]
    ids = torch.tensor([[tokenizer.bos_token_id, *(token.id for token in tokens)]])
    with torch.inference_mode():
        traces = model(ids, output_traces=True).traces
    word = next(n for n, group in enumerate(words([token.text for token in tokens])) if len(group) > 1)
    group = [n + 1 for n in words([token.text for token in tokens])[word]]
    expected = traces[1][0, group, :, 3].mean()
    assert found.fields["distance"][1][1][word] == pytest.approx(float(expected), rel=1e-4)
    assert all(len(row) == len(found.words) for _, rows in found.fields.values() for row in rows)
    assert (
        governance_traces(make("gpt2"), tokenizer, tokens) is None and governance_traces(model, tokenizer, []) is None
    )
