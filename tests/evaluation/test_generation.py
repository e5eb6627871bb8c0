"""Continuations in batches, and how repetitive they are."""

import math

import pytest
import torch

from mvlm_core.data.verses import next_words, sample_verses, verses_of
from mvlm_core.evaluation.bits_per_byte import encode
from mvlm_core.evaluation.generation import continuations, diversity, nucleus, prompt_ids, repetition
from mvlm_core.settings import Sampling
from tests.evaluation import CONTEXT


def test_prompts_begin_with_the_start_token_and_are_truncated_on_the_left(tokenizer, real_text):
    text = "".join(real_text[:3])
    whole = prompt_ids(tokenizer, text)
    assert whole[0] == tokenizer.bos_token_id and tokenizer.decode(whole[1:]) == text
    assert prompt_ids(tokenizer, text, len(whole)) == whole
    assert [prompt_ids(tokenizer, text, room) for room in (1, 40)] == [whole[-1:], whole[-40:]]


@pytest.mark.parametrize("name", ["simone", "gpt2"])
def test_batched_greedy_decoding_matches_each_prompt_decoded_alone(name, make, tokenizer, real_text):
    model = make(name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)  # fresh weights hardly attend to earlier tokens
        model.lm_head.weight[tokenizer.all_special_ids] *= 3  # special tokens would win now and then
    prompts = [[tokenizer.bos_token_id, *encode(tokenizer, text)][: 3 + 9 * n] for n, text in enumerate(real_text[:9])]
    lengths = [3, 12, 7, 21, 0, CONTEXT - 48, 9, 21, CONTEXT - 75]  # two fill the context
    generated = continuations(model, tokenizer, prompts, lengths, batch_size=4)
    for prompt, length, text in zip(prompts, lengths, generated, strict=True):
        ids = list(prompt)
        for _ in range(length):
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[tokenizer.all_special_ids] = -math.inf
            ids.append(int(logits.argmax()))
        assert text == tokenizer.decode(ids[len(prompt) :])
    with pytest.raises(ValueError, match=f"context of {CONTEXT}"):
        continuations(model, tokenizer, [prompts[0]], [CONTEXT])


def test_prompts_that_fill_the_context_share_one_batch(make, tokenizer, real_text, monkeypatch):
    model = make("gpt2")
    ids = [tokenizer.bos_token_id, *encode(tokenizer, "".join(real_text[:3]))]
    prompts = [ids[: CONTEXT - length] for length in range(10, 18)]
    passes = []
    monkeypatch.setattr(model, "forward", lambda forward=model.forward, **given: passes.append(1) or forward(**given))
    together = continuations(model, tokenizer, prompts, list(range(10, 18)))
    assert len(passes) == 17, "one pass a token of the longest"
    assert together == continuations(model, tokenizer, prompts, list(range(10, 18)), batch_size=1)
    assert len(passes) == 17 + sum(range(10, 18))


def test_sampling_is_seeded_and_preserves_the_global_rng_state(tokenizer, overfitted):
    prompts = [[tokenizer.bos_token_id]] * 6
    before = torch.random.get_rng_state()
    one, again, other = (
        continuations(overfitted, tokenizer, prompts, [12] * 6, sample=Sampling(), seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other and len(set(one)) > 1
    assert torch.equal(before, torch.random.get_rng_state())
    few = continuations(overfitted, tokenizer, prompts, [12] * 6, sample=Sampling(), seed=1, batch_size=4)
    assert few == one, "a text does not depend on what shares its batch"


def test_nucleus_tokens_are_drawn_in_proportion_to_their_probability():
    probabilities = torch.tensor([0.03, 0.5, 0.3, 0.01, 0.16])  # the first 0.95 are tokens 1, 2 and 4
    chances = (torch.arange(9600) + 0.5) / 9600
    drawn = nucleus(probabilities.log().expand(9600, -1), chances, 0.95).flatten()
    assert torch.bincount(drawn, minlength=5).tolist() == [0, 5000, 3000, 0, 1600]
    ends = nucleus(probabilities.log().expand(2, -1), torch.tensor([0.0, 1.0 - 2**-24]), 0.95).flatten()
    assert ends.tolist() == [1, 4]
    assert nucleus(torch.zeros(1, 7), torch.tensor([0.999]), 0.95).item() < 7, "all alike"


def test_nucleus_sampling_does_not_depend_on_the_initial_sort_size():
    torch.manual_seed(0)
    logits, chances = torch.randn(64, 50) * torch.linspace(0.1, 8, 64)[:, None], torch.rand(64)
    whole = nucleus(logits, chances, 0.9, likely=50)
    assert all(torch.equal(whole, nucleus(logits, chances, 0.9, likely=count)) for count in (1, 3, 20, 80))


def test_rep_4_and_distinct_2_of_known_and_real_text(real_text):
    found = diversity(["a b c d a b c d".split(), "e f".split()])
    assert found.rep_4.value == pytest.approx((1 / 5 + 0) / 2)
    assert (found.distinct_2, found.words) == (5 / 8, 5.0)
    repeated = diversity([("In the beginning " * 100).split()])
    assert repeated.rep_4.value > 0.98 and repeated.distinct_2 < 0.02
    real = diversity([text.split()[:64] for text in real_text])
    assert real.rep_4.value < 0.05 and real.distinct_2 > 0.5


def test_greedy_text_is_more_repetitive_than_sampled_text(corpus, make, tokenizer, overfitted):
    verses = sample_verses(verses_of(corpus.split("validation")), 24, 0)
    used = [verse for verse in verses if next_words(verse, 24) is not None]
    found = repetition(overfitted, tokenizer, verses, words=24, seed=5)
    assert found["reference"] == diversity([next_words(verse, 24).split() for verse in used])
    assert found["reference"].words == 24 and found["greedy"].rep_4.count == len(used) > 15
    assert found["greedy"].distinct_2 < found["sampled"].distinct_2
    assert found == repetition(overfitted, tokenizer, verses, words=24, seed=5)
    assert found["sampled"] != repetition(overfitted, tokenizer, verses, words=24, seed=6)["sampled"]
    stuck = make()
    with torch.no_grad():
        stuck.lm_head.weight.zero_()  # all tokens equal: greedy decoding always takes the first
        stuck.pointer.sentinel.fill_(100.0)  # and none is copied
    assert repetition(stuck, tokenizer, verses, words=24)["greedy"].words < 2
