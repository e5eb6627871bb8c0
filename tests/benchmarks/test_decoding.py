"""``decoding.py``: statistics of a text, and the decoding setting that is nearest to the books."""

import pytest

from benchmarks.experiments import decoding
from mvlm_core.errors import UserError
from mvlm_core.evaluation.compression import compared_texts


@pytest.fixture(scope="module")
def train(corpus):
    return compared_texts(corpus)[0]


def test_repetitive_and_shuffled_text_differ_from_the_books(corpus, train):
    held_out = corpus.split("validation")[0].read().split()
    texts = [" ".join(held_out[start : start + 64]) for start in range(0, 256, 64)]
    books = decoding.measured(texts, train)
    looped = decoding.measured([" ".join(text.split()[:8] * 8) for text in texts], train)
    mixed = decoding.measured([" ".join(sorted(text.split(), key=lambda word: word[::-1])) for text in texts], train)
    assert looped["rep_4"] > 0.8 > 0.1 > books["rep_4"] and looped["distinct_2"] < 0.5 * books["distinct_2"]
    assert looped["bits_per_byte"] < books["bits_per_byte"] < mixed["bits_per_byte"]
    assert decoding.distance(books, books) == 0
    assert min(decoding.distance(other, books) for other in (looped, mixed)) > 0.05


def test_every_setting_is_measured_and_the_nearest_is_marked(trained, corpus, train):
    results = decoding.measure(trained / "mvlm_gpt2", corpus, train, 2, 0)
    assert list(results) == ["the books", *decoding.settings()] and len(results) == 17
    rows = decoding.table(results, "model").splitlines()
    marked = [row for row in rows if "**" in row]
    distances = {name: decoding.distance(figures, results["the books"]) for name, figures in [*results.items()][1:]}
    assert len(rows) == 19 and len(marked) == 1 and min(distances, key=distances.get) in marked[0]


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        decoding.main([str(tmp_path / "none")])
