"""`test_scores.json` beside an export: of every window of the test text the nats, whose sums the test scores are.

With it a score can be checked without scoring the whole text again: that the sums are right costs nothing, and that
the parts are right is seen from some windows, drawn at random and scored again from the exported files. It is a record
of the run, like its checkpoints: it goes into no archive, and where it is missing the whole text is scored.

    python -m mvlm_core.export.scores REQUEST.json ANSWER.json

computes the scores again, run by `validation` in a process of its own.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvlm_core.bill import RESCORED_SHARE
from mvlm_core.data.corpus import load_corpus
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

# Relative tolerances of a score: on another device or in another precision, sums are ordered otherwise.
SAME_MACHINE, OTHER_MACHINE = 1e-4, 1e-3
# Where a share q of n windows has wrong nats, a sample of the share s sees none of them with probability
# (1 - s) ** (q * n): 2e-4 for one in fifty of 3,200. What is wrong everywhere, if only by little, the sums show.
# Short texts are scored as a whole.
_LEAST_WINDOWS = 64
# A window has few tokens, whose rounding does not cancel as that of a whole text does.
_WINDOW_TOLERANCE = 10
_SMALL_WINDOW = 10.0  # nats: smaller ones may be off by as much as one of this size


def write_scores(folder: Path, score: Score) -> None:
    """Write a whole score, by document, beside the export whose weights it is of."""

    def in_order(windows: dict[int, float]) -> list[float]:
        return [windows[number] for number in sorted(windows)]

    documents = {
        key: {"bytes": document.bytes, "tokens": document.tokens, "nats": in_order(document.windows)}
        for key, document in score.documents.items()
    }
    write_json_atomic(folder / TEST_SCORES, {"weights": _weights(folder), "documents": documents})


def read_scores(folder: Path) -> Score | None:
    """The score that lies beside an export; None where there is none, it is damaged, or of other weights."""
    found = read_json(folder / TEST_SCORES)
    try:
        if found["weights"] != _weights(folder):
            return None
        return Score({key: _document(value) for key, value in found["documents"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _weights(folder: Path) -> str:
    return sha256_file(folder / "model.safetensors")


def _document(value: dict[str, Any]) -> DocumentScore:
    size, tokens, nats = value["bytes"], value["tokens"], value["nats"]
    if not all(isinstance(number, int) and 0 <= number < 2**53 for number in (size, tokens)):
        raise ValueError("bytes or tokens are no numbers")
    if not all(isinstance(number, float) and 0 <= number < math.inf for number in nats):
        raise ValueError("nats are no numbers")
    return DocumentScore(size, tokens, dict(enumerate(nats)))


def drawn_windows(stored: Score, seed: int) -> Iterator[bool]:
    """For each window of all documents in order whether it is in the sample of this seed."""
    count = sum(len(document.windows) for document in stored.documents.values())
    share = max(RESCORED_SHARE, _LEAST_WINDOWS / max(1, count))
    chance = random.Random(seed)
    while True:
        yield chance.random() < share


def differences(stored: Score, found: Score, context: int, tolerance: float) -> list[str]:
    """Where a score differs from one of all the same documents but of some windows only, each in a sentence.

    Args:
        context: of the model, in tokens.
        tolerance: of the sum over the windows, relative.
    """
    problems = [f"{key}: scored, but not in the corpus" for key in stored.documents.keys() - found.documents.keys()]
    sums = [0.0, 0.0]
    for key, document in found.documents.items():
        known = stored.documents.get(key)
        whole = (document.bytes, document.tokens, window_count(document.tokens, context))
        if known is None or (known.bytes, known.tokens, len(known.windows)) != whole:
            problems.append(f"{key}: not {whole[0]} bytes in {whole[1]} tokens and {whole[2]} windows, as the text is")
            continue
        for number, nats in document.windows.items():
            sums = [sums[0] + known.windows[number], sums[1] + nats]
            if not _alike(known.windows[number], nats, _WINDOW_TOLERANCE * tolerance):
                problems.append(f"{key}, window {number}: {nats} nats, recorded in training: {known.windows[number]}")
    if not _alike(sums[0], sums[1], tolerance):
        problems.append(f"all windows of the sample: {sums[1]} nats, recorded in training: {sums[0]}")
    return sorted(problems)


def _alike(recorded: float, found: float, tolerance: float) -> bool:
    return math.isclose(recorded, found, rel_tol=tolerance, abs_tol=tolerance * _SMALL_WINDOW)


def rescore(folder: Path, *, data_dir: str, device: str, seed: int, whole: bool) -> dict[str, Any]:
    """The scores of the whole test text and of its primary part; None where there is no such text.

    Where the nats of every window lie beside the export, these scores are sums of them, and ``sample`` says how many
    windows were scored again and what differs; otherwise (None), or if ``whole``, everything is scored again, in one
    pass. No scores, and another fingerprint, where the corpus is not the one that the model was trained on.
    """
    config, corpus = training_config(folder), load_corpus(data_dir, **corpus_choice(folder))
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
        ((document.path, document.read()) for document in corpus.split("test")),
        sample=drawn_windows(stored, seed) if stored else None,
    )
    if stored:
        problems = differences(stored, score, context_of(model), result["tolerance"])
        windows = [sum(len(document.windows) for document in some.documents.values()) for some in (score, stored)]
        result["sample"] = {"windows": windows[0], "of": windows[1], "problems": problems}
        score = stored
    primary = {document.path for document in corpus.primary_part("test")}
    result["test_bpb"] = score.bits_per_byte
    result[PRIMARY_TEST_BPB] = score.part(lambda path: path in primary).bits_per_byte if primary else None
    return result


def main(request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    write_json_atomic(answer, rescore(Path(asked.pop("folder")), **asked))


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:]))
