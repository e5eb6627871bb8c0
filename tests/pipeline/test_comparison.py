"""The comparison's numbers, sentences and tables."""

import json

import pytest

from mvlm_core.console import text_table
from mvlm_core.data.corpus import NO_TEST_TEXT
from mvlm_core.export.plots import POINTS, thinned
from mvlm_core.metrics import METRICS
from mvlm_core.pipeline import comparison, plots

NAMES = ["mvlm_gpt2", "simone_enhanced"]
BASELINES = {
    "translation": "kjv",
    "train_bytes": 9,
    "test_bytes": 9,
    "xz": 1.88,
    "ppmd_order_6": 1.58,
    "ppmd_order_16": 1.51,
}


def entry(parameters=1000, text=10**6, score=1.5, **more):
    return {
        "parameters": parameters,
        "bytes": text,
        "tokens": text // 4,
        "seconds": 10.0,
        "tokens_per_second": 25000.0,
        "validation_bpb": score,
        "test_bpb": score,
        "test_bpb_kjv": score,
        "peak_memory_bytes": 1,
        "size_bytes": 1,
    } | more


def test_comparison_reports_equal_budgets_and_differences_within_noise():
    models = dict(zip(NAMES, (entry(), entry(1019, 1_009_000, 1.4)), strict=True))
    result = comparison.compare(models, NAMES, BASELINES)
    assert result["parameters"]["equal_within_2_percent"] and result["bytes"]["equal_within_1_percent"]
    words = " ".join(result["sentences"])
    assert "6.7% lower" in words and "One run per model" in words and words.count("predicts this text better") == 2
    assert "simone_enhanced scores 1.4000 bits per byte, mvlm_gpt2 1.5000" in words
    models["simone_enhanced"] = entry(1030, 1_020_000, 1.501)
    result = comparison.compare(models, NAMES, BASELINES | {"ppmd_order_16": 1.4})
    words = " ".join(result["sentences"])
    assert "within noise" in words and words.count("NOT matched") == 2 and words.count("worse than the compressor") == 2
    assert not result["parameters"]["equal_within_2_percent"] and not result["bytes"]["equal_within_1_percent"]
    assert any("PPMd order 16 1.400" in line for line in comparison.table(result, NAMES))


def test_two_seeds_of_one_model_have_no_winner():
    models = dict(zip(NAMES, (entry(score=1.8529), entry(score=1.8641)), strict=True))  # GPT-2, 2026-11-29 in LOG.md
    sentences = comparison.compare(models, NAMES, {})["sentences"]
    assert "same within noise (1.8529 and 1.8641" in sentences[0] and "below 0.02 bits per byte" in sentences[-1]


def test_comparison_handles_a_single_model_with_missing_scores():
    result = comparison.compare({"mvlm_gpt2": entry(test_bpb=None, test_bpb_kjv=None)}, ["mvlm_gpt2"], {})
    assert result["test_bpb"] == {"mvlm_gpt2": None, "ratio": None}
    assert result["parameters"]["equal_within_2_percent"] is None
    assert comparison.table(result, ["mvlm_gpt2"])
    json.dumps(result, allow_nan=False)


def test_models_without_a_test_score_are_compared_by_validation():
    untested = {"test_bpb": None, "test_bpb_kjv": None}
    models = {NAMES[0]: entry(**untested), NAMES[1]: entry(score=1.4, **untested)}
    first, *_, last = comparison.compare(models, NAMES, {})["sentences"]
    assert first == "On the validation text simone_enhanced scores 1.4000 bits per byte, mvlm_gpt2 1.5000: 6.7% lower."
    assert last == f"There is {NO_TEST_TEXT}."
    models[NAMES[0]]["test_bpb"] = 1.3
    sentences = comparison.compare(models, NAMES, {})["sentences"]
    assert sentences[0] == first and "test text" not in " ".join(sentences), "both scores are on the same text"


def test_baselines_are_compared_with_the_score_on_the_same_text():
    model = {"mvlm_gpt2": entry(test_bpb=1.6, test_bpb_kjv=1.4)}
    for translation, words in (
        ("kjv", "1.400 bits per byte on the KJV part"),
        (None, "1.600 bits per byte on the test"),
    ):
        result = comparison.compare(model, ["mvlm_gpt2"], BASELINES | {"translation": translation})
        assert words in result["sentences"][-1]
    advice = "the model is undertrained; train longer, with a larger --num_epochs or --max_hours."
    assert result["sentences"][-1].endswith(f"worse than the compressor: {advice}")


def test_metric_rows_list_all_metrics_books_and_extreme_translations():
    scores = {"kjv": 1.2, "web": 1.9, "asv": 1.5}
    parts = {name: {"book": {"Esther": 1.25}, "translation": scores} for name in NAMES}
    parts["mvlm_gpt2"] = {"book": {"Esther": 2.5}, "translation": {"web": 2.0}}
    result = comparison.compare({name: entry() for name in NAMES}, NAMES, {}, {}, parts)
    rows = comparison.metric_rows(result, NAMES)
    assert [row[0] for row in rows[: len(METRICS)]] == [metric.title for metric in METRICS]
    assert rows[len(METRICS) :] == [
        ["· Esther", "2.5000", "1.2500", "0.500"],
        ["· easiest translation (kjv)", "-", "1.2000", ""],
        ["· hardest translation (web)", "2.0000", "1.9000", "0.950"],
    ]


def test_text_table_aligns_columns_under_a_header():
    lines = text_table(["", "model", "b"], [["first row", "1", "2,000"], ["x", "-", ""]])
    assert lines == [
        "           model      b",
        "-----------------------",
        "first row      1  2,000",
        "x              -       ",
    ]


def test_scores_by_part_skip_invalid_values():
    config = {"results": {"test_bpb_by_book": {"Esther": 1.5, "Ruth": "?", "Job": 1e300}, "test_bpb_by_translation": 3}}
    assert comparison.scores_by_part(config) == {"book": {"Esther": 1.5}}


def test_comparison_plot_is_written_as_an_image(tmp_path):
    from PIL import Image

    result = comparison.compare({NAMES[0]: entry(), NAMES[1]: entry(score=1.4)}, NAMES, BASELINES)
    history = [{"bytes": n * 1000, "seconds": n * 1.0, "validation_bpb": 3 / n} for n in range(1, 6)]
    plots.plot_comparison(result, {name: history for name in NAMES}, tmp_path / "c.png")
    width, height = Image.open(tmp_path / "c.png").size
    assert width > 1000
    untested = {name: {**entry(), "test_bpb": None, "test_bpb_kjv": None} for name in NAMES}
    result = comparison.compare(untested, NAMES, {})
    plots.plot_comparison(result, {name: history for name in NAMES}, tmp_path / "c.png")
    narrow, same = Image.open(tmp_path / "c.png").size
    assert same == height and narrow == pytest.approx(2 / 3 * width, rel=0.05), "no empty third panel"


def test_long_curves_are_thinned_and_keep_the_last_point():
    points = [(float(n), 0.0) for n in range(1001)]
    found = thinned(points)
    assert 300 < len(found) <= POINTS and found[-1] == points[-1] and found[0][0] < 3
    assert thinned(points[:POINTS]) == points[:POINTS]
