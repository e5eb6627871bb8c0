"""Test bits per byte of an export, computed again from its files, as JSON.

    python -m mvlm_core.export.rescore REQUEST.json ANSWER.json

Run by `validation` in a process of its own. The request holds `folder`, `data_dir`, `device`, `seed` (of the sample of
windows) and `whole` (score all of them).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mvlm_core.errors import run_main
from mvlm_core.export.manifest import corpus_choice, training_config
from mvlm_core.files import write_json_atomic
from mvlm_core.hardware import choose_hardware, set_process_environment
from mvlm_core.metrics import PRIMARY_TEST_BPB

# Relative tolerances of a score: on another device or in another precision, sums are ordered otherwise.
SAME_MACHINE, OTHER_MACHINE = 1e-4, 1e-3


def rescore(folder: Path, *, data_dir: str, device: str, seed: int, whole: bool) -> dict[str, Any]:
    """The scores of the whole test text and of its primary part; None where there is no such text.

    Where the nats of every window lie beside the export, these scores are sums of them, and ``sample`` says how many
    windows were scored again and what differs; otherwise (None), or if ``whole``, everything is scored again, in one
    pass. No scores, and another fingerprint, where the corpus is not the one that the model was trained on.
    """
    from mvlm_core.data.corpus import load_corpus
    from mvlm_core.evaluation.bits_per_byte import context_of, load_export, score_loaded
    from mvlm_core.export.scores import differences, drawn_windows, read_scores

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


def main(arguments: list[str] | None = None) -> None:
    request, answer = sys.argv[1:] if arguments is None else arguments
    set_process_environment()
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    write_json_atomic(answer, rescore(Path(asked.pop("folder")), **asked))


if __name__ == "__main__":
    run_main(main)
