"""Further training from an export's weights: exact resuming, measured gain and forgetting, refused arguments."""

import json
import logging
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mvlm_trainer
from mvlm_core.data.corpus import load_corpus, named_texts
from mvlm_core.errors import Stopped, UserError
from mvlm_core.evaluation.bits_per_byte import load_export, score_loaded
from mvlm_core.export.archive import write_archive
from mvlm_core.export.manifest import training_config
from mvlm_core.settings import FINE_TUNING_RATE
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.history import read_history
from mvlm_core.training.init_from import open_export
from mvlm_core.training.plan import plan_run
from mvlm_core.training.preparation import check_held_out, old_text
from mvlm_core.training.run import run_training
from prioritary_mvlm import PrioritaryConfig
from tests.export.exports import change_config, copy_export, seal, set_json
from tests.helpers import (
    FIXTURES,
    MODELS,
    REPOSITORY,
    StopAfter,
    make_loop,
    parse_settings,
    recipe_of,
    tiny_settings,
    with_a_value_replaced,
)

CLASSES = {"mvlm_gpt2": mvlm_trainer.GPT2Settings, "simone_enhanced": PrioritaryConfig}


@pytest.fixture
def corpus(trained):
    return trained / "corpus"


def further(model, trained, work, **changes):
    """Settings of a run that continues the tiny King James export with the other translation."""
    corpus = trained / "corpus"
    changes = {"init_from": str(trained / model), "data_subset": "bible/plain", "replay": f"{corpus}=1/4"} | changes
    return tiny_settings(model, changes.pop("data_dir", corpus), work, **changes)


def scores(model_dir, documents):
    return score_loaded(*load_export(model_dir), named_texts(documents)).bits_per_byte


@pytest.mark.parametrize("model", MODELS)
def test_gain_and_forgetting_match_the_scores_of_both_exports(model, trained, corpus, tmp_path):
    folder = run_training(recipe_of(model), further(model, trained, tmp_path))
    config = training_config(folder, "settings", "results")
    results = config["results"]
    old, new = (load_corpus(corpus, only=f"bible/{translation}") for translation in ("kjv", "plain"))
    for name, documents in (("old_test_bpb", old.split("test")), ("test_bpb", new.split("test"))):
        assert results[f"{name}_before"] == pytest.approx(scores(trained / model, documents), rel=1e-5)
        assert results[name] == pytest.approx(scores(folder, documents), rel=1e-5)
    assert results["test_bpb"] < results["test_bpb_before"] - 0.01, "it has learned from the new text"
    assert results["validation_bpb"] < results["validation_bpb_before"]
    card = (folder / "README.md").read_text()
    for name in ("validation_bpb_before", "test_bpb_before", "old_test_bpb_before", "old_test_bpb"):
        assert f"| {results[name]:.4f} |" in card
    assert config["init_from"]["manifest_sha256"] == open_export(str(trained / model)).sha256
    assert "First trained on" in card and "\n- kjv" in card and "\n- plain" in card
    assert (folder / "tokenizer.json").read_bytes() == (trained / model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_training_starts_from_the_exports_weights_and_resumes_bit_identically(model, trained, tmp_path):
    settings = {name: further(model, trained, tmp_path / name) for name in ("whole", "parts")}
    whole = make_loop(model, settings["whole"])
    first = load_file(trained / model / "model.safetensors")
    assert all(torch.equal(whole.task.weights()[f"model.{name}"], tensor) for name, tensor in first.items())
    state = whole.run(StopAfter())
    for steps in (3, 4):
        with pytest.raises(Stopped):
            make_loop(model, settings["parts"]).run(StopAfter(steps))
    again = make_loop(model, settings["parts"])
    assert again.run(StopAfter()).before == state.before
    for name in ("model", "optimizer"):
        expected, found = (newest_checkpoint(loop.checkpoints.root).tensors(name) for loop in (whole, again))
        assert expected and all(torch.equal(expected[key], found[key]) for key in expected)
    losses = [[record["train_loss"] for record in read_history(loop.step_log.path)] for loop in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_base_and_replay_are_part_of_the_run_identity(trained, corpus, tmp_path):
    with pytest.raises(Stopped):
        make_loop("mvlm_gpt2", further("mvlm_gpt2", trained, tmp_path)).run(StopAfter(2))
    other = copy_export(trained / "mvlm_gpt2", tmp_path / "other")
    set_json(other / "generation_config.json", another="value")
    seal(other)
    for changes, word in (
        ({"init_from": str(other)}, "--init_from"),
        ({"replay": f"{corpus}=0.3"}, "--replay was 1/4 of"),
        ({"replay": None}, "--replay was 1/4 of"),
    ):
        with pytest.raises(UserError, match=word):
            make_loop("mvlm_gpt2", further("mvlm_gpt2", trained, tmp_path, **changes)).run(StopAfter())
    moved = shutil.copytree(trained / "mvlm_gpt2", tmp_path / "moved")
    make_loop("mvlm_gpt2", further("mvlm_gpt2", trained, tmp_path, init_from=str(moved), max_steps=3)).run(StopAfter())


def test_an_archive_gives_the_same_run_as_its_folder(trained, tmp_path):
    archive = tmp_path / "model.tar.gz"
    write_archive(trained / "simone_enhanced", archive)
    tasks = [
        make_loop("simone_enhanced", further("simone_enhanced", trained, tmp_path / str(n), init_from=str(path))).task
        for n, path in enumerate((trained / "simone_enhanced", archive))
    ]
    assert tasks[0].identity == tasks[1].identity
    assert all(torch.equal(tensor, tasks[1].weights()[name]) for name, tensor in tasks[0].weights().items())


@pytest.mark.parametrize("model", MODELS)
def test_shape_preset_and_defaults_come_from_the_export(model, trained, tmp_path, monkeypatch):
    def parse(*arguments):
        given = ["--init_from", str(trained / model), *arguments]
        return parse_settings(CLASSES[model], given, tmp_path / "out")

    settings, usual = parse(), CLASSES[model](preset="smoke")
    assert (settings.preset, settings.hidden_dim, settings.num_layers, settings.max_length) == ("smoke", 32, 2, 32)
    assert settings.vocab_size == 400 and settings.data_subset is None and settings.train_mix is None
    assert settings.learning_rate == pytest.approx(FINE_TUNING_RATE * usual.learning_rate)
    assert (settings.num_epochs, settings.max_bytes) == (2.0, usual.max_bytes) and settings.optimizer == usual.optimizer
    given = parse("--learning_rate", "0.5", "--max_steps", "7", "--max_length", "16", "--dropout", "0.3")
    assert (given.learning_rate, given.max_steps, given.num_epochs) == (0.5, 7, None)
    assert (given.max_length, given.dropout) == (16, 0.3)
    if model == "simone_enhanced":
        assert settings.adamw_learning_rate == pytest.approx(FINE_TUNING_RATE * usual.adamw_learning_rate)
        assert settings.coherence_weight == 0 and settings.output_head == usual.output_head
    steps = (settings.batch_size, settings.eval_interval, settings.checkpoint_interval)
    assert steps == (usual.batch_size, usual.eval_interval, usual.checkpoint_interval)
    monkeypatch.setattr("mvlm_core.settings.FINE_TUNING_TOKENS", 3 * 32)
    large = parse("--preset", "h200")
    assert (large.batch_size, large.eval_interval, large.checkpoint_interval) == (3, 100, 200)
    assert parse("--preset", "h200", "--batch_size", "5").batch_size == 5


@pytest.mark.parametrize("model", MODELS)
def test_shorter_context_gives_the_same_logits(model, trained, tmp_path):
    task = make_loop(model, further(model, trained, tmp_path, max_length=16)).task
    long = make_loop(model, further(model, trained, tmp_path / "long")).task
    ids = torch.randint(400, (2, 16))
    with torch.no_grad():
        short, full = (one.model.eval()(input_ids=ids).logits for one in (task, long))
    assert torch.allclose(short, full, atol=1e-5)


def test_without_the_old_corpus_forgetting_is_not_measured(trained, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mvlm"), "propagate", True)
    caplog.set_level(logging.INFO, "mvlm")
    source = copy_export(trained / "mvlm_gpt2", tmp_path / "source")
    change_config(source, "data", data_dir="/nowhere")
    folder = run_training(
        recipe_of("mvlm_gpt2"), further("mvlm_gpt2", trained, tmp_path, init_from=str(source), replay=None, max_steps=2)
    )
    assert "forgetting is not measured: the export's corpus is not here or has changed" in caplog.text
    assert "fine-tuning, test, old corpus, bits per byte: not measured" in caplog.text
    assert "First trained on: 4 documents, " in (folder / "README.md").read_text()
    results = training_config(folder, "results")["results"]
    assert results["old_test_bpb_before"] is None is results["old_test_bpb"] and results["test_bpb_before"] > 0
    assert "test, old corpus, bits per byte | - |" in (folder / "README.md").read_text()


def test_replay_uses_the_old_train_text_at_the_requested_share(trained, corpus, tmp_path):
    loop = make_loop("mvlm_gpt2", further("mvlm_gpt2", trained, tmp_path))
    batches = loop.task.batches
    assert batches.replay_share == Fraction(1, 4)
    old = load_corpus(corpus, only="bible/kjv").split("train")
    assert len(batches.replay.store.repeats) == len(old) and batches.replay.store.repeats.all()
    assert np.array_equal(batches.batch(0, 3, 1).targets, batches.replay.batch(0, 0, 1).targets)
    source = copy_export(trained / "mvlm_gpt2", tmp_path / "source")
    change_config(source, "data", mix="bible/kjv=3")
    again = make_loop("mvlm_gpt2", further("mvlm_gpt2", trained, tmp_path, init_from=str(source))).task.batches
    assert set(again.replay.store.repeats) == {3}, "in the mix that the export had read"


def test_held_out_documents_of_the_new_text_are_not_replayed(trained, corpus, tmp_path):
    """A train book of the replayed corpus that the new corpus holds out for its test."""
    new, old = (shutil.copytree(corpus / "bible" / "plain", tmp_path / name) for name in ("new", "old"))
    set_json(new / "01-genesis.json", split="test")
    set_json(old / "01-genesis.json", quality_score=1.0)
    settings = further("mvlm_gpt2", trained, tmp_path, data_dir=new, data_subset=None, replay=f"{old}=1/4")
    store = make_loop("mvlm_gpt2", settings).task.batches.replay.store
    assert store.repeats.tolist() == [0, 1, 1, 1]
    lengths, sizes = np.diff(store.starts), [document.size for document in load_corpus(old).split("train")]
    assert np.average(store.weights, weights=lengths * store.repeats) == pytest.approx(1)
    assert store.bytes_per_token == pytest.approx(sum(sizes[1:]) / lengths[1:].sum())
    for document in load_corpus(old).documents:
        turned = {"train": "test", "test": "train"}.get(document.split, "validation")
        set_json((new / document.path).with_suffix(".json"), split=turned)
    with pytest.raises(UserError, match="--replay .*: the training text has 0 tokens"):
        make_loop("mvlm_gpt2", settings)


@pytest.mark.parametrize("flag", ("init_from", "teacher"))
def test_held_out_text_that_an_export_was_trained_on_is_refused(flag, trained, corpus, tmp_path, caplog, monkeypatch):
    """The base's own corpus with another split; without that corpus the run says that it cannot check."""
    monkeypatch.setattr(logging.getLogger("mvlm"), "propagate", True)
    caplog.set_level(logging.INFO, "mvlm")
    new = shutil.copytree(corpus / "bible" / "kjv", tmp_path / "new")
    moved = copy_export(trained / "mvlm_gpt2", tmp_path / "moved")
    change_config(moved, "data", data_dir="/nowhere")

    def settings(export, **more):
        more |= {"init_from": str(export)} if flag == "init_from" else {"teacher": (str(export),)}
        return tiny_settings("mvlm_gpt2", new, tmp_path, data_subset=None, **more)

    check_held_out(settings(trained / "mvlm_gpt2"), load_corpus(new))
    set_json(new / "01-genesis.json", split="validation")
    set_json(new / "43-john.json", split="test")
    for more in ({}, {"dry_run": True}):
        with pytest.raises(UserError) as error:
            run_training(recipe_of("mvlm_gpt2"), settings(trained / "mvlm_gpt2", **more))
        assert f"--{flag} {trained / 'mvlm_gpt2'} was trained on 2 of the documents held out here" in str(error.value)
        assert "such as 01-genesis.txt; use its --data_dir and --validation_split" in str(error.value)
    assert "is unknown" not in caplog.text
    check_held_out(settings(moved), load_corpus(new))
    assert f"--{flag} {moved}: whether it has seen held-out text is unknown" in caplog.text


def test_planned_steps_match_the_run_with_replay(trained, tmp_path):
    from mvlm_core.hardware import choose_hardware

    settings = further("mvlm_gpt2", trained, tmp_path, max_steps=None, num_epochs=3.0, dry_run=True)
    plan = plan_run(recipe_of("mvlm_gpt2"), settings, choose_hardware(device="cpu"))
    steps = int(next(line for line in plan.lines if " steps, " in line).split(" steps, ")[0].split()[-1])
    loop = make_loop("mvlm_gpt2", settings)
    assert steps == pytest.approx(loop.length.total, rel=0.03)


# --- wrong uses ------------------------------------------------------------------------------------------------------


def refused(model, trained, tmp_path, *arguments, init_from=None):
    given = map(str, ["--output_dir", tmp_path / "out", "--init_from", init_from or trained / model, *arguments])
    with pytest.raises(UserError) as caught:
        parse_settings(CLASSES[model], given, "unused")
    assert not (tmp_path / "out").exists()
    return caught.value.problems


WRONG = {
    "longer context": (["--max_length", 64], "--max_length 64: the export of --init_from has 32"),
    "another width": (["--hidden_dim", 64], "--hidden_dim 64: the export of --init_from has 32"),
    "another vocabulary": (["--vocab_size", 512], "--vocab_size 512: the export of --init_from has 400"),
    "more layers": (["--num_layers", 3], "--num_layers 3: the export of --init_from has 2"),
    "a tokenizer": (["--tokenizer_path", "x"], "--tokenizer_path cannot be used with --init_from"),
    "no such replay": (["--replay", "nowhere=0.2"], "--replay nowhere=0.2: no such folder"),
    "all of it": (["--replay", f"{FIXTURES}=1"], "expected FOLDER=SHARE with a share between 0 and 1"),
    "no share": (["--replay", f"{FIXTURES}"], "expected FOLDER=SHARE"),
    "no text": (["--replay", f"{REPOSITORY / 'docs'}=0.2"], "docs=0.2: no .txt file"),
}


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_invalid_arguments_are_refused_with_a_reason(arguments, message, trained, tmp_path):
    problems = refused("mvlm_gpt2", trained, tmp_path, *arguments)
    assert len(problems) == 1 and message in problems[0]


def test_all_problems_are_reported_in_one_error(trained, tmp_path):
    given = "--max_length 64 --hidden_dim 64 --tokenizer_path x --replay nowhere=2 --batch_size 0".split()
    assert len(refused("simone_enhanced", trained, tmp_path, *given)) == 6


def test_unusable_exports_are_refused_with_a_reason(trained, tmp_path):
    def one(init_from, model="mvlm_gpt2", *arguments):
        problems = refused(model, trained, tmp_path, *arguments, init_from=init_from)
        assert len(problems) == 1
        return problems[0]

    assert "no such folder or archive" in one(tmp_path / "missing")
    assert "is an export of simone_enhanced, not of mvlm_gpt2" in one(trained / "simone_enhanced")
    assert "is in the export of --init_from" in one(
        trained / "mvlm_gpt2", "mvlm_gpt2", "--output_dir", trained / "mvlm_gpt2" / "finer"
    )
    (tmp_path / "empty").mkdir()
    assert "no manifest, so not a finished export" in one(tmp_path / "empty")
    cut = copy_export(trained / "mvlm_gpt2", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    assert "model.safetensors: SHA-256 differs" in one(cut)
    (cut / "model.safetensors").unlink()
    seal(cut)
    assert "model.safetensors is missing" in one(cut)
    archive = tmp_path / "model.tar.gz"
    write_archive(trained / "mvlm_gpt2", archive)
    archive.write_bytes(archive.read_bytes()[:-3000])
    assert "model.tar.gz" in one(archive)


def test_replay_without_init_from_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="--replay needs --init_from"):
        tiny_settings("mvlm_gpt2", corpus, tmp_path, replay=f"{corpus}=0.5").check()


def test_malformed_training_configs_are_refused_or_harmless(trained, tmp_path):
    """``training_config.json`` with a value replaced at random, under a manifest that agrees."""
    source = copy_export(trained / "simone_enhanced", tmp_path / "source")
    record = json.loads((source / "training_config.json").read_text())
    odd = (None, -1, 10**400, "x", "\0", "\ud800", "x" * 5000, [], {}, True, 0.5)
    changed = [with_a_value_replaced(record, seed, odd[seed % len(odd)]) for seed in range(66)]
    for section, key in (("data", "data_dir"), ("data", "only"), ("data", "mix"), ("settings", "num_heads")):
        changed += [record | {section: record[section] | {key: value}} for value in odd]
    corpus, outcomes, path = load_corpus(trained / "corpus"), set(), str(source)
    for value in changed:
        (source / "training_config.json").write_text(json.dumps(value))
        seal(source, "simone_enhanced")
        settings = PrioritaryConfig(init_from=path, data_dir=str(trained / "corpus"), device="cpu")
        if settings.problems():
            outcomes.add("refused")
            continue
        outcomes.add("not measured" if old_text(settings, open_export(path), corpus) is None else "measured")
    assert outcomes == {"refused", "not measured", "measured"}
