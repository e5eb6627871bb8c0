"""Export to ONNX: one graph for both prefill and decoding, with a KV cache.

Inputs: ``input_ids [batch, tokens]`` and for each layer ``past_key_values.N.key`` and ``….value``
``[batch, heads, past, head_dim]``, initially empty (past = 0). Outputs: ``logits [batch, tokens, vocab]`` and the
updated cache, ``present.N.key`` and ``….value``, to pass back in with the next tokens. All rows of a batch have the
same length: there is no padding mask.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from mvlm_core.errors import run_main
from mvlm_core.evaluation.bits_per_byte import context_of, load_export
from mvlm_core.files import read_json, write_json_atomic

_ONE_FILE = 1 << 30  # bytes of weights; larger ones go into an external data file, as protobuf is limited to 2 GiB
_PROBE_TOKENS = 48


class CachedForward(nn.Module):
    """Wraps a causal language model's forward with the cache as a flat list: each layer's keys, then its values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return output.logits, _flat(output.past_key_values)


def _flat(cache: Cache) -> list[Tensor]:
    layers: Any = cache.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def write_onnx(model: Any, path: Path) -> None:
    """Write the graph and weights of ``model`` to ``path``."""
    ids = torch.zeros(2, 3, dtype=torch.long)  # no dimension of 1: torch would specialize on it
    with torch.inference_mode():
        past = _flat(model(input_ids=ids, use_cache=True).past_key_values)
    names = [f"{layer}.{kind}" for layer in range(len(past) // 2) for kind in ("key", "value")]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about operators that text models do not use
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in torch, and dynamic dimensions that share a name
        program: Any = torch.onnx.export(
            CachedForward(model).eval(),
            (ids, past),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            dynamic_shapes=({0: "batch", 1: "tokens"}, [{0: "batch", 2: "past"} for _ in past]),
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # tracebacks with this machine's paths
    size = sum(parameter.nbytes for parameter in model.parameters())
    program.save(path, external_data=size > _ONE_FILE)


class CachedGraph:
    """Runs an ONNX graph in ONNX Runtime on the CPU and keeps its KV cache.

    Args:
        threads: 0 means one per core.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.reset()

    def reset(self, batch: int = 1) -> None:
        """Clear the cache for a new batch of ``batch`` texts."""
        _, *cached = self.session.get_inputs()
        self.past = {
            tensor.name: np.zeros((batch, tensor.shape[1], 0, tensor.shape[3]), np.float32) for tensor in cached
        }

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens ``ids [batch, tokens]`` to those already read; return logits ``[batch, tokens, vocab]``."""
        logits, *present = self.session.run(None, {"input_ids": ids} | self.past)
        self.past = dict(zip(self.past, present, strict=True))
        return logits


def largest_difference(model: Any, path: Path) -> float:
    """Largest difference between the logits of ``model`` and the graph, run in three chunks (one of a single token)."""
    length = min(context_of(model), _PROBE_TOKENS)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.numpy()
    graph = CachedGraph(path)
    graph.reset(batch=2)
    parts = [graph.read(part.numpy()) for part in ids.split([length // 2, 1, length - length // 2 - 1], dim=1)]
    return float(np.abs(np.concatenate(parts, axis=1) - expected).max())


def main(request: str, answer: str) -> None:
    """``python -m mvlm_core.export.onnx_format REQUEST.json ANSWER.json``, run by ``validation``."""
    arguments = read_json(Path(request))
    model, _ = load_export(arguments["folder"])
    write_json_atomic(answer, {"largest_difference": largest_difference(model.float(), Path(arguments["graph"]))})


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:]))
