"""``benchmarks/throughput.py``: its count of operations, who takes part, and a real, tiny race."""

import pytest

from benchmarks.performance import throughput
from mvlm_core.errors import UserError

TINY = throughput.Shape(64, 2, 2, 256, 300, 32, 2, 2, 300, "tied")


def test_every_context_has_as_many_tokens_a_step():
    options = throughput.parse_options(["--contexts", "8,16,32"])
    jobs = throughput.contenders(TINY, options)
    assert [(name, shape.context) for name, shape, _ in jobs] == [
        (name, context) for name in ("mvlm_gpt2", "simone_enhanced") for context in (8, 16, 32)
    ]
    assert {shape.context * shape.batch for _, shape, _ in jobs} == {64}
    assert len({label for _, _, label in jobs}) == 6


def test_nanogpt_takes_part_only_where_it_is(tmp_path):
    assert "nanoGPT" not in [name for name, _, _ in throughput.contenders(TINY, throughput.parse_options([]))]
    with pytest.raises(UserError) as caught:
        throughput.parse_options(["--nanogpt", str(tmp_path), "--rounds", "0", "--contexts", "1"])
    assert len(caught.value.problems) == 3


def test_a_race_of_ours_and_the_trainer(monkeypatch, tiny_corpus):
    """Real steps: sizes as the formula counts them by hand, ratios of the medians of the same rounds."""
    monkeypatch.setitem(throughput.SHAPES, "cpu", TINY)
    given = ["--rounds", "2", "--steps", "1", "--precision", "fp32", "--data_dir", str(tiny_corpus)]
    result = throughput.measure(throughput.parse_options(given))
    found = result["contenders"]
    ours = ["mvlm_gpt2", "simone_enhanced", "simone_enhanced, coherence on"]
    assert list(found) == [*ours, "transformers.Trainer", "model 1's products alone"]
    peer, products = found["transformers.Trainer"], found["model 1's products alone"]
    assert (
        peer["parameters"] == found["mvlm_gpt2"]["parameters"] == 300 * 64 + 32 * 64 + 2 * (12 * 64**2 + 13 * 64) + 128
    )
    for one in found.values():
        assert one["tokens_per_step"] == 64 and len(one["rounds"]) == 2
        assert one["tokens_per_second"] > 0 and one["share_of_peak"] < 1
    assert peer["flops_per_token"] == 6 * (300 * 64 + 2 * 12 * 64**2) + 12 * 2 * 64 * 32
    assert products["parameters"] == 300 * 64 + 2 * 12 * 64**2
    assert products["flops_per_token"] == peer["flops_per_token"] == found["mvlm_gpt2"]["flops_per_token"]
    assert len(throughput.table(result).splitlines()) == 9
