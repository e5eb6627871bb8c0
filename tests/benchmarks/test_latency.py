"""``benchmarks/performance/latency.py``: real generation, scoring and checkpoint saves at small sizes."""

import json

import pytest

from benchmarks.performance import latency


@pytest.mark.parametrize("model", tuple(latency.TRAINERS))
def test_generation_reads_one_token_per_pass_with_the_cache(model, monkeypatch):
    monkeypatch.setattr(latency, "NEW_TOKENS", 6)
    built = latency.build(model, {"hidden_dim": 32, "vocab_size": 400, "num_layers": 2}).model.eval()
    calls = []
    built.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for cached in (True, False):
        latency.generate(built, cached)
    assert calls == [1] * 6 + [1, 2, 3, 4, 5, 6], "with the cache each pass reads one token"


def test_the_table_has_median_and_spread(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(latency, "measure", lambda options: [("it", [3.0, 1.0, 2.0])])
    assert latency.main(["--json", str(tmp_path / "results.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| it | 2.00 (1.00 … 3.00) |"
    assert json.loads((tmp_path / "results.json").read_text()) == {"it": [3.0, 1.0, 2.0]}


def test_scoring_reads_the_whole_test_text(tiny_corpus, monkeypatch):
    monkeypatch.setattr(latency, "CACHE_DIR", tiny_corpus.parent / "cache")
    seen = []
    monkeypatch.setattr(
        "mvlm_core.evaluation.bits_per_byte.score_documents", lambda *arguments, **_: seen.extend(arguments[2])
    )
    latency.score("mvlm_gpt2", tiny_corpus)
    assert [key for key, _ in seen] == ["bible/kjv/21-ecclesiastes.txt", "bible/plain/21-ecclesiastes.txt"]


def test_checkpoint_saves_are_timed_with_and_without_the_background_thread(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(latency.SHAPES, "124M", {"hidden_dim": 32, "vocab_size": 400, "num_layers": 2})
    assert latency.main(["--checkpoint", "--rounds", "2", "--folder", str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| save of")]
    assert len(rows) == 6 and all("0.00 GB" in row for row in rows)
    assert not list(tmp_path.iterdir())
    tensors = latency.state_tensors("mvlm_gpt2", latency.SHAPES["124M"])
    sizes = {name: sum(tensor.numel() for tensor in named.values()) for name, named in tensors.items()}
    assert sizes["optimizer"] == pytest.approx(2 * sizes["model"], rel=0.01), "AdamW: two figures a weight, and a count"
