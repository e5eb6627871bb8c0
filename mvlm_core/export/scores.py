"""Recompute the test scores of an export and compare them with those recorded in training.

`training_config.json` records the nats of each test document (`test_nats`), which sum to the test scores. So a check of
the sums and of a random sample of documents is enough.

    python -m mvlm_core.export.scores REQUEST.json ANSWER.json

`validation` runs this command in a separate process.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvlm_core.cost_estimate import RESCORED_SHARE
from mvlm_core.data.corpus import Document, load_corpus, named_texts
from mvlm_core.errors import UserError, run_main
from mvlm_core.evaluation.bits_per_byte import DocumentScore, Score, load_export, score_loaded
from mvlm_core.export.manifest import TRAINING_CONFIG, corpus_choice, training_config
from mvlm_core.files import write_json_atomic
from mvlm_core.hardware import choose_hardware
from mvlm_core.metrics import PRIMARY_TEST_BPB

# Relative tolerances of a score: another device or precision sums in a different order.
SAME_MACHINE, OTHER_MACHINE = 1e-4, 1e-3
# In nats; rounding errors cancel less in fewer, so these get the absolute tolerance of this many.
_SMALL_DOCUMENT, _SMALL_TEXT = 1000.0, 10.0
_MIN_DOCUMENTS = 8  # in the sample
_NATS_LIMIT = 2.0**53  # of a document; their sum must be finite


def recorded_score(config: dict[str, Any], documents: Sequence[Document]) -> Score:
    """Read the score of the test documents from a training_config.json.

    Raises:
        UserError: it is not a valid score of exactly these documents.
    """
    nats: Any = config.get("test_nats")
    same = isinstance(nats, dict) and nats.keys() == {document.path for document in documents}
    if not same or not all(isinstance(value, float) and 0 <= value < _NATS_LIMIT for value in nats.values()):
        raise UserError(f"{TRAINING_CONFIG}: test_nats is not a number of nats for each test document")
    return Score({document.path: DocumentScore(document.size, nats[document.path]) for document in documents})


def draw_sample(documents: Sequence[Document], seed: int) -> list[Document]:
    """Draw a random sample of the documents; all of them if there are few."""
    count = max(_MIN_DOCUMENTS, math.ceil(RESCORED_SHARE * len(documents)))
    return random.Random(seed).sample(documents, min(count, len(documents)))


def differences(recorded: Score, rescored: Score, tolerance: float) -> list[str]:
    """Compare rescored documents with their recorded scores; return the problems.

    Args:
        tolerance: relative tolerance of each document and of the sum, which also shows small errors in many short ones.
    """
    pairs = {path: (recorded.documents[path].nats, now.nats) for path, now in rescored.documents.items()}
    problems = [
        f"{path}: {now} nats, recorded in training: {before}"
        for path, (before, now) in sorted(pairs.items())
        if not math.isclose(before, now, rel_tol=tolerance, abs_tol=tolerance * _SMALL_DOCUMENT)
    ]
    before, now = recorded.part(pairs).nats, rescored.nats
    if not math.isclose(before, now, rel_tol=tolerance, abs_tol=tolerance * _SMALL_TEXT):
        problems.append(f"all documents of the sample: {now} nats, recorded in training: {before}")
    return problems


def rescore(
    folder: Path, *, data_dir: str, validation_dir: str | None, device: str, seed: int, whole: bool
) -> dict[str, Any]:
    """Recompute the scores of the whole test split and of its primary part from the recorded nats of each document.

    ``sample`` holds the number of rescored documents (all of them with ``whole``) and the problems. All three are None
    without such text or with ``--no_test_score``, and if the corpus is not the one that the model was trained on, whose
    fingerprint differs.

    Raises:
        UserError: the export has no valid record.
    """
    config, corpus = training_config(folder), load_corpus(data_dir, **corpus_choice(folder, validation_dir))
    hardware = choose_hardware(device=device)
    hardware.apply()
    on_cpus = config.get("hardware", {}).get("device") == hardware.device == "cpu"
    result: dict[str, Any] = {"fingerprint": corpus.fingerprint, "device": hardware.device}
    result |= {"sample": None, "test_bpb": None, PRIMARY_TEST_BPB: None}
    test = [] if config.get("settings", {}).get("no_test_score") is True else corpus.split("test")
    if corpus.fingerprint != config.get("data", {}).get("fingerprint") or not test:
        return result
    recorded = recorded_score(config, test)
    documents = test if whole else draw_sample(test, seed)
    rescored = score_loaded(*load_export(folder, hardware.device), named_texts(documents))
    problems = differences(recorded, rescored, SAME_MACHINE if on_cpus else OTHER_MACHINE)
    result["sample"] = {"documents": len(documents), "of": len(test), "problems": problems}
    primary = {document.path for document in corpus.primary_part("test")}
    result["test_bpb"] = recorded.bits_per_byte
    result[PRIMARY_TEST_BPB] = recorded.part(primary).bits_per_byte if primary else None
    return result


def main(request: str, answer: str) -> None:
    arguments = json.loads(Path(request).read_text(encoding="utf-8"))
    write_json_atomic(answer, rescore(Path(arguments.pop("folder")), **arguments))


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:]))
