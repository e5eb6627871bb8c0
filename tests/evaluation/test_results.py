"""Results: means, their differences, credit for a choice, and conversion to JSON."""

import math

import pytest

from mvlm_core.evaluation.results import Mean, as_json, choice_point, mean


def test_a_difference_of_means_adds_the_errors_in_quadrature():
    one, other = mean([1.0, 2.0, 3.0, 6.0]), mean([0.0, 1.0])
    assert (one.value, one.count, other.error) == (3.0, 4, pytest.approx(0.5))
    difference = one - other
    assert (difference.value, difference.count) == (2.5, 2)
    assert difference.error == pytest.approx(math.hypot(one.error, 0.5))


def test_tied_answers_share_the_point():
    assert [choice_point((-1, -1, -5), answer) for answer in range(3)] == [0.5, 0.5, 0]


def test_non_finite_numbers_become_null_in_json():
    assert as_json({"a": Mean(math.nan, math.inf, 0), "b": 0.5}) == {
        "a": {"value": None, "error": None, "count": 0},
        "b": 0.5,
    }
