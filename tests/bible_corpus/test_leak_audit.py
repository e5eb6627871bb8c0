"""The leak audit on synthetic verses: leaks are found, and each book has its own share."""

from __future__ import annotations

from bible_corpus.leak_audit import leak_audit


def test_leak_audit_finds_a_held_out_passage_in_train_text():
    passage = "and it came to pass in the days when the judges ruled that there was a famine in the land"
    clean = {
        "kjv": {8001001: passage, 1001001: "in the beginning god created the heaven and the earth and it was good so"}
    }
    assert leak_audit(clean)["Ruth"]["share"] == 0
    leaking = {"kjv": clean["kjv"], "asv": {7001001: passage.replace("days", "Days,")}}
    row = leak_audit(leaking)["Ruth"]
    assert (row["share"], row["share_kjv"], row["sequences"], row["train_books"]) == (1.0, 1.0, 8, {"Judges": 8})


def test_each_held_out_book_has_its_own_leak_share():
    """Half of Ruth's words are also in Judges, none of Jonah's."""
    passage = "and it came to pass in the days when the judges ruled that there was a famine in the land"
    other = "now the word of the lord came unto jonah the son of amittai saying arise go to nineveh that city"
    bibles = {"kjv": {8001001: passage, 8001002: passage[::-1], 32001001: other, 7001001: passage}}
    audit = leak_audit(bibles)
    assert audit["Jonah"]["share"] == audit["Jonah"]["share_kjv"] == 0 and not audit["Jonah"]["train_books"]
    assert 0.25 < audit["Ruth"]["share"] == audit["Ruth"]["share_kjv"] < 0.75
    assert audit["Ruth"]["train_books"] == {"Judges": 8}
