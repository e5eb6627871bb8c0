"""``benchmarks/performance/preparation.py`` on the tiny corpus: tokens grow with the text."""

import json

import pytest

from benchmarks.performance import preparation
from mvlm_core.errors import UserError


@pytest.mark.integration
def test_twice_the_text_gives_twice_the_tokens(tiny_corpus, tmp_path, capsys):
    places = ["--data_dir", str(tiny_corpus), "--scratch", str(tmp_path), "--json", str(tmp_path / "results.json")]
    assert preparation.main([*places, "--copies", "1,2", "--vocab_size", "500"]) == 0
    one, two = json.loads((tmp_path / "results.json").read_text())
    assert two["bytes"] == 2 * one["bytes"] > 1000
    assert two["tokens"] == pytest.approx(2 * one["tokens"], rel=0.02)
    assert one["peak"] > 50e6 and 0 < one["tokenizer_seconds"] + one["token_seconds"] < one["seconds"]
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert [path.name for path in tmp_path.iterdir() if path.name != "corpus"] == ["results.json"]


def test_bad_copies_are_refused():
    with pytest.raises(UserError, match="--copies: 1,x: whole numbers above 0"):
        preparation.main(["--copies", "1,x"])
