"""``generality.py``: other prose, multiple-choice tasks, and their control baselines."""

import json
import math

import pytest

from benchmarks.experiments import generality
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import encode, load_export, score_loaded
from tests.helpers import MODELS, build_tiny_corpus, sample_books

PROSE = "The engineer opened the valve and read the gauge. Pressure fell slowly, as the manual said it would.\n" * 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_tiny_corpus(tmp_path_factory.mktemp("generality") / "corpus")


def test_unigram_scores_depend_only_on_word_frequencies():
    score = generality.unigram(["the cat and the dog"])
    assert score("", "the") == pytest.approx(math.log(3 / 10))
    assert score("any context", " the Dog!") == pytest.approx(math.log(3 / 10) + math.log(2 / 10))
    assert score("", "dog the") == score("", "the dog") and score("", "unheard") == pytest.approx(math.log(1 / 10))


def test_other_prose_is_scored_next_to_test_books_and_compressors(trained, corpus, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "manual.txt").write_text(PROSE)
    exports = [str(trained / name) for name in MODELS]
    arguments = ["--text", str(tmp_path / "texts"), "--data_dir", str(corpus), "--json", str(tmp_path / "results.json")]
    assert generality.main([*exports, *arguments]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["text"]
    books, prose = rows["test books"], rows[str(tmp_path / "texts")]
    assert prose["bytes"] == len(PROSE.encode())
    for export in exports:
        assert prose[export] == score_loaded(*load_export(export), [("", PROSE)]).bits_per_byte
        assert prose[export] > books[export] + 0.4
    assert prose["PPMd order 16"] < 2 < min(prose[export] for export in exports)  # eight copies of one paragraph
    assert f"| {books[exports[0]]:.3f} |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ([], ["--text", "nowhere"], ["--tasks", "x", "--limit", "0"]))
def test_unusable_arguments_are_refused(trained, arguments):
    with pytest.raises(UserError, match=r"give --text|nowhere: no folder|--limit 0: must be at least 1"):
        generality.main([str(trained / MODELS[0]), *arguments])


@pytest.mark.integration
def test_lm_eval_tasks_are_scored_and_unknown_ones_refused(trained, corpus, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-ecosystem.txt")
    lines = [line for line in sample_books()["ecclesiastes"].split("\n") if 40 < len(line) < 90][:12]
    halves = [(line[: line.index(" ", len(line) // 2)], line[line.index(" ", len(line) // 2) + 1 :]) for line in lines]
    questions = [
        {"query": first, "choices": [second, " ".join(second.split()[::-1]), second], "gold": 0}
        for first, second in halves
    ]
    (tmp_path / "endings.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "endings.yaml").write_text(
        f"task: endings\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'endings.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list:\n  - metric: acc\n"
    )
    exports = [str(trained / name) for name in MODELS]
    options = ["--tasks", "endings", "--task_folder", str(tmp_path), "--data_dir", str(corpus)]
    assert generality.main([*exports, *options, "--json", str(tmp_path / "results.json")]) == 0
    row = json.loads((tmp_path / "results.json").read_text())["tasks"]["endings"]
    assert row["questions"] == 12 and row["chance"] == pytest.approx(1 / 3)
    assert row["unigram"]["value"] == pytest.approx(1 / 3)  # the same words three times
    for export in exports:
        model, tokenizer = load_export(export)

        def nats(text, model=model, tokenizer=tokenizer):
            return score_loaded(model, tokenizer, [("", text)]).nats

        better = [nats(f"{q['query']} {q['choices'][0]}") < nats(f"{q['query']} {q['choices'][1]}") for q in questions]
        assert row[export]["value"] == pytest.approx(sum(better) / 2 / 12, abs=0.1)
        assert encode(tokenizer, "x")
    with pytest.raises(UserError, match="knows no such task"):
        generality.main([exports[0], "--tasks", "nonesuch", "--task_folder", str(tmp_path), "--data_dir", str(corpus)])
