"""``benchmarks/command.py``: formatting of tables and spreads, options that are refused."""

import argparse
import json

import pytest

from benchmarks import command
from mvlm_core.errors import UserError


def test_table_spread_and_deviation_formatting():
    expected = "| a | b | c |\n| --- | --- | ---: |\n| x | 1 | 2.5 |"
    assert command.table(("a", "b", "c"), [("x", 1, 2.5)], left=2) == expected
    assert command.spread([3.0, 1.0, 2.6], "{:.1f}") == "2.2 (1.0 … 3.0)"
    assert command.spread([-0.3, -0.1], "{:+.1f}") == "−0.2 (−0.3 … −0.1)"
    assert command.spread([5.0, 1.0, 2.0], "{:.0f}", lambda values: sorted(values)[1]) == "2 (1 … 5)"
    assert command.spread([1.001, 1.002], "{:.2f}") == "1.00", "no spread where all are shown alike"
    assert command.deviation([1.0, 2.0]) == "1.5000 ± 0.7071" and command.deviation([1.0]) == "1.0000"


def test_show_prints_the_table_and_writes_the_json_file(tmp_path, capsys):
    options = command.new_parser("").parse_args(["--json", str(tmp_path / "results.json")])
    command.show("a table", {"figure": 1}, options)
    assert capsys.readouterr().out == "a table\n"
    assert json.loads((tmp_path / "results.json").read_text()) == {"figure": 1}


def test_bad_options_are_refused():
    assert command.whole_numbers("1,20") == [1, 20]
    for text in ("1,x", "0", "", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole numbers above 0"):
            command.whole_numbers(text)
    options = argparse.Namespace(rounds=0, steps=1)
    assert command.at_least_one(options, "rounds", "steps") == ["--rounds 0: must be at least 1"]
    assert command.parse_only(None, "abc") == ["a", "b", "c"] and command.parse_only(None, "abc", "a") == ["a"]
    assert command.parse_only("c, a", "abc", "b") == ["c", "a"]
    with pytest.raises(UserError) as caught:
        command.parse_only("x,a,y", "abc")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--only 'x'", "--only 'y'"]
