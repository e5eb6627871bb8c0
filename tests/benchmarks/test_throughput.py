"""``benchmarks/performance/throughput.py``: chosen contenders, a hand-checked table, and a tiny real comparison."""

import pytest

from benchmarks.performance import throughput
from mvlm_core.errors import UserError

SIZES = {"hidden_dim": 64, "num_layers": 2, "num_heads": 2, "ff_dim": 256, "vocab_size": 300, "batch_size": 2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(throughput.SHAPES, "cpu", (SIZES, {"output_head": "tied"}))
    monkeypatch.setitem(throughput.CONTEXTS, "cpu", 32)


PARAMETERS = 300 * 64 + 32 * 64 + 2 * (12 * 64**2 + 13 * 64) + 128  # of GPT-2 at these sizes
FLOPS = 6 * (300 * 64 + 2 * 12 * 64**2) + 12 * 2 * 64 * 32  # per token, after Chowdhery et al. 2022, appendix B


def arguments(corpus, *more):
    return ["--rounds", "2", "--steps", "1", "--precision", "fp32", "--data_dir", str(corpus), *more]


def test_nanogpt_is_included_only_with_a_valid_path(tmp_path):
    assert "nanoGPT" not in throughput.available(throughput.parse_options([]))
    with pytest.raises(UserError) as caught:
        throughput.parse_options(["--nanogpt", str(tmp_path), "--rounds", "0", "--batch_size", "0"])
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError, match="--only 'nanoGPT': choose from"):
        throughput.parse_options(["--only", "mvlm_gpt2,nanoGPT"])
    (tmp_path / "model.py").touch()
    assert "nanoGPT" in throughput.available(throughput.parse_options(["--nanogpt", str(tmp_path)]))


@pytest.mark.parametrize("name", [*throughput.OURS, "transformers.Trainer"])
def test_contenders_run_a_real_training_step(name, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "CACHE_DIR", tmp_path / "cache")
    options = throughput.parse_options(arguments(tiny_corpus))
    options.folder = tmp_path
    step, parameters = throughput.CONTENDERS[name](throughput.settings_of(name, options), options)
    step()
    assert name.startswith("simone_enhanced") or parameters == PARAMETERS


def test_throughput_ratios_are_computed_round_by_round():
    facts = {"parameters": 10, "peak_memory": 5e6, "step_memory": 2e6, "share_of_peak": 0.5, "flops_per_second": 3e9}
    both = {"one": facts | {"rounds": [1.0, 4.0, 2.0]}, "two": facts | {"rounds": [0.25, 1.0, 0.25]}}
    result = {"shape": "cpu", "tokens_per_step": 64, "precision": "fp32", "matmul_peak": 6e9, "contenders": both}
    assert throughput.table(result).splitlines()[2:4] == [
        "| one | 10 | 32 (16 … 64) | 1.00 | 3 | 50% | 5 (+2 by steps) |",
        "| two | 10 | 256 (64 … 256) | 4.00 | 3 | 50% | 5 (+2 by steps) |",
    ]


@pytest.mark.integration
def test_throughput_of_our_models_and_transformers_trainer_is_measured(tiny_corpus):
    """In real processes, at sizes whose parameters and FLOPs are known."""
    result = throughput.measure(throughput.parse_options(arguments(tiny_corpus, "--processes", "2")))
    contenders = result["contenders"]
    assert list(contenders) == [*throughput.CONTENDERS][:4] and result["tokens_per_step"] == 64
    assert len(throughput.table(result).splitlines()) == 8
    for name in ("mvlm_gpt2", "transformers.Trainer"):
        assert contenders[name]["parameters"] == PARAMETERS
        assert contenders[name]["flops_per_token"] == pytest.approx(FLOPS, rel=0.03)
    for one in contenders.values():
        assert len(one["rounds"]) == 2 and one["tokens_per_second"] > 0 and one["step_memory"] >= 0
        assert one["share_of_peak"] == pytest.approx(one["flops_per_second"] / result["matmul_peak"])
    _, plain, coherent, _ = (one["flops_per_token"] for one in contenders.values())
    assert coherent - plain == pytest.approx(6 * (300 * 64 + 64**2), rel=0.05), "the second prediction and its adapter"
