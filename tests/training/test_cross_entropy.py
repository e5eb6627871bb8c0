"""The blockwise loss equals PyTorch's over full logits: value, gradients, weights."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm_core.machine import compiler_problem
from mvlm_core.training import cross_entropy
from mvlm_core.training.cross_entropy import linear_cross_entropy, rows_at_a_time


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_match_full_logits(rows, weighted):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 8, generator=generator, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    targets = torch.randint(50, (3, 11), generator=generator)
    token_weights = torch.rand(3, 11, generator=generator) if weighted else None

    loss, nll = linear_cross_entropy(hidden, weight, targets, token_weights, block_rows=rows)
    (loss * 3).backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None

    logits = hidden @ weight.T
    expected_nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 11)
    scale = torch.ones(3, 11) if token_weights is None else token_weights
    expected = (scale * expected_nll).mean()
    (expected * 3).backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1], weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [7, 1000])
def test_mixture_with_a_second_source_matches_full_logits(rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    score = torch.randn(3, 11, generator=generator, requires_grad=True)
    other = torch.randn(3, 11, generator=generator, requires_grad=True)
    targets = torch.randint(50, (3, 11), generator=generator)
    token_weights = torch.rand(3, 11, generator=generator)
    inputs = hidden, weight, score, other

    def gradients(loss):
        return torch.autograd.grad(loss * 3, inputs)

    share, log_other = F.logsigmoid(score), F.logsigmoid(-score) + F.logsigmoid(other)
    loss, nll = linear_cross_entropy(
        hidden, weight, targets, token_weights, block_rows=rows, mixture=(share, log_other)
    )
    ours = gradients(loss)
    share, log_other = F.logsigmoid(score), F.logsigmoid(-score) + F.logsigmoid(other)
    logits = hidden @ weight.T
    own = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1) + share
    mixed = torch.logaddexp(own, log_other)
    expected = -(token_weights * mixed).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll, -mixed.detach(), rtol=1e-5, atol=1e-5)
    for mine, right in zip(ours, gradients(expected), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)


def test_loss_requires_no_grad_when_the_inputs_do_not():
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 4]))
    assert not loss.requires_grad


def test_extremely_unlikely_targets_have_exact_loss_and_gradients():
    hidden = torch.full((2, 4), 10.0, requires_grad=True)
    weight = torch.stack([torch.full((4,), value) for value in (30.0, 0.0, -30.0)]).requires_grad_()
    loss, nll = linear_cross_entropy(hidden, weight, torch.tensor([2, 0]))
    loss.backward()
    assert nll.tolist() == [2400.0, 0.0] and float(loss.detach()) == 1200.0
    assert torch.equal(hidden.grad[0], torch.full((4,), 30.0)) and torch.equal(hidden.grad[1], torch.zeros(4))


def test_autocast_computes_in_bf16_and_returns_fp32_gradients():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    rounded, _ = linear_cross_entropy(hidden.detach().bfloat16(), weight.detach(), targets)
    assert float(loss.detach()) == float(rounded) and hidden.grad.dtype == weight.grad.dtype == torch.float32


# --- the compiled kernel ----------------------------------------------------------------------------------------


def both_ways(kernel, dtype, *, vocab=90, dim=16, rows=16, shape=(3, 16)):
    """Loss, per-token loss and both gradients, from the same random inputs each time."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, requires_grad=True)
    targets = torch.randint(vocab, shape, generator=generator)
    token_weights = torch.rand(shape, generator=generator)
    loss, nll = linear_cross_entropy(hidden, weight, targets, token_weights, block_rows=rows, kernel=kernel)
    loss.backward()
    return loss.detach(), nll, hidden.grad, weight.grad


def assert_equal_to_rounding(found, expected, dtype):
    """float32 sums run in another order; in bfloat16 a gradient of the logits may round the other way."""
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)
    step = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert ours.dtype == theirs.dtype and theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=step, atol=step * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [{"vocab": 64}, {"vocab": 90}, {"rows": 7}, {"rows": 1000}, {"shape": (2, 13)}])
def test_compiled_kernel_run_eagerly_matches_blocks(case, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "compiled_block", lambda function: function)
    assert_equal_to_rounding(both_ways("compiled", dtype, **case), both_ways("blocks", dtype, **case), dtype)


@pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))
def test_compiled_kernel_matches_blocks():
    """One compilation per dtype, about ten seconds in total."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_equal_to_rounding(both_ways("compiled", dtype), both_ways("blocks", dtype), dtype)


def test_even_rows_chooses_equal_blocks_where_possible():
    assert cross_entropy.even_rows(32 * 1024, 4194) == 4096
    assert cross_entropy.even_rows(32 * 1023, 4194) == 4092
    assert cross_entropy.even_rows(100, 4194) == 100
    assert cross_entropy.even_rows(101, 50) == 50, "a prime number of tokens: the last block is another one"


# --- bytes moved ------------------------------------------------------------------------------------------------


class CountBytes(TorchDispatchMode):
    """Counts the bytes that each operation reads and writes, without views and allocations.

    An accumulated sum is both an input and an output of its operation, so it counts as read and written. For gather
    and scatter only the selected elements count.
    """

    def __init__(self):
        super().__init__()
        self.moved = 0
        self.counting = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aten, operation = torch.ops.aten, function.overloadpacket
        free = function.is_view or operation in (aten.empty, aten.empty_like, aten.new_empty)
        if self.counting and function.namespace == "aten" and not free:
            outputs = {argument.name for argument in function._schema.arguments if argument.is_out}
            inputs = [*args, *(value for name, value in (kwargs or {}).items() if name not in outputs)]
            moved = [*inputs[1:], inputs[-1]] if operation in (aten.gather, aten.scatter_add_) else [*inputs, result]
            self.moved += sum(x.nbytes for x in moved if isinstance(x, torch.Tensor))
        return result


def bytes_of_the_schedule(rows, vocab, dim):
    """Bytes that Inductor's kernels read and write for one block in bfloat16; it runs up to the schedule, on fake
    tensors, so nothing is compiled."""
    kernels = []

    def count(graph, inputs):
        lowered = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
            lowered.run(*inputs)
            lowered._update_scheduler()
            kernels.extend(node.get_read_write_buffers_sizes() for node in lowered.scheduler.nodes)
        return graph.forward

    backend = aot_autograd(fw_compiler=count, decompositions=select_decomp_table)
    block = torch.compile(cross_entropy._score_block, fullgraph=True, dynamic=False, backend=backend)
    with FakeTensorMode(), torch.no_grad():
        hidden, matrix = torch.empty(rows, dim), torch.empty(vocab, dim)
        block(hidden.bfloat16(), matrix.bfloat16(), torch.empty(rows, dtype=torch.int64), vocab)
    return kernels


def bytes_of_the_loss(kernel, tokens, vocab, dim, monkeypatch):
    """Bytes that the loss of ``tokens`` and both gradients move in bfloat16, with the blocks of a CUDA device."""
    rows = rows_at_a_time(vocab, dim, "cuda")
    of_a_block = sum(bytes_of_the_schedule(cross_entropy.even_rows(tokens, rows), vocab, dim))

    def compiled(*arguments):
        counter.counting = False
        result = cross_entropy._score_block(*arguments)
        counter.counting, counter.moved = True, counter.moved + of_a_block
        return result

    monkeypatch.setattr(cross_entropy, "compiled_block", lambda _function: compiled)
    with FakeTensorMode(), CountBytes() as counter:
        hidden = torch.empty(tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.empty(vocab, dim, requires_grad=True), torch.empty(tokens, dtype=torch.int64)
        linear_cross_entropy(hidden, weight, targets, block_rows=rows, kernel=kernel)
    return counter.moved


def test_compiled_kernel_moves_less_than_half_the_bytes(monkeypatch):
    """A step of the h200 preset, 32 sequences of 1,024 tokens, over 32,000 entries."""
    product, rest = bytes_of_the_schedule(4096, 32000, 768)
    logits = 4096 * 32000 * 2
    assert product > logits and 2 * logits < rest < 2.01 * logits, "one kernel: it reads logits and writes the gradient"
    before, after = (bytes_of_the_loss(kernel, 32768, 32000, 768, monkeypatch) for kernel in ("blocks", "compiled"))
    assert after < before / 2, f"{before / 1e9:.1f} GB a step in blocks, {after / 1e9:.1f} GB compiled"
