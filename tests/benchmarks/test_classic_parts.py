"""``benchmarks/experiments/classic_parts.py``: each part is in the model, and costs as many parameters."""

from functools import partial

import pytest

from benchmarks.experiments import runner
from benchmarks.performance import gpu_check
from benchmarks.reliability import fault_injection

PARTS = (None, "layer_norm", "gelu", "plain_queries", "learned_positions")


def try_part(part):
    """Parameters, loss and gradients of one batch, in a process of its own: a part may change the model's classes."""
    from mvlm_core.hardware import choose_hardware

    hardware = choose_hardware(device="cpu", precision="fp32", no_compile=True)
    gpu_check.recipe_of = partial(runner.recipe_of, classic_part=part)
    settings, built = gpu_check.build("simone_enhanced", "smoke", hardware)
    return built.model.num_parameters(), *gpu_check.forward_and_backward(settings, built, hardware, 4)


def test_classic_parts_are_in_the_model_and_spend_the_same():
    fault_injection.CONTEXT.set_forkserver_preload(fault_injection.PRELOAD)
    with fault_injection.CONTEXT.Pool(1, maxtasksperchild=1) as pool:
        found = dict(zip(PARTS, pool.map(try_part, PARTS, chunksize=1), strict=True))
    assert len({loss for _, loss, _ in found.values()}) == len(PARTS)
    for part, (parameters, loss, norm) in found.items():
        assert parameters == pytest.approx(found[None][0], rel=0.05), part
        assert 0 < loss < 10 and norm > 0, part
