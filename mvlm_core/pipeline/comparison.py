"""Compare two models on the same held-out text, with general-purpose compressors as baselines.

Bits per byte is comparable across tokenizers, and between models and compressors. The generated sentences claim no more
than one run with one seed supports.
"""

from __future__ import annotations

from typing import Any

from mvlm_core.console import text_table
from mvlm_core.data.corpus import NO_TEST_TEXT
from mvlm_core.evaluation.compression import LABELS
from mvlm_core.evaluation.results import rows as suite_rows
from mvlm_core.metrics import BY_NAME, METRICS, NOISE_BPB, PRIMARY_TEST_BPB, Metric
from mvlm_core.run_layout import finite_number

# Must be equal for a fair comparison: metric, label for the sentence, and relative tolerance.
FAIRNESS = (("parameters", "parameters", 0.02), ("bytes", "training text", 0.01))
PARTS = ("book", "translation")


def scores_by_part(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Test bits per byte by book and by translation from a training_config.json, skipping damaged values."""
    parts = {part: config.get("results", {}).get(f"test_bpb_by_{part}") for part in PARTS}
    return {
        part: {str(name): value for name, value in values.items() if finite_number(value) is not None}
        for part, values in parts.items()
        if isinstance(values, dict)
    }


def compare(
    models: dict[str, dict[str, Any]],
    names: list[str],
    baselines: dict[str, Any],
    suite: dict[str, dict[str, Any]] | None = None,
    parts: dict[str, dict[str, dict[str, float]]] | None = None,
) -> dict[str, Any]:
    """Build the `comparison` section of training_summary.json: for each metric, the models' values and their ratio.

    Args:
        models: the summary's entries by name.
        names: finished models in training order; `ratio` is the second's value over the first's.
        baselines: from `compression_baselines`.
        suite: evaluation suite results by name.
        parts: `scores_by_part` by name.
    """
    result: dict[str, Any] = {}
    for metric in METRICS:
        values = {name: models[name].get(metric.name) for name in names}
        result[metric.name] = values | {"ratio": _ratio(list(values.values()))}
    for key, _, tolerance in FAIRNESS:
        ratio = result[key]["ratio"]
        flag = f"equal_within_{round(tolerance * 100)}_percent"
        result[key][flag] = None if ratio is None else abs(ratio - 1) <= tolerance
    for part in PARTS:
        result[f"test_bpb_by_{part}"] = {name: values.get(part, {}) for name, values in (parts or {}).items()}
    result["evaluation_suite"] = suite or {}
    result["compression_baselines"] = baselines
    result["sentences"] = _sentences(result, names)
    return result


def _ratio(values: list[Any]) -> float | None:
    if len(values) != 2 or not all(isinstance(value, int | float) and value > 0 for value in values):
        return None
    return values[1] / values[0]


def score_metric(comparison: dict[str, Any], names: list[str]) -> Metric:
    """The score by which models are compared: on the test text, or on the validation text if one has no test score."""
    tested = all(comparison["test_bpb"][name] is not None for name in names)
    return BY_NAME["test_bpb" if tested else "validation_bpb"]


# --- sentences ----------------------------------------------------------------------------------------------


def _sentences(result: dict[str, Any], names: list[str]) -> list[str]:
    sentences = []
    if len(names) == 2:
        sentences += _verdict(result, names)
        for key, label, tolerance in FAIRNESS:
            ratio = result[key]["ratio"]
            if ratio is not None:
                matched = abs(ratio - 1) <= tolerance
                unmatched = "NOT matched, so the scores are not directly comparable"
                verdict = f"matched within {tolerance:.0%}" if matched else unmatched
                sentences.append(f"Ratio of {label}, {names[1]} to {names[0]}: {ratio:.3f}, {verdict}.")
        sentences.append(f"One run per model: differences below {NOISE_BPB} bits per byte are noise.")
    if names and all(result["test_bpb"][name] is None for name in names):
        sentences.append(f"There is {NO_TEST_TEXT}.")
    return sentences + _against_baselines(result, names)


def _verdict(result: dict[str, Any], names: list[str]) -> list[str]:
    """State which of two models scores better on the held-out text, and by how much."""
    metric = score_metric(result, names)
    scores = result[metric.name]
    if None in (scores[name] for name in names):
        return []
    better, worse = sorted(names, key=lambda name: scores[name])
    difference = scores[worse] - scores[better]
    if difference < NOISE_BPB:
        both = " and ".join(f"{scores[name]:.4f}" for name in names)
        return [f"On the {metric.label} text both score the same within noise ({both} bits per byte)."]
    return [
        f"On the {metric.label} text {better} scores {scores[better]:.4f} bits per byte, {worse} {scores[worse]:.4f}: "
        f"{difference / scores[worse]:.1%} lower."
    ]


def _against_baselines(result: dict[str, Any], names: list[str]) -> list[str]:
    baselines = result["compression_baselines"]
    if not baselines:
        return []
    scores = result[PRIMARY_TEST_BPB if baselines["translation"] else "test_bpb"]
    label, best = LABELS["ppmd_order_16"], baselines["ppmd_order_16"]
    advice = "the model is undertrained; train longer, with a larger --num_epochs or --max_hours"
    verdicts = f"worse than the compressor: {advice}", "the model predicts this text better"
    return [
        f"{name} scores {scores[name]:.3f} bits per byte on {_baseline_text(baselines)}, {label} {best:.3f}: "
        f"{verdicts[scores[name] < best]}."
        for name in names
        if scores[name] is not None
    ]


def _baseline_text(baselines: dict[str, Any]) -> str:
    translation = baselines["translation"]
    return f"the {translation.upper()} part of the test text" if translation else "the test text"


# --- tables -------------------------------------------------------------------------------------------------


def table(comparison: dict[str, Any], names: list[str]) -> list[str]:
    """Format the whole comparison as lines of plain text."""
    lines = text_table(["", *names, "ratio"], metric_rows(comparison, names))
    if rows := evaluation_rows(comparison, names):
        lines += ["", *text_table(["evaluation suite, test split", "reference text", *names], rows), ""]
    return [*lines, *baseline_lines(comparison), "", *comparison["sentences"]]


def metric_rows(comparison: dict[str, Any], names: list[str]) -> list[list[str]]:
    """Table rows: metric, each model's value, ratio.

    Followed by test scores by book and, with more than two translations, those of the last model's easiest and hardest.
    """

    def row(title: str, values: dict[str, Any], key: str) -> list[str]:
        cells = [values.get(name) for name in names]
        ratio = _ratio(cells)
        return [title, *map(BY_NAME[key].text, cells), "" if ratio is None else f"{ratio:.3f}"]

    def part_row(title: str, scores: dict[str, dict[str, float]], part: str) -> list[str]:
        return row(title, {name: scores.get(name, {}).get(part) for name in names}, "test_bpb")

    rows = [row(metric.title, comparison[metric.name], metric.name) for metric in METRICS]
    books, translations = (comparison[f"test_bpb_by_{part}"] for part in PARTS)
    rows += [part_row(f"· {book}", books, book) for book in (books.get(names[-1], {}) if names else ())]
    if len(scores := translations.get(names[-1], {}) if names else {}) > 2:
        for label, choose in (("easiest", min), ("hardest", max)):
            translation = choose(scores, key=scores.__getitem__)
            rows.append(part_row(f"· {label} translation ({translation})", translations, translation))
    return rows


def evaluation_rows(comparison: dict[str, Any], names: list[str]) -> list[list[str]]:
    """Table rows: metric, the text's own value, each model's; empty if a model has no results."""
    suite = comparison.get("evaluation_suite", {})
    return suite_rows([suite[name] for name in names]) if all(name in suite for name in names) else []


def baseline_lines(comparison: dict[str, Any]) -> list[str]:
    """Format the compression baselines and explain PPMd; empty if they were not measured."""
    if not (baselines := comparison.get("compression_baselines")):
        return []
    values = ", ".join(f"{label} {baselines[name]:.3f}" for name, label in LABELS.items())
    text = f"{_baseline_text(baselines)} ({baselines['test_bytes']:,} bytes)"
    return [
        f"Compressors primed with the training text, bits per byte of {text}: {values}.",
        "PPMd, a compressor, predicts each byte from the bytes before it, at most as many as its order.",
    ]
