"""`test_scores.json` in an export folder: nats of every window of the test text, which sum to the test scores.

It allows a score to be verified without scoring the whole text again: the sums are cheap to check, and the values
are checked by rescoring a random sample of windows with the exported files. Like the checkpoints, it is a record of the
run and never packed into an archive; without it, the whole text is scored.

    python -m mvlm_core.export.scores REQUEST.json ANSWER.json

This command recomputes the scores; `validation` runs it in a separate process.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvlm_core.cost_estimate import RESCORED_SHARE
from mvlm_core.data.corpus import load_corpus, named_texts
from mvlm_core.errors import run_main
from mvlm_core.evaluation.bits_per_byte import (
    DocumentScore,
    Score,
    context_of,
    load_export,
    score_loaded,
    window_count,
)
from mvlm_core.export.manifest import TEST_SCORES, corpus_choice, training_config
from mvlm_core.files import read_json, sha256_file, write_json_atomic
from mvlm_core.hardware import choose_hardware
from mvlm_core.metrics import PRIMARY_TEST_BPB

# Relative tolerances of a score: another device or precision sums in a different order.
SAME_MACHINE, OTHER_MACHINE = 1e-4, 1e-3
# If a fraction q of n windows has wrong nats, a sampling rate s misses all of them with probability (1 - s) ** (q * n):
# 2e-4 for one in fifty of 3,200. Small errors in all windows show up in the sums. Short texts are scored completely.
_MIN_WINDOWS = 64
# A window has few tokens, so rounding errors cancel less than over a whole text.
_WINDOW_TOLERANCE = 10
_SMALL_WINDOW = 10.0  # nats; windows with fewer get the absolute tolerance of one with this many


def write_scores(folder: Path, score: Score) -> None:
    """Write a complete score, by document, to the folder of the export it belongs to."""

    def in_order(windows: dict[int, float]) -> list[float]:
        return [windows[number] for number in sorted(windows)]

    documents = {
        key: {"bytes": document.bytes, "tokens": document.tokens, "nats": in_order(document.windows)}
        for key, document in score.documents.items()
    }
    write_json_atomic(folder / TEST_SCORES, {"weights": _weights(folder), "documents": documents})


def read_scores(folder: Path) -> Score | None:
    """Read the score in an export folder; None if it is missing, damaged, or belongs to other weights."""
    stored = read_json(folder / TEST_SCORES)
    try:
        if stored["weights"] != _weights(folder):
            return None
        return Score({key: _document(value) for key, value in stored["documents"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _weights(folder: Path) -> str:
    return sha256_file(folder / "model.safetensors")


def _document(value: dict[str, Any]) -> DocumentScore:
    size, tokens, nats = value["bytes"], value["tokens"], value["nats"]
    if not all(isinstance(number, int) and 0 <= number < 2**53 for number in (size, tokens)):
        raise ValueError("bytes or tokens are not valid numbers")
    if not all(isinstance(number, float) and 0 <= number < math.inf for number in nats):
        raise ValueError("nats are not valid numbers")
    return DocumentScore(size, tokens, dict(enumerate(nats)))


def drawn_windows(stored: Score, seed: int) -> Iterator[bool]:
    """Yield for each window, in order over all documents, whether it is in the sample drawn with this seed."""
    count = sum(len(document.windows) for document in stored.documents.values())
    share = max(RESCORED_SHARE, _MIN_WINDOWS / max(1, count))
    rng = random.Random(seed)
    while True:
        yield rng.random() < share


def differences(stored: Score, sample: Score, context: int, tolerance: float) -> list[str]:
    """Compare a stored score with a sample of rescored windows of the same documents; return the problems.

    Args:
        context: of the model, in tokens.
        tolerance: relative tolerance of the sum over the sampled windows.
    """
    problems = [f"{key}: scored, but not in the corpus" for key in stored.documents.keys() - sample.documents.keys()]
    sums = [0.0, 0.0]
    for key, document in sample.documents.items():
        recorded = stored.documents.get(key)
        size = (document.bytes, document.tokens, window_count(document.tokens, context))
        if recorded is None or (recorded.bytes, recorded.tokens, len(recorded.windows)) != size:
            problems.append(
                f"{key}: recorded size differs from the text's {size[0]} bytes, {size[1]} tokens and {size[2]} windows"
            )
            continue
        for number, nats in document.windows.items():
            before = recorded.windows[number]
            sums = [sums[0] + before, sums[1] + nats]
            if not _is_close(before, nats, _WINDOW_TOLERANCE * tolerance):
                problems.append(f"{key}, window {number}: {nats} nats, recorded in training: {before}")
    if not _is_close(sums[0], sums[1], tolerance):
        problems.append(f"all windows of the sample: {sums[1]} nats, recorded in training: {sums[0]}")
    return sorted(problems)


def _is_close(recorded: float, rescored: float, tolerance: float) -> bool:
    return math.isclose(recorded, rescored, rel_tol=tolerance, abs_tol=tolerance * _SMALL_WINDOW)


def rescore(
    folder: Path, *, data_dir: str, validation_dir: str | None, device: str, seed: int, whole: bool
) -> dict[str, Any]:
    """Recompute the scores of the whole test split and of its primary part; None without such text.

    With a stored score the results are its sums, and ``sample`` holds the number of rescored windows and the problems;
    without one, or with ``whole``, everything is rescored in one pass and ``sample`` is None. If the corpus is not the
    one that the model was trained on, the scores are None and the fingerprint differs.
    """
    config, corpus = training_config(folder), load_corpus(data_dir, **corpus_choice(folder, validation_dir))
    hardware = choose_hardware(device=device)
    hardware.apply()
    on_cpus = config.get("hardware", {}).get("device") == hardware.device == "cpu"
    result: dict[str, Any] = {"fingerprint": corpus.fingerprint, "device": hardware.device}
    result |= {"tolerance": SAME_MACHINE if on_cpus else OTHER_MACHINE, "sample": None}
    result |= {"test_bpb": None, PRIMARY_TEST_BPB: None}
    if corpus.fingerprint != config.get("data", {}).get("fingerprint") or not corpus.split("test"):
        return result
    stored = None if whole else read_scores(folder)
    model, tokenizer = load_export(folder, hardware.device)
    score = score_loaded(
        model,
        tokenizer,
        named_texts(corpus.split("test")),
        sample=drawn_windows(stored, seed) if stored else None,
    )
    if stored:
        problems = differences(stored, score, context_of(model), result["tolerance"])
        windows = [sum(len(document.windows) for document in each.documents.values()) for each in (score, stored)]
        result["sample"] = {"windows": windows[0], "of": windows[1], "problems": problems}
        score = stored
    primary = {document.path for document in corpus.primary_part("test")}
    result["test_bpb"] = score.bits_per_byte
    result[PRIMARY_TEST_BPB] = score.part(primary).bits_per_byte if primary else None
    return result


def main(request: str, answer: str) -> None:
    arguments = json.loads(Path(request).read_text(encoding="utf-8"))
    write_json_atomic(answer, rescore(Path(arguments.pop("folder")), **arguments))


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:]))
