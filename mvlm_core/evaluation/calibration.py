"""Calibration: whether a model's confidence in its next token matches its accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mvlm_core.data.verses import Verse
from mvlm_core.evaluation.bits_per_byte import Window, context_of, encode, window_logits
from mvlm_core.evaluation.generation import prompt_ids

BINS = 15
_BATCH_SIZE = 16


@dataclass(frozen=True)
class Calibration:
    """Calibration over ``tokens`` predictions.

    Attributes:
        error: expected calibration error, 0 to 1.
        confidence: mean probability of the most likely token.
        accuracy: top-1 accuracy.
    """

    error: float
    confidence: float
    accuracy: float
    tokens: int


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> Calibration:
    """Expected calibration error with ``BINS`` bins of equal width (Guo et al. 2017, arXiv:1706.04599, equation 3).

    Predictions fall into bins ((b - 1) / BINS, b / BINS] by the probability of the most likely token; the error is the
    mean over predictions of abs(accuracy - mean confidence) of their bin.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not len(confidence):
        return Calibration(math.nan, math.nan, math.nan, 0)
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(index, weights=correct - confidence, minlength=BINS)
    error = float(np.abs(gaps).sum()) / len(confidence)
    return Calibration(error, float(confidence.mean()), float(correct.mean()), len(confidence))


def verse_ids(tokenizer: Any, verse: Verse) -> list[int]:
    """Tokens of a verse and of the line breaks after it, as in the document, where they depend on what follows."""
    following = verse.document[verse.next_begin :][:1]
    ids = encode(tokenizer, verse.document[verse.begin : verse.next_begin] + following)
    return ids[: len(ids) - len(encode(tokenizer, following))]


@torch.inference_mode()
def calibration(model: Any, tokenizer: Any, verses: Iterable[Verse]) -> Calibration:
    """Calibration on the tokens of the verses and of the line breaks after them, each predicted from all the text that
    precedes it."""
    context = context_of(model)
    items = []
    for verse in verses:
        last = verse_ids(tokenizer, verse)
        ids = np.array((prompt_ids(tokenizer, verse.before, context + 1) + last)[-context - 1 :])
        items.append(Window(verse.reference, ids[:-1], ids[1:], max(0, len(ids) - 1 - len(last))))
    items.sort(key=lambda item: (len(item.inputs), item.first_new))  # to minimize padding and unused logits
    confidence, correct = [np.empty(0)], [np.empty(0)]
    for start in range(0, len(items), _BATCH_SIZE):
        logits, targets, new = window_logits(model, items[start : start + _BATCH_SIZE], str(model.device))
        top, predicted = logits.float().softmax(dim=-1).max(dim=-1)
        confidence.append(top.cpu()[new].numpy())
        correct.append((predicted == targets).cpu()[new].numpy())
    return calibration_error(np.concatenate(confidence), np.concatenate(correct))
