"""Loads an exported model the way a stranger would and writes what it found, as JSON.

    python -I mvlm_core/export/load_probe.py REQUEST.json ANSWER.json

Run by `validate_models.py` in a process of its own, on a copy of the export. Needs torch and transformers
only and refuses to import anything of this repository, so it proves that the folder stands by itself. The
request holds the `folder`, `prompts`, `texts` for the round trip, `specials`, words that must be ordinary text, and
what training recorded: the number of `parameters` and the size of the `vocabulary`.
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
Check = tuple[str, str, list[str], str]  # its group and name, what is wrong, and what is told where nothing is


class Unusable(Exception):
    """What in the export does not work, and why."""


@contextlib.contextmanager
def concerning(what: str) -> Iterator[None]:
    """Whatever goes wrong in here is reported as a fault of ``what``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the tokenizers library is no Exception
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise Unusable(f"{what}: {type(error).__name__}: {' '.join(lines[:5])}") from None


class Barrier(importlib.abc.MetaPathFinder):
    """An editable install makes the repository importable everywhere; here it must not be."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] in OURS:
            raise ModuleNotFoundError(f"{fullname}: the export needs a module of the repository that made it")


def weight_checks(model: Any, info: dict[str, Any], recorded: object) -> list[Check]:
    """The weights' checks; ``recorded`` is the number of parameters that training wrote down."""
    tensors = model.state_dict().items()
    not_finite = [name for name, value in tensors if value.is_floating_point() and not value.isfinite().all()]
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    unfilled = sorted(str(key) for kind in kinds for key in info.get(kind, ()))
    parameters = sum(value.numel() for value in model.parameters())
    return [
        ("weights", "finite", not_finite, "all values finite"),
        ("weights", "fit the architecture", unfilled, "no missing, unexpected or mismatched weight"),
        equals(
            "weights", "parameter count", parameters == recorded, f"{parameters:,}, recorded in training: {recorded}"
        ),
    ]


def equals(group: str, name: str, passed: bool, detail: str) -> Check:
    return group, name, [] if passed else [detail], detail


def comes_back(tokenizer: Any, text: str) -> bool:
    """Whether a text survives the round trip, with special tokens kept and skipped."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return all(
        tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False) == text
        for skip in (False, True)
    )


def tokenizer_checks(tokenizer: Any, model: Any, request: dict[str, Any]) -> list[Check]:
    """The tokenizer's checks, with the texts, the words and the vocabulary size of the request."""
    specials, special_ids = tokenizer.special_tokens_map, set(tokenizer.all_special_ids)
    failed = [ascii(text[:40]) for text in request["texts"] if not comes_back(tokenizer, text)]
    words = (*request["specials"], *map(str, specials.values()))
    taken = [word for word in words if special_ids & set(tokenizer(word, add_special_tokens=False).input_ids)]
    size, highest, recorded = len(tokenizer), max(tokenizer.get_vocab().values()), request["vocabulary"]
    rows = model.get_input_embeddings().weight.shape[0]
    fits = f"{size:,} entries, highest id {highest:,}, {rows:,} rows"
    missing = [f"{role} missing" for role in ("bos_token", "eos_token") if not specials.get(role)]
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        missing.append("ids of start and end missing")
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
        ("tokenizer", "special words are ordinary text", taken, "none is turned into a special token"),
    ]


def generated(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[list[dict[str, Any]], Check]:
    """Greedy continuations, asked for as the documentation of transformers asks, and their check."""
    import torch

    samples, problems = [], []
    context = model.config.max_position_embeddings  # GPT-2's n_positions answers to this name too
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, : context - 1]
        wanted = min(NEW_TOKENS, context - ids.shape[1])  # a learned position embedding ends there
        with torch.inference_mode():
            finite = bool(torch.isfinite(model(input_ids=ids).logits).all())
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=wanted, do_sample=False
            )[0]
        new = output[ids.shape[1] :].tolist()
        end = model.generation_config.eos_token_id
        whole = len(new) == wanted or bool(new) and new[-1] in (end if isinstance(end, list) else [end])
        if not (whole and finite and max(new, default=0) < len(tokenizer)):
            problems.append(f"{prompt!r} gave {len(new)} tokens" + ("" if finite else ", non-finite logits"))
        text = tokenizer.decode(output, skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text, "new_tokens": len(new)})
    return samples, ("generation", "generates", problems, f"{len(samples)} prompts, greedy")


def probe(request: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = request["folder"]
    with concerning("config.json, generation_config.json or model.safetensors"):
        config = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))
        own_code = "auto_map" in config  # a model that transformers knows must load without trusting any code
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, trust_remote_code=own_code, output_loading_info=True
        )
        model, info = loaded
        model.eval()
        checks = weight_checks(model, info, request["parameters"])
    with concerning("tokenizer.json or tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        checks += tokenizer_checks(tokenizer, model, request)
    with concerning("config.json, generation_config.json or tokenizer.json, while generating"):
        samples, check = generated(model, tokenizer, request["prompts"])
    return {"class": type(model).__name__, "checks": [*checks, check], "samples": samples}


def limit_memory(model_dir: str) -> None:
    """A hostile configuration may ask for any amount; loading needs a few times the size of the files.

    The limit on private memory makes the asking fail here, before the machine runs short.
    """
    files = sum(path.stat().st_size for path in Path(model_dir).iterdir())
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(16 << 30, machine // 2) + 20 * files
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> int:
    request, answer = map(Path, sys.argv[1:])
    asked = json.loads(request.read_text(encoding="utf-8"))
    sys.meta_path.insert(0, Barrier())
    limit_memory(asked["folder"])
    try:
        result = probe(asked)
    except Unusable as error:
        print(error)
        return 1
    answer.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
