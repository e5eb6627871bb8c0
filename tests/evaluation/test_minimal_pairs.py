"""Minimal pairs of known verses, and which of them models prefer."""

import pytest

from bible_corpus.grammar import RULES
from mvlm_core.data.verses import verses_of
from mvlm_core.evaluation.minimal_pairs import Pair, minimal_pairs, pair_accuracy
from tests.evaluation import KNOWN, verse_of


def test_pairs_of_known_verses():
    verses = [
        "And she said unto her, All that thou sayest unto me I will do: for thou art a virtuous woman.",
        "And they said unto him, These things hath he done, and he hath no rest this day.",
        "Ye are the salt of the earth: and we have seen it.",
        "They that dwell in Shethou art said that he is of himself.",
    ]
    pairs = minimal_pairs([verse_of(text) for text in [*verses, verses[0]]], RULES, per_rule=200)
    changes = {}
    for pair in pairs:
        good, bad = pair.good.split(), pair.bad.split()
        (index,) = [n for n, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b]
        changes.setdefault(pair.rule, set()).add((verses.index(pair.good), good[index], bad[index]))
    assert changes == {
        "verb after thou": {(0, "art", "is")},
        "verb after he, she, it": {(1, "hath", "hast"), (3, "is", "art")},
        "verb after they, ye, we": {(2, "are", "is")},
        "pronoun after a preposition": {(0, "me", "I"), (1, "him,", "he,")},
        "pronoun as subject": {(1, "they", "them"), (2, "we", "us")},
        "noun after these, those": {(1, "things", "thing")},
        "this before a singular noun": {(1, "this", "these")},
    }


def test_every_rule_finds_pairs_in_the_corpus_up_to_its_limit(corpus):
    verses = list(verses_of(corpus.documents))
    pairs = minimal_pairs(verses, RULES, per_rule=15, seed=1)
    counts = {rule.name: sum(pair.rule == rule.name for pair in pairs) for rule in RULES}
    assert all(3 <= count <= 15 for count in counts.values()) and counts["verb after he, she, it"] == 15
    assert (
        pairs == minimal_pairs(verses, RULES, per_rule=15, seed=1) != minimal_pairs(verses, RULES, per_rule=15, seed=2)
    )
    assert len({(pair.rule, pair.good) for pair in pairs}) == len(pairs)


def test_a_model_prefers_the_verses_it_was_trained_on(couples, tokenizer, overfitted):
    pairs = [
        Pair("all", p.good, p.bad)
        for p in minimal_pairs([verse for couple in couples[:KNOWN] for verse in couple], RULES, per_rule=200)
    ]
    assert len(pairs) >= 20
    turned = [Pair("turned", pair.bad, pair.good) for pair in pairs]
    ties = [Pair("ties", pair.good, pair.good) for pair in pairs]
    few = [Pair("few", pair.good, pair.bad) for pair in pairs[:19]]
    found = pair_accuracy(overfitted, tokenizer, [*pairs, *turned, *ties, *few])
    assert set(found) == {"all", "turned", "ties"}, "fewer than 20 pairs are not reported"
    assert found["all"].value > 0.9 and found["all"].count == len(pairs)
    assert found["turned"].value == pytest.approx(1 - found["all"].value)
    assert (found["ties"].value, found["ties"].error) == (0.5, 0.0)
