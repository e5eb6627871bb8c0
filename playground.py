#!/usr/bin/env python3
"""Try trained models on a local web page: generate text, score your own text, compare runs.

    python playground.py
    python playground.py models/simone_enhanced mvlm_gpt2_model.tar.gz --port 7861

MODEL is an export folder or a .tar.gz; its files are verified before loading. Default: all models in models/, else in
models_for_download/. Tokens are shaded by their surprisal in bits; model 2 also shows its governance heads' activity
layer by layer. The page works offline and loads nothing from other hosts.

Requires: pip install -r requirements-extras.txt
Exit codes: 0 done, 2 bad arguments or an unusable model, 130/143 stopped by a signal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm_core.errors import UserError, run_main
from mvlm_core.pipeline import local_server
from mvlm_core.settings import DEFAULT_DATA_DIR, DEFAULT_SAMPLING
from mvlm_core.signals import end_on_sigterm
from prioritary_mvlm.config import MODELING_FILES

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mvlm_core.data.corpus import Corpus
    from mvlm_core.pipeline.playground import Models

SYSTEM_FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
EVENT: Any = {"api_visibility": "private", "show_progress": "minimal"}
# Keep the browser from loading anything from other hosts, whatever the page's code requests.
POLICY = (
    "content-security-policy",
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'",
)


def show_user_errors(handler: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    """Wrap an event handler so that a ``UserError`` is shown on the page."""
    import gradio as gr

    @wraps(handler)
    def wrapper(*values: Any) -> Iterator[str]:
        try:
            yield from handler(*values)
        except UserError as error:
            raise gr.Error("; ".join(error.problems), print_exception=False) from None

    return wrapper


def build_app(models: Models, corpus: Callable[[], Corpus], places: str, *, local: bool) -> FastAPI:
    """Build the web app.

    Args:
        corpus: its train text primes the compressors.
        places: exports and archives to compare, one path per line.
        local: only this machine can connect, so the page may accept any local path.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    from fastapi import FastAPI

    from mvlm_core.pipeline.playground import STYLE, compare_runs, score_text

    with gr.Blocks(title="Playground", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.Markdown(f"# Playground\n{' and '.join(models)}")
        with gr.Tab("Write"):
            write_tab(models)
        with gr.Tab("Score my text"):
            text = gr.Textbox(label="Text", lines=8, max_lines=16)
            with gr.Row():
                upload = gr.UploadButton("Upload a .txt file", file_types=[".txt", ".md"])
                go = gr.Button("Score", variant="primary")
            upload.upload(read_upload, upload, text, api_visibility="private")
            go.click(show_user_errors(lambda value: score_text(models, value, corpus)), text, gr.HTML(), **EVENT)
        with gr.Tab("Compare runs"):
            label = "Exports, archives or folders of them, one path per line"
            paths = gr.Textbox(places, label=label, lines=4, interactive=local)
            go = gr.Button("Compare", variant="primary")
            compare = show_user_errors(lambda value: iter([compare_runs(value if local else places)]))
            go.click(compare, paths, gr.HTML(), **EVENT)
    sans, mono = SYSTEM_FONTS
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        theme=gr.themes.Default(font=sans, font_mono=mono),
        css=STYLE.read_text(encoding="utf-8"),
        footer_links=[],
        ssr_mode=False,
        max_file_size="1mb",
    )


def write_tab(models: Models) -> None:
    """Build the "Write" tab: prompt and sampling settings above the models' continuations."""
    import gradio as gr

    from mvlm_core.pipeline.playground import MAX_NEW_TOKENS, generate_side_by_side

    prompt = gr.Textbox("In the beginning", label="Prompt", lines=2)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        temperature = gr.Slider(0, 2, DEFAULT_SAMPLING.temperature, step=0.05, label="Temperature")
        top_p = gr.Slider(0.05, 1, DEFAULT_SAMPLING.top_p, step=0.05, label="Top-p")
        length = gr.Slider(1, MAX_NEW_TOKENS, 80, step=1, label="Length in tokens")
    with gr.Row():
        go, stop = gr.Button("Write", variant="primary"), gr.Button("Stop")
    gr.HTML("<p class=note>Surprisal: 0 bits <span class=legend></span> 12 bits or more</p>")
    write = show_user_errors(lambda *values: generate_side_by_side(models, *values))
    inputs = [prompt, seed, temperature, top_p, length]
    run = gr.on([go.click, prompt.submit], write, inputs, gr.HTML(), **EVENT)
    stop.click(None, cancels=run)


def read_upload(file: str) -> str:
    """Return the text of an uploaded file."""
    import gradio as gr

    from mvlm_core.data.decoding import decode

    try:
        return decode(Path(file).read_bytes())
    except ValueError as error:
        raise gr.Error(f"{Path(file).name}: {error}", print_exception=False) from None


def main(arguments: list[str] | None = None) -> int:
    parser = local_server.parser_of(__doc__, port=7860)
    parser.add_argument("--data_dir", default=str(DEFAULT_DATA_DIR), help="corpus that primes the compressors")
    options = parser.parse_args(arguments)

    def app_of(models: local_server.Models, first: Path) -> FastAPI:
        from mvlm_core.data.corpus import load_corpus
        from mvlm_core.export.manifest import corpus_choice

        corpus = cache(partial(load_corpus, options.data_dir, **corpus_choice(first)))
        local = options.host in ("127.0.0.1", "::1", "localhost")
        return build_app(models, corpus, "\n".join(map(str, options.models)), local=local)

    return local_server.serve(options, ("gradio", "uvicorn"), MODELING_FILES, app_of, headers=[POLICY])


if __name__ == "__main__":
    end_on_sigterm()  # cleans up unpacked archives
    run_main(main)
