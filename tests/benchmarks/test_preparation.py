"""``benchmarks/performance/preparation.py`` on the tiny corpus: tokens that grow with the text, a noticed change."""

import json

import pytest

from benchmarks.performance import preparation


@pytest.mark.integration
def test_twice_the_text_gives_twice_the_tokens_and_a_changed_byte_is_noticed(tiny_corpus, tmp_path, capsys):
    places = ["--data_dir", str(tiny_corpus), "--scratch", str(tmp_path), "--json", str(tmp_path / "found.json")]
    assert preparation.main([*places, "--copies", "1,2", "--vocab_size", "500"]) == 0
    one, two = json.loads((tmp_path / "found.json").read_text())
    assert two["bytes"] == 2 * one["bytes"] > 1000
    assert two["first"]["tokens"] == pytest.approx(2 * one["first"]["tokens"], rel=0.02)
    assert one["noticed"] and two["noticed"] and one["first"]["peak"] > 50e6
    assert capsys.readouterr().out.count("| noticed |") == 2
    assert [path.name for path in tmp_path.iterdir() if path.name != "corpus"] == ["found.json"]


def test_bad_copies_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        preparation.main(["--copies", "1,x"])
    assert caught.value.code == 2 and "--copies: 1,x: whole numbers above 0" in capsys.readouterr().err
