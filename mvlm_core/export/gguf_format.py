"""Write a standard GPT-2 as GGUF, for llama.cpp and programs built on it, with a Modelfile for Ollama."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from mvlm_core.files import read_json
from mvlm_core.settings import DEFAULT_SAMPLING

# Matrices that GPT-2 stores as ``[in, out]``; GGUF, like most formats, uses ``[out, in]``.
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_gguf(export: Path, path: Path, name: str) -> None:
    """Write the GPT-2 in the folder ``export`` to ``path`` with float32 weights.

    The output matrix is omitted: llama.cpp then uses the embedding, to which it is tied.
    """
    from safetensors.torch import load_file

    gguf: Any = importlib.import_module("gguf")
    config = read_json(export / "config.json")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(gguf, writer, json.loads((export / "tokenizer.json").read_text(encoding="utf-8")), config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    for name, tensor in load_file(export / "model.safetensors").items():
        tensor = tensor.float().T if name.endswith(_TRANSPOSED) else tensor.float()
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"{name}: a GPT-2 has no such tensor")
        writer.add_tensor(gguf_name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Add our vocabulary and merges with GPT-2's pre-tokenizer; text starts with the start token, as in training."""
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | special
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([types.CONTROL if token in special else types.NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)


def modelfile(gguf_name: str, context: int) -> str:
    """Ollama Modelfile for plain text completion, without a chat template."""
    return (
        f"FROM ./{gguf_name}\nTEMPLATE {{{{ .Prompt }}}}\nPARAMETER num_ctx {context}\n"
        f"PARAMETER temperature {DEFAULT_SAMPLING.temperature}\nPARAMETER top_p {DEFAULT_SAMPLING.top_p}\n"
    )
