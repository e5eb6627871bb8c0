#!/usr/bin/env python3
"""Serve trained models over HTTP with an OpenAI-compatible completions API.

    python serve.py
    python serve.py models/simone_enhanced mvlm_gpt2_model.tar.gz --port 8001

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
         -d '{"model": "simone_enhanced", "prompt": "In the beginning", "max_tokens": 40, "stream": true}'

MODEL is an export folder or a .tar.gz; its files are verified before loading, and its folder name is the model name in
requests. Default: all models in models/, else in models_for_download/.

Endpoints: GET /v1/models, GET /health and POST /v1/completions with model, prompt, max_tokens, temperature, top_p,
frequency_penalty, seed, stop (the text ends with the token that completes it), suffix and stream. There is no chat
endpoint: these are base models. Requests are handled one at a time, so a seed gives the same text under any load.

Requires: pip install -r requirements-extras.txt
Exit codes: 0 done, 2 bad arguments or an unusable model, 130/143 stopped by a signal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mvlm_core.errors import run_main
from mvlm_core.pipeline import local_server
from mvlm_core.signals import end_on_sigterm
from prioritary_mvlm.config import MODELING_FILES

if TYPE_CHECKING:
    from fastapi import FastAPI


def main(arguments: list[str] | None = None) -> int:
    options = local_server.parser_of(__doc__, port=8000).parse_args(arguments)

    def app_of(models: local_server.Models, _: Path) -> FastAPI:
        from mvlm_core.pipeline.completions import completions_app

        return completions_app(models)

    return local_server.serve(options, ("fastapi", "openai", "uvicorn"), MODELING_FILES, app_of, "/v1")


if __name__ == "__main__":
    end_on_sigterm()  # cleans up unpacked archives
    run_main(main)
