"""``benchmarks/experiments/scaling.py``: fits that recover known answers, and the settings of the runs."""

import json
import math

import pytest

from benchmarks.experiments import scaling


def options_of(tmp_path, corpus, *arguments):
    places = ["--work_dir", str(tmp_path / "runs"), "--data_dir", str(corpus)]
    return scaling.parse_options([*places, *arguments])


def test_best_rate_is_the_minimum_of_a_parabola():
    def bits(rate):
        return 1.5 + 0.1 * (math.log(rate) - math.log(0.003)) ** 2

    points = {rate: bits(rate) for rate in (0.001, 0.002, 0.004, 0.008)}
    assert scaling.best_rate(points) == pytest.approx(0.003)
    assert scaling.best_rate({0.001: 1.0, 0.002: 1.1, 0.004: 1.2}) == 0.001, "at an end of the grid, the end"


def test_learning_rate_rule_recovers_known_power_laws():
    best = {width: 3.0 * width**-0.5 for width in (192, 320, 448)}
    rule = scaling.fit_rule(best, {batch: 0.1 * batch**0.25 for batch in (4, 8, 16)}, {1: 0.2, 4: 0.1})
    assert (rule.a, rule.b, rule.c, rule.d) == tuple(map(pytest.approx, (3.0, -0.5, 0.25, -0.5)))
    assert rule(768, 128, 100) == pytest.approx(3.0 * 768**-0.5 * 16**0.25 / 10)
    assert (scaling.fit_rule(best, {}, {8: 0.1}).c, scaling.fit_rule(best, {}, {8: 0.1}).d) == (0, 0)


def test_scaling_law_fit_recovers_a_known_law():
    law = scaling.Law(floor=0.7, a=60.0, alpha=0.35, b=90.0, beta=0.4)
    sizes = [(2e6, 1e6), (7e6, 1e6), (19e6, 1e6), (2e6, 4e6), (2e6, 8e6), (7e6, 4e6)]
    fitted = scaling.fit_law([(n, size, law(n, size)) for n, size in sizes])
    assert (fitted.alpha, fitted.beta) == (0.35, 0.4)
    assert fitted(110e6, 7e8) == pytest.approx(law(110e6, 7e8), abs=1e-6)


def test_scaling_law_has_no_size_term_if_size_does_not_help():
    def bits(n, size):
        return 0.7 + 90.0 * size**-0.4 + 0.01 * math.log(n / 2e6)

    sizes = [(2e6, 1e6), (7e6, 1e6), (19e6, 1e6), (2e6, 4e6), (2e6, 8e6), (7e6, 4e6)]
    fitted = scaling.fit_law([(n, size, bits(n, size)) for n, size in sizes])
    assert fitted.a == 0 and fitted.b > 0
    assert fitted(2e6, 4e6) == pytest.approx(bits(2e6, 4e6), abs=0.02)


def test_rate_search_continues_until_the_minimum_is_bracketed():
    def searched(best, start=0.002):
        points = {}
        while new := scaling.next_rates(points, start):
            points |= {rate: abs(math.log(rate / best)) for rate in new}
        return sorted(points)

    assert searched(0.0021) == [0.001, 0.002, 0.004]
    assert searched(0.0042) == [0.001, 0.002, 0.004, 0.008]
    assert searched(0.0003) == [0.000125, 0.00025, 0.0005, 0.001, 0.002, 0.004]
    assert len(searched(1e-9)) == scaling.MAX_RATES, "no search without an end"


def test_planned_runs_have_valid_settings_and_the_expected_sizes(tmp_path, tiny_corpus):
    options = options_of(tmp_path, tiny_corpus)
    for model, rate in scaling.STARTS.items():
        folders = set()
        for part in ("learning_rates", "batches"):
            for search in scaling.searches(part, model, options):
                settings = search.runs_at(rate)[0].settings().check()
                assert settings.hidden_dim // settings.num_heads == 64 and settings.max_bytes == options.max_bytes
                assert settings.batch_size == search.batch
                folders.add(settings.output_dir)
                assert search.points() == {} and search.best() is None
        (longer,) = scaling.searches("lengths", model, options)
        assert longer.runs_at(rate)[0].settings().max_bytes == 4 * options.max_bytes
        rule = scaling.Rule(rate, 0.0, d=-0.5)
        more = scaling.runs_at_rule_rates("amounts", model, rule, options)
        amounts = [run.settings().max_bytes // options.max_bytes for run in more]
        assert amounts == [2, 4, 8, 2, 4]
        assert [run.settings().learning_rate for run in more] == [rate * amount**-0.5 for amount in amounts]
        tried = [run.settings().learning_rate for run in scaling.runs_at_rule_rates("test", model, rule, options)]
        assert tried == [rate / 2, rate, rate * 2]
        assert len(folders | {str(run.folder) for run in more}) == 5 + 5


def test_finished_runs_yield_rules_laws_and_tables(tmp_path, tiny_corpus, monkeypatch, capsys):
    """Bits per byte come from a known law and rule instead of training."""
    rule, law = scaling.Rule(0.5, -1.0, 0.5, -0.25), scaling.Law(0.7, 60.0, 0.35, 90.0, 0.4)

    def result(run):
        settings = run.settings()
        size = settings.max_bytes or 500_000
        parameters = settings.hidden_dim**2 * settings.num_layers * 12
        best = rule(settings.hidden_dim, settings.batch_size, size / 1e6)
        loss = law(parameters, size) + 0.1 * math.log(settings.learning_rate / best) ** 2
        return {"parameters": parameters, "bytes": size, "validation_bpb": loss, "origin": {}}

    monkeypatch.setattr(scaling.Run, "result", result)
    monkeypatch.setattr(scaling.runner, "run_all", lambda runs, folder, options: [])
    options = options_of(tmp_path, tiny_corpus, "--json", str(tmp_path / "results.json"))
    assert not [run for part in scaling.PARTS for run in scaling.run_part(part, "mvlm_gpt2", options)]
    fitted = scaling.rule_of("mvlm_gpt2", options)
    assert [fitted.a, fitted.b, fitted.c, fitted.d] == pytest.approx([0.5, -1.0, 0.5, -0.25])
    scaling.report(options)
    out = capsys.readouterr().out
    assert out.count("| mvlm_gpt2 | small, ") == 4
    assert "best learning rate = 0.5 · width ** -1.00 · (batch / 8) ** 0.50 · text ** -0.25" in out
    assert json.loads((tmp_path / "results.json").read_text()).keys() == scaling.SETTINGS.keys()
