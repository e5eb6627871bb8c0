"""Grammar by minimal pairs: a real verse and the same verse with one form wrong; the real one must be likelier.

The method is that of BLiMP (Warstadt et al. 2020, arXiv:1912.00582), with pairs made from the corpus's own text by
rules that the caller gives. Chance is one half.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mvlm_core.data.verses import Verse
from mvlm_core.evaluation.bits_per_byte import context_of, encode, score_documents
from mvlm_core.evaluation.estimate import Mean, mean


@dataclass(frozen=True)
class Rule:
    """Where a good form stands (the group ``form`` of ``pattern``) and the wrong form that takes its place."""

    name: str
    pattern: str
    wrong: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A real verse and the same with the form of one rule wrong."""

    rule: str
    good: str
    bad: str


def minimal_pairs(verses: Iterable[Verse], rules: Iterable[Rule], *, per_rule: int = 200, seed: int = 0) -> list[Pair]:
    """At most ``per_rule`` pairs of each rule, drawn at random: one for each different verse that has the good form.

    Where a verse has it more than once, the first one is made wrong.
    """
    texts = sorted({verse.text for verse in verses})
    random.Random(seed).shuffle(texts)
    pairs = []
    for rule in rules:
        pattern, found = re.compile(rule.pattern), 0
        for text in texts:
            if found < per_rule and (place := pattern.search(text)) is not None:
                begin, end = place.span("form")
                pairs.append(Pair(rule.name, text, text[:begin] + rule.wrong[place["form"]] + text[end:]))
                found += 1
    return pairs


def pair_point(good_nats: float, bad_nats: float) -> float:
    """1 for the real verse likelier, 0 for the wrong one, one half for a tie (equal within rounding, 1e-6)."""
    if math.isclose(good_nats, bad_nats, rel_tol=1e-6):
        return 0.5
    return float(good_nats < bad_nats)


def pair_accuracy(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], *, least: int = 20, batch_size: int = 32
) -> dict[str, Mean]:
    """Rule → the mean of ``pair_point``, for rules with at least ``least`` pairs.

    Scored is the whole verse with its line break, after the start token alone, as ``evaluation`` scores a document.
    """
    texts = sorted({text for pair in pairs for text in (pair.good, pair.bad)}, key=lambda text: (len(text), text))
    score = score_documents(
        model,
        lambda text: encode(tokenizer, text),
        ((text, text + "\n") for text in texts),
        start_id=tokenizer.bos_token_id,
        context=context_of(model),
        batch_size=batch_size,
        device=str(next(model.parameters()).device),
    )
    points: dict[str, list[float]] = {}
    for pair in pairs:
        point = pair_point(score.documents[pair.good][0], score.documents[pair.bad][0])
        points.setdefault(pair.rule, []).append(point)
    return {rule: mean(found) for rule, found in points.items() if len(found) >= least}
