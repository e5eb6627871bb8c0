"""Forecasts of a large run's score: laws with known answers, and the lines of a dry run."""

import math
from dataclasses import replace

import pytest

from mvlm_core.hardware import choose_hardware
from mvlm_core.training.forecast import HOURS, TEXT_PER_PARAMETER, ScalingLaw
from mvlm_core.training.plan import plan_run
from tests.helpers import MODELS, recipe_of, tiny_settings
from tests.test_docs import page

SIZES = (250_000, 1_000_000, 4_000_000)


def law_of(score, ratio_error=0.0):
    return ScalingLaw(
        tuple((size, score(size)) for size in SIZES),
        ((1, 1.0), (4, 0.96), (16, 0.9)),
        ratio_error,
        reached=(0, math.inf),
    )


def test_a_power_law_is_extrapolated_exactly():
    law = law_of(lambda size: 30 * size**-0.2)
    for size in (*SIZES, 110_000_000):
        found = law.forecast(size, 1)
        assert found.bits_per_byte == pytest.approx(30 * size**-0.2) and found.error == pytest.approx(0, abs=1e-9)
    assert law.relative_error() == pytest.approx(0)


def test_forecast_error_spans_the_fits_with_and_without_a_floor():
    def score(size):
        return 0.5 + 30 * size**-0.2

    law = law_of(score)
    assert law.floor() == pytest.approx(0.5)
    found, (middle, largest) = law.forecast(110_000_000, 1), SIZES[1:]
    straight = score(largest) * (score(largest) / score(middle)) ** (math.log(110e6 / largest) / math.log(4))
    assert found.bits_per_byte + found.error == pytest.approx(score(110_000_000))
    assert found.bits_per_byte - found.error == pytest.approx(straight) and found.error > 0.02
    assert law.relative_error() == pytest.approx(score(middle) ** 2 / score(SIZES[0]) / score(largest) - 1)


def test_forecast_is_no_worse_than_what_a_smaller_model_reached():
    law = law_of(lambda size: 0.5 + 30 * size**-0.2)
    free = law.forecast(110_000_000, 1)
    low = free.bits_per_byte - free.error
    for reached, expected in ((low + 0.01, low + 0.01), (9.0, free.bits_per_byte + free.error), (0.1, low)):
        found = replace(law, reached=(60_000_000, reached)).forecast(110_000_000, 1)
        assert found.bits_per_byte + found.error == pytest.approx(expected)
        assert found.bits_per_byte - found.error == pytest.approx(low)
    assert replace(law, reached=(200_000_000, 0.1)).forecast(110_000_000, 1) == free


def test_score_ratios_are_interpolated_in_log_compute_and_clamped():
    law = law_of(lambda size: 2.0, ratio_error=0.01)
    ratios = {0.5: 1, 1: 1, 2: 0.98, 4: 0.96, 8: 0.93, 16: 0.9, 1000: 0.9}
    for compute, ratio in ratios.items():
        found = law.forecast(SIZES[0], compute)
        assert found.bits_per_byte == pytest.approx(2 * ratio) and found.error == pytest.approx(2 * ratio * 0.01)


def test_description_lists_run_lengths_long_enough_for_one_model():
    law = law_of(lambda size: 2.0, ratio_error=0.01)
    first, second = law.describe(SIZES[-1], seconds=3600 * 4, unit_seconds=3600)
    assert "1.92 ± 0.02 (this run), 2.00 ± 0.02 (1 h)" in first and "(6 h)" in first and "(0.1 h)" not in first
    assert "4.0 M" in second and "+0.0%" in second
    assert law.describe(SIZES[-1], seconds=60, unit_seconds=1e9) == []


@pytest.mark.parametrize("model", MODELS)
def test_dry_run_forecasts_only_runs_similar_to_the_measured_ones(model, tiny_corpus, tmp_path):
    shape = {"hidden_dim": 96, "num_heads": 2, "ff_dim": 384, "num_layers": 2, "data_subset": None, "max_steps": None}
    settings = tiny_settings(model, tiny_corpus, tmp_path, preset="h200", num_epochs=3.0, **shape)
    recipe, hardware = recipe_of(model), choose_hardware(device="cpu", precision="fp32")

    def said(**changes):
        return [line for line in plan_run(recipe, replace(settings, **changes), hardware).lines if "expected" in line]

    (line,) = said()
    assert all(f"({hours:g} h)" in line for hours in HOURS) and "this run" in line
    assert "this run" not in said(max_bytes=1000)[0]  # shorter than the unit, three epochs
    assert said(hidden_dim=192) == said(preset="cpu") == []


@pytest.mark.parametrize("model", MODELS)
def test_laws_match_the_measurements_in_the_log(model):
    law, log = recipe_of(model).law, page("benchmarks/LOG.md")
    assert [size for size, _ in law.scores] == sorted(size for size, _ in law.scores)
    assert law.score_ratios[0] == (1, 1) and list(law.score_ratios) == sorted(law.score_ratios)
    assert all(f"{score:.4f}" in log for _, score in law.scores) and all(
        f"{ratio:.3f}" in log for _, ratio in law.score_ratios[1:]
    )
    assert 0 < law.ratio_error < 0.1 and abs(law.relative_error()) < 0.1
    assert TEXT_PER_PARAMETER[0] < TEXT_PER_PARAMETER[1]
