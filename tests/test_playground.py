"""``playground.py``: its tabs match the models and their records, and the page loads nothing from other hosts."""

import asyncio
import json
import re
import shutil
import signal
import subprocess
import threading
from html import unescape
from urllib.request import urlopen

import pytest

import playground
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import load_export, score_loaded
from mvlm_core.evaluation.surprisal import GovernanceTraces, Token
from mvlm_core.export.archive import write_archive
from mvlm_core.export.manifest import training_config
from mvlm_core.pipeline import local_server
from mvlm_core.pipeline.playground import (
    HTML,
    STYLE,
    TEXT_LIMIT,
    compare_runs,
    exports_at,
    generate_side_by_side,
    score_text,
)
from tests.helpers import CHROMIUM, MODELS
from tests.test_serve import server

DRAW = {"seed": 3.0, "temperature": 0.8, "top_p": 0.95, "length": 12.0}  # a browser sends floats
TEXT = "And it came to pass. <b>My dog</b> ate a pizza!\nBehold."


@pytest.fixture(scope="module")
def models(trained):
    return {name: load_export(trained / name) for name in MODELS}


@pytest.fixture(scope="module")
def corpus(trained):
    return load_corpus(trained / "corpus")


def spans(page):
    """Bits and text of each shaded token."""
    return [
        (float(bits), unescape(text)) for bits, text in re.findall(r'title="([\d.]+) bits">(.*?)</span>', page, re.S)
    ]


def cells(page):
    """A table's cells by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("</table>")[0], re.S)
    return [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]


# --- write --------------------------------------------------------------------------------------------------


def test_both_models_stream_their_continuations(models, monkeypatch):
    monkeypatch.setattr("mvlm_core.pipeline.playground.UPDATE_SECONDS", 0)
    pages = list(generate_side_by_side(models, "In the <i>beginning", **DRAW))
    assert len(pages) > 8 and all(name in pages[0] for name in MODELS)
    counts = [len(spans(page)) for page in pages]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    for name, section in zip(MODELS, re.findall("<section>(.*?)</section>", pages[-1], re.S), strict=True):
        tokens = spans(section)
        text = "".join(text for _, text in tokens)
        assert text.startswith("In the <i>beginning") and len(text) > 22 and name in section
        known = [bits for bits, _ in spans(section.split("</b>")[0])]
        assert f"prompt {sum(known) / 19:.2f} bits per byte" in section
        assert "12 tokens generated" in section
    assert pages[-1].count("<details") + pages[-1].count(" everywhere</p>") == 4, "fields, of the model with heads"
    assert "<i>" not in pages[-1]


def test_a_continuation_that_fills_the_context_says_so(models):
    *_, last = generate_side_by_side(models, "In the", **DRAW | {"length": 500.0})
    assert len(re.findall(r"\d\d tokens generated \(the context is full\)", last)) == len(MODELS)


def test_the_same_seed_gives_the_same_page(models):
    last = [list(generate_side_by_side(models, "In the", **DRAW | {"seed": seed}))[-1] for seed in (1, 1, 2)]
    assert last[0] == last[1] != last[2]


def test_all_invalid_settings_are_reported_in_one_error(models):
    with pytest.raises(UserError) as caught:
        next(generate_side_by_side(models, "In the", seed=-1, temperature=3, top_p=0, length=0.5))
    assert [problem.split()[0] for problem in caught.value.problems] == ["seed", "temperature", "top-p", "length"]
    with pytest.raises(UserError, match="seed None: must be from 0"):
        next(generate_side_by_side(models, "In the", **DRAW | {"seed": None}))
    with pytest.raises(UserError, match="cannot be read"):
        next(generate_side_by_side(models, "\ud800", **DRAW))


def test_token_shading_grows_with_bits_and_escapes_html():
    assert re.search(r"\.text {[^}]*font-variant-ligatures: none", STYLE.read_text()), "or one shading is lost"
    page = HTML.shaded([Token(1, "a", 0.0), Token(2, "b", 6.0), Token(3, "<c>", 99.0)])
    assert re.findall(r"--heat:([\d.]+)", page) == ["0.00", "0.50", "1.00"]
    assert "&lt;c&gt;" in page and "<c>" not in page


def test_heat_map_has_a_row_per_layer_and_a_column_per_token():
    fields = {"memory": ("a share", [[0.0, 0.5], [1.0, 0.25]]), "policy": ("a gate", [[1.0, 1.0], [1.0, 1.0]])}
    page = HTML.heat_map("m", GovernanceTraces(["In", " <b>"], ["layer 1", "layer 2"], fields))
    assert cells(page) == [["", "In", "<b>"], ["layer 1", "0.00", "0.50"], ["layer 2", "1.00", "0.25"]]
    assert re.findall(r"--heat:([\d.]+)", page) == ["0.00", "0.50", "1.00", "0.25"]
    assert "a gate: 1.00 everywhere" in page and page.count("<table") == 1 and 'tabindex="0"' in page


# --- score --------------------------------------------------------------------------------------------------


def test_sentence_and_whole_text_scores_match_the_evaluation(models, corpus):
    first, last = score_text(models, TEXT, lambda: corpus)
    header, *rows = cells(last)
    assert cells(first)[0] == ["", *MODELS] and header == ["", *MODELS, "xz -9e", "PPMd order 6", "PPMd order 16"]
    assert [row[0] for row in rows] == [
        "And it came to pass.", "<b>My dog</b> ate a pizza!", "Behold.", "the whole text"
    ]  # fmt: skip
    for column, (model, tokenizer) in enumerate(models.values(), start=1):
        score = score_loaded(model, tokenizer, [("text", TEXT)])
        assert float(rows[-1][column]) == pytest.approx(score.bits_per_byte, abs=6e-4)
        sizes = [20, 28, 7]  # bytes, including the space before and the line break after
        total = sum(float(row[column]) * size for row, size in zip(rows, sizes, strict=False))
        assert total / sum(sizes) == pytest.approx(score.bits_per_byte, abs=0.01)
    assert all(float(cell) > 0 for cell in rows[-1][1:]) and rows[0][3] == ""
    assert "".join(text for _, text in spans(last)) == TEXT * 2


def test_models_are_scored_without_a_corpus(models, tmp_path):
    pages = list(score_text(models, TEXT, lambda: load_corpus(tmp_path / "none")))
    assert cells(pages[-1])[0] == ["", *MODELS] and "No compressors" in pages[-1]


@pytest.mark.parametrize("text", ("", " \n", "a" * (TEXT_LIMIT + 1)))
def test_empty_and_oversized_texts_are_refused(models, text):
    with pytest.raises(UserError, match="1 to 65,536 bytes"):
        next(score_text(models, text, lambda: None))


# --- compare ------------------------------------------------------------------------------------------------


def test_exports_and_archives_are_compared_by_recorded_results(trained, tmp_path):
    archive = tmp_path / "mvlm_gpt2_model.tar.gz"
    write_archive(trained / MODELS[0], archive)
    assert exports_at(tmp_path) == [archive] and exports_at(trained) == [trained / name for name in MODELS]
    header, *rows = cells(compare_runs(f"{trained}\n\n{archive}\n"))
    table = {first: values for first, *values in rows}
    assert header == ["", *MODELS, archive.name]
    assert table["model"] == [*MODELS, MODELS[0]] and table["max_length"] == ["32"] * 3
    results = [training_config(trained / name)["results"] for name in MODELS]
    assert table["test, bits per byte"][:2] == [f"{result['test_bpb']:.4f}" for result in results]
    assert table["test, bits per byte"][2] == table["test, bits per byte"][0]
    assert table["model files, bytes"][2] == table["model files, bytes"][0]


def test_missing_and_tampered_exports_are_reported(trained, tmp_path):
    copy = tmp_path / "changed"
    shutil.copytree(trained / MODELS[0], copy, ignore=shutil.ignore_patterns("checkpoints"))
    with (copy / "training_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="SHA-256 differs.*none: no such folder or archive"):
        compare_runs(f"{copy}\n{tmp_path / 'none'}")
    with pytest.raises(UserError, match="at least one"):
        compare_runs(" \n")


# --- the page -----------------------------------------------------------------------------------------------


def test_all_bad_arguments_are_reported_in_one_error(tmp_path):
    pytest.importorskip("gradio")
    with pytest.raises(UserError) as caught:
        playground.main([str(tmp_path), str(tmp_path / "none")])
    assert len(caught.value.problems) == 2


def build(models, corpus, trained, local=True):
    pytest.importorskip("gradio")
    return playground.build_app(models, lambda: corpus, str(trained), local=local)


def test_page_references_no_external_resources(models, corpus, trained):
    app = build(models, corpus, trained)
    from fastapi.testclient import TestClient

    client = TestClient(app)
    page = client.get("/")
    assert page.status_code == 200
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//(?!testserver)", page.text)
    theme = client.get("/theme.css").text
    assert "system-ui" in theme and not re.search(r"url\([\"']?(?:https?:)?//|@import", theme)
    assert client.get("/config").json()["analytics_enabled"] is False


@pytest.mark.integration
def test_command_serves_the_page_and_exits_on_sigterm(trained):
    pytest.importorskip("gradio")
    with server(trained / MODELS[0], trained / MODELS[1], script="playground.py") as (process, url):
        with urlopen(url, timeout=60) as answer:
            assert b"Playground" in answer.read() and "default-src 'self'" in answer.headers["content-security-policy"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143


class Browser:
    """The page in a frame of a given width, driven by a script in the enclosing page, which reports what it saw."""

    SCRIPT = """
        <iframe id=f src="/" width=WIDTH height=900 style="border: 0"></iframe><img src="/wait">
        <script>
        const page = () => document.getElementById('f').contentDocument, seen = {errors: []};
        const until = async test => { while (!test()) await new Promise(go => setTimeout(go, 100)); };
        const named = (kind, text) => [...page().querySelectorAll(kind)].find(b => b.innerText.trim() == text);
        const button = text => named('button.primary', text);
        const width = () => page().documentElement.scrollWidth;
        window.addEventListener('error', error => seen.errors.push(error.message));
        (async () => {
            await until(() => page() && button('Write'));
            button('Write').click();
            await until(() => page().querySelector('.heat'));
            seen.tokens = page().querySelectorAll('.text span').length; seen.write = width();
            named('[role=tab]', 'Compare runs').click();
            await until(() => button('Compare') && button('Compare').offsetParent);
            button('Compare').click();
            await until(() => page().querySelector('.scores'));
            seen.compare = width();
            const requests = document.getElementById('f').contentWindow.performance.getEntriesByType('resource');
            const here = new RegExp(`^(${location.origin}|data:|blob:)`);
            seen.elsewhere = requests.map(request => request.name).filter(name => !here.test(name));
            await fetch('/done', {method: 'POST', body: JSON.stringify(seen)});
        })();
        </script>"""

    def __init__(self, app, width):
        from starlette.responses import HTMLResponse, Response
        from starlette.routing import Route

        self.seen, done = {}, asyncio.Event()

        async def frame(request):
            return HTMLResponse(self.SCRIPT.replace("WIDTH", str(width)))

        async def wait(request):  # keeps the browser from considering the page loaded
            await done.wait()
            return Response(status_code=204)

        async def tell(request):
            self.seen.update(json.loads(await request.body()))
            done.set()
            return Response()

        app.router.routes[:0] = [
            Route("/frame", frame), Route("/wait", wait), Route("/done", tell, methods=["POST"])
        ]  # fmt: skip
        self.app = app

    def visit(self):
        import uvicorn

        with local_server.listen("127.0.0.1", 0) as listener:
            config = uvicorn.Config(
                self.app, log_level="warning", timeout_graceful_shutdown=1, headers=[playground.POLICY]
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
            command += ["--window-size=1400,1000", "--dump-dom", f"{local_server.address(listener)}/frame"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            finally:
                server.should_exit = True
                thread.join()
        return self.seen, re.findall(r"CONSOLE.*", done.stderr)


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", (1280, 390))
def test_page_in_a_browser_has_no_errors_overflow_or_external_requests(models, corpus, trained, width):
    seen, complaints = Browser(build(models, corpus, trained), width).visit()
    assert seen["tokens"] > 20 and not complaints and not seen["errors"]
    assert max(seen["write"], seen["compare"]) <= width
    assert seen["elsewhere"] == []
