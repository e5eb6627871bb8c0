"""Cloze and extractable memorization of an overfitted model, and text comparisons with known results."""

from dataclasses import replace

import pytest

from mvlm_core.data.token_store import document_coverage, document_repeats
from mvlm_core.evaluation import memorization
from mvlm_core.evaluation.memorization import cloze, extractable_memorization, extraction, overlap
from tests.evaluation import KNOWN


def test_an_overfitted_model_reproduces_train_but_not_held_out_text(make, couples, tokenizer, overfitted):
    known, control = ([first for first, _ in part] for part in (couples[:KNOWN], couples[KNOWN : KNOWN + 50]))
    train, held_out = (extraction(overfitted, tokenizer, verses) for verses in (known, control))
    assert train["exact"].count == KNOWN and held_out["exact"].count == len(control) >= 40
    assert train["exact"].value > 0.8 and held_out["exact"].value < 0.05
    assert train["prefix"].value > 0.85 > 0.3 > held_out["prefix"].value
    assert held_out["longest"].value >= held_out["prefix"].value
    untrained = extraction(make(), tokenizer, known)
    assert untrained["exact"].value == 0 and untrained["prefix"].value < 0.05


def test_overlap_of_known_texts():
    wanted = "and the earth was void".split()
    assert overlap("and the earth was void and".split(), wanted) == (1.0, 1.0, 1.0)
    assert overlap("and the sea the earth was".split(), wanted) == (0.0, 0.4, 0.6)
    assert overlap("and the".split(), wanted) == (0.0, 0.4, 0.4)
    assert overlap([], wanted) == (0.0, 0.0, 0.0)


def test_cloze_accuracy_is_higher_with_the_context_seen_in_training(couples, tokenizer, overfitted):
    known, control = couples[:KNOWN], couples[KNOWN : KNOWN + 50]
    firsts = cloze(overfitted, tokenizer, [first for first, _ in known])
    assert firsts["full"] == firsts["alone"] and firsts["full"].value > 0.9, "there is no text before a first verse"
    seconds = cloze(overfitted, tokenizer, [second for _, second in known])
    assert seconds["full"].value > 0.9 and seconds["full"].value > seconds["alone"].value + 0.2
    unread = cloze(overfitted, tokenizer, [second for _, second in control])
    assert unread["full"].value < 0.3 and unread["full"].count == len(control)


def test_cloze_answers_must_match_the_whole_word():
    is_word = memorization._is_word
    assert is_word(" God.", " God") and is_word(" God", " God") and is_word(" God,\nAnd", " God")
    assert not is_word(" Gods.", " God") and not is_word(" God's hand", " God")
    assert not is_word(" the God", " God") and not is_word(" god.", " God")


def test_memorization_compares_length_matched_train_and_held_out_verses(corpus, make, tokenizer, monkeypatch):
    used, original = [], memorization.extraction
    monkeypatch.setattr(memorization, "extraction", lambda *given: used.append(given[2]) or original(*given))
    everything = {d.path: 1.0 for d in corpus.split("train")}
    found = extractable_memorization(make(), tokenizer, corpus, everything, verses=20)
    texts = {split: {d.read() for d in corpus.primary_part(split)} for split in ("train", "validation")}
    train, control = used
    assert {v.document for v in train} <= texts["train"] and {v.document for v in control} <= texts["validation"]
    lengths = [sum(len(v.text.split()) for v in verses) for verses in used]
    assert len(train) == len(control) == 20 and lengths[0] == pytest.approx(lengths[1], rel=0.05)
    assert min(len(v.text.split()) for v in control) >= 8
    assert list(found) == ["train", "held_out", "read"] and found["train"]["exact"]["value"] == 0.0
    used.clear()
    extractable_memorization(make(), tokenizer, replace(corpus, primary_translation=None), everything, verses=20)
    assert {v.translation for v in used[0]} == {v.translation for v in used[1]} == {"kjv", "plain"}


def test_memorization_leaves_out_what_is_never_read_and_states_the_share_of_the_rest(
    corpus, make, tokenizer, monkeypatch
):
    used = []
    monkeypatch.setattr(memorization, "extraction", lambda *given: used.append(given[2]) or {})
    documents = corpus.split("train")
    read = document_coverage(documents, document_repeats(documents, "bible/plain=0,bible/kjv=16"), 0.044)
    found = extractable_memorization(make(), tokenizer, corpus, read, verses=20)
    assert found["read"] == pytest.approx(1 - 0.956**16) and round(found["read"], 2) == 0.51
    read["bible/kjv/19-psalms.txt"] = 0.0
    extractable_memorization(make(), tokenizer, corpus, read, verses=20)
    psalms = next(d.read() for d in documents if d.path == "bible/kjv/19-psalms.txt")
    assert psalms in {v.document for v in used[0]} and psalms not in {v.document for v in used[2]}
    assert extractable_memorization(make(), tokenizer, corpus, dict.fromkeys(read, 0.0))["read"] is None
