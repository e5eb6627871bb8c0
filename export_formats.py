#!/usr/bin/env python3
"""Export a trained model to ONNX or GGUF and verify the result.

    python export_formats.py models/mvlm_gpt2 --onnx --gguf --output gpt2_formats
    python export_formats.py simone_enhanced_model.tar.gz --onnx --output simone_formats

MODEL is an export folder, an unpacked archive or a .tar.gz; its files are verified before loading.
--onnx (ONNX Runtime): one graph with a KV cache, kept only if its logits match the model's to 1e-4.
--gguf (llama.cpp, Ollama): GPT-2 only; these runtimes do not keep the previous token's state that SIM-ONE needs.
The output folder also gets a README.md with commands and a manifest.json with SHA-256 checksums. Requires:
pip install -r requirements-extras.txt

Exit codes: 0 done, 1 the exported model's outputs differ, 2 bad arguments or unusable model, 130/143 stopped by a
signal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mvlm_core.command_line import CommandLine
from mvlm_core.errors import run_main
from mvlm_core.export.file_checks import checked_exports
from mvlm_core.export.formats import PACKAGES, missing_packages, write_formats
from mvlm_core.files import output_folder_problems
from mvlm_core.hardware import set_process_environment
from mvlm_core.signals import end_on_sigterm
from prioritary_mvlm.config import MODELING_FILES


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="export folder, unpacked archive or .tar.gz")
    add("--onnx", action="store_true", help="write onnx/model.onnx, for ONNX Runtime")
    add("--gguf", action="store_true", help="write gguf/NAME.gguf and a Modelfile, for llama.cpp and Ollama (GPT-2)")
    add("--output", metavar="DIR", type=Path, required=True, help="output folder: new or empty")
    options = parser.parse_args(arguments)
    options.formats = [name for name in PACKAGES if getattr(options, name)]
    return options


def option_problems(options: argparse.Namespace) -> list[str]:
    problems = [f"--{problem}" for problem in missing_packages(options.formats)]
    if not options.formats:
        problems.append("no format: use --onnx, --gguf or both")
    problems += output_folder_problems(options.output, "--output") or (
        [f"--output {options.output}: not empty; name another folder"]
        if options.output.is_dir() and any(options.output.iterdir())
        else []
    )
    return problems


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_process_environment()
    with checked_exports([options.model], MODELING_FILES, option_problems(options)) as (folder,):
        write_formats(folder, options.formats, options.output.absolute())
    print(f"exported and verified: {options.output} ({', '.join(options.formats)}); its README.md has usage examples")
    return 0


if __name__ == "__main__":
    end_on_sigterm()  # cleans up unfinished output
    run_main(main)
