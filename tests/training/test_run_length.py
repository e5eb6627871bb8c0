"""The learning rate schedule, whole and shortened by a time limit."""

import pytest

from mvlm_core.training.run_length import RunLength


def test_schedules_at_known_points():
    length = RunLength(110, 10)
    assert str(length) == "110" and not length.is_reached(109) and length.is_reached(110)
    for schedule in ("linear", "cosine"):
        assert length.learning_rate_scale(0, schedule) == pytest.approx(0.1)
        assert length.learning_rate_scale(9, schedule) == length.learning_rate_scale(10, schedule) == 1
    assert length.learning_rate_scale(60, "linear") == pytest.approx(0.5)
    assert length.learning_rate_scale(110, "linear") == 0
    assert length.learning_rate_scale(60, "cosine") == pytest.approx(0.55)
    assert length.learning_rate_scale(110, "cosine") == pytest.approx(0.1)
    assert [length.progress(step) for step in (0, 55, 110)] == [0, 0.5, 1]


def test_the_warm_up_of_a_shortened_run_is_shortened_without_a_jump():
    length = RunLength(10_000, 1000, fixed_at=50, fixed_steps=550)
    rates = [length.learning_rate_scale(step, "cosine") for step in range(550)]
    assert rates[49] == pytest.approx(0.05) and rates[50] - rates[49] < 0.02
    assert max(rates) == pytest.approx(0.98, abs=0.001) and rates[-1] == pytest.approx(0.1, abs=0.001)
