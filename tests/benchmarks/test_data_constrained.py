"""``benchmarks/experiments/data_constrained.py``: valid lines, a subset of whole books, and a table of real runs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.experiments import data_constrained, runner
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import load_export
from mvlm_core.metrics import PRIMARY_TEST_BPB
from tests.helpers import TINY


def options_of(tmp_path, data_dir, *arguments):
    return data_constrained.parse_options(
        ["--work_dir", str(tmp_path / "work"), "--data_dir", str(data_dir), *arguments]
    )


def train_book_sizes(data_dir):
    sizes = Counter()
    for document in load_corpus(data_dir).split("train"):
        sizes[document.book] += document.size
    return sizes


def test_every_line_is_a_valid_run_with_the_expected_compute(tmp_path, tiny_corpus):
    some = str(max(train_book_sizes(tiny_corpus).values()))
    options = options_of(tmp_path, tiny_corpus, "--text_bytes", some, "--seeds", "2")
    runs = data_constrained.plan(options)
    assert len({run.folder for run in runs}) == len(runs) == 2 * len(data_constrained.TWINS)
    for run in runs:
        settings = run.settings().check()
        assert settings.data_dir.endswith(f"text-{some}") and settings.validation_text == "all"
        assert settings.max_bytes is None, "the epochs given replace the preset's length"
    (hour,) = data_constrained.plan(options_of(tmp_path, tiny_corpus, "--only", "hour", "--seeds", "1"))
    assert hour.settings().check().data_subset == "bible/kjv" and not hour.settings().train_mix
    with pytest.raises(UserError, match="no such line.*hour"):
        data_constrained.plan(options_of(tmp_path, tiny_corpus, "--only", "hour,no such line"))
    with pytest.raises(UserError, match="--processes 0"):
        options_of(tmp_path, tiny_corpus, "--processes", "0")
    # 3 teacher epochs plus 9 student epochs, whose steps cost a third more: 1 + 4.
    by_line = {run.label: data_constrained.compute(run) for run in runs}
    assert by_line["mvlm_gpt2 3 epochs"] == 1 and by_line["mvlm_gpt2 9 epochs"] == 3
    assert by_line["mvlm_gpt2 9 epochs with 1 teacher"] == pytest.approx(5)
    assert by_line["simone_enhanced 18 epochs with 3 teachers"] == pytest.approx(3 + 8)


def test_few_books_keep_all_translations_and_all_held_out_books(tmp_path, tiny_corpus):
    whole, sizes = load_corpus(tiny_corpus), train_book_sizes(tiny_corpus)
    options = options_of(tmp_path, tiny_corpus, "--text_bytes", str(max(sizes.values())))
    corpus = load_corpus(data_constrained.few_books(options))
    chosen = {d.book for d in corpus.split("train")}
    assert corpus.primary_translation == whole.primary_translation == "kjv", "which is also scored by itself"
    assert 0 < sum(sizes[book] for book in chosen) <= options.text_bytes < sizes.total()
    assert {d.path for d in corpus.split("train")} == {d.path for d in whole.split("train") if d.book in chosen}
    for split in ("validation", "test"):
        assert [d.path for d in corpus.split(split)] == [d.path for d in whole.split(split)]
    with pytest.raises(UserError, match="--text_bytes 1: every train book is larger"):
        data_constrained.few_books(options_of(tmp_path, tiny_corpus, "--text_bytes", "1"))


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_finished_runs_make_a_table(finished, tmp_path, tiny_corpus, monkeypatch, capsys):
    run = finished["mvlm_gpt2"]
    monkeypatch.setattr(data_constrained, "plan", lambda options: [run])
    monkeypatch.setattr(data_constrained, "compute", lambda run: 5.0)
    assert data_constrained.main(["--table", "--work_dir", str(tmp_path)]) == 0
    header, _, row = capsys.readouterr().out.splitlines()[:3]
    cells, result = cells_of(row), run.result()
    assert cells[:4] == ["mvlm_gpt2", "1", f"{result['parameters']:,}", "5.0"] and len(cells) == len(cells_of(header))
    assert cells[4:] == [f"{result[name]:.4f}" for name in ("validation_bpb", "test_bpb", PRIMARY_TEST_BPB)]


def test_an_ensemble_predicts_the_mean_of_its_models_probabilities(finished):
    ids = torch.arange(12).reshape(2, 6)
    folders = [finished["simone_enhanced"].folder, finished["simone_enhanced"].folder]
    alone, _ = load_export(folders[0])
    both = data_constrained.Ensemble(folders)
    with torch.no_grad():
        torch.testing.assert_close(
            both(input_ids=ids).logits.softmax(-1), alone(input_ids=ids).logits.softmax(-1), rtol=1e-5, atol=1e-7
        )
        both.models[1].final_norm.weight.mul_(3)
        mean = sum(model(input_ids=ids).logits.softmax(-1) for model in both.models) / 2
        torch.testing.assert_close(both(input_ids=ids).logits.softmax(-1), mean, rtol=1e-5, atol=1e-7)
        assert (mean - alone(input_ids=ids).logits.softmax(-1)).abs().max() > 1e-3


@pytest.mark.integration
def test_real_runs_make_a_table(tiny_corpus, tmp_path, monkeypatch, capsys):
    """A SIM-ONE student of one teacher on two CPU workers, and a GPT-2 student of three with their ensemble."""
    monkeypatch.setattr(runner, "setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(runner, "outlive_terminal", lambda: None)
    plain = data_constrained.plan

    def tiny_plan(options):
        return [
            replace(run, values=run.values | TINY | {"num_epochs": 0.5, "max_steps": None}) for run in plain(options)
        ]

    monkeypatch.setattr(data_constrained, "plan", tiny_plan)
    text = ["--text_bytes", str(max(train_book_sizes(tiny_corpus).values())), "--seeds", "1"]
    for line, processes in (
        ("simone_enhanced 9 epochs with 1 teacher", "2"),
        ("mvlm_gpt2 18 epochs with 3 teachers", "1"),
    ):
        places = ["--data_dir", str(tiny_corpus), "--work_dir", str(tmp_path / "work"), "--ensembles"]
        assert data_constrained.main(["--only", line, "--processes", processes, *places, *text]) == 0
        printed = capsys.readouterr().out.strip().splitlines()
        cells = cells_of(printed[2])
        assert cells[:2] == [line, "1"] and all(1 < float(cell) < 8 for cell in cells[4:])
    label, seeds, alone, together, student, share = cells_of(printed[-1])
    assert (label, seeds, student) == (line, "1", cells[4]), "a student of one teacher has no ensemble beside it"
    assert float(together) < float(alone), "the mean of the probabilities is better than the mean of the scores"
    gain = float(alone) - float(together)
    assert float(share) == pytest.approx((float(alone) - float(student)) / gain, abs=0.01 + 2e-4 / gain)
