"""Calibration: known distributions, and a token-by-token reference."""

import math

import numpy as np
import pytest
import torch

from mvlm_core.data.verses import LINE, Verse, sample_verses, verses_of
from mvlm_core.evaluation.bits_per_byte import encode
from mvlm_core.evaluation.calibration import calibration, calibration_error, verse_ids
from tests.evaluation import CONTEXT
from tests.helpers import MODELS, recipe_of


def test_calibration_error_of_known_distributions():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.02, 1, 200_000)
    calibrated = calibration_error(confidence, rng.uniform(size=200_000) < confidence)
    assert calibrated.error < 0.01 and calibrated.tokens == 200_000
    assert calibration_error([0.9] * 10, [1, 0] * 5).error == pytest.approx(0.4), "over-confident by 0.4"
    mixed = calibration_error([0.95, 0.95, 0.5, 0.5], [1, 0, 1, 1])
    assert (mixed.error, mixed.confidence, mixed.accuracy) == pytest.approx((0.475, 0.725, 0.75))
    # One bin holds (14/15, 1]: gaps of opposite sign cancel in a bin and add up between two.
    assert calibration_error([0.95, 0.99], [0, 1]).error == pytest.approx(0.47)
    assert calibration_error([14 / 15, 0.99], [0, 1]).error == pytest.approx((14 / 15 + 0.01) / 2)
    assert math.isnan(calibration_error([], []).error)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("end", ("\n", "\n\n", ""))
def test_targets_are_the_documents_own_tokens(model, end, real_text):
    """Line breaks as well: two are one token of model 1 too, but not before text."""
    tripled = [text.replace("\n", "\n\n\n") for text in real_text]
    tokenizer = recipe_of(model).tokenizer_class.train(tripled, 600).for_transformers(CONTEXT)
    text = real_text[0].strip() + "\n\n“" + real_text[1].strip().replace("\n", "\n\n") + end
    verses = [Verse(text, line.start(), line.end(), "", None) for line in LINE.finditer(text)]
    assert len(encode(tokenizer, "\n\n")) == 1 and len(verses) > 20
    assert [number for verse in verses for number in verse_ids(tokenizer, verse)] == encode(tokenizer, text)


def test_calibration_covers_each_token_of_the_verses_in_their_context(corpus, tokenizer, overfitted):
    verses = sample_verses(verses_of(corpus.split("validation")), 12, 3)
    everything = list(verses_of(corpus.split("validation")))
    verses += [v for v in everything if v.begin == 0 or v.document.startswith("\n\n", v.end)]  # ends of chapters too
    confidence, correct = [], []
    for verse in verses:
        rest = verse.document[verse.end :]
        following = verse.document[: len(verse.document) - len(rest.lstrip())]  # up to the next verse
        new = encode(tokenizer, following)[len(encode(tokenizer, verse.before)) :]
        ids = [tokenizer.bos_token_id, *encode(tokenizer, verse.before), *new][-CONTEXT - 1 :]
        with torch.no_grad():
            logits = overfitted(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        count = min(len(new), len(ids) - 1)
        top, answer = logits.softmax(-1)[-count:].max(-1)
        confidence += top.tolist()
        correct += (answer == torch.tensor(ids[-count:])).tolist()
    expected = calibration_error(confidence, correct)
    found = calibration(overfitted, tokenizer, verses)
    assert found.tokens == expected.tokens
    assert (found.error, found.confidence, found.accuracy) == pytest.approx(
        (expected.error, expected.confidence, expected.accuracy), rel=1e-4
    )
    assert expected.confidence > expected.accuracy + 0.1, "an overfitted model is over-confident"
