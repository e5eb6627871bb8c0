"""The archives in other engines: ONNX Runtime and llama.cpp agree with PyTorch.

Run with ``pip install -r requirements-extras.txt -r requirements-ecosystem.txt`` and ``pytest -m integration
tests/test_other_engines.py``; tests of packages that are not installed are skipped.
"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.performance import other_engines
from benchmarks.performance.other_engines import gguf_reader, greedy, onnx_reader, open_llama, torch_reader
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import encode, load_export
from mvlm_core.evaluation.generation import prompt_ids
from mvlm_core.export.archive import opened, write_archive
from mvlm_core.export.file_checks import Checks
from mvlm_core.export.formats import LOGITS_TOLERANCE
from mvlm_core.export.manifest import read_manifest, write_manifest
from mvlm_core.export.validation import check_formats
from mvlm_core.files import sha256_file
from mvlm_core.run_layout import Layout
from mvlm_core.training.run import run_training
from tests.export.exports import copy_export
from tests.helpers import MODELS, REPOSITORY, build_tiny_corpus, recipe_of, sample_books, tiny_settings

pytestmark = pytest.mark.integration
EXTRAS = "pip install -r requirements-extras.txt"
NEW_TOKENS = 64
# llama.cpp on a CPU keeps its cache in float16 and uses a float16 lookup table for GELU.
HALF_PRECISION = 5e-3


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Model name → an export with room for 64 new tokens, trained enough not to repeat a single word."""
    work = tmp_path_factory.mktemp("exports")
    corpus = build_tiny_corpus(work / "corpus")
    for name, rate in zip(MODELS, ({"learning_rate": 0.01}, {}), strict=True):
        longer = {"max_length": 96, "max_steps": 200, "eval_interval": 100} | rate
        run_training(recipe_of(name), tiny_settings(name, corpus, work, **longer))
    return {name: work / name for name in MODELS}


@pytest.fixture(scope="module", params=MODELS)
def unpacked(request, exports, tmp_path_factory):
    """Model name, model, tokenizer, and the formats converted from its archive, packed and extracted again."""
    for package in ("onnx", "onnxscript", "onnxruntime", "gguf"):
        pytest.importorskip(package, reason=EXTRAS)
    name, place = request.param, tmp_path_factory.mktemp(request.param)
    write_archive(exports[name], place / "model.tar.gz")
    flags = ["--onnx", "--gguf"] if name == "mvlm_gpt2" else ["--onnx"]
    command = [sys.executable, REPOSITORY / "export_formats.py", place / "model.tar.gz", *flags]
    done = subprocess.run([*command, "--output", place / "formats"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and done.stdout.count("\n") == 1, "one line, and nothing of torch's"
    write_archive(place / "formats", place / "formats.tar.gz")
    with opened(place / "formats.tar.gz") as folder:
        assert folder.name == f"{name}_formats"
        yield name, *load_export(exports[name]), folder


def test_validation_detects_corrupted_onnx_weights(unpacked, exports, tmp_path):
    name, _, _, folder = unpacked
    layout = Layout(tmp_path)
    export, made = copy_export(exports[name], layout.export(name)), layout.formats(name)
    shutil.copytree(folder, made)

    def logits():
        checks = Checks()
        check_formats(name, export, layout, checks)
        return next(check for check in checks if check.name == "ONNX logits")

    assert logits().passed and "largest difference" in logits().detail
    graph = made / "onnx" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[-40_000:-20_000] = bytes(20_000)  # the weights come last
    graph.write_bytes(data)
    files = read_manifest(made)["files"] | {"onnx/model.onnx": sha256_file(graph)}
    write_manifest(made, f"{name}_formats", files)
    assert not logits().passed


def test_the_benchmark_compares_every_engine_with_torch(unpacked, exports, tmp_path, capsys):
    name, _, _, folder = unpacked
    found = tmp_path / "found.json"
    flags = ["--tokens", "8", "--rounds", "1", "--json", str(found)]
    if name == "mvlm_gpt2":
        pytest.importorskip("llama_cpp", reason="pip install -r requirements-ecosystem.txt")
    assert other_engines.main([str(exports[name]), str(folder), *flags]) == 0
    figures = json.loads(found.read_text())
    assert list(figures) == ["PyTorch", "ONNX Runtime", "llama.cpp"][: 3 if name == "mvlm_gpt2" else 2]
    assert {engine["same_tokens"] for engine in figures.values()} == {8}
    assert f"| ONNX Runtime | {figures['ONNX Runtime']['tokens_per_second'][0][0]:,.1f} |" in capsys.readouterr().out
    with pytest.raises(UserError) as caught:
        other_engines.main([str(tmp_path / "none"), str(folder), "--tokens", "0"])
    assert len(caught.value.problems) == 2


def graph_in(folder):
    from mvlm_core.export.onnx_format import CachedGraph

    return CachedGraph(folder / "onnx" / "model.onnx")


def test_onnx_logits_match_torch_for_any_chunking(unpacked):
    _, model, tokenizer, folder = unpacked
    ids = torch.tensor([encode(tokenizer, sample_books()["psalms"])[start : start + 90] for start in (0, 500)])
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.numpy()
    graph = graph_in(folder)
    for lengths in ([90], [1] * 90, [40, 50], [1, 2, 3, 84], [89, 1]):
        graph.reset(batch=2)
        found = np.concatenate([graph.read(part.numpy()) for part in ids.split(lengths, dim=1)], axis=1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_onnx_greedy_decoding_with_cache_matches_torch(unpacked):
    _, model, tokenizer, folder = unpacked
    prompt = prompt_ids(tokenizer, "And it came to pass")
    text, logits = greedy(torch_reader(model), prompt, NEW_TOKENS)
    found, their_logits = greedy(onnx_reader(graph_in(folder)), prompt, NEW_TOKENS)
    assert found == text and len(set(text)) > 4
    np.testing.assert_allclose(their_logits, logits, rtol=0, atol=LOGITS_TOLERANCE)


def test_onnx_logits_depend_on_the_last_cache_entry(unpacked):
    """Model 2 reads the key and value of the previous token, so zeroing the last cache entry changes its logits."""
    name, _, tokenizer, folder = unpacked
    if name == "mvlm_gpt2":
        pytest.skip("GPT-2 reads each token's own")
    ids = np.array([prompt_ids(tokenizer, "And the LORD said unto Moses")])
    graph = graph_in(folder)
    whole = graph.read(ids)[:, -1]
    graph.reset()
    graph.read(ids[:, :-1])
    for cached in graph.past.values():
        cached[:, :, -1] = 0
    assert np.abs(graph.read(ids[:, -1:])[:, -1] - whole).max() > 100 * LOGITS_TOLERANCE


def test_llama_cpp_matches_gpt2_tokens_logits_and_text(unpacked):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install -r requirements-ecosystem.txt")
    name, model, tokenizer, folder = unpacked
    if name != "mvlm_gpt2":
        assert not list(folder.rglob("*.gguf"))
        pytest.skip("only a GPT-2 can be written as GGUF")
    llama = open_llama(folder / "gguf" / "mvlm_gpt2.gguf", 96, threads=1)
    assert llama_cpp.__version__ and llama.token_bos() == llama.token_eos() == tokenizer.bos_token_id
    for text in ("And the LORD said", "  two  spaces\n\n’tis 1769 — ‘so’ <|endoftext|> Ἐν", "don't we'll"):
        ids = encode(tokenizer, text)
        assert llama.tokenize(text.encode(), add_bos=False) == ids
        assert llama.tokenize(text.encode()) == [tokenizer.bos_token_id, *ids], "as in training"
        assert llama.detokenize(ids).decode() == text
    prompt = prompt_ids(tokenizer, "And the LORD said")
    text, logits = greedy(torch_reader(model), prompt, NEW_TOKENS)
    found, their_logits = greedy(gguf_reader(llama), prompt, NEW_TOKENS)
    assert found == text
    np.testing.assert_allclose(their_logits, logits, rtol=0, atol=HALF_PRECISION)
    llama.reset()
    said = llama.create_completion("And the LORD said", max_tokens=NEW_TOKENS, temperature=0)["choices"][0]["text"]
    assert said == tokenizer.decode(text, skip_special_tokens=True)


def test_readme_code_runs_in_isolated_python_and_matches_torch(unpacked):
    name, model, tokenizer, folder = unpacked
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == (2 if name == "mvlm_gpt2" else 1)
    prompt = prompt_ids(tokenizer, "In the beginning")
    for block in blocks:
        if "llama_cpp" in block:
            pytest.importorskip("llama_cpp", reason="pip install -r requirements-ecosystem.txt")
        command = [sys.executable, "-I", "-c", block]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        count = 40 if "llama_cpp" in block else 80 - len(prompt)
        text, _ = greedy(torch_reader(model), prompt, count)
        assert done.stdout == "In the beginning" + tokenizer.decode(text) + "\n"
