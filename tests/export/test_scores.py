"""Recorded test scores (nats per document): saved exactly, and checked against a sample of rescored documents."""

import math

import pytest

from mvlm_core.cost_estimate import RESCORED_SHARE
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import DocumentScore, Score, score_export
from mvlm_core.export.manifest import training_config
from mvlm_core.export.scores import differences, draw_sample, recorded_score


@pytest.mark.parametrize("name", ["mvlm_gpt2", "simone_enhanced"])
def test_recorded_scores_match_rescoring_the_exported_weights(trained, name):
    config, corpus = training_config(trained / name), load_corpus(trained / "corpus", only="bible/kjv")
    recorded = recorded_score(config, corpus.split("test"))
    assert recorded.bits_per_byte == pytest.approx(config["results"]["test_bpb"], rel=1e-12)
    again = score_export(trained / name, corpus)
    assert list(again.documents) == list(recorded.documents) == list(config["test_nats"]) != []
    for path, document in again.documents.items():
        assert recorded.documents[path].bytes == document.bytes
        assert recorded.documents[path].nats == pytest.approx(document.nats, rel=1e-6)
    assert differences(recorded, again, 1e-6) == []


def test_invalid_records_are_refused(trained):
    documents = load_corpus(trained / "corpus").split("test")
    good = {document.path: 5000.0 for document in documents}
    first, second = good
    assert recorded_score({"test_nats": good}, documents).nats == 10_000
    records = [good | {second: value} for value in (None, "1.0", -1.0, 3, 10**400, math.nan, math.inf, 1e308, [1.0])]
    records += [{first: 5000.0}, good | {"gone.txt": 5000.0}, {str(number): 1.0 for number in range(100_000)}]
    for record in (*records, {}, None, [good], list(good), "x" * 100_000, 1.0, True):
        with pytest.raises(UserError) as caught:
            recorded_score({"test_nats": record}, documents)
        assert str(caught.value) == "training_config.json: test_nats is not a number of nats for each test document"


def test_differences_name_each_kind_of_mismatch():
    def problems(tolerance=1e-4, **nats):
        rescored = Score({path: DocumentScore(10, value) for path, value in nats.items()})
        return differences(recorded, rescored, tolerance)

    recorded = Score({"a": DocumentScore(10, 5000.0), "b": DocumentScore(10, 6000.0), "c": DocumentScore(10, 20.0)})
    assert problems(a=5000.4, b=6000.5) == problems(c=20.0) == []
    assert problems(a=5010.0, b=6000.0, tolerance=1e-3) == ["a: 5010.0 nats, recorded in training: 5000.0"]
    assert problems(a=4999.0, b=6001.0) == [
        "a: 4999.0 nats, recorded in training: 5000.0",
        "b: 6001.0 nats, recorded in training: 6000.0",
    ]
    assert problems(a=5000.0, c=20.09) == [], "rounding errors cancel less in a short document"
    assert problems(a=5000.0, c=20.11) == ["c: 20.11 nats, recorded in training: 20.0"]
    assert problems(c=20.09) == ["all documents of the sample: 20.09 nats, recorded in training: 20.0"]
    assert len(problems(a=math.nan)) == 2


def test_sample_is_seeded_and_about_an_eighth_of_many_documents():
    many = list(range(800))
    sample = draw_sample(many, 1)
    assert sample == draw_sample(many, 1) != draw_sample(many, 2)
    assert len(set(sample)) == len(sample) == 800 * RESCORED_SHARE
    assert set().union(*(draw_sample(many, seed) for seed in range(100))) == set(many), "each may be drawn"
    assert sorted(draw_sample(many[:8], 1)) == many[:8], "few documents are all scored"
