"""Test bits per byte of an export, computed again from its files, as JSON.

    python -m mvlm_core.export.rescore MODEL_DIR DATA_DIR DEVICE ANSWER.json

Run by `validation` in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mvlm_core.errors import run_main
from mvlm_core.export.manifest import corpus_choice, training_config
from mvlm_core.files import write_json_atomic
from mvlm_core.hardware import choose_hardware, set_process_environment
from mvlm_core.metrics import PRIMARY_TEST_BPB


def rescore(folder: Path, data_dir: str, device: str) -> dict[str, Any]:
    """The scores of the whole test text and of its primary part, in one pass; None where there is no such text.

    No scores, and another fingerprint, where the corpus is not the one that the model was trained on.
    """
    from mvlm_core.data.corpus import load_corpus
    from mvlm_core.evaluation.bits_per_byte import score_export

    corpus = load_corpus(data_dir, **corpus_choice(folder))
    hardware = choose_hardware(device=device)
    hardware.apply()
    result: dict[str, Any] = {"fingerprint": corpus.fingerprint, "device": hardware.device}
    result |= {"test_bpb": None, PRIMARY_TEST_BPB: None}
    same_text = corpus.fingerprint == training_config(folder).get("data", {}).get("fingerprint")
    if same_text and corpus.split("test"):
        score = score_export(folder, corpus, split="test", device=hardware.device)
        primary = {document.path for document in corpus.primary_part("test")}
        result["test_bpb"] = score.bits_per_byte
        result[PRIMARY_TEST_BPB] = score.part(lambda path: path in primary).bits_per_byte if primary else None
    return result


def main(arguments: list[str] | None = None) -> None:
    folder, data_dir, device, answer = sys.argv[1:] if arguments is None else arguments
    set_process_environment()
    write_json_atomic(answer, rescore(Path(folder), data_dir, device))


if __name__ == "__main__":
    run_main(main)
