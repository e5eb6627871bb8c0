#!/usr/bin/env python3
"""Write a trained model in the formats of other programs, and check what was written.

    python export_formats.py models/mvlm_gpt2 --onnx --gguf --output gpt2_formats
    python export_formats.py simone_enhanced_model.tar.gz --onnx --output simone_formats

MODEL is an export folder, an unpacked archive or the .tar.gz itself; its files are checked before anything is loaded.
--onnx, for ONNX Runtime: one graph with a key-value cache, kept only if its logits are the model's to 1e-4.
--gguf, for llama.cpp and Ollama: a GPT-2 alone; Enhanced SIM-ONE needs what they do not keep of the token before.
The output folder holds a README.md with commands, and manifest.json with every file's SHA-256. The packages:
pip install -r requirements-extras.txt

Exit codes: 0 done, 1 the written model differs, 2 bad arguments or an unusable model, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mvlm_core.console import command_line
from mvlm_core.errors import UserError, run_main
from mvlm_core.export.file_checks import checked_export
from mvlm_core.export.formats import PACKAGES, missing_packages, write_formats
from mvlm_core.files import output_folder_problems
from mvlm_core.hardware import set_process_environment
from mvlm_core.signals import end_on_sigterm
from prioritary_mvlm.config import MODELLING_FILES


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: every problem with it.
    """
    parser = command_line(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="export folder, unpacked archive or .tar.gz")
    add("--onnx", action="store_true", help="write onnx/model.onnx, for ONNX Runtime")
    add("--gguf", action="store_true", help="write gguf/NAME.gguf and a Modelfile, for llama.cpp and Ollama (GPT-2)")
    add("--output", metavar="DIR", type=Path, required=True, help="folder to make; nothing may be in it")
    options = parser.parse_args(arguments)
    options.formats = [kind for kind in PACKAGES if getattr(options, kind)]
    problems = [f"--{problem}" for problem in missing_packages(options.formats)]
    if not options.formats:
        problems.append("no format: give --onnx, --gguf or both")
    problems += output_folder_problems(options.output, "--output") or (
        [f"--output {options.output}: not empty; name another folder"]
        if options.output.is_dir() and any(options.output.iterdir())
        else []
    )
    if problems:
        raise UserError(problems)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_process_environment()
    with checked_export(options.model, MODELLING_FILES) as folder:
        write_formats(folder, options.formats, options.output.absolute())
    print(f"written and checked: {options.output} ({', '.join(options.formats)}); its README.md says how to run them")
    return 0


if __name__ == "__main__":
    end_on_sigterm()  # what is not finished is removed first
    run_main(main)
