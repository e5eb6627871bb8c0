"""``benchmarks/performance/throughput.py``: its count of operations, who takes part, and a real, tiny race."""

from dataclasses import replace

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


PARAMETERS = 300 * 64 + 32 * 64 + 2 * (12 * 64**2 + 13 * 64) + 128  # of GPT-2 at TINY's shape
FLOPS = 6 * (300 * 64 + 2 * 12 * 64**2) + 12 * 2 * 64 * 32


def arguments(corpus, *more):
    return ["--rounds", "2", "--steps", "1", "--precision", "fp32", "--data_dir", str(corpus), *more]


@pytest.mark.parametrize("name", ["mvlm_gpt2", "simone_enhanced", "simone_enhanced, coherence on"])
def test_our_contenders_make_real_steps(name, tiny_corpus, tmp_path):
    options = throughput.parse_options(arguments(tiny_corpus))
    one = throughput.CONTENDERS[name](TINY, options, tmp_path)
    one.step()
    assert one.tokens_per_step == 64
    if name == "mvlm_gpt2":
        assert (one.parameters, one.flops_per_token) == (PARAMETERS, FLOPS)
    else:
        plain = throughput.CONTENDERS["simone_enhanced"](TINY, options, tmp_path / "plain")
        extra = 6 * (300 * 64 + 64**2) if name.endswith("coherence on") else 0
        assert one.flops_per_token == plain.flops_per_token + extra


def test_the_trainer_races_with_the_products(monkeypatch, tiny_corpus):
    """Two real processes: sizes as the formula counts them by hand."""
    monkeypatch.setitem(throughput.SHAPES, "cpu", TINY)
    names = ["transformers.Trainer", "model 1's products alone"]
    options = throughput.parse_options(arguments(tiny_corpus, "--only", ";".join(names)))
    result = throughput.measure(options)
    assert list(result["contenders"]) == names
    peer, products = result["contenders"].values()
    assert peer["parameters"] == PARAMETERS and products["parameters"] == 300 * 64 + 2 * 12 * 64**2
    for one in (peer, products):
        assert one["flops_per_token"] == FLOPS and one["tokens_per_step"] == 64 and len(one["rounds"]) == 2
        assert one["tokens_per_second"] > 0 and one["step_memory"] >= 0
        assert one["share_of_peak"] == pytest.approx(one["flops_per_second"] / result["matmul_peak"])


def test_what_goes_wrong_in_a_process_is_told(tiny_corpus, monkeypatch):
    monkeypatch.setitem(throughput.SHAPES, "cpu", replace(TINY, heads=3))
    options = throughput.parse_options(arguments(tiny_corpus, "--only", "model 1's products alone"))
    with pytest.raises(RuntimeError, match="shape"):
        throughput.measure(options)


def test_ratios_are_of_the_same_rounds():
    facts = {"parameters": 10, "peak_memory": 5e6, "step_memory": 2e6, "share_of_peak": 0.5, "flops_per_second": 3e9}
    first = facts | {"tokens_per_step": 64, "rounds": [1.0, 4.0, 2.0], "rates": [64.0, 16.0, 32.0]}
    second = facts | {"tokens_per_step": 32, "rounds": [0.25, 1.0, 0.25], "rates": [128.0, 32.0, 128.0]}
    result = {"shape": {}, "precision": "fp32", "matmul_peak": 6e9, "contenders": {"one": first, "two": second}}
    assert throughput.table(result).splitlines()[2:4] == [
        "| one | 10 | 32 (16 … 64) | 1.00 | 3 | 50% | 5 (+2 by steps) |",
        "| two | 10 | 128 (32 … 128) | 2.00 | 3 | 50% | 5 (+2 by steps) |",
    ]


@pytest.mark.integration
def test_a_race_of_ours_and_the_trainer(monkeypatch, tiny_corpus):
    monkeypatch.setitem(throughput.SHAPES, "cpu", TINY)
    result = throughput.measure(throughput.parse_options(arguments(tiny_corpus, "--processes", "2")))
    assert list(result["contenders"]) == [*throughput.CONTENDERS][:4] + [throughput.PRODUCTS]
    assert len(throughput.table(result).splitlines()) == 9
