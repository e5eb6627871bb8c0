"""Muon and AdamW against references, and restored optimizer state."""

import pytest
import torch
from torch import nn

from mvlm_core.training.distributed import Ranks
from mvlm_core.training.optimizer import Muon, build_optimizers, orthogonalize


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 96), (2, 96, 32)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = torch.linalg.svdvals(matrices)
    after = torch.linalg.svdvals(orthogonalize(matrices))
    assert before.max() / before.min() > 2
    assert 0.6 < after.min() and after.max() < 1.3


def plainly_orthogonalized(x):
    """Jordan's iteration as published, applied to the matrix itself."""
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(32, 32), (32, 47), (32, 48), (32, 96), (96, 32)])
def test_orthogonalize_matches_the_reference_iteration_for_all_shapes(shape):
    """Singular values over six decades: in float32 the products of the Gram matrix must not lose the small ones."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = u * torch.logspace(0, -6, u.shape[1], dtype=torch.float64) @ v
    expected = plainly_orthogonalized(matrix if shape[0] <= shape[1] else matrix.T)
    expected = expected if shape[0] <= shape[1] else expected.T
    exactly, in_float32 = orthogonalize(matrix[None])[0], orthogonalize(matrix[None].float())[0].double()
    torch.testing.assert_close(exactly, expected, rtol=0, atol=1e-9)
    assert (in_float32 - expected).norm() < 1e-3 * expected.norm()


def test_batched_muon_equals_one_matrix_at_a_time():
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(8, 12)) for _ in range(3)]
    apart = [nn.Parameter(p.detach().clone()) for p in together]
    one, several = Muon(together, lr=0.1, weight_decay=0.3), [Muon([p], lr=0.1, weight_decay=0.3) for p in apart]
    for _ in range(3):
        for p, q in zip(together, apart, strict=True):
            p.grad = torch.randn(8, 12)
            q.grad = p.grad.clone()
        one.step()
        for muon in several:
            muon.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Apart(Ranks):
    """A rank without communication: it keeps only what it would send."""

    def all_gather(self, part):
        return part


def test_ranks_share_the_orthogonalization():
    """Each rank does its part of the matrices; together they are complete, with at most world - 1 of padding."""
    torch.manual_seed(0)
    for count, world in ((1, 2), (5, 2), (4, 4), (5, 4)):
        matrices, muon = torch.randn(count, 8, 12), Muon([torch.zeros(8, 12)])
        whole, sent = muon._orthogonalize_batch(matrices), []
        for rank in range(world):
            muon.ranks = Apart(rank, world)
            sent.append(muon._orthogonalize_batch(matrices))
        together = torch.cat(sent)
        assert count <= len(together) < count + world
        torch.testing.assert_close(together[:count], whole, rtol=0, atol=1e-6)


def named_weights():
    torch.manual_seed(0)
    return [
        ("embed.weight", nn.Parameter(torch.randn(40, 32))),
        ("layer.weight", nn.Parameter(torch.randn(32, 32))),
        ("norm.weight", nn.Parameter(torch.randn(32))),
    ]


def test_muon_takes_inner_matrices_only():
    optimizers = build_optimizers(
        named_weights(),
        kind="muon",
        learning_rate=0.02,
        weight_decay=0.1,
        adamw_learning_rate=1e-3,
        embedding_names=("embed",),
    )
    muon, adamw = optimizers.parts
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(32, 32)]
    assert {tuple(p.shape) for group in adamw.param_groups for p in group["params"]} == {(40, 32), (32,)}
    assert optimizers.set_scale(0.5) == pytest.approx(0.01)
    assert adamw.param_groups[0]["lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_state_round_trip_is_bit_identical(kind):
    def fresh():
        named = named_weights()
        return named, build_optimizers(
            named, kind=kind, learning_rate=0.01, weight_decay=0.1, embedding_names=("embed",)
        )

    def step(named, optimizers, seed):
        torch.manual_seed(seed)
        for _, p in named:
            p.grad = torch.randn_like(p)
        optimizers.step()

    named, optimizers = fresh()
    step(named, optimizers, 1)
    weights = [p.detach().clone() for _, p in named]
    state = {name: value.clone() for name, value in optimizers.state_tensors().items()}
    step(named, optimizers, 2)

    again, restored = fresh()
    with torch.no_grad():
        for (_, p), saved in zip(again, weights, strict=True):
            p.copy_(saved)
    restored.load_state_tensors(state)
    step(again, restored, 2)
    for (_, p), (_, q) in zip(named, again, strict=True):
        assert torch.equal(p, q)


STEPS, SHAPES = 25, [(48, 32), (32, 48), (32, 32)]


def gradients(seed, dtype):
    """The same stream of gradients for two optimizers: a constant direction plus noise."""
    generator = torch.Generator().manual_seed(seed)
    lasting = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for _ in range(STEPS):
        yield [(g + torch.randn(g.shape, generator=generator)).to(dtype) for g in lasting]


def twins(dtype):
    torch.manual_seed(3)
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


def step_both(first, second, ours, theirs, grads):
    """One step of two optimizers, each with its own copy of the same gradients."""
    for p, q, g in zip(ours, theirs, grads, strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    first.step()
    second.step()


def test_muon_matches_torch_muon_step_by_step():
    """In bfloat16, the only precision of torch's iteration, with steps as large as the weights, so that
    the rounding of the weights (2^-8) hides nothing."""
    ours, theirs = twins(torch.bfloat16)
    muon = Muon(ours, lr=1.0, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=1.0, momentum=0.95, weight_decay=0.1)
    for step, grads in enumerate(gradients(4, torch.bfloat16)):
        step_both(muon, reference, ours, theirs, grads)
        for p, q in zip(ours, theirs, strict=True):
            assert (p - q).float().norm() < 0.25, f"step {step}"  # an orthogonal update's norm is above 5
            torch.testing.assert_close(muon.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])
            p.data.copy_(q)  # compare single steps: rounding must not accumulate


def test_float32_muon_matches_torch_muon_within_bf16_rounding():
    """Momentum, Nesterov step, scale by shape and weight decay."""
    ours, theirs = twins(torch.float32)
    muon = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)
    for grads in gradients(5, torch.float32):
        step_both(muon, reference, ours, theirs, grads)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(muon.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])
        assert (p - q).norm() < 0.02 * q.norm()  # torch iterates in bfloat16 for any gradient dtype


def test_adamw_matches_torch_adamw_step_by_step():
    ours, theirs = twins(torch.float32)
    named = [(f"matrix{n}", p) for n, p in enumerate(ours)]
    optimizers = build_optimizers(named, kind="adamw", learning_rate=0.01, weight_decay=0.3)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.99), weight_decay=0.3, foreach=False, fused=False)
    for grads in gradients(6, torch.float32):
        step_both(optimizers, reference, ours, theirs, grads)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_model_too_small_for_muon_uses_adamw_alone():
    layers = nn.ModuleList([nn.Embedding(40, 16), nn.Linear(16, 40)])
    optimizers = build_optimizers(layers.named_parameters(), kind="muon", learning_rate=0.02, weight_decay=0.1)
    assert [type(part) for part in optimizers.parts] == [torch.optim.AdamW]
    assert {*optimizers.parameters()} == {*layers.parameters()}


def test_muon_on_gpt2_updates_the_same_matrices_as_on_linear_layers():
    """Conv1D stores its weight as [inputs, outputs] and Q, K and V side by side."""
    torch.manual_seed(0)
    ones = torch.ones(32)
    linear = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "up": (96, 32), "down": (32, 96)}
    linear = {name: nn.Parameter(torch.randn(shape)) for name, shape in linear.items()} | {"norm": nn.Parameter(ones)}
    joined = {"norm": ones} | {name: linear[name].detach().T.clone() for name in ("up", "down")}
    joined["c_attn"] = torch.cat([linear[name].detach().T for name in "qkv"], dim=1)
    joined = {name: nn.Parameter(value) for name, value in joined.items()}
    settings = {"kind": "muon", "learning_rate": 0.1, "weight_decay": 0.3}
    first = build_optimizers(linear.items(), **settings)
    second = build_optimizers(joined.items(), **settings, transposed=True, qkv_name="c_attn")
    for _ in range(3):
        for p in linear.values():
            p.grad = torch.randn_like(p)
        for name in ("up", "down"):
            joined[name].grad = linear[name].grad.T.clone()
        joined["c_attn"].grad = torch.cat([linear[name].grad.T for name in "qkv"], dim=1)
        for optimizers in (first, second):
            optimizers.step(found_inf=torch.tensor(0.0))
    assert len(first.parts[0].param_groups[0]["params"]) == 5 and len(second.parts[0].param_groups) == 2
    for name in ("up", "down"):
        torch.testing.assert_close(joined[name], linear[name].T, rtol=1e-4, atol=1e-5)
    for name, part in zip("qkv", joined["c_attn"].chunk(3, dim=1), strict=True):
        torch.testing.assert_close(part, linear[name].T, rtol=1e-4, atol=1e-5)
