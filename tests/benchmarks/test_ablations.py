"""``benchmarks/ablations.py``: settings that are valid, arithmetic that is right, runs that are made once."""

import json
import logging
import sys

import pytest

from benchmarks.experiments import ablations
from benchmarks.experiments import runner as trials
from mvlm_core.errors import UserError
from mvlm_core.pipeline.child_process import Signals
from tests.helpers import TINY


def options_of(tmp_path, *arguments):
    return ablations.parse_options(["--work_dir", str(tmp_path), *arguments])


@pytest.mark.parametrize("preset", ["cpu", "smoke"])
def test_every_variant_is_one_valid_change(tmp_path, preset):
    runs = ablations.plan(options_of(tmp_path, "--preset", preset, "--seeds", "2", "--max_bytes", "1000"))
    assert all(run.settings().no_test_score for run in runs)
    assert len(runs) == 2 * len(ablations.VARIANTS) == len({run.folder for run in runs})
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)  # seed by seed
    settings = {run.name: run.settings().check() for run in runs}
    variants = {variant.name: variant for variant in ablations.VARIANTS}
    for run in runs:
        mine, reference = settings[run.name], settings[f"{ablations.REFERENCES[run.model]}, seed {run.seed}"]
        assert mine.max_bytes == 1000 and mine.num_epochs is None and mine.seed == run.seed
        differing = {name for name, value in mine.identity().items() if value != reference.identity()[name]}
        assert differing == set(variants[run.label].values(preset))
    assert settings["tied_head, seed 0"].output_head == "tied"
    assert settings["no_coherence, seed 0"].coherence_weight == 0.0


def test_classic_parts_are_in_the_model_and_spend_the_same(tmp_path, tiny_corpus):
    tiny = {**TINY, "data_dir": str(tiny_corpus), "max_steps": 3, "seed": 0, "no_test_score": True}
    results = {}
    with Signals() as signals:
        for part in (None, "layer_norm", "gelu", "plain_queries", "learned_positions"):
            run = trials.Run("x", "simone_enhanced", tiny | {"output_dir": str(tmp_path / str(part))}, part)
            assert trials.execute(run, signals)[0] == 0, run.log.read_text()
            results[part] = run.result()
    assert len({result["validation_bpb"] for result in results.values()}) == 5
    for part, result in results.items():
        assert result["parameters"] == pytest.approx(results[None]["parameters"], rel=0.05), part


def test_a_name_brings_its_reference_and_an_unknown_one_is_refused(tmp_path):
    assert [variant.name for variant in ablations.chosen("base_linear")] == ["baseline", "base_linear"]
    with pytest.raises(UserError, match="no_such"):
        ablations.plan(options_of(tmp_path, "--only", "full,no_such"))


def test_another_length_is_another_folder(tmp_path):
    assert options_of(tmp_path).root != options_of(tmp_path, "--max_bytes", "1000").root


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], "no pair"),
        ([0.3], "one seed"),
        ([-0.0162, -0.0045, -0.0164], "helps"),  # mean -0.0124, standard error 0.0039
        ([0.0162, 0.0045, 0.0164], "hurts"),
        ([0.004, 0.0041, 0.0042], "noise"),  # certain, but small
        ([0.05, -0.01, 0.02], "noise"),  # mean 0.020, standard error 0.017
        ([0.01, 0.02], "hurts"),  # mean 0.015, standard error 0.005
        ([0.0, 0.02], "noise"),  # mean 0.010, standard error 0.010
    ],
)
def test_verdict(differences, expected):
    assert ablations.verdict(differences) == expected


def figures(bits, speed=1000.0, parameters=1_900_000):
    return {"validation_bpb": bits, "tokens_per_second": speed, "parameters": parameters}


def test_table_pairs_by_seed():
    results = {
        "full": {0: figures(1.46), 1: figures(1.48), 2: figures(1.47)},
        "no_coherence": {0: figures(1.48, 1100.0), 1: figures(1.49, 1300.0), 2: figures(1.49, 1200.0)},
        "tied_head": {1: figures(1.60, 900.0, 1_380_000), 5: figures(9.0)},
        "base_linear": {0: figures(1.7)},
    }
    lines = ablations.table(ablations.rows_of(results)).splitlines()[2:]
    assert lines == [
        "| `full` model 2 as the preset has it | 1,900,000 | 1.4700 ± 0.0100 (3) |  |  | reference |",
        "| `no_coherence` without the coherence part of the loss | 1,900,000 | 1.4867 ± 0.0058 (3) "
        "| +0.0167 (+0.0100 … +0.0200) | 1.200 | hurts |",
        "| `tied_head` output tied to the embedding | 1,380,000 (−27.4%) | 5.3000 ± 5.2326 (2) "
        "| +0.1200 (+0.1200 … +0.1200) | 0.900 | one seed |",
        "| `base_linear` linear to zero for cosine | 1,900,000 | 1.7000 (1) |  |  | no pair |",
    ]


def test_a_run_is_made_once_and_a_failure_is_told(tiny_corpus, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trials, "setup_logging", lambda *_, **__: None)  # caplog listens instead
    monkeypatch.setattr(trials, "set_process_environment", lambda: None)
    caplog.set_level(logging.INFO, "mvlm")
    monkeypatch.setattr(trials.log, "propagate", True)
    shared = TINY | {"data_dir": str(tiny_corpus), "cache_dir": str(tmp_path / "cache"), "no_test_score": True}
    variants = {variant.name: variant for variant in ablations.VARIANTS}
    good, bad = (
        trials.Run(
            name, variants[name].model, shared | {"seed": 0, "output_dir": str(tmp_path / name / "seed0"), **changes}
        )
        for name, changes in (("tied_head", {"output_head": "tied"}), ("cosine", {"learning_rate": -1.0}))
    )
    assert good.result() is None
    with Signals() as signals:
        assert trials.run_all([good, bad], signals) == [bad]
    assert "--learning_rate -1.0: must be above 0" in caplog.text
    result = good.result()
    assert result["steps"] == TINY["max_steps"] and 1 < result["validation_bpb"] < 9
    assert not any("test" in name for name in result) and not (good.folder / "checkpoints").exists()
    noted = trials.read_training_config(good.folder)["results"]
    assert {name: value for name, value in noted.items() if name.startswith("test")} == {
        "test_bpb": None,
        "test_bpb_kjv": None,
        "test_bpb_by_book": {},
        "test_bpb_by_translation": {},
    }, "the test books are not read"

    job = json.dumps({"model": good.model, "settings": good.values})
    monkeypatch.setattr(sys, "argv", ["trials.py", job])
    trials.run_one()
    assert f"already finished: {good.folder}" in caplog.text
    other = trials.Run(good.label, good.model, good.values | {"output_head": "own"})
    assert other.result() is None  # what is there was made with other settings
