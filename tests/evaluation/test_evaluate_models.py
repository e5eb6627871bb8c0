"""``evaluate_models.py`` with real exports: one table, cached results, no unverified code."""

import json
import shutil

import pytest

import evaluate_models
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError
from mvlm_core.evaluation import suite
from mvlm_core.evaluation.results import DEFINITIONS, share
from mvlm_core.export.archive import write_archive
from mvlm_core.files import sha256_file
from tests.export.exports import moved_validation_text


@pytest.fixture
def evaluate(trained, capsys):
    """A function that runs it with further arguments and returns the table's rows and all output."""

    def evaluate(*arguments):
        sizes = ["--verses", "12", "--prompts", "4", "--words", "10", "--pairs", "25", "--device", "cpu"]
        corpus = ["--data_dir", str(trained / "corpus")]
        assert evaluate_models.main([*map(str, arguments), *sizes, *corpus]) == 0
        printed = capsys.readouterr()
        rows = [row for row in printed.out.splitlines() if row.startswith("|")]
        return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows], printed

    return evaluate


@pytest.fixture
def variant(make, tokenizer, trained):
    """A function that exports an untrained model of a given width, with a matching manifest."""

    def variant(folder, width):
        shutil.copytree(trained / "mvlm_gpt2", folder, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
        make("gpt2", width).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"] = {name: sha256_file(folder / name) for name in manifest["files"]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return variant


def test_all_models_share_one_table_and_results_are_cached(evaluate, variant, trained, tmp_path, monkeypatch):
    gpt2 = variant(tmp_path / "mvlm_gpt2", 16)
    archive = tmp_path / "simone_enhanced_model.tar.gz"
    write_archive(trained / "simone_enhanced", archive)
    arguments = [gpt2, archive, "--json", tmp_path / "out.json"]
    table, printed = evaluate(*arguments)
    assert table[0] == ["validation", "reference text", gpt2.name, archive.name] and {len(row) for row in table} == {4}
    labels = [row[0] for row in table]
    sampled = "rep-4, sampled (temperature 1, top-p 0.95)"
    assert {"bits per byte", "· Ruth", "· kjv", "calibration error (ECE)", sampled} <= set(labels)
    for label in labels[labels.index("calibration error (ECE)") :]:
        words = (*(word for key in DEFINITIONS for word in key.split(", ")), "mean confidence", "accuracy, next token")
        assert label.removeprefix("· ").startswith(words) or label.endswith(" pairs)"), label
    for label, meaning in DEFINITIONS.items():
        assert f"\n{label}: {meaning}.\n" in printed.out
    saved = json.loads((tmp_path / "out.json").read_text())
    assert printed.out.endswith("\n".join(["", *saved["notes"], ""])) and "12 distinct held-out" in saved["notes"][0]
    results = saved["results"]
    first = results[str(gpt2)]
    assert f"{first['bits_per_byte']['all']:.4f}" == table[labels.index("bits per byte")][2]
    assert first["memorization"]["train"]["exact"]["count"] == first["cloze"]["full"]["count"] == 12
    assert "another corpus" not in printed.out
    read = table[labels.index("training verses, expected share seen")][2]
    assert f"expected to have seen, from its epochs and data mix: {read};" in printed.out
    recorded = json.loads((trained / "mvlm_gpt2" / "training_config.json").read_text())["results"]
    assert read == f"{recorded['memorization']['read']:.1%}" and recorded["best_step"] == 12
    again, printed = evaluate(*arguments)
    assert "mvlm_gpt2:" not in printed.err and again == table, "nothing is measured twice"
    with monkeypatch.context() as patch:
        patch.setattr(suite, "FORMAT", suite.FORMAT + 1)
        again, printed = evaluate(*arguments)
    assert "mvlm_gpt2:" in printed.err and again == table, "results of an older version are not reused"
    evaluate(*arguments)
    variant(gpt2, 24)
    changed, printed = evaluate(*arguments)
    assert "mvlm_gpt2:" in printed.err and "tar.gz:" not in printed.err
    assert [row[3] for row in changed] == [row[3] for row in table] and changed != table
    text = table[labels.index("rep-4, greedy")][1]
    assert text == share(first["repetition"]["reference"]["rep_4"]) and "±" in text
    table, printed = evaluate(archive, "--data_subset", "bible/plain", "--no_bits_per_byte")
    assert f"{archive} was trained on another corpus" in printed.out
    assert "bits per byte" not in [row[0] for row in table]


def test_validation_text_may_be_in_another_folder(evaluate, export, trained, tmp_path):
    own = moved_validation_text(export, trained / "corpus", tmp_path)
    with pytest.raises(UserError, match="validation folder /gone does not exist; choose it with --validation_dir"):
        evaluate(export)
    _, printed = evaluate(export, "--split", "test", "--no_bits_per_byte", "--validation_dir", own)
    assert "trained on another corpus" not in printed.out


def test_the_share_read_follows_from_the_recorded_epochs_and_mix(export, trained):
    corpus, file = load_corpus(trained / "corpus"), export / "training_config.json"
    config = json.loads(file.read_text())
    assert evaluate_models.recorded_coverage(export, corpus) == {}, "trained on one translation only"
    history = json.loads((export / "training_history.json").read_text())
    (epochs,) = {record["epoch"] for record in history if record["step"] == config["results"]["best_step"]}
    config["data"]["fingerprint"] = corpus.fingerprint
    for mix, repeats in (("bible/kjv=0,bible/plain=3", (0, 3)), (None, (1, 1))):
        config["data"]["mix"] = mix
        file.write_text(json.dumps(config))
        shares = evaluate_models.recorded_coverage(export, corpus)
        assert shares["bible/kjv/01-genesis.txt"] == pytest.approx(1 - (1 - min(1, epochs)) ** repeats[0])
        assert shares["bible/plain/01-genesis.txt"] == pytest.approx(1 - (1 - min(1, epochs)) ** repeats[1])
        assert len(shares) == len(corpus.split("train")) and 0 < epochs
    del config["results"]["best_epoch"]
    file.write_text(json.dumps(config))
    assert evaluate_models.recorded_coverage(export, corpus) == {}, "not recorded"


def test_all_problems_are_reported_before_any_measurement(trained, tmp_path):
    other = tmp_path / "changed"
    shutil.copytree(trained / "simone_enhanced", other, ignore=shutil.ignore_patterns("checkpoints"))
    with (other / "rope_attention.py").open("a") as file:
        file.write("print('run')\n")
    models = [other, tmp_path, tmp_path / "none"]
    arguments = [*models, *"--verses 0 --seed -1 --device tpu --json".split(), tmp_path / "none" / "x"]
    with pytest.raises(UserError) as caught:
        evaluate_models.main([str(argument) for argument in arguments])
    problems = "\n".join(caught.value.problems)
    for words in ("rope_attention.py: differs", "not a finished export", "no such folder"):
        assert words in problems
    flags = [
        "--verses 0: must be at least 1",
        "--seed -1: must be from 0 to 2**63 - 1",
        "--device tpu",
        f"--json {arguments[-1]}",
    ]
    assert all(found.startswith(flag) for found, flag in zip(caught.value.problems, flags, strict=False))
