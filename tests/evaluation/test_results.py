"""Results: means, their differences, credit for a choice, and conversion to JSON."""

import math

import pytest

from mvlm_core.evaluation.results import Mean, as_json, choice_point, mean, share


def test_a_difference_of_means_adds_the_errors_in_quadrature():
    one, other = mean([1.0, 2.0, 3.0, 6.0]), mean([0.0, 0.5, 1.0])
    assert (one.value, one.count, other.error) == (3.0, 4, pytest.approx(0.5 / math.sqrt(3)))
    difference = one - other
    assert (difference.value, difference.count) == (2.5, 3)
    assert difference.error == pytest.approx(math.hypot(one.error, other.error))


@pytest.mark.parametrize(
    ("successes", "count", "error"),
    [(0, 300, "0.0046"), (25, 25, "0.0471"), (49, 300, "0.0214"), (150, 300, "0.0287")],
)
def test_outcomes_of_0_and_1_have_an_error_even_if_all_agree(successes, count, error):
    sample = mean([1.0] * successes + [0.0] * (count - successes))
    assert sample.value == successes / count and f"{sample.error:.4f}" == error
    assert "± 0.0%" not in share(as_json(sample - mean([0.0] * count)))


def test_tied_answers_share_the_point():
    assert [choice_point((-1, -1, -5), answer) for answer in range(3)] == [0.5, 0.5, 0]
    pairs = (-10.0, -11.0), (-11.0, -10.0), (-10.0, -10.000001), (-10.0, -10.001)
    assert [choice_point(pair, 0) for pair in pairs] == [1.0, 0.0, 0.5, 1.0]


def test_non_finite_numbers_become_null_in_json():
    assert as_json({"a": Mean(math.nan, math.inf, 0), "b": 0.5}) == {
        "a": {"value": None, "error": None, "count": 0},
        "b": 0.5,
    }
