"""Results: means over seeds."""

from mvlm_core.evaluation.results import over_seeds


def test_what_one_seed_lacks_has_no_mean():
    known, unknown = {"value": 0.5, "error": 0.1, "count": 4}, {"value": None, "error": None, "count": 0}
    assert over_seeds([{"a": known}, {"a": unknown}]) == {"a": {"value": None, "error": None, "count": 4}}
    assert over_seeds([{"a": known}]) == {"a": known}
    assert over_seeds([{"b": 0.5}, {"b": None}]) == over_seeds([{"b": None}, {"b": 0.5}]) == {"b": None}
    assert over_seeds([{"b": 0.5}, {"b": 0.25}]) == {"b": 0.375}
