"""``component_swaps.py``: each swap changes the model, is trained, and keeps the parameter count."""

import pytest
import torch

from benchmarks.experiments.component_swaps import COMPONENT_SWAPS
from benchmarks.experiments.runner import recipe_of
from mvlm_core.hardware import choose_hardware
from mvlm_core.training.cost import StubTokenizer
from tests.helpers import tiny_settings


def built(swap, folder):
    settings = tiny_settings("simone_enhanced", folder, folder, hidden_dim=64, num_layers=3)
    torch.manual_seed(0)
    return recipe_of("simone_enhanced", swap).build(
        settings, StubTokenizer(400), choose_hardware(device="cpu", precision="fp32")
    )


@pytest.mark.parametrize("swap", COMPONENT_SWAPS)
def test_each_swapped_component_is_trained_at_the_same_parameter_count(swap, tmp_path):
    original, swapped = built(None, tmp_path), built(swap, tmp_path)
    assert swapped.model.num_parameters() == pytest.approx(original.model.num_parameters(), rel=0.05)
    ids = torch.randint(400, (2, 17), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 16)
    losses = [model.loss(ids[:, :-1], ids[:, 1:], weights, 0.9).total for model in (original, swapped)]
    assert losses[0].isfinite() and losses[1].isfinite() and losses[0] != losses[1]
    losses[1].backward()
    trained = [name for name, parameter in swapped.model.named_parameters() if parameter.grad is not None]
    assert trained == [name for name, _ in swapped.model.named_parameters()]
    optimized = {id(p) for part in swapped.optimizers.parts for group in part.param_groups for p in group["params"]}
    assert optimized >= {id(parameter) for parameter in swapped.model.parameters()}


@torch.no_grad()
def test_each_swap_replaces_its_component(tmp_path):
    models = {swap: built(swap, tmp_path).model.eval() for swap in COMPONENT_SWAPS}
    kinds = {swap: [type(module).__name__ for module in model.modules()] for swap, model in models.items()}
    # Two per layer, the embedding's and the final one are replaced; those of queries, keys and pointer stay.
    assert kinds["layer_norm"].count("_LayerNorm") == 2 * 3 + 2 and kinds["layer_norm"].count("RMSNorm") == 2 * 3 + 3
    assert kinds["gelu"].count("GELU") == 3 and "SwiGLU" not in kinds["gelu"]
    assert kinds["plain_queries"].count("RMSNorm") == 2 * 3 + 2 + 3
    # Without rotation a position is known by its embedding alone.
    model, ids = models["learned_positions"], torch.full((1, 8), 7)
    model.embed_tokens.positions.zero_()
    assert torch.allclose(*(model.rotary(torch.arange(8)[None], torch.float32)[0][:, :, place] for place in (0, 7)))
    before, _ = model.hidden_states(ids)
    model.embed_tokens.positions.normal_()
    assert not torch.allclose(model.hidden_states(ids)[0], before)
