"""The plan against what the run then does, and the sum of its costs."""

import json
import logging
import shutil
from dataclasses import replace

import pytest

from mvlm_core.cost_estimate import PRICE_PER_HOUR, Item, format_costs
from mvlm_core.data.corpus import load_corpus
from mvlm_core.hardware import choose_hardware
from mvlm_core.training import supervisor, text_plan
from mvlm_core.training.cost import step_cost
from mvlm_core.training.plan import EXPORT_SECONDS, plan_run, planned_steps
from mvlm_core.training.preparation import prepare_text, read_corpus
from mvlm_core.training.run import run_training
from mvlm_core.training.run_length import run_length
from mvlm_core.training.text_plan import plan_text
from prioritary_mvlm import PrioritaryConfig
from tests.helpers import MODELS, recipe_of, tiny_settings

CPU = {"device": "cpu", "precision": "fp32"}


@pytest.mark.parametrize("model", MODELS)
def test_planned_text_and_steps_match_the_run(model, tiny_corpus, tmp_path):
    changes = {"max_steps": None, "data_subset": "bible", "train_mix": "bible/kjv=3"}
    settings = tiny_settings(model, tiny_corpus, tmp_path, num_epochs=2.0, **changes)
    kind, (corpus, _) = recipe_of(model).tokenizer_class, read_corpus(settings)
    before = plan_text(settings, kind, corpus)
    assert not before.has_tokenizer and not before.has_tokens and not (tmp_path / "cache").exists()
    text = prepare_text(settings, kind)
    after = plan_text(settings, kind, corpus)
    assert after.has_tokenizer and after.has_tokens and after.epoch_bytes > 1.9 * after.train_bytes
    for plan in (before, after):  # a text this small is sampled whole
        assert plan.bytes_per_token == pytest.approx(text.store.bytes_per_token, rel=0.002)
        assert planned_steps(settings, plan) == pytest.approx(run_length(settings, text.batches).total, rel=0.02)
    assert planned_steps(tiny_settings(model, tiny_corpus, tmp_path, max_steps=None, max_hours=1.0), after) is None


def test_newton_schulz_flops_are_counted(tiny_corpus, tmp_path):
    """In bf16, five rounds of three products: x·xᵀ and p·x on the long side, gram·gram on the short one."""
    shape = {
        "hidden_dim": 64,
        "num_heads": 2,
        "ff_dim": 256,
        "num_layers": 3,
        "optimizer": "muon",
        "coherence_weight": 0.0,
    }
    settings = tiny_settings("simone_enhanced", tiny_corpus, tmp_path, **shape)
    hardware = replace(choose_hardware(**CPU), precision="bf16")
    cost = step_cost(recipe_of("simone_enhanced").build, settings, hardware, 1)
    width, inner = 64, 192
    square, long = 3 * 2 * width**3, 2 * 2 * width**2 * inner + 2 * width**3
    assert cost.optimizer_flops == pytest.approx(3 * 5 * (4 * square + 3 * long), rel=0.02)
    assert (
        step_cost(
            recipe_of("mvlm_gpt2").build, tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path), choose_hardware(**CPU), 1
        ).optimizer_flops
        == 0
    )


def test_the_costs_add_up():
    for gpus, note in ((1, "at 4 dollars per GPU-hour"), (8, "at 4 dollars per GPU-hour × 8")):
        lines = format_costs([Item("one", 90, "x"), Item("two", 3600)], gpus=gpus)
        assert lines[0].startswith("one") and "1.5 min" in lines[0] and lines[0].endswith("x")
        assert "61.5 min" in lines[-1] and f" {3690 / 3600 * PRICE_PER_HOUR * gpus:.2f} dollars" in lines[-1]
        assert lines[-1].endswith(note)
    assert not any("dollars" in line for line in format_costs([Item("one", 90)], gpus=0))


def test_all_gpus_of_the_machine_are_paid_for(tiny_corpus, tmp_path, monkeypatch):
    """Also those that ``--gpus`` leaves idle; on a machine without any, ``--gpus`` is the number to rent."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cpu = choose_hardware(**CPU)
    gpu = replace(cpu, device="cuda", reasons=cpu.reasons | {"compile": "no C compiler"})

    def planned(hardware, **changes):
        settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, **{"preset": "h200", "device": "auto"} | changes)
        plan = plan_run(recipe_of("mvlm_gpt2"), settings, hardware)
        steps = next(item.seconds for item in plan.items if item.name == "training steps")
        return plan.gpus, steps, plan.costs()[-1], plan.lines[0]

    alone = planned(cpu)
    assert alone[0] == 1 and alone[2].endswith("dollars per GPU-hour") and "none here" in alone[3]
    rented = planned(cpu, gpus=2)
    assert rented[:2] == (2, pytest.approx(alone[1] / 2)) and rented[2].endswith("× 2")
    assert "planned for a machine with 2" in rented[3]
    assert planned(cpu, gpus=8)[:2] == (8, pytest.approx(alone[1] / 4)), "a batch of four sequences"
    assert planned(cpu, preset="smoke")[0] == 0
    monkeypatch.setattr(supervisor, "gpu_count", lambda: 8)
    for changes, ranks in (({}, 4), ({"gpus": 2}, 2)):
        here = planned(gpu, **changes)
        assert here[:2] == (8, pytest.approx(alone[1] / ranks)) and here[2].endswith("× 8")
        assert f"across {ranks} of the 8" in here[3]


def test_plan_uses_up_max_hours(tiny_corpus, tmp_path):
    changes = {"data_dir": str(tiny_corpus), "output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}

    def planned(models, teacher_epochs=3.0):
        values = changes | {"num_models": models, "teacher_epochs": teacher_epochs, "num_epochs": 1e9}
        settings = PrioritaryConfig(preset="h200", device="cpu", max_hours=0.5, **values)
        items = plan_run(recipe_of("simone_enhanced"), settings, choose_hardware(**CPU)).items
        found = {item.name: item.seconds for item in items}
        return sum(found[name] for name in ("training steps", "evaluations", "checkpoints")), found

    assert planned(1)[0] == pytest.approx(1800, rel=0.01)
    student, items = planned(2, teacher_epochs=1e6)  # longer than fits: the teacher gets its maximum share
    beside = EXPORT_SECONDS + items["compilation"]
    assert student == pytest.approx(1800 * 4 / 5, rel=0.01)
    assert items["teachers"] - beside == pytest.approx(1800 / 5, rel=0.01)
    student, items = planned(3)
    beside += EXPORT_SECONDS  # the second teacher uses the first one's compiled graphs
    assert 0 < items["teachers"] - beside < 60, "three epochs of a tiny corpus"
    assert student == pytest.approx(1800 - (items["teachers"] - beside), rel=0.01)


def test_a_plan_on_a_gpu_uses_the_hardwares_own_choices(tiny_corpus, tmp_path):
    """Without a compiler nothing is compiled, and an old GPU has no bf16; elsewhere an H200 with both is assumed."""
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, preset="h200", precision="auto")
    cpu = choose_hardware(**CPU)
    gpu = replace(cpu, device="cuda", reasons=cpu.reasons | {"compile": "no C compiler"})

    def planned(hardware, **changes):
        plan = plan_run(recipe_of("mvlm_gpt2"), replace(settings, **changes), hardware)
        return {item.name: item.seconds for item in plan.items}, " ".join([*plan.lines, *plan.assumptions])

    (uncompiled, said), (compiled, _), (elsewhere, expected) = (
        planned(hardware) for hardware in (gpu, replace(gpu, compile=True), cpu)
    )
    assert uncompiled["compilation"] == 0 < compiled["compilation"] == elsewhere["compilation"]
    assert uncompiled["evaluations"] == compiled["evaluations"], "scored in fp32, compiled or not"
    assert "not compiled (no C compiler): slower than estimated" in said and "backward, fp32" in said
    assert "s to compile" in expected and "backward, bf16" in expected
    assert planned(cpu, no_compile=True)[0]["compilation"] == 0


def test_the_seconds_of_each_item_are_recorded_and_logged(tiny_corpus, tmp_path, caplog):
    settings = tiny_settings("mvlm_gpt2", tiny_corpus, tmp_path, no_test_score=True)
    with caplog.at_level(logging.INFO, logger="mvlm"):
        export = run_training(recipe_of("mvlm_gpt2"), settings)
    found = json.loads((export / "training_config.json").read_text())["costs"]
    for name in ("tokenizer and tokens", "training steps", "evaluations", "checkpoints", "export and test scores"):
        assert found[name] > 0 and any(name in message for message in caplog.messages)
    history = json.loads((export / "training_history.json").read_text())
    assert found["training steps"] <= history[-1]["seconds"]


def test_text_in_one_large_file_is_measured_by_its_beginning(tiny_corpus, tmp_path, monkeypatch):
    text = "".join(load_corpus(tiny_corpus).split("train")[n].read() for n in range(4))
    folder = tmp_path / "one_file"
    folder.mkdir()
    (folder / "all.txt").write_text(text)
    (folder / "all.json").write_text('{"split": "train"}')
    (folder / "held.txt").write_text("In the beginning God created the heaven and the earth.\n")
    (folder / "held.json").write_text('{"split": "validation"}')
    monkeypatch.setattr(text_plan, "SAMPLE_BYTES", len(text) // 3)
    monkeypatch.setattr(text_plan, "MEASURED_BYTES", len(text) // 3)
    settings = tiny_settings("mvlm_gpt2", folder, tmp_path, data_subset=None)
    kind, (corpus, _) = recipe_of("mvlm_gpt2").tokenizer_class, read_corpus(settings)
    plan = plan_text(settings, kind, corpus)
    assert plan.source.endswith(f"{len(text) // 3 / 1e6:.1f} MB of the text")
    assert plan.bytes_per_token == pytest.approx(prepare_text(settings, kind).store.bytes_per_token, rel=0.05)


@pytest.mark.parametrize("model", MODELS)
def test_text_prepared_on_another_machine_is_reused(model, tiny_corpus, tmp_path, caplog):
    """``--prepare_only`` on one machine, corpus and cache copied to another: no tokenizer training or encoding."""
    here = tiny_settings(model, tiny_corpus, tmp_path / "here", prepare_only=True)
    assert run_training(recipe_of(model), here).exists() is False, "no output folder: nothing was trained"
    there = tmp_path / "there"
    shutil.copytree(tiny_corpus, there / "corpus")
    shutil.copytree(tmp_path / "here" / "cache", there / "cache")
    files = {path: path.stat().st_mtime_ns for path in sorted((there / "cache").rglob("*"))}
    assert {path.name for path in files} >= {"tokenizer.json", "tokens.bin", "index.json"}
    settings = tiny_settings(model, there / "corpus", there)
    plan = plan_text(settings, recipe_of(model).tokenizer_class, load_corpus(there / "corpus", only="bible/kjv"))
    assert plan.has_tokenizer and plan.has_tokens
    with caplog.at_level(logging.INFO, logger="mvlm"):
        prepare_text(settings, recipe_of(model).tokenizer_class)
    assert not any("training a byte-level BPE" in message for message in caplog.messages)
    assert {path: path.stat().st_mtime_ns for path in sorted((there / "cache").rglob("*"))} == files
