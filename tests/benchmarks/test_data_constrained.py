"""``benchmarks/experiments/data_constrained.py``: valid variants, a subset of whole books, and a table of real runs."""

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


def test_every_variant_is_a_valid_run_with_the_expected_compute(tmp_path, tiny_corpus):
    fingerprint = load_corpus(tiny_corpus).fingerprint[:8]
    some = str(max(train_book_sizes(tiny_corpus).values()))
    options = options_of(tmp_path, tiny_corpus, "--text_bytes", some, "--seeds", "2")
    runs = data_constrained.make_runs(options)
    assert len({run.folder for run in runs}) == len(runs) == 2 * len(data_constrained.PROXIES)
    for run in runs:
        settings = run.settings().check()
        assert settings.data_dir.endswith(f"text-{some}-{fingerprint}") and settings.validation_text == "all"
        assert settings.max_bytes is None, "the epochs given replace the preset's length"
    (hour,) = data_constrained.make_runs(options_of(tmp_path, tiny_corpus, "--only", "hour", "--seeds", "1"))
    assert hour.settings().check().data_subset == "bible/kjv" and not hour.settings().train_mix
    with pytest.raises(UserError, match="no such variant.*hour"):
        data_constrained.make_runs(options_of(tmp_path, tiny_corpus, "--only", "hour,no such variant"))
    with pytest.raises(UserError, match="--processes 0"):
        options_of(tmp_path, tiny_corpus, "--processes", "0")
    # 3 teacher epochs plus 9 student epochs, whose steps cost a third more: 1 + 4.
    compute = {run.label: data_constrained.compute(run) for run in runs}
    assert compute["mvlm_gpt2 3ep"] == 1 and compute["mvlm_gpt2 1ep"] == pytest.approx(1 / 3)
    assert compute["mvlm_gpt2 9ep-1x3ep"] == compute["mvlm_gpt2 9ep-1x3ep-dropout0.1"] == pytest.approx(5)
    assert compute["simone_enhanced 18ep-3x3ep"] == pytest.approx(3 + 8)
    assert compute["simone_enhanced 18ep-3x1ep"] == pytest.approx(1 + 8)


def test_recipes_have_short_ids_and_explicit_settings():
    recipe = data_constrained.ProxyRecipe(4.5, 2, 1, {"dropout": 0.1})
    assert recipe.id == "4.5ep-2x1ep-dropout0.1"
    assert recipe.settings == {"num_epochs": 4.5, "num_models": 3, "teacher_epochs": 1.0, "dropout": 0.1}
    assert data_constrained.ProxyRecipe(3).id == "3ep" and data_constrained.ProxyRecipe(3).settings == {"num_epochs": 3}
    repeated = {"simone_enhanced 9ep-1x3ep-dropout0.1", "mvlm_gpt2 9ep-1x3ep-dropout0"}
    assert not repeated & data_constrained.PROXIES.keys(), "each model's own dropout"


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
    (tiny_corpus / "bible" / "kjv" / "08-ruth.txt").write_text("Now it came to pass in the days of the judges.\n")
    changed = load_corpus(data_constrained.few_books(options))
    assert [d.read() for d in changed.split("validation")] == [
        d.read() for d in load_corpus(tiny_corpus).split("validation")
    ]
    with pytest.raises(UserError, match="--text_bytes 1: every train book is larger"):
        data_constrained.few_books(options_of(tmp_path, tiny_corpus, "--text_bytes", "1"))


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_finished_runs_make_a_table(finished, tmp_path, tiny_corpus, monkeypatch, capsys):
    run = finished["mvlm_gpt2"]
    monkeypatch.setattr(data_constrained, "make_runs", lambda options: [run])
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
    make_runs = data_constrained.make_runs

    def tiny_runs(options):
        tiny = TINY | {"num_epochs": 0.5, "max_steps": None}
        return [replace(run, values=run.values | tiny) for run in make_runs(options)]

    monkeypatch.setattr(data_constrained, "make_runs", tiny_runs)
    text = ["--text_bytes", str(max(train_book_sizes(tiny_corpus).values())), "--seeds", "1"]
    for variant, processes in (("simone_enhanced 9ep-1x3ep", "2"), ("mvlm_gpt2 18ep-3x3ep", "1")):
        places = ["--data_dir", str(tiny_corpus), "--work_dir", str(tmp_path / "work"), "--ensembles"]
        assert data_constrained.main(["--only", variant, "--processes", processes, *places, *text]) == 0
        printed = capsys.readouterr().out.strip().splitlines()
        cells = cells_of(printed[2])
        assert cells[:2] == [variant, "1"] and all(1 < float(cell) < 8 for cell in cells[4:])
    label, seeds, alone, together, student, share = cells_of(printed[-1])
    assert (label, seeds, student) == (variant, "1", cells[4]), "a student of one teacher has no ensemble beside it"
    assert float(together) < float(alone), "the mean of the probabilities is better than the mean of the scores"
    gain = float(alone) - float(together)
    assert float(share) == pytest.approx((float(alone) - float(student)) / gain, abs=0.01 + 2e-4 / gain)
