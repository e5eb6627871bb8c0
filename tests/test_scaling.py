"""``benchmarks/scaling.py``: the parabola and the power law by known answers, the runs by their settings."""

import sys

import pytest
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
import scaling


def options_of(tmp_path, corpus, *arguments):
    places = ["--work_dir", str(tmp_path / "runs"), "--data_dir", str(corpus)]
    return scaling.parse_options([*places, *arguments])


def test_the_minimum_of_a_parabola_is_found():
    import math

    def bits(rate):
        return 1.5 + 0.1 * (math.log(rate) - math.log(0.003)) ** 2

    points = {rate: bits(rate) for rate in (0.001, 0.002, 0.004, 0.008)}
    assert scaling.best_rate(points) == pytest.approx(0.003)
    assert scaling.best_rate({0.001: 1.0, 0.002: 1.1, 0.004: 1.2}) == 0.001, "at an end of the grid, the end"


def test_a_power_law_is_found():
    rule = scaling.fit({width: 3.0 * width**-0.5 for width in (192, 320, 448)})
    assert (rule.a, rule.b) == (pytest.approx(3.0), pytest.approx(-0.5))
    assert rule(768) == pytest.approx(3.0 * 768**-0.5)


def test_sizes_are_what_they_say_and_settings_are_valid(tmp_path, tiny_corpus):
    options = options_of(tmp_path, tiny_corpus)
    for model, rates in scaling.RATES.items():
        for name, size in (*scaling.SIZES.items(), scaling.TEST_SIZE):
            settings = scaling.rate_runs(model, name, size, rates[0], options)[0].settings().check()
            assert settings.hidden_dim // settings.num_heads == 64 and settings.max_bytes == options.max_bytes


def test_little_text_is_the_first_train_books_and_all_validation(tmp_path, tiny_corpus):
    options = options_of(tmp_path, tiny_corpus, "--little_bytes", "1")
    corpus = scaling.load_corpus(scaling.little_text(options))
    whole = scaling.load_corpus(tiny_corpus, only="bible/kjv")
    assert [d.path for d in corpus.split("train")] == [d.path for d in whole.split("train")][:1]
    assert [d.path for d in corpus.split("validation")] == [d.path for d in whole.split("validation")]
    runs = scaling.repeat_runs(options)
    assert len({run.folder for run in runs}) == len(runs) == 2 * 3 * 5
    for run in runs:
        run.settings().check()
