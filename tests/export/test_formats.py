"""Exports to GGUF and ONNX: their contents, what is refused, and cleanup after errors."""

import json
import shutil

import numpy as np
import pytest

import export_formats
from mvlm_core.errors import TrainingError, UserError
from mvlm_core.export import formats
from mvlm_core.export.archive import check_archive, write_archive
from mvlm_core.export.file_checks import Checks
from mvlm_core.export.formats import formats_of, write_formats
from mvlm_core.export.manifest import read_manifest, verify_folder
from mvlm_core.export.validation import check_formats
from tests.export.exports import pack, seal, set_json
from tests.helpers import MODELS, REPOSITORY

CLAIMED = ("gguf", "llama.cpp", "ollama", "vllm")


def text_of(field):
    return field.parts[field.data[-1]].tobytes().decode()


def texts_of(field):
    return [field.parts[place].tobytes().decode() for place in field.data]


def number_of(field):
    return field.parts[field.data[-1]][0]


def test_gguf_contains_the_weights_and_tokenizer_of_gpt2(export, tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install -r requirements-extras.txt")
    from safetensors.numpy import load_file

    output = tmp_path / "formats"
    assert export_formats.main([str(export), "--gguf", "--output", str(output)]) == 0
    reader = gguf.GGUFReader(output / "gguf" / "mvlm_gpt2.gguf")
    config, weights = json.loads((export / "config.json").read_text()), load_file(export / "model.safetensors")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == len(weights) == 2 + 2 + 12 * config["n_layer"]
    np.testing.assert_array_equal(found["token_embd.weight"], weights["transformer.wte.weight"])
    np.testing.assert_array_equal(found["position_embd.weight"], weights["transformer.wpe.weight"])
    for theirs, own in (("attn_qkv", "attn.c_attn"), ("ffn_down", "mlp.c_proj"), ("attn_output", "attn.c_proj")):
        np.testing.assert_array_equal(found[f"blk.1.{theirs}.weight"], weights[f"transformer.h.1.{own}.weight"].T)
        np.testing.assert_array_equal(found[f"blk.1.{theirs}.bias"], weights[f"transformer.h.1.{own}.bias"])
    fields = reader.fields
    for key, own in (("context_length", "n_positions"), ("block_count", "n_layer"), ("feed_forward_length", "n_inner")):
        assert number_of(fields[f"gpt2.{key}"]) == config[own]
    assert text_of(fields["tokenizer.ggml.pre"]) == "gpt-2"
    tokenizer = json.loads((export / "tokenizer.json").read_text())
    tokens, last = texts_of(fields["tokenizer.ggml.tokens"]), len(tokenizer["model"]["vocab"])
    assert all(tokens[number] == token for token, number in tokenizer["model"]["vocab"].items())
    assert tokens[last:] == ["<|endoftext|>"] and len(tokens) == config["vocab_size"]
    assert texts_of(fields["tokenizer.ggml.merges"]) == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    for role in ("bos", "eos"):
        assert number_of(fields[f"tokenizer.ggml.{role}_token_id"]) == last
    kinds = fields["tokenizer.ggml.token_type"]
    assert [number for number, place in enumerate(kinds.data) if kinds.parts[place][0] == gguf.TokenType.CONTROL] == [
        last
    ]
    lines = (output / "gguf" / "Modelfile").read_text().splitlines()
    assert lines[:3] == ["FROM ./mvlm_gpt2.gguf", "TEMPLATE {{ .Prompt }}", "PARAMETER num_ctx 32"]

    assert read_manifest(output)["name"] == "mvlm_gpt2_formats" and not verify_folder(output)
    write_archive(output, tmp_path / "formats.tar.gz")
    assert not check_archive(tmp_path / "formats.tar.gz")


def test_validation_detects_missing_changed_and_outdated_formats(export, capsys):
    pytest.importorskip("gguf", reason="pip install -r requirements-extras.txt")
    layout = pack(export)

    def failed():
        checks = Checks()
        check_formats("mvlm_gpt2", export, layout, checks)
        return [check.name for check in checks if not check.passed], len(checks)

    assert failed() == ([], 0), "nothing was asked for"
    folder, archive = layout.formats("mvlm_gpt2"), layout.formats_archive("mvlm_gpt2")
    write_formats(export, ["gguf"], folder)
    assert formats_of(folder, export) == ["gguf"]
    assert failed()[0] == ["exists"]
    digest = write_archive(folder, archive)
    with layout.checksums.open("a") as sums:
        sums.write(f"{digest}  {archive.name}\n")
    assert failed() == ([], 5)
    (folder / "gguf" / "Modelfile").write_text("FROM ./other.gguf")
    assert failed()[0] == ["made from this export"] and formats_of(folder, export) == []
    shutil.rmtree(folder)
    assert failed()[0] == ["made from this export"], "the archive alone"
    write_formats(export, ["gguf"], folder)
    set_json(export / "training_config.json", title="another run")
    seal(export)
    assert failed()[0] == ["made from this export"]


@pytest.mark.parametrize("more", ((), ("--onnx",)))
def test_gguf_export_of_model_2_is_refused_with_one_message(trained, tmp_path, more, monkeypatch):
    monkeypatch.setattr(formats, "PACKAGES", {"onnx": (), "gguf": ()})
    with pytest.raises(UserError) as caught:
        export_formats.main([str(trained / "simone_enhanced"), "--gguf", *more, "--output", str(tmp_path / "out")])
    assert caught.value.problems == [formats.NO_GGUF]
    assert "only a GPT-2" in formats.NO_GGUF and "previous token" in formats.NO_GGUF
    assert not list(tmp_path.iterdir())


def test_only_the_readme_of_model_2_explains_why_there_is_no_gguf(trained):
    written = {name: formats.supported(trained / name, ["onnx", "gguf"]) for name in MODELS}
    said = {name: formats._readme(trained / name, name, written[name]) for name in MODELS}
    assert "Why there is no GGUF" in said["simone_enhanced"] and "llama_cpp" not in said["simone_enhanced"]
    assert "Why there is no GGUF" not in said["mvlm_gpt2"] and "llama_cpp" in said["mvlm_gpt2"]


def test_docs_claim_llama_cpp_and_vllm_support_only_for_gpt2():
    pages = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"), REPOSITORY / "benchmarks/README.md"]
    paragraphs = [text for page in pages for text in page.read_text(encoding="utf-8").split("\n\n") if text[:1] != "#"]
    named = [text for text in paragraphs if any(word in text.lower() for word in CLAIMED)]
    assert len(named) >= 2
    for text in named:
        lines = [line for line in text.splitlines() if any(word in line.lower() for word in CLAIMED)]
        rows = lines if text.lstrip().startswith("|") else [text]
        assert all(any(word in row for word in ("GPT-2", "gpt2", "refused")) for row in rows), rows


def test_onnx_export_with_differing_logits_fails_and_leaves_no_files(export, tmp_path, monkeypatch):
    from mvlm_core.export import onnx_format

    monkeypatch.setattr(onnx_format, "write_onnx", lambda model, path: path.write_bytes(b"graph"))
    for difference in (2e-4, float("nan")):
        monkeypatch.setattr(onnx_format, "largest_difference", lambda model, path, value=difference: value)
        with pytest.raises(TrainingError, match="differ from the model's"):
            write_formats(export, ["onnx"], tmp_path / "place" / "out")
        assert not list((tmp_path / "place").iterdir())


def test_all_invalid_arguments_are_reported_in_one_message(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PACKAGES", {"onnx": ("onnx_not_here", "json"), "gguf": ("gguf_not_here",)})
    model = str(trained / "mvlm_gpt2")
    with pytest.raises(UserError) as caught:
        export_formats.main([model, "--onnx", "--gguf", "--output", str(trained)])
    gguf, onnx, output = caught.value.problems
    assert gguf.startswith("--gguf needs gguf_not_here: ") and onnx.startswith("--onnx needs onnx_not_here: ")
    assert onnx.endswith("-m pip install -r requirements-extras.txt") and "not empty" in output
    with pytest.raises(UserError, match="no format.*none: no such folder"):
        export_formats.main([str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    monkeypatch.setattr(formats, "PACKAGES", {"onnx": (), "gguf": ()})
    for place, words in ((tmp_path, "not a finished export"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=words):
            export_formats.main([str(place), "--gguf", "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_changed_exports_are_refused_and_not_converted(export, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PACKAGES", {"onnx": (), "gguf": ()})
    with (export / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="model.safetensors"):
        export_formats.main([str(export), "--gguf", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
