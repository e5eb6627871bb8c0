"""The evaluation set: what it draws from which split."""

from dataclasses import replace
from functools import partial

from bible_corpus.grammar import RULES
from mvlm_core.evaluation.results import rows
from mvlm_core.evaluation.suite import draw_evaluation_set, evaluate


def test_evaluation_set_has_held_out_text_and_matching_train_verses(corpus):
    draw = partial(draw_evaluation_set, corpus, "test", RULES, verses=20, prompts=5, words=10, pairs=3)
    text = draw(seed=1)
    books = {d.read() for d in corpus.split("test")}
    assert {d.read() for d in text.held_out} == books
    assert len(text.verses) == len(text.train_verses) == 20 and len(text.prompts) == 5
    assert {v.document for v in [*text.verses, *text.prompts]} <= books
    assert min(len(v.text.split()) for v in text.verses) >= 8
    assert {v.document for v in text.train_verses} <= {d.read() for d in corpus.split("train")}
    assert [v.translation for v in text.train_verses] == [v.translation for v in text.verses]
    psalms = [d for d in corpus.split("train") if d.book == "Psalms"]
    some = draw(seed=1, train=psalms)
    assert {v.document for v in some.train_verses} == {d.read() for d in psalms} and some.verses == text.verses
    lines = {line for book in books for line in book.split("\n")}
    assert all(pair.good in lines and pair.bad not in lines for pair in text.pairs)
    assert max(sum(pair.rule == rule.name for pair in text.pairs) for rule in RULES) == 3
    assert text == draw(seed=1)
    assert text.verses != draw(seed=2).verses


def test_rows_without_any_value_are_left_out(corpus, trained):
    text = draw_evaluation_set(corpus, "test", RULES, verses=5, prompts=3, words=10, pairs=20, seed=1)
    every, some = (
        rows([evaluate(trained / "mvlm_gpt2", chosen, None, device="cpu", bits_per_byte=False)])
        for chosen in (text, replace(text, verses=[], train_verses=[]))
    )
    labels = [row[0] for row in every]
    assert {"calibration error (ECE)", "last word, full context"} <= set(labels)
    assert "training verses, expected share seen" not in labels, "it is unknown"
    assert some == every[labels.index("rep-4, greedy") :] and len(some) == 4
