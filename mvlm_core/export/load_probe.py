"""Load an exported model as a third party would and write the results of its checks as JSON.

    python -I mvlm_core/export/load_probe.py REQUEST.json ANSWER.json

`validate_models.py` runs it in a separate process on a copy of the export. It needs only torch and transformers and
blocks imports from this repository, which proves that the folder is self-contained. The request holds the `folder`,
`prompts`, `texts` for the round trip, `specials` (words that must encode as ordinary text), and what training recorded:
the number of `parameters` and the size of the `vocabulary`.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = {
    "bible_corpus",
    "mvlm_core",
    "mvlm_trainer",
    "prioritary_mvlm",
    "simone_transformer",
    "train_all_models",
    "validate_models",
    "prepare_dataset",
}
NEW_TOKENS = 40
Check = tuple[str, str, list[str], str]  # group, name, problems, and the detail if there are none


class ExportError(Exception):
    """The export cannot be loaded or used; the message names the files and the reason."""


@contextlib.contextmanager
def attribute_errors_to(files: str) -> Iterator[None]:
    """Report any exception as a fault of ``files``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the tokenizers library is not an Exception
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise ExportError(f"{files}: {type(error).__name__}: {' '.join(lines[:5])}") from None


class ImportBlocker(importlib.abc.MetaPathFinder):
    """Blocks imports from the repository, which an editable install would make importable."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] in OURS:
            raise ModuleNotFoundError(f"{fullname}: the export imports a module of the training repository")


def weight_checks(model: Any, info: dict[str, Any], recorded: object) -> list[Check]:
    """Check the weights; ``recorded`` is the number of parameters recorded in training."""
    tensors = model.state_dict().items()
    not_finite = [name for name, value in tensors if value.is_floating_point() and not value.isfinite().all()]
    fields = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    mismatches = sorted(str(key) for field in fields for key in info.get(field, ()))
    parameters = sum(value.numel() for value in model.parameters())
    return [
        ("weights", "finite", not_finite, "all values finite"),
        ("weights", "fit the architecture", mismatches, "no missing, unexpected or mismatched weight"),
        equals(
            "weights", "parameter count", parameters == recorded, f"{parameters:,}, recorded in training: {recorded}"
        ),
    ]


def equals(group: str, name: str, passed: bool, detail: str) -> Check:
    return group, name, [] if passed else [detail], detail


def round_trips(tokenizer: Any, text: str) -> bool:
    """Whether a text survives encoding and decoding, with special tokens kept and skipped."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return all(
        tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False) == text
        for skip in (False, True)
    )


def tokenizer_checks(tokenizer: Any, model: Any, request: dict[str, Any]) -> list[Check]:
    """Check the tokenizer with the texts, words and vocabulary size of the request."""
    specials, special_ids = tokenizer.special_tokens_map, set(tokenizer.all_special_ids)
    failed = [ascii(text[:40]) for text in request["texts"] if not round_trips(tokenizer, text)]
    words = (*request["specials"], *map(str, specials.values()))
    taken = [word for word in words if special_ids & set(tokenizer(word, add_special_tokens=False).input_ids)]
    size, highest, recorded = len(tokenizer), max(tokenizer.get_vocab().values()), request["vocabulary"]
    rows = model.get_input_embeddings().weight.shape[0]
    fits = f"{size:,} entries, highest id {highest:,}, {rows:,} rows"
    missing = [f"{role} missing" for role in ("bos_token", "eos_token") if not specials.get(role)]
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        missing.append("bos_token_id or eos_token_id missing")
    named = [getattr(model.generation_config, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")]
    missing += [
        f"generation_config names {number}, which is not a special token"
        for number in named
        if number is not None and number not in special_ids
    ]
    return [
        ("tokenizer", "round trip", failed, "exact on every text"),
        equals("tokenizer", "vocabulary fits the embedding", max(size, highest + 1) <= rows, fits),
        equals("tokenizer", "vocabulary size", size == recorded, f"{size:,}, recorded in training: {recorded}"),
        ("tokenizer", "special tokens", missing, ", ".join(sorted(set(map(str, specials.values()))))),
        ("tokenizer", "text of special tokens is ordinary text", taken, "none is encoded as a special token"),
    ]


def generated(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[list[dict[str, Any]], Check]:
    """Generate greedy continuations as in transformers' documentation, and check them."""
    import torch

    samples, problems = [], []
    context = model.config.max_position_embeddings  # an alias of GPT-2's n_positions
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, : context - 1]
        length = min(NEW_TOKENS, context - ids.shape[1])  # learned position embeddings end there
        with torch.inference_mode():
            finite = bool(torch.isfinite(model(input_ids=ids).logits).all())
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
            )[0]
        new = output[ids.shape[1] :].tolist()
        end = model.generation_config.eos_token_id
        complete = len(new) == length or bool(new) and new[-1] in (end if isinstance(end, list) else [end])
        if not (complete and finite and max(new, default=0) < len(tokenizer)):
            problems.append(f"{prompt!r} gave {len(new)} tokens" + ("" if finite else ", non-finite logits"))
        text = tokenizer.decode(output, skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text, "new_tokens": len(new)})
    return samples, ("generation", "generates", problems, f"{len(samples)} prompts, greedy")


def probe(request: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = request["folder"]
    with attribute_errors_to("config.json, generation_config.json or model.safetensors"):
        config = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))
        own_code = "auto_map" in config  # an architecture built into transformers must load without remote code
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, trust_remote_code=own_code, output_loading_info=True
        )
        model, info = loaded
        model.eval()
        checks = weight_checks(model, info, request["parameters"])
    with attribute_errors_to("tokenizer.json or tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        checks += tokenizer_checks(tokenizer, model, request)
    with attribute_errors_to("config.json, generation_config.json or tokenizer.json, while generating"):
        samples, check = generated(model, tokenizer, request["prompts"])
    return {"class": type(model).__name__, "checks": [*checks, check], "samples": samples}


def limit_memory(model_dir: str) -> None:
    """Limit private memory to what loading needs: room for the libraries, and twenty times the size of the files.

    A malicious config may request any amount; with the limit it fails here, before the machine runs out of memory.
    """
    files = sum(path.stat().st_size for path in Path(model_dir).iterdir())
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(16 << 30, machine // 2) + 20 * files
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> int:
    request_file, answer_file = map(Path, sys.argv[1:])
    request = json.loads(request_file.read_text(encoding="utf-8"))
    sys.meta_path.insert(0, ImportBlocker())
    limit_memory(request["folder"])
    try:
        result = probe(request)
    except ExportError as error:
        print(error)
        return 1
    answer_file.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
