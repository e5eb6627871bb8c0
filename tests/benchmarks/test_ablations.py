"""``benchmarks/experiments/ablations.py``: variants that are one valid change, verdicts and the table."""

import pytest

from benchmarks.experiments import ablations
from mvlm_core.errors import UserError
from mvlm_core.training.identity import settings_identity


def options_of(tmp_path, *arguments):
    return ablations.parse_options(["--work_dir", str(tmp_path), *arguments])


@pytest.mark.parametrize("preset", ["cpu", "smoke", "h200"])
def test_every_variant_is_one_valid_change(tmp_path, preset):
    runs = ablations.make_runs(options_of(tmp_path, "--preset", preset, "--seeds", "1", "--max_bytes", "1000"))
    variants = ablations.variants_of(preset)
    assert [run.label for run in runs] == list(variants) and len({run.folder for run in runs}) == len(variants)
    settings = {run.label: run.settings().check() for run in runs}
    for run in runs:
        changed, reference = settings[run.label], settings[ablations.REFERENCES[run.model]]
        assert changed.max_bytes == 1000 and changed.no_test_score
        identity = settings_identity(reference)
        differing = {name for name, value in settings_identity(changed).items() if value != identity[name]}
        assert differing == {f"--{name}" for name in variants[run.label].overrides}
        assert bool(differing) or bool(run.component_swap) == (changed is not reference)
    assert settings["no_coherence"].coherence_weight == 0.0
    assert settings["base_half_rate"].learning_rate == settings["baseline"].learning_rate / 2
    assert ("tied_head_layers" in settings) == (preset != "h200")


def test_only_option_includes_the_reference_and_refuses_unknown_names(tmp_path):
    runs = ablations.make_runs(options_of(tmp_path, "--only", "base_linear", "--seeds", "1"))
    assert [run.label for run in runs] == ["baseline", "base_linear"]
    with pytest.raises(UserError, match="no_such"):
        ablations.make_runs(options_of(tmp_path, "--only", "full,no_such"))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.3], "one seed"),
        ([-0.0162, -0.0095, -0.0164], "helps"),  # mean -0.0140, standard error 0.0023
        ([0.0162, 0.0095, 0.0164], "hurts"),
        ([-0.0162, -0.0045, -0.0164], "noise"),  # mean -0.0124, standard error 0.0039: p = 0.09
        ([0.004, 0.0041, 0.0042], "noise"),  # certain, but small
        ([0.05, -0.01, 0.02], "noise"),  # mean 0.020, standard error 0.017
        ([0.01, 0.02], "noise"),  # mean 0.015, standard error 0.005: p = 0.2
        ([0.01, 0.011], "hurts"),  # mean 0.0105, standard error 0.0005
        ([0.0, 0.01] * 3, "noise"),  # mean 0.005, standard error 0.0022: p = 0.08
        ([0.0, 0.02] * 6, "hurts"),  # mean 0.010, standard error 0.0030
        ([0.0, 0.02], "noise"),  # mean 0.010, standard error 0.010
    ],
)
def test_verdict(differences, expected):
    assert ablations.verdict(differences) == expected


def figures(bits, speed=1000.0, parameters=1_900_000, memory=8e8):
    return {
        "validation_bpb": bits,
        "tokens_per_second": speed,
        "parameters": parameters,
        "peak_memory_bytes": memory,
    }


def test_table_pairs_by_seed():
    results = {
        "full": {0: figures(1.46), 1: figures(1.48), 2: figures(1.47)},
        "no_coherence": {
            0: figures(1.48, 1100.0, memory=6e8),
            1: figures(1.49, 1300.0, memory=6e8),
            2: figures(1.49, 1200.0, memory=6e8),
        },
        "tied_head_layers": {1: figures(1.60, 900.0, 1_380_000), 5: figures(9.0)},
        "base_linear": {0: figures(1.7)},
    }
    assert ablations.table(results).splitlines()[2:6] == [
        "| `full` model 2, preset | 1,900,000 | 1.4700 ± 0.0100 (3) |  |  |  | reference |",
        "| `no_coherence` without the coherence loss | 1,900,000 | 1.4867 ± 0.0058 (3) "
        "| +0.0167 (+0.0100 … +0.0200) | 1.200 | 0.750 | hurts |",
        "| `tied_head_layers` tied output matrix, more layers | 1,380,000 (−27.4%) | 5.3000 ± 5.2326 (2) "
        "| +0.1200 | 0.900 | 1.000 | one seed |",
        "| `base_linear` linear decay to zero instead of cosine | 1,900,000 | 1.7000 (1) |  |  |  | no pair |",
    ]
