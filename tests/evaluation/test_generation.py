"""Continuations in batches, and how repetitive they are."""

import math

import pytest
import torch

from mvlm_core.data.verses import followed_by, sample_verses, verses_of
from mvlm_core.evaluation.bits_per_byte import encode
from mvlm_core.evaluation.generation import continuations, diversity, prompt_ids, repetition
from tests.evaluation import CONTEXT


def test_a_prompt_is_the_start_token_and_the_text_or_the_end_of_it(tokenizer, real_text):
    text = "".join(real_text[:3])
    whole = prompt_ids(tokenizer, text)
    assert whole[0] == tokenizer.bos_token_id and tokenizer.decode(whole[1:]) == text
    assert prompt_ids(tokenizer, text, len(whole)) == whole
    assert [prompt_ids(tokenizer, text, room) for room in (1, 40)] == [whole[-1:], whole[-40:]]


@pytest.mark.parametrize("name", ["simone", "gpt2"])
def test_a_batch_gives_what_each_prompt_gives_alone(name, make, tokenizer, real_text):
    model = make(name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)  # fresh weights hardly look back
        model.lm_head.weight[tokenizer.all_special_ids] *= 3  # would win now and then
    prompts = [[tokenizer.bos_token_id, *encode(tokenizer, text)][: 3 + 9 * n] for n, text in enumerate(real_text[:9])]
    lengths = [3, 12, 7, 21, 0, 5, 9, 21, 1]
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


def test_sampling_follows_the_seed_and_leaves_other_random_numbers_alone(tokenizer, overfitted):
    prompts = [[tokenizer.bos_token_id]] * 6
    before = torch.random.get_rng_state()
    one, again, other = (
        continuations(overfitted, tokenizer, prompts, [12] * 6, sample=True, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other and len(set(one)) > 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_repetition_by_hand_and_of_real_text(real_text):
    found = diversity(["a b c d a b c d".split(), "e f".split()])
    assert found.rep_4.value == pytest.approx((1 / 5 + 0) / 2)
    assert (found.distinct_2, found.words) == (5 / 8, 5.0)
    repeated = diversity([("In the beginning " * 100).split()])
    assert repeated.rep_4.value > 0.98 and repeated.distinct_2 < 0.02
    real = diversity([text.split()[:64] for text in real_text])
    assert real.rep_4.value < 0.05 and real.distinct_2 > 0.5


def test_greedy_text_repeats_more_than_sampled_or_real_text(corpus, make, tokenizer, overfitted):
    verses = sample_verses(verses_of(corpus.split("validation")), 24, 0)
    used = [verse for verse in verses if followed_by(verse, 24) is not None]
    found = repetition(overfitted, tokenizer, verses, words=24, seed=5)
    assert found["reference"] == diversity([followed_by(verse, 24).split() for verse in used])
    assert found["reference"].words == 24 and found["greedy"].rep_4.count == len(used) > 15
    assert found["greedy"].distinct_2 < found["sampled"].distinct_2
    assert found == repetition(overfitted, tokenizer, verses, words=24, seed=5)
    assert found["sampled"] != repetition(overfitted, tokenizer, verses, words=24, seed=6)["sampled"]
    stuck = make()
    with torch.no_grad():
        stuck.lm_head.weight.zero_()  # all tokens equal: greedy decoding always takes the first
    assert repetition(stuck, tokenizer, verses, words=24)["greedy"].words < 2
