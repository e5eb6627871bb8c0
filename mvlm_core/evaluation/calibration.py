"""Calibration: whether a model's confidence in its next token matches its accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mvlm_core.data.verses import Verse
from mvlm_core.evaluation.bits_per_byte import context_of, encode
from mvlm_core.evaluation.generation import prompt_ids


@dataclass(frozen=True)
class Calibration:
    """How well confidence matches accuracy, over ``tokens`` predictions.

    Attributes:
        error: expected calibration error, 0 to 1.
        confidence: mean probability of the most likely token.
        accuracy: share of tokens that were the most likely one.
    """

    error: float
    confidence: float
    accuracy: float
    tokens: int


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Calibration:
    """Expected calibration error with ``bins`` bins of equal width (Guo et al. 2017, arXiv:1706.04599, equation 3).

    Predictions fall into bins ((b - 1) / bins, b / bins] by the probability of the most likely token; the error is the
    mean over predictions of abs(accuracy - mean confidence) of their bin.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not len(confidence):
        return Calibration(math.nan, math.nan, math.nan, 0)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    error = float(np.abs(gaps).sum()) / len(confidence)
    return Calibration(error, float(confidence.mean()), float(correct.mean()), len(confidence))


@torch.inference_mode()
def calibration(
    model: Any, tokenizer: Any, verses: Sequence[Verse], *, bins: int = 15, batch_size: int = 16
) -> Calibration:
    """Calibration on the tokens of the verses, each predicted from all the text before it."""
    context, device = context_of(model), next(model.parameters()).device
    rows = []
    for verse in verses:
        new = encode(tokenizer, verse.text + "\n")
        ids = (prompt_ids(tokenizer, verse.before, context + 1) + new)[-context - 1 :]
        rows.append((ids, max(1, len(ids) - len(new))))  # index of the first target; its logits' is one less
    rows.sort(key=lambda row: len(row[0]))
    confidence, correct = [], []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        length, first = max(len(ids) for ids, _ in batch), min(first for _, first in batch)
        padded = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch], device=device)
        output = model(input_ids=padded[:, :-1], use_cache=False, logits_to_keep=length - first)
        top, predicted = output.logits.float().softmax(dim=-1).max(dim=-1)
        hit = predicted == padded[:, first:]
        for row, (ids, begin) in enumerate(batch):
            confidence.append(top[row, begin - first : len(ids) - first].cpu().numpy())
            correct.append(hit[row, begin - first : len(ids) - first].cpu().numpy())
    return calibration_error(np.concatenate(confidence or [[]]), np.concatenate(correct or [[]]), bins)
