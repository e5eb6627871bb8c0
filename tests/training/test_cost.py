"""The cost estimate against formulas, and against the memory that a process really uses."""

import json
import os
import subprocess
import sys

import pytest

from mvlm_core.hardware import choose_hardware
from mvlm_core.training.cost import StepMemory, fitting_micro_batch, step_cost
from tests.helpers import MODELS, REPOSITORY, recipe_of, tiny_settings

SIZES = {
    "small": {"hidden_dim": 128, "num_heads": 2, "ff_dim": 512, "num_layers": 4, "batch_size": 8, "max_length": 256},
    "wide": {"hidden_dim": 256, "num_heads": 4, "ff_dim": 1024, "num_layers": 4, "batch_size": 8, "max_length": 256},
    "long": {"hidden_dim": 128, "num_heads": 2, "ff_dim": 512, "num_layers": 6, "batch_size": 4, "max_length": 512},
}
# For every model and size: estimate, then run two real steps and print how much memory they used.
MEASURE = """
import gc, json, sys
from pathlib import Path
import torch
from tests.helpers import recipe_of, tiny_settings
from mvlm_core.training.cost import StubTokenizer, step_cost
from mvlm_core.hardware import choose_hardware
from mvlm_core.monitor import memory_in_use, peak_memory, reset_peak_memory

def measure(model, shape):
    settings = tiny_settings(model, Path("none"), Path("none"), **shape, vocab_size=4096)
    recipe, hardware = recipe_of(model), choose_hardware(device="cpu", precision="fp32")
    estimate = step_cost(recipe.build, settings, hardware, settings.batch_size).memory.total
    (torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()
    gc.collect()
    before = memory_in_use()
    reset_peak_memory()
    built = recipe.build(settings, StubTokenizer(4096), hardware)
    for _ in range(2):
        ids = torch.randint(4096, (settings.batch_size, settings.max_length))
        built.loss(ids, ids, torch.ones(ids.shape), 0.0).total.backward()
        built.optimizers.step()
        built.optimizers.zero_grad()
    return estimate, peak_memory() - before

models, sizes = json.loads(sys.argv[1])
measure(models[0], sizes["small"])  # what the first steps of a process allocate for good
print(json.dumps({f"{model} {size}": measure(model, sizes[size]) for model in models for size in sizes}))
"""


@pytest.fixture(scope="module")
def measured():
    # With a fixed threshold large blocks are returned at once; by default the C library keeps about half as much again.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, json.dumps([MODELS, SIZES])]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's allocator is told how to behave")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_memory_estimate_matches_a_measured_step(model, size, measured):
    estimate, taken = measured[f"{model} {size}"]
    assert estimate == pytest.approx(taken, rel=0.25)


def test_memory_estimate_includes_the_weights_of_all_teachers(tmp_path):
    hardware = choose_hardware(device="cpu", precision="fp32")

    def memory(**changes):
        settings = tiny_settings("mvlm_gpt2", tmp_path, tmp_path, **changes)
        return step_cost(recipe_of("mvlm_gpt2").build, settings, hardware, 2).memory

    alone = memory()
    for found in (memory(num_models=3), memory(teacher=("a", "b"))):
        assert found.total - alone.total == found.teachers == 2 * alone.weights > 0 == alone.teachers


@pytest.mark.parametrize("model", MODELS)
def test_flops_per_token_match_the_published_formula(model, tmp_path):
    """6 per matrix weight plus 12 · layers · width · context for attention (arXiv 2204.02311), within 3 %."""
    settings = tiny_settings(model, tmp_path, tmp_path, **SIZES["wide"], vocab_size=4096)
    settings.coherence_weight = 0.0
    hardware = choose_hardware(device="cpu", precision="fp32")
    cost = step_cost(recipe_of(model).build, settings, hardware, 2)
    width, layers, vocabulary = 256, 4, 4096
    inner = 2 * 1024 if model == "mvlm_gpt2" else 3 * 704
    weights = layers * width * (4 * width + inner) + vocabulary * width
    formula = 6 * weights + 12 * layers * width * settings.max_length
    assert cost.flops_per_token == pytest.approx(formula, rel=0.03)


def test_micro_batches_are_halved_until_they_fit():
    def fits(size):
        return fitting_micro_batch(StepMemory(10**9, 10**9, 10**9, 10**9), 10**9, size, max_sequences=32)

    assert [fits(size) for size in (80e9, 37e9, 36e9, 21e9, 20e9, 6e9, 5e9)] == [32, 32, 16, 16, 8, 1, None]


def test_dry_run_prints_the_cost_and_writes_nothing(tiny_corpus, tmp_path):
    places = ["--data_dir", tiny_corpus, "--output_dir", tmp_path / "out", "--log_file", tmp_path / "log"]
    script = REPOSITORY / "SIM-ONE Training" / "enhanced_train.py"
    command = [sys.executable, script, "--preset", "h200", "--dry_run", *places]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\n109," in done.stdout and "MFLOP per token" in done.stdout
    for size, count in ((8, 4), (16, 16), (24, 32), (80, 32), (141, 32)):
        assert f"\n{size} GB: a micro-batch of {count} fits" in done.stdout
    assert "for Muon's Newton-Schulz iteration" in done.stdout and done.stdout.count("assumed: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
