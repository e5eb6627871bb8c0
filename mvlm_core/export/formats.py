"""Convert an export to other formats: a folder with a manifest, written atomically.

onnx/       model.onnx, tokenizer.json, tokenizer_config.json
gguf/       NAME.gguf, Modelfile                 (GPT-2 only)
README.md   how to run them
formats.json, manifest.json
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from mvlm_core.errors import TrainingError, UserError
from mvlm_core.export.manifest import manifest_sha256, read_manifest, verify_folder, write_manifest
from mvlm_core.files import fsync_path, make_folder, read_json, sha256_file, template, write_json_atomic

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "gguf": ("gguf",)}
RECORD = "formats.json"
LOGITS_TOLERANCE = 1e-4  # between the logits of torch and of ONNX Runtime, both in float32
NO_GGUF = (
    "only a GPT-2 can be written as GGUF: Enhanced SIM-ONE needs the previous token's key and value, which llama.cpp "
    "and vLLM do not keep; export it to ONNX"
)
_README = Path(__file__).with_name("formats_readme.md")


def missing_packages(formats: Iterable[str]) -> list[str]:
    """Describe the missing packages of each format."""
    command = f"{sys.executable} -m pip install -r requirements-extras.txt"
    missing = {
        format: [name for name in PACKAGES[format] if importlib.util.find_spec(name) is None]
        for format in sorted(formats)
    }
    return [f"{format} needs {', '.join(names)}: install with {command}" for format, names in missing.items() if names]


def supported(export: Path, formats: Iterable[str]) -> list[str]:
    """Return those of ``formats`` that support the model in the folder ``export``."""
    is_gpt2 = read_json(export / "config.json").get("model_type") == "gpt2"
    return sorted(format for format in formats if format != "gguf" or is_gpt2)


def formats_of(folder: Path, export: Path) -> list[str]:
    """Formats of this export in ``folder``; none if a file is damaged or they were made from another export."""
    if verify_folder(folder):
        return []
    record = read_json(folder / RECORD)
    return list(record.get("formats", ())) if record.get("source") == manifest_sha256(export) else []


def write_formats(export: Path, formats: Iterable[str], output: Path) -> None:
    """Convert an export, whose files have been checked, to other formats and verify the ONNX logits.

    Args:
        output: the folder to create; it may exist if it is empty.

    Raises:
        UserError: a format does not support this model.
        TrainingError: ONNX Runtime's logits differ from the model's; nothing was written.
    """
    formats = sorted(formats)
    if supported(export, formats) != formats:
        raise UserError(NO_GGUF)
    name = read_manifest(export)["name"]
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    make_folder(partial)
    try:
        record = {"model": name, "source": manifest_sha256(export), "formats": formats}
        if "onnx" in formats:
            record["onnx_largest_difference"] = _add_onnx(export, partial / "onnx")
        if "gguf" in formats:
            _add_gguf(export, partial / "gguf", name)
        (partial / "README.md").write_text(_readme(export, name, formats), encoding="utf-8")
        write_json_atomic(partial / RECORD, record)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in files:
            fsync_path(path)
        write_manifest(partial, f"{name}_formats", {str(p.relative_to(partial)): sha256_file(p) for p in files})
        os.rename(partial, output)
        fsync_path(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _add_onnx(export: Path, folder: Path) -> float:
    """Write the ONNX graph; return the largest difference from the model's logits."""
    from mvlm_core.evaluation.bits_per_byte import load_export
    from mvlm_core.export.onnx_format import largest_difference, write_onnx

    folder.mkdir()
    model = load_export(export)[0].float()
    write_onnx(model, folder / "model.onnx")
    if not (difference := largest_difference(model, folder / "model.onnx")) <= LOGITS_TOLERANCE:
        raise TrainingError(f"ONNX Runtime's logits differ from the model's by {difference:.2g}: nothing was written")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(export / file, folder / file)
    return difference


def _add_gguf(export: Path, folder: Path, name: str) -> None:
    from mvlm_core.export.gguf_format import modelfile, write_gguf

    folder.mkdir()
    write_gguf(export, folder / f"{name}.gguf", name)
    context = read_json(export / "config.json")["n_positions"]
    (folder / "Modelfile").write_text(modelfile(f"{name}.gguf", context), encoding="utf-8")


def _readme(export: Path, name: str, formats: list[str]) -> str:
    config = read_json(export / "config.json")
    return template(_README).render(
        name=name,
        formats=formats,
        start=config["bos_token_id"],
        context=config.get("n_positions") or config["max_position_embeddings"],
        is_gpt2=supported(export, ["gguf"]),
    )
