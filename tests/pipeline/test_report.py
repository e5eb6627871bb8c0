"""``make_report.py``: one self-contained page from a real run's records and exports, also after failures."""

import html
import re
import shutil
import subprocess

import pytest

import evaluate_models
import make_report
from mvlm_core.data.corpus import NO_TEST_TEXT
from mvlm_core.errors import UserError
from mvlm_core.evaluation.results import DEFINITIONS
from mvlm_core.export.manifest import training_config
from mvlm_core.files import read_json, write_json_atomic
from mvlm_core.metrics import BY_NAME, METRICS
from mvlm_core.pipeline import comparison
from mvlm_core.pipeline.summary import Summary
from mvlm_core.run_layout import Layout
from tests.helpers import CHROMIUM, MODELS, REPOSITORY

BASELINES = {"translation": "kjv", "test_bytes": 1000, "xz": 2.5, "ppmd_order_6": 2.2, "ppmd_order_16": 2.1}


def make_run(trained, root):
    """A finished run's folders and record, with the tiny models in it."""
    layout = Layout(root)
    for name in MODELS:
        shutil.copytree(trained / name, layout.export(name), ignore=shutil.ignore_patterns("checkpoints"))
    layout.downloads.mkdir()
    summary = Summary(layout, list(MODELS), preset="smoke", device="cpu")
    for name in MODELS:
        summary.take_results(name)
    parts = {name: comparison.scores_by_part(training_config(layout.export(name))) for name in MODELS}
    summary.value["comparison"] = comparison.compare(summary.models, list(MODELS), BASELINES, {}, parts)
    summary.close()
    return layout, summary


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """An intact run and its page; read-only."""
    layout, summary = make_run(trained, tmp_path_factory.mktemp("run"))
    return layout, summary, page_of(layout, trained)


def page_of(layout, trained):
    arguments = ["--work_dir", layout.root, "--data_dir", trained / "corpus", "--device", "cpu"]
    assert make_report.main([str(argument) for argument in arguments]) == 0
    return layout.report.read_text(encoding="utf-8")


def test_directions_of_metrics_are_written_once(run):
    _, _, page = run
    assert page.count(BY_NAME["test_bpb"].direction) == 2, "in the text; figures are encoded"
    directions = {metric.name: metric.direction for metric in METRICS}
    assert directions["test_bpb"] == directions["seconds"] == "lower is better"
    assert directions["tokens_per_second"] == "higher is better" and directions["parameters"] == ""
    sources = [*(REPOSITORY / "mvlm_core").rglob("*.py"), *(REPOSITORY / "mvlm_core").rglob("*.html")]
    assert [path.name for path in sources if "lower is better" in path.read_text(encoding="utf-8")] == ["metrics.py"]


def test_report_is_self_contained_and_shows_the_runs_results(run):
    _, summary, page = run
    for name in MODELS:
        assert f"{summary.models[name]['test_bpb']:.4f}" in page
        assert f"{summary.models[name]['parameters']:,}" in page
    for sentence in summary.value["comparison"]["sentences"]:
        assert sentence in page
    assert "Ecclesiastes" in page and "PPMd order 16 2.100" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page
    assert len(re.findall(r"<img src=\"data:image/svg\+xml;base64,", page)) == 7
    assert "Nothing failed, but the exports and archives were not validated" in page
    numbers = re.findall(r"<dd>(.*?)<small>", page)
    scores = [summary.models[name]["test_bpb"] for name in MODELS]
    assert numbers[:2] == [f"{score:.4f}" for score in scores]
    assert float(numbers[2].replace("−", "-").removesuffix(" %")) == pytest.approx(
        100 * (scores[1] / scores[0] - 1), abs=0.06
    )
    headings = [
        page.index(f"<h2>{title}") for title in ("Curves", "Samples", "Governance head traces", "All results", "Setup")
    ]
    assert headings == sorted(headings), "pictures before tables"
    assert page.count("<caption>") == page.count("<table>") and len(page) < 600_000
    assert page.count('<th scope="row">') == page.count("<tr>") - page.count("<thead>")


def test_report_shows_samples_of_both_models_and_per_token_traces(run):
    page = run[2]
    assert page.count("<blockquote>") == 3 * len(MODELS)
    assert "<h3>In the beginning …</h3>" in page, "the first words of the train text"
    assert page.count("; the original continues: “") == 2 and page.count(", held out") == 4
    traces = re.findall(r'<div class="heat">(.*?)</div>', page, re.S)
    assert len(traces) == 2 * 5, "two verses, five fields, of the one model that has traces"
    assert re.search(r"\.heat {[^}]*font-variant-ligatures: none", page), "a ligature takes one token's shading"
    assert page.count("attention entropy, in nats") == 2
    counts = [trace.count("<span") for trace in traces]
    assert counts[0] > 10 and counts == [counts[0]] * 5 + [counts[5]] * 5
    first_distances = [float(re.search(r'title="([\d.]+)"', traces[number])[1]) for number in (3, 8)]
    assert min(first_distances) > 0, "the start token, which sees only itself, is left out"
    assert all(0 <= float(share) <= 0.55 for share in re.findall(r"var\(--heat\) / ([\d.]+)\)", page))


def test_report_without_test_scores_shows_the_validation_scores(trained, tmp_path):
    layout, summary = make_run(trained, tmp_path)
    for entry in summary.models.values():
        entry["test_bpb"] = entry["test_bpb_kjv"] = None
    summary.value["comparison"] = comparison.compare(summary.models, list(MODELS), {})
    summary.save()
    page = page_of(layout, trained)
    scores = [summary.models[name]["validation_bpb"] for name in MODELS]
    numbers = re.findall(r"<dd>(.*?)<small>(.*?)</small>", page)
    assert numbers[:2] == [(f"{score:.4f}", "bits per byte on held-out validation text") for score in scores]
    assert numbers[2][0].startswith("−" if scores[1] < scores[0] else "+") and len(numbers) == 3
    lead, *others = re.findall(r'<p class="(?:lead|note)">(.*?)</p>', page.split("</header>")[0])
    assert lead.startswith("On the validation text ") and f"There is {NO_TEST_TEXT}." == html.unescape(others[-1])


def test_evaluation_table_has_definitions_and_sample_sizes_below_it(trained, tmp_path):
    layout, summary = make_run(trained, tmp_path)
    exports = [str(layout.export(name)) for name in MODELS]
    sizes = "--split test --no_bits_per_byte --verses 12 --prompts 4 --words 10 --pairs 25 --device cpu".split()
    files = ["--data_dir", str(trained / "corpus"), "--json", str(layout.evaluation_suite)]
    assert evaluate_models.main([*exports, *sizes, *files]) == 0
    saved = read_json(layout.evaluation_suite)
    suite = {name: saved["results"][export] for name, export in zip(MODELS, exports, strict=True)}
    summary.value["comparison"] = comparison.compare(summary.models, list(MODELS), BASELINES, suite)
    summary.save()
    page = html.unescape(page_of(layout, trained))
    below = page[page.index('<th scope="row">rep-4, greedy</th>') : page.index("<h2>Setup")]
    for label, meaning in DEFINITIONS.items():
        assert f"<dt>{label}</dt><dd>{meaning}</dd>" in below
    assert "<dt>±</dt><dd>standard error over samples</dd>" in below and " ± " in page
    assert all(f'<p class="note">{note}</p>' in below for note in saved["notes"]) and len(saved["notes"]) == 3
    assert "12 distinct held-out verses" in below and "4 prompts continued by 10 words" in below
    for words in ("Bits per byte: the bits an ideal code", "PPMd, a compressor, predicts each byte"):
        assert page.count(words) == 1


def test_report_of_the_same_run_is_reproducible(run, trained):
    layout, _, page = run
    assert page_of(layout, trained) == page


def test_failures_are_reported_with_their_html_escaped(trained, tmp_path):
    layout, summary = make_run(trained, tmp_path)
    summary.update("simone_enhanced", status="failed", error="<script>alert(1)</script>")
    with (layout.export("mvlm_gpt2") / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    write_json_atomic(layout.validation_report, {"models": {}, "failed": ["archive: <b>bad</b>"]})
    page = page_of(layout, trained)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;b&gt;bad&lt;/b&gt;" in page
    assert "SHA-256 differs" in page and "Nothing failed" not in page
    assert "<script" not in page and "<blockquote>" not in page, "a changed model is not asked for samples"


def test_a_missing_run_is_refused_with_an_error(tmp_path, trained):
    with pytest.raises(UserError, match="no record of a run"):
        make_report.main(["--work_dir", str(tmp_path), "--data_dir", str(trained / "corpus")])
    with pytest.raises(UserError, match="--seed"):
        make_report.main(["--seed", str(2**63)])


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", (1280, 390))
def test_report_renders_in_chromium_without_console_messages_or_horizontal_scrolling(run, tmp_path, width):
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="{run[0].report.as_uri()}" width="{width}" height="900" style="border: 0" onload="'
        "const d = this.contentDocument; document.title = [d.documentElement.scrollWidth, d.images.length, "
        '[...d.images].every(i => i.naturalWidth > 0)].join()"></iframe>',
        encoding="utf-8",
    )
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    scroll_width, images, whole = re.search(r"<title>(.*)</title>", done.stdout)[1].split(",")
    assert int(scroll_width) <= width and int(images) == 7 and whole == "true"
