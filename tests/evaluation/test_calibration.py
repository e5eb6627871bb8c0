"""Calibration: known distributions, and a token-by-token reference."""

import math

import numpy as np
import pytest
import torch

from mvlm_core.data.verses import sample_verses, verses_of
from mvlm_core.evaluation.bits_per_byte import encode
from mvlm_core.evaluation.calibration import calibration, calibration_error
from tests.evaluation import CONTEXT


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


def test_calibration_covers_each_token_of_the_verses_in_their_context(corpus, tokenizer, overfitted):
    verses = sample_verses(verses_of(corpus.split("validation")), 12, 3)
    verses += [v for v in verses_of(corpus.split("validation")) if v.begin == 0]
    confidence, correct = [], []
    for verse in verses:
        new = encode(tokenizer, verse.text + "\n")
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
