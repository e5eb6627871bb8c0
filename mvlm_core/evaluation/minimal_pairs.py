"""Grammar test with minimal pairs: a verse should be more likely than the same verse with one wrong word form.

The method follows BLiMP (Warstadt et al. 2020, arXiv:1912.00582), with pairs generated from the corpus by rules that
the caller provides. Chance level is one half.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mvlm_core.data.verses import Verse
from mvlm_core.evaluation.bits_per_byte import score_loaded
from mvlm_core.evaluation.results import Mean, choice_point, mean

MIN_PAIRS = 20  # of a rule that is reported


@dataclass(frozen=True)
class Rule:
    """Finds a correct form (the group ``form`` of ``pattern``) and maps it to the ``wrong`` form."""

    name: str
    pattern: str
    wrong: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A verse and the same verse with one form replaced by a rule's wrong form."""

    rule: str
    good: str
    bad: str


def minimal_pairs(verses: Iterable[Verse], rules: Iterable[Rule], *, per_rule: int, seed: int = 0) -> list[Pair]:
    """Draw up to ``per_rule`` pairs for each rule at random from the distinct verses that match it.

    Only the first match in a verse is changed.
    """
    texts = sorted({verse.text for verse in verses})
    random.Random(seed).shuffle(texts)
    pairs = []
    for rule in rules:
        for match in islice(filter(None, map(re.compile(rule.pattern).search, texts)), per_rule):
            text, (begin, end) = match.string, match.span("form")
            pairs.append(Pair(rule.name, text, text[:begin] + rule.wrong[match["form"]] + text[end:]))
    return pairs


def pair_accuracy(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> dict[str, Mean]:
    """Share of pairs whose good verse is more likely, by rule, for rules with at least ``MIN_PAIRS`` pairs.

    A tie counts half. The whole verse with its line break is scored as a separate document.
    """
    texts = sorted({text for pair in pairs for text in (pair.good, pair.bad)}, key=lambda text: (len(text), text))
    score = score_loaded(model, tokenizer, ((text, text + "\n") for text in texts), batch_size=32)
    points: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        log_probs = [-score.documents[text].nats for text in (pair.good, pair.bad)]
        points[pair.rule].append(choice_point(log_probs, 0))
    return {rule: mean(values) for rule, values in points.items() if len(values) >= MIN_PAIRS}
