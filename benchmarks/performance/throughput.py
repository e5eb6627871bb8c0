"""How fast a training step is, beside peers that are trained in the same run on the same machine.

    python -m benchmarks.performance.throughput                      both models, and transformers.Trainer with GPT-2
    python -m benchmarks.performance.throughput --nanogpt FOLDER         and nanoGPT (FOLDER holds its model.py)
    python -m benchmarks.performance.throughput --litgpt FOLDER          and litgpt (pip install --target FOLDER litgpt)
    python -m benchmarks.performance.throughput --shape 124m             GPT-2's shape, vocabulary and context
    python -m benchmarks.performance.throughput --contexts 128,256,512,1024   our two, as many tokens a step in each

Every contender lives in a process of its own; they take turns, a few steps at a time, so that what the machine does
meanwhile affects all of them. A step is the whole step: batch, forward, backward, clipping, optimizer; one contender
only does the matrix products of model 1's step, which no step can beat. Printed are the medians over the rounds. FLOP/s
count what is useful: products with weights and attention, forward and backward, not the optimizer's; their share is of
the matrix product's own speed, measured between the rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.experiments.runner import SETTINGS, recipe_of
from mvlm_core.errors import UserError, run_main
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR

WARM_UP = 2  # steps that allocate, not counted
CONTEXT = multiprocessing.get_context("spawn")
_here: dict[str, Contender] = {}  # in a contender's process: the contender


@dataclass(frozen=True)
class Shape:
    """What is trained, for all contenders alike; ``layers_2``, ``vocab_2`` and ``head_2`` are model 2's."""

    width: int
    layers: int
    heads: int
    ff_dim: int
    vocab: int
    context: int
    batch: int
    layers_2: int
    vocab_2: int
    head_2: str

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.context


SHAPES = {
    # The cpu preset, its baseline with GPT-2's own feed-forward width, which the peers cannot change.
    "cpu": Shape(128, 7, 2, 512, 4096, 256, 8, 4, 4096, "own"),
    "124m": Shape(768, 12, 12, 3072, 50257, 1024, 2, 12, 32000, "tied"),
    "32k": Shape(256, 4, 4, 1024, 32000, 1024, 4, 4, 32000, "tied"),
}


@dataclass
class Contender:
    """A trainer that is ready: ``step()`` makes one, all of it."""

    step: Callable[[], None]
    parameters: int
    flops_per_token: float
    tokens_per_step: int


def flops_per_token(matrix_parameters: int, layers: int, width: int, context: int) -> float:
    """Forward and backward, after Chowdhery et al. 2022 (arXiv 2204.02311, appendix B); torch's own count of both
    models agrees within 3 % (``tests/training/test_cost.py``).

    Args:
        matrix_parameters: weights that every token is multiplied with, the output matrix among them, embeddings not.
    """
    return 6 * matrix_parameters + 12 * layers * width * context


def matrices(model: Any) -> int:
    """Weights that every token is multiplied with: a tied output counts, an embedding that is looked up does not."""
    import torch

    looked_up = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    output = model.lm_head.weight
    tied = output.numel() if id(output) in looked_up else 0
    return tied + sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in looked_up)


def ours(
    model: str, shape: Shape, options: argparse.Namespace, folder: Path, coherence_weight: float = 0.0
) -> Contender:
    """One of our two models, by what the command line gave."""
    from mvlm_core.hardware import choose_hardware
    from mvlm_core.signals import StopRequest
    from mvlm_core.training.loop import TrainingLoop
    from mvlm_core.training.preparation import prepare_text
    from mvlm_core.training.state import Run, build_task

    values: dict[str, Any] = {"preset": "cpu", "quiet": True, "max_steps": 10**6, "precision": options.precision}
    values |= {"output_dir": str(folder), "cache_dir": str(CACHE_DIR), "data_dir": str(options.data_dir.absolute())}
    values |= {"hidden_dim": shape.width, "num_heads": shape.heads, "ff_dim": shape.ff_dim}
    values |= {"num_layers": shape.layers, "vocab_size": shape.vocab}
    values |= {"max_length": shape.context, "batch_size": shape.batch}
    if model == "simone_enhanced":
        values |= {"num_layers": shape.layers_2, "vocab_size": shape.vocab_2, "output_head": shape.head_2}
        values |= {"coherence_weight": coherence_weight}
    recipe, settings = recipe_of(model), SETTINGS[model](**values).check()
    hardware = choose_hardware(precision=options.precision)
    text = prepare_text(settings, recipe.tokenizer_class)
    run = Run(recipe, settings, hardware, ranks_of(options.processes))
    task = build_task(run, text)
    loop, stop = TrainingLoop(run, task), StopRequest()

    def step() -> None:
        loop._step(stop)
        loop._pending.clear()

    serve_child(run.ranks, step)
    count = matrices(task.model)
    if coherence_weight:
        count += task.model.lm_head.weight.numel() + shape.width**2  # the second prediction and its adapter
    flops = flops_per_token(count, settings.num_layers, shape.width, shape.context)
    return Contender(step, task.model.num_parameters(), flops, task.batches.tokens_per_batch)


def nanogpt(shape: Shape, options: argparse.Namespace, _folder: Path) -> Contender:
    """nanoGPT's model, optimizer and loss."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", options.nanogpt / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sizes = {"block_size": shape.context, "vocab_size": shape.vocab, "n_layer": shape.layers, "n_head": shape.heads}
    model = module.GPT(module.GPTConfig(**sizes, n_embd=shape.width, dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    return plain_loop(model, optimizer, lambda inputs, targets: model(inputs, targets)[1], shape, options.precision)


def litgpt(shape: Shape, options: argparse.Namespace, _folder: Path) -> Contender:
    """litgpt's GPT-NeoX at GPT-2's shape: rotary positions, an output matrix of its own, its own loss."""
    import torch

    sys.path.append(str(options.litgpt))  # the user's own folder, with what litgpt needs
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    sizes = {"block_size": shape.context, "padded_vocab_size": shape.vocab, "n_layer": shape.layers}
    sizes |= {"n_head": shape.heads, "n_embd": shape.width, "intermediate_size": shape.ff_dim}
    layer = {"parallel_residual": False, "mlp_class_name": "GptNeoxMLP", "gelu_approximate": "tanh"}
    model = GPT(Config(**sizes, **layer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss(inputs: Any, targets: Any) -> Any:
        return chunked_cross_entropy(model(inputs), targets, chunk_size=0)

    return plain_loop(model, optimizer, loss, shape, options.precision)


def plain_loop(model: Any, optimizer: Any, loss: Callable[..., Any], shape: Shape, precision: str) -> Contender:
    """A step as nanoGPT's train.py and litgpt's pretrain.py make it; batches ready beforehand."""
    import torch

    batches = random_batches(shape)
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        inputs, targets = next(batches)
        with context:
            value = loss(inputs, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(step, *counted(model, shape))


def counted(model: Any, shape: Shape) -> tuple[int, float, int]:
    """The figures of a ``Contender`` with model 1's shape."""
    flops = flops_per_token(matrices(model), shape.layers, shape.width, shape.context)
    return sum(p.numel() for p in model.parameters()), flops, shape.tokens


def huggingface(shape: Shape, options: argparse.Namespace, folder: Path) -> Contender:
    """``transformers.Trainer`` with ``GPT2LMHeadModel``, its own optimizer and collator; dropout off as elsewhere."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    sizes = {"vocab_size": shape.vocab, "n_positions": shape.context, "n_embd": shape.width, "n_layer": shape.layers}
    dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, n_head=shape.heads))
    ids = torch.randint(shape.vocab, (64 * shape.batch, shape.context), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class TakesTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    length = {"per_device_train_batch_size": shape.batch, "max_steps": 10**6}
    precision = {"bf16": options.precision == "bf16", "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(folder), **quiet, **length, **precision)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[TakesTurns()])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()

    return Contender(step, *counted(model, shape))


def products_alone(shape: Shape, options: argparse.Namespace, _folder: Path) -> Contender:
    """The matrix products of model 1's step, forward and backward, and nothing else: how fast a step could be if norms,
    activations, softmax over the vocabulary, optimizer and all else were free."""
    import torch
    import torch.nn.functional as F

    from mvlm_core.training.cross_entropy import rows_at_a_time

    width, heads = shape.width, shape.heads
    ranks = ranks_of(options.processes)
    batch = shape.batch // ranks.world
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    scale = width**-0.5

    def matrix(rows: int, columns: int) -> Any:
        return torch.nn.Parameter(torch.randn(rows, columns, dtype=dtype) * scale)

    sizes = ((width, 3 * width), (width, width), (width, shape.ff_dim), (shape.ff_dim, width))
    layers = [[matrix(*size) for size in sizes] for _ in range(shape.layers)]
    weights = [weight for layer in layers for weight in layer]
    output = matrix(shape.vocab, width).detach()
    hidden = torch.randn(batch, shape.context, width, dtype=dtype, requires_grad=True)
    rows_at_once = rows_at_a_time(shape.vocab, width, "cpu")
    gradient = torch.randn(rows_at_once, shape.vocab, dtype=dtype)

    def step() -> None:
        x = hidden
        for qkv, proj, up, down in layers:
            q, k, v = (x @ qkv).view(batch, shape.context, 3, heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = attended.transpose(1, 2).reshape(batch, shape.context, width) @ proj @ up @ down
        rows = x.detach().view(-1, width)
        gradient_rows, gradient_output = torch.empty_like(rows), torch.zeros_like(output)
        for start in range(0, len(rows), rows_at_once):
            part = rows[start : start + rows_at_once]
            part @ output.t()
            theirs = gradient[: len(part)]
            torch.mm(theirs, output, out=gradient_rows[start : start + rows_at_once])
            gradient_output.addmm_(theirs.t(), part)
        torch.autograd.grad(x, [hidden, *weights], gradient_rows.view_as(x))
        ranks.barrier()

    serve_child(ranks, step)
    count = output.numel() + sum(weight.numel() for weight in weights)
    flops = flops_per_token(count, shape.layers, width, shape.context)
    return Contender(step, count, flops, batch * ranks.world * shape.context)


def ranks_of(processes: int) -> Any:
    """This process alone, or the main one of several that share each batch."""
    from benchmarks.forked_ranks import fork_ranks
    from mvlm_core.training.distributed import ALONE, join

    if processes == 1:
        return ALONE
    folder = _here["folder"] = tempfile.TemporaryDirectory()  # for as long as this process lives
    fork_ranks(processes, Path(folder.name))
    return join("cpu")


def serve_child(ranks: Any, step: Callable[[], None]) -> None:
    """A child of several processes makes steps for as long as the parent does, and ends with it."""
    if ranks.is_main:
        return
    try:
        while True:
            step()
    finally:
        os._exit(0)


def random_batches(shape: Shape) -> Iterator[tuple[Any, Any]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab, (16, shape.batch, shape.context + 1), generator=generator)
    while True:
        for batch in tokens:
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


# Peers, which run as they come; two of them need a folder: the option that names it, and a file that must be in it.
PEERS = {"transformers.Trainer": huggingface, "nanoGPT": nanogpt, "litgpt": litgpt}
GIVEN_PEERS = {"nanoGPT": ("nanogpt", "model.py"), "litgpt": ("litgpt", "litgpt/model.py")}
PRODUCTS = "model 1's products alone"
CONTENDERS = {
    "mvlm_gpt2": partial(ours, "mvlm_gpt2"),
    "simone_enhanced": partial(ours, "simone_enhanced"),
    "simone_enhanced, coherence on": partial(ours, "simone_enhanced", coherence_weight=0.3),
    **PEERS,
    PRODUCTS: products_alone,
}


def prepare(name: str, shape: Shape, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """In a contender's process: make it ready; returns its figures."""
    set_process_environment()
    os.dup2(2, 1)  # what libraries print is not part of the table

    import torch

    from mvlm_core.hardware import choose_hardware
    from mvlm_core.monitor import peak_memory

    hardware = choose_hardware(precision=options.precision)
    if name in PEERS:  # as they come, on as many threads
        torch.set_num_threads(hardware.threads)
    else:
        hardware.apply()
    one = _here["contender"] = CONTENDERS[name](shape, options, folder)
    before = peak_memory()
    for _ in range(WARM_UP):
        one.step()
    return {key: value for key, value in vars(one).items() if key != "step"} | {"before": before}


def turn(steps: int) -> tuple[float, int]:
    """In a contender's process: make these steps; returns their median in seconds, and the peak memory so far."""
    from mvlm_core.monitor import peak_memory

    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        _here["contender"].step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), peak_memory()


def matmul_peak(precision: str, size: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product, the best of a few."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds + 1):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def result(facts: dict[str, float], turns: list[tuple[float, int]], peak: float) -> dict[str, Any]:
    """A contender's figures over all rounds; ``peak``: FLOP/s of a matrix product."""
    rounds, peak_memory = [seconds for seconds, _ in turns], turns[-1][1]
    rates = [facts["tokens_per_step"] / seconds for seconds in rounds]
    flops = facts["flops_per_token"] * facts["tokens_per_step"] / statistics.median(rounds)
    speed = {"tokens_per_second": statistics.median(rates), "rates": rates, "rounds": rounds}
    memory = {"peak_memory": peak_memory, "step_memory": peak_memory - facts["before"]}
    return facts | speed | memory | {"flops_per_second": flops, "share_of_peak": flops / peak}


def contenders(shape: Shape, options: argparse.Namespace) -> list[tuple[str, Shape, str]]:
    """Name, shape and label of each process."""
    if options.contexts:
        shapes = [replace(shape, context=c, batch=max(1, shape.tokens // c)) for c in options.contexts]
        return [(name, one, f"{name}, context {one.context:,}") for name in SETTINGS for one in shapes]
    names = [name for name in CONTENDERS if name not in GIVEN_PEERS or vars(options)[GIVEN_PEERS[name][0]]]
    return [(name, shape, name) for name in names if not options.only or name in options.only]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of turns; returns each contender's figures."""
    from mvlm_core.hardware import choose_hardware

    choose_hardware(precision=options.precision).apply()
    shape = SHAPES[options.shape]
    if options.batch_size:
        shape = replace(shape, batch=options.batch_size)
    facts, peaks = {}, []
    with ExitStack() as stack:
        scratch, pools = Path(stack.enter_context(tempfile.TemporaryDirectory())), {}
        for name, own_shape, label in contenders(shape, options):
            pools[label] = stack.enter_context(ProcessPoolExecutor(1, CONTEXT))
            facts[label] = pools[label].submit(prepare, name, own_shape, options, scratch / str(len(pools))).result()
            print(f"{label}: ready", file=sys.stderr, flush=True)
        turns: dict[str, list[tuple[float, int]]] = {label: [] for label in pools}
        for _ in range(options.rounds):
            peaks.append(matmul_peak(options.precision))
            for label, pool in pools.items():
                turns[label].append(pool.submit(turn, options.steps).result())
    peak = statistics.median(peaks)
    found = {label: result(facts[label], turns[label], peak) for label in facts}
    return {"shape": asdict(shape), "precision": options.precision, "matmul_peak": peak, "contenders": found}


def table(result: dict[str, Any]) -> str:
    first, rows = next(iter(result["contenders"].values())), []
    for name, one in result["contenders"].items():
        # Paired by round: what the machine did in a round affected both.
        paired = [theirs / mine for mine, theirs in zip(one["rounds"], first["rounds"], strict=True)]
        ratio = statistics.median(paired) * one["tokens_per_step"] / first["tokens_per_step"]
        rate = command.spread(one["rates"], "{:,.0f}", statistics.median)
        flops = (f"{one['flops_per_second'] / 1e9:.0f}", f"{one['share_of_peak']:.0%}")
        memory = f"{one['peak_memory'] / 1e6:,.0f} ({one['step_memory'] / 1e6:+,.0f} by steps)"
        rows.append((name, f"{one['parameters']:,}", rate, f"{ratio:.2f}", *flops, memory))
    columns = ("contender", "parameters", "tokens/s (least … most)", "ratio", "GFLOP/s", "of the peak", "memory, MB")
    end = f"{result['precision']}, {result['shape']}; matrix product {result['matmul_peak'] / 1e9:.0f} GFLOP/s."
    return f"{command.table(columns, rows)}\n\n{end}"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command.new_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), default="cpu", help="[default cpu]")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of all of them [default fp32]")
    add("--rounds", type=int, default=7, help="turns of each contender [default 7]")
    add("--steps", type=int, default=3, help="steps per turn [default 3]")
    add("--batch_size", type=int, help="sequences per step [default: the shape's]")
    add("--contexts", type=command.whole_numbers, help="our two models alone, at each of these contexts")
    add("--only", type=lambda text: text.split(";"), help="these contenders, separated by semicolons")
    add("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="text of our two")
    workers = "CPU workers that share each batch of our two; memory is then the first one's alone [default 1]"
    add("--processes", type=int, default=1, help=workers)
    add("--nanogpt", type=Path, help="folder of nanoGPT's model.py")
    add("--litgpt", type=Path, help="folder of the package litgpt and its dependencies")
    options = parser.parse_args(arguments)
    problems = command.below_one(options, "rounds", "steps", "processes")
    problems += [f"--contexts {context}: at least 2" for context in options.contexts or () if context < 2]
    for option, file in GIVEN_PEERS.values():
        if (folder := vars(options)[option]) and not (folder / file).is_file():
            problems.append(f"--{option} {folder}: has no {file}")
    if problems:
        raise UserError(problems)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    set_process_environment()
    result = measure(options)
    command.show(table(result), result, options)
    return 0


if __name__ == "__main__":
    run_main(main)
