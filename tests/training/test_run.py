"""A whole run of each trainer in this process: export, scores, reruns, different runs, bad data folders."""

import json
import logging
import math
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError
from mvlm_core.evaluation import memorization
from mvlm_core.evaluation.bits_per_byte import DocumentScore, Score, load_export, score_export
from mvlm_core.export import file_checks
from mvlm_core.export.manifest import read_manifest, training_config, verify_folder, write_manifest
from mvlm_core.export.model_card import model_card
from mvlm_core.files import sha256_file, write_json_atomic
from mvlm_core.hardware import choose_hardware
from mvlm_core.metrics import METRICS
from mvlm_core.pipeline.report import facts
from mvlm_core.pipeline.summary import Summary
from mvlm_core.run_layout import Layout
from mvlm_core.settings import DEFAULT_SAMPLING
from mvlm_core.training.checkpoint import newest_checkpoint
from mvlm_core.training.distributed import Ranks
from mvlm_core.training.results import hardware_record, score_test
from mvlm_core.training.run import run_training
from mvlm_core.training.task import Run
from prioritary_mvlm import EnhancedPrioritaryTrainer, PrioritaryConfig
from tests.export.exports import copy_export
from tests.helpers import (
    MODELS,
    TINY,
    build_tiny_corpus,
    executable,
    make_loop,
    recipe_of,
    tiny_settings,
    without_cuda,
)

EXPORTED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "training_config.json",
    "training_history.json",
    "training_plots.png",
}
MODELING = {"enhanced_model.py", "rope_attention.py", "modern_layers.py"}


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    """A finished run: name, settings, folder; read-only."""
    work = tmp_path_factory.mktemp("runs")
    settings = tiny_settings(request.param, build_tiny_corpus(work / "corpus"), work, max_steps=8)
    return request.param, settings, run_training(recipe_of(request.param), settings)


def test_export_is_complete_and_its_scores_are_reproducible(trained):
    name, settings, folder = trained
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["name"] == name
    assert set(manifest["files"]) == EXPORTED | (MODELING if name == "simone_enhanced" else set())
    assert all(sha256_file(folder / file) == expected for file, expected in manifest["files"].items())
    assert not (folder / ".export").exists()

    results = json.loads((folder / "training_config.json").read_text())["results"]
    model, tokenizer = load_export(folder)
    assert model.num_parameters() == results["parameters"]
    assert {metric.name for metric in METRICS} - results.keys() == {"size_bytes"}, "known once the files are written"
    assert results["steps"] == 8 and results["tokens"] == 8 * 128 and results["seconds"] > 0
    assert results["tokens_per_second"] > results["tokens"] / results["seconds"], "evaluations are in the seconds only"
    corpus = load_corpus(settings.data_dir, only=settings.data_subset)
    score = score_export(folder, corpus)
    assert score.bits_per_byte == pytest.approx(results["test_bpb"], rel=1e-6)
    assert results["test_bpb"] == pytest.approx(results["test_bpb_kjv"], rel=1e-9), "only the KJV is in this corpus"
    assert 2 < results["test_bpb"] < 6
    history = json.loads((folder / "training_history.json").read_text())
    assert history[-1]["validation_bpb"] == pytest.approx(results["validation_bpb"])
    text = tokenizer("the LORD", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=3, do_sample=False).shape[1] <= text.input_ids.shape[1] + 3
    decoding, _ = model._prepare_generation_config(None)
    assert decoding.do_sample and asdict(DEFAULT_SAMPLING).items() <= vars(decoding).items()
    assert decoding.top_k == 0, "transformers adds no filter of its own"


def test_the_number_of_gpus_is_recorded_and_shown(trained, tmp_path):
    name, settings, folder = trained
    layout = Layout(tmp_path)
    shutil.copytree(folder, layout.export(name))
    config = training_config(layout.export(name))
    hardware = replace(choose_hardware(device="cpu"), device="cuda", name="NVIDIA H200")
    assert "gpus" not in config["hardware"]
    for gpus, shown in ((1, "NVIDIA H200"), (8, "8 × NVIDIA H200")):
        config["hardware"] = hardware_record(Run(recipe_of(name), settings, hardware, Ranks(0, gpus)))
        assert config["hardware"]["gpus"] == gpus
        card = model_card(config, title="T", description="D", sources="S", licenses=None, remote_code=False)
        assert f"| training hardware | {shown} |" in card
        write_json_atomic(layout.export(name) / "training_config.json", config)
        summary = Summary(layout, [name], preset="smoke", device="cuda: NVIDIA H200")
        summary.take_results(name)
        assert ("device", f"cuda: {shown}") in facts(summary.value, {})


def test_rerun_of_a_finished_run_changes_nothing(trained, caplog, monkeypatch):
    name, settings, folder = trained
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()}
    monkeypatch.setattr(logging.getLogger("mvlm"), "propagate", True)
    with caplog.at_level(logging.INFO, "mvlm"):
        run_training(recipe_of(name), settings)
    assert "already finished" in caplog.text
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()} == before


def test_modeling_files_of_another_version_are_replaced(tmp_path, monkeypatch):
    settings = tiny_settings("simone_enhanced", build_tiny_corpus(tmp_path / "corpus"), tmp_path, max_steps=8)
    folder = run_training(recipe_of("simone_enhanced"), settings)
    files, modeling, more = read_manifest(folder)["files"], folder / "modern_layers.py", folder / "earlier_layers.py"
    own = modeling.read_bytes()
    modeling.write_bytes(own + b"# an earlier version\n")
    more.write_text("# a file that it had")
    write_manifest(folder, "simone_enhanced", files | {file.name: sha256_file(file) for file in (modeling, more)})
    assert not verify_folder(folder)
    shutil.rmtree(folder / "checkpoints")  # not needed
    with monkeypatch.context() as patch:  # killed before the new manifest is written
        patch.setattr(file_checks, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_training(recipe_of("simone_enhanced"), settings)
    assert modeling.read_bytes() == own and read_manifest(folder)["files"] != files
    with pytest.raises(UserError, match="no checkpoint to continue from"):
        run_training(recipe_of("simone_enhanced"), replace(settings, max_steps=9))
    run_training(recipe_of("simone_enhanced"), settings)
    assert modeling.read_bytes() == own and not more.exists()
    assert read_manifest(folder)["files"] == files and not verify_folder(folder)


def test_a_finished_model_without_checkpoints_is_not_overwritten_by_a_longer_run(trained, tmp_path):
    name, settings, folder = trained
    copy = copy_export(folder, tmp_path / name)
    settings_there = replace(settings, output_dir=str(copy))
    longer = replace(settings_there, max_steps=settings.max_steps + 1)
    with pytest.raises(UserError, match="finished model, but no checkpoint to continue from: .* --fresh.* --init_from"):
        run_training(recipe_of(name), longer)
    assert not verify_folder(copy)
    (copy / "README.md").write_text("# My model")
    with pytest.raises(UserError, match="no checkpoint to continue from"):
        run_training(recipe_of(name), settings_there)
    (copy / "tokenizer.json").unlink()
    run_training(recipe_of(name), longer)  # a damaged one is made again
    assert not verify_folder(copy) and training_config(copy)["results"]["steps"] == longer.max_steps


def test_model_with_sdpa_only_ignores_other_attention_kernels(tiny_corpus, tmp_path, caplog):
    caplog.set_level("INFO", "mvlm")
    for backend in ("flash_attn", "eager"):
        settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, attention_backend=backend, dry_run=True)
        run_training(recipe_of("mvlm_gpt2"), settings)
        assert f"--attention_backend {backend}: not used by MVLM-GPT2" in caplog.text
    with pytest.raises(UserError, match="flash_attn"):
        run_training(
            recipe_of("simone_enhanced"),
            replace(tiny_settings("simone_enhanced", tiny_corpus, tmp_path), attention_backend="flash_attn"),
        )


def test_evaluated_weights_are_the_exported_ones(trained):
    name, settings, folder = trained
    from safetensors.torch import load_file

    last = newest_checkpoint(folder / "checkpoints")
    own, exported = last.tensors("model"), load_file(folder / "model.safetensors")
    assert last.state["best_step"] == 8
    assert all(torch.equal(tensor, own[f"model.{key}"]) for key, tensor in exported.items())
    loop = make_loop(name, settings)
    loop._resume()
    assert loop.task.evaluate() == pytest.approx(last.state["best_bpb"], rel=1e-6)


def test_different_run_over_a_finished_model_is_refused_unless_fresh(trained, tmp_path):
    name, settings, finished = trained
    folder = shutil.copytree(finished, tmp_path / name)
    manifest = (folder / "manifest.json").read_bytes()
    other = tiny_settings(name, settings.data_dir, tmp_path, cache_dir=settings.cache_dir, max_steps=4, seed=5)
    with pytest.raises(UserError) as caught:
        run_training(recipe_of(name), other)
    assert "--seed was 0, now 5" in str(caught.value) and "--fresh" in str(caught.value)
    assert (folder / "manifest.json").read_bytes() == manifest
    (folder / "mine.txt").write_text("kept")
    other.fresh = True
    run_training(recipe_of(name), other)
    assert (folder / "manifest.json").read_bytes() != manifest and (folder / "mine.txt").exists()


def test_the_best_weights_are_exported_and_the_last_kept(tiny_corpus, tmp_path, monkeypatch):
    values = iter([2.0, 3.0, 4.0])
    monkeypatch.setattr(
        "mvlm_core.training.task.score_documents",
        lambda *_, **__: Score({"all": DocumentScore(1, next(values) * math.log(2))}),
    )
    settings = tiny_settings("simone_enhanced", tiny_corpus, tmp_path)
    folder = EnhancedPrioritaryTrainer(settings, tiny_corpus, tmp_path / "out").train()
    monkeypatch.undo()
    from safetensors.torch import load_file

    exported = load_file(folder / "model.safetensors")
    best = load_file(folder / "checkpoints" / "step-00000004" / "model.safetensors")
    last = load_file(folder / "checkpoints" / "step-00000012" / "model.safetensors")
    name = "layers.0.attention.q_proj.weight"
    assert torch.equal(exported[name], best[f"model.{name}"])
    assert not torch.equal(exported[name], last[f"model.{name}"])
    assert json.loads((folder / "training_config.json").read_text())["results"]["best_step"] == 4


@pytest.mark.parametrize("fault", ["a document has changed", "out of memory"])
def test_a_run_whose_memorization_cannot_be_measured_is_exported_without_it(
    fault, tiny_corpus, tmp_path, caplog, monkeypatch
):
    """The fault comes after the test scores, which the export needs."""
    monkeypatch.setattr(logging.getLogger("mvlm"), "propagate", True)
    document = next(tiny_corpus.rglob("kjv/*-ruth.txt"))

    def score_then_break(*given):
        score = score_test(*given)
        if fault == "out of memory":
            monkeypatch.setattr(memorization, "continuations", out_of_memory)
        else:
            document.write_text("Whither thou goest, I will go.\n")
        return score

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr("mvlm_core.training.results.score_test", score_then_break)
    folder = run_training(recipe_of("mvlm_gpt2"), tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, max_steps=4))
    reason = "CUDA out of memory." if fault == "out of memory" else f"{document} changed during the run: .*"
    assert re.search(f"memorization is left out of the model card .*: {reason}$", caplog.text, re.M)
    assert not verify_folder(folder)
    measured = training_config(folder)["results"]
    assert measured["memorization"] is None and 2 < measured["test_bpb"] < 8
    row = "| memorization: second half of a verse reproduced exactly from its first half | - |"
    assert row in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["missing", "empty", "binary"])
def test_a_folder_without_text_is_refused_before_anything_is_written(kind, tmp_path):
    data = tmp_path / "data"
    if kind != "missing":
        data.mkdir()
    if kind == "binary":
        (data / "x.txt").write_bytes(bytes(range(256)) * 50)
    config = PrioritaryConfig(preset="smoke", device="cpu", data_subset=None, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=str(data)):
        EnhancedPrioritaryTrainer(config, data, tmp_path / "out").train()
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


@without_cuda
def test_h200_preset_is_refused_without_a_gpu_unless_the_cpu_is_requested(tiny_corpus, tmp_path):
    def run(**changes):
        settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **{"preset": "h200", "num_models": 1} | changes)
        return run_training(recipe_of("mvlm_gpt2"), settings)

    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match="would train on the CPU|--device cuda"):
            run(device=device)
    assert not (tmp_path / "cache").exists()
    for alone in ({"dry_run": True}, {"prepare_only": True}):
        assert run(device="auto", **alone).exists() is False
    assert (run(device="cpu") / "manifest.json").is_file()


@without_cuda
def test_unusable_gpu_is_reported_instead_of_training_the_cpu_preset(tiny_corpus, tmp_path, empty_path):
    """By the trainers and from Python; without a GPU, or on request, the preset for the CPU is trained."""
    shape = {name: TINY[name] for name in ("data_subset", "hidden_dim", "num_heads", "ff_dim", "vocab_size", "quiet")}
    config = PrioritaryConfig(preset="auto", max_steps=2, max_length=32, cache_dir=str(tmp_path / "cache"), **shape)
    trainer = EnhancedPrioritaryTrainer(config, tiny_corpus, tmp_path / "out")
    executable(empty_path / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    with pytest.raises(UserError, match="--preset auto would train on the CPU: torch .* use --device cpu"):
        trainer.train()
    assert not (tmp_path / "out").exists()
    trainer.config.device = "cpu"
    assert json.loads((trainer.train() / "training_config.json").read_text())["preset"] == "cpu"
    (empty_path / "nvidia-smi").unlink()
    trainer.config.device = "auto"
    assert trainer.train() == tmp_path / "out"


def test_a_run_without_an_output_folder_is_refused_before_anything_is_written(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = replace(tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path), output_dir=None, learning_rate=-1.0)
    with pytest.raises(UserError) as caught:
        run_training(recipe_of("mvlm_gpt2"), settings)
    rate, folder = caught.value.problems
    assert "--learning_rate -1.0" in rate and folder == "output_dir: name a folder for the model"
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
