"""Stored test scores (nats per window): saved exactly, and checked against a sample of rescored windows."""

import json
from dataclasses import replace
from itertools import islice

import pytest

from mvlm_core.cost_estimate import RESCORED_SHARE
from mvlm_core.data.corpus import load_corpus
from mvlm_core.evaluation.bits_per_byte import DocumentScore, Score, score_export
from mvlm_core.export.manifest import TEST_SCORES, training_config
from mvlm_core.export.scores import differences, drawn_windows, read_scores, write_scores

CONTEXT = 32


@pytest.fixture(scope="module")
def stored(trained):
    """The scores that the trainer wrote; read-only."""
    found = read_scores(trained / "mvlm_gpt2")
    assert found is not None
    return found


def with_document(score, key, **changes):
    return Score(score.documents | {key: replace(score.documents[key], **changes)})


def test_stored_scores_match_rescoring_the_exported_weights(trained, stored):
    folder = trained / "mvlm_gpt2"
    results = training_config(folder)["results"]
    assert stored.bits_per_byte == pytest.approx(results["test_bpb"], rel=1e-12)
    again = score_export(folder, load_corpus(trained / "corpus", only="bible/kjv"))
    assert again.documents.keys() == stored.documents.keys() and len(again.documents) > 0
    for key, document in again.documents.items():
        assert list(stored.documents[key].windows) == sorted(document.windows)
        assert stored.documents[key].windows == pytest.approx(document.windows, rel=1e-6)
    assert differences(stored, again, CONTEXT, 1e-6) == []


def test_scores_that_are_damaged_or_of_other_weights_are_ignored(export, stored):
    assert read_scores(export) is None, "they are no part of the export"
    write_scores(export, stored)
    assert read_scores(export) == stored
    whole = json.loads((export / TEST_SCORES).read_text())
    key = next(iter(whole["documents"]))
    first = whole["documents"][key]
    for damage in (
        [],
        {"documents": whole["documents"]},
        whole | {"documents": [first]},
        *(
            whole | {"documents": {key: first | change}}
            for change in ({"nats": [-1.0]}, {"nats": ["1.0"]}, {"nats": 3}, {"bytes": None}, {"tokens": -1})
        ),
    ):
        (export / TEST_SCORES).write_text(json.dumps(damage))
        assert read_scores(export) is None, damage
    (export / TEST_SCORES).write_text(json.dumps(whole))
    with (export / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert read_scores(export) is None


def test_differences_name_each_kind_of_mismatch(stored):
    key, document = max(stored.documents.items(), key=lambda item: len(item[1].windows))
    few = Score({name: replace(found, windows={}) for name, found in stored.documents.items()})
    few.documents[key] = replace(document, windows={number: document.windows[number] for number in (1, 2)})
    assert differences(stored, few, CONTEXT, 1e-4) == []
    for changes in ({"bytes": document.bytes + 1}, {"tokens": document.tokens - 1}, {"windows": {0: 1.0}}):
        (problem,) = differences(with_document(stored, key, **changes), few, CONTEXT, 1e-4)
        assert problem.startswith(f"{key}: recorded size differs from the text's {document.bytes} bytes")
    (problem,) = differences(Score({"gone.txt": document} | stored.documents), few, CONTEXT, 1e-4)
    assert problem == "gone.txt: scored, but not in the corpus"
    # A large error in one window is named, a small one in all windows shows in their sum, rounding is tolerated.
    one = document.windows | {2: document.windows[2] * 1.01}
    problems = "\n".join(differences(with_document(stored, key, windows=one), few, CONTEXT, 1e-4))
    assert f"{key}, window 2:" in problems and "window 1:" not in problems
    for factor, found in ((1 + 2e-4, True), (1 - 2e-4, True), (1 + 5e-5, False)):
        all_of_them = {number: nats * factor for number, nats in document.windows.items()}
        problems = differences(with_document(stored, key, windows=all_of_them), few, CONTEXT, 1e-4)
        assert bool(problems) is found and all("all windows of the sample" in line for line in problems)


def test_window_sample_is_seeded_and_large_enough_to_catch_errors():
    long = Score({"a": DocumentScore(1, 1, dict.fromkeys(range(4000), 1.0))})

    def drawn(score, seed):
        count = sum(len(document.windows) for document in score.documents.values())
        return list(islice(drawn_windows(score, seed), count))

    assert drawn(long, 1) == drawn(long, 1) != drawn(long, 2)
    assert sum(drawn(long, 1)) == pytest.approx(4000 * RESCORED_SHARE, rel=0.1)
    short = Score({"a": DocumentScore(1, 1, dict.fromkeys(range(64), 1.0))})
    assert all(drawn(short, 1)), "a text of few windows is scored as a whole"
    # With 2 percent of the windows wrong, none of 200 seeds misses all of them.
    wrong = {number * 50 for number in range(80)}
    missed = [not any(was and number in wrong for number, was in enumerate(drawn(long, seed))) for seed in range(200)]
    assert sum(missed) == 0
