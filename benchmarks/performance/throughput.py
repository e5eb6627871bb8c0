#!/usr/bin/env python3
"""How fast a training step is, beside peers that are trained in the same run on the same machine.

    python -m benchmarks.performance.throughput                      both models, and transformers.Trainer with GPT-2
    python -m benchmarks.performance.throughput --nanogpt FOLDER         and nanoGPT (FOLDER holds its model.py)
    python -m benchmarks.performance.throughput --litgpt FOLDER          and litgpt (pip install --target FOLDER litgpt)
    python -m benchmarks.performance.throughput --shape 124m             GPT-2's shape, vocabulary and context
    python -m benchmarks.performance.throughput --contexts 128,256,512,1024   our two, as many tokens a step in each

Every contender lives in a process of its own; they take turns, a few steps at a time, so that what the machine does
meanwhile meets all of them. A step is the whole step: batch, forward, backward, clipping, optimizer; one contender only
multiplies what model 1's step multiplies, which no step is faster than. Printed are the medians over the rounds. FLOP/s
count what is useful: products with weights and attention, forward and backward, not the optimizer's; their share is of
the matrix product's own speed, measured between the rounds.

Exit codes: 0 done, 1 a contender failed, 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.runner import SETTINGS, recipe_of
from mvlm_core.errors import UserError, run_main
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR, REPOSITORY_ROOT

WARM_UP = 2  # steps that allocate, not counted


@dataclass(frozen=True)
class Shape:
    """What is trained, for all contenders alike; ``layers_2`` and ``vocab_2`` are model 2's."""

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


SHAPES = {
    # The cpu preset, its baseline with GPT-2's own feed-forward width, which the peers cannot change.
    "cpu": Shape(128, 7, 2, 512, 4096, 256, 8, 4, 4096, "own"),
    "124m": Shape(768, 12, 12, 3072, 50257, 1024, 2, 12, 32000, "tied"),
    "32k": Shape(256, 4, 4, 1024, 32000, 1024, 4, 4, 32000, "tied"),
}
PEERS = ("transformers.Trainer", "nanoGPT", "litgpt")
GIVEN_PEERS = {"nanoGPT": "nanogpt", "litgpt": "litgpt"}  # that need a folder: the option that names it
PRODUCTS = "model 1's products alone"
CONTENDERS = ("mvlm_gpt2", "simone_enhanced", "simone_enhanced, coherence on", *PEERS, PRODUCTS)


@dataclass
class Contender:
    """A trainer that is ready: ``step()`` makes one, all of it."""

    step: Callable[[], None]
    parameters: int
    flops_per_token: float
    tokens_per_step: int


def flops_per_token(matrix_parameters: int, layers: int, width: int, context: int) -> float:
    """Forward and backward, after Chowdhery et al. 2022 (arXiv 2204.02311, appendix B); torch's own count of both
    models agrees within 3 % (``tests/test_cost_estimate.py``).

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


def ours(name: str, shape: Shape, folder: Path, given: dict[str, Any]) -> Contender:
    """One of our two, by what the command line gave."""
    from mvlm_core.hardware import choose_hardware
    from mvlm_core.signals import StopRequest
    from mvlm_core.training.loop import TrainingLoop
    from mvlm_core.training.run import batch_source, build_task, prepare_text

    second = name.startswith("simone")
    model = "simone_enhanced" if second else "mvlm_gpt2"
    values: dict[str, Any] = {
        "preset": "cpu",
        "hidden_dim": shape.width,
        "num_heads": shape.heads,
        "ff_dim": shape.ff_dim,
        "num_layers": shape.layers_2 if second else shape.layers,
        "vocab_size": shape.vocab_2 if second else shape.vocab,
        "max_length": shape.context,
        "batch_size": shape.batch,
        "precision": given["precision"],
        "quiet": True,
        "max_steps": 10**6,
        "output_dir": str(folder),
        "data_dir": given["data_dir"],
        "cache_dir": str(CACHE_DIR),
    }
    if second:
        values |= {"output_head": shape.head_2, "coherence_weight": 0.3 if name.endswith("coherence on") else 0.0}
    recipe, settings = recipe_of(model), SETTINGS[model](**values).check()
    hardware = choose_hardware(precision=given["precision"])
    text = prepare_text(settings, recipe.tokenizer_class)
    batches = batch_source(settings, text)
    ranks = ranks_of(given["processes"])
    built, task = build_task(recipe, settings, hardware, text, batches, {}, ranks)
    loop, stop = TrainingLoop(task, settings, hardware, folder, 10**6, ranks), StopRequest()

    def step() -> None:
        loop._step(stop)
        loop._pending.clear()

    serve_child(ranks, step)
    count = matrices(built.model)
    if name.endswith("coherence on"):
        count += built.model.lm_head.weight.numel() + shape.width**2  # the second prediction and its adapter
    flops = flops_per_token(count, settings.num_layers, shape.width, shape.context)
    return Contender(step, built.model.num_parameters(), flops, batches.tokens_per_batch)


def nanogpt(shape: Shape, precision: str, folder: Path) -> Contender:
    """nanoGPT's model, optimizer and loss."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=shape.context,
        vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        dropout=0.0,
        bias=True,
    )
    model = module.GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")

    def loss(inputs: Any, targets: Any) -> Any:
        return model(inputs, targets)[1]

    return plain_loop(model, optimizer, loss, shape, precision)


def litgpt(shape: Shape, precision: str, folder: Path) -> Contender:
    """litgpt's GPT-NeoX at GPT-2's shape: rotary positions, an output matrix of its own, its own loss."""
    import torch

    sys.path.append(str(folder))
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=shape.context,
        padded_vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        intermediate_size=shape.ff_dim,
        parallel_residual=False,
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
    )
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss(inputs: Any, targets: Any) -> Any:
        return chunked_cross_entropy(model(inputs), targets, chunk_size=0)

    return plain_loop(model, optimizer, loss, shape, precision)


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

    flops = flops_per_token(matrices(model), shape.layers, shape.width, shape.context)
    return Contender(step, sum(p.numel() for p in model.parameters()), flops, shape.batch * shape.context)


def huggingface(shape: Shape, precision: str, folder: Path) -> Contender:
    """``transformers.Trainer`` with ``GPT2LMHeadModel``, its own optimizer and collator; dropout off as elsewhere."""
    import threading

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    ids = torch.randint(shape.vocab, (64 * shape.batch, shape.context), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class TakesTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=shape.batch,
        max_steps=10**6,
        bf16=precision == "bf16",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[TakesTurns()])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()

    flops = flops_per_token(matrices(model), shape.layers, shape.width, shape.context)
    return Contender(step, model.num_parameters(), flops, shape.batch * shape.context)


def products_alone(shape: Shape, precision: str, processes: int = 1) -> Contender:
    """What model 1's step multiplies, forward and backward, and nothing else: how fast a step could be if norms,
    activations, softmax over the vocabulary, optimizer and all else were free."""
    import torch
    import torch.nn.functional as F

    from mvlm_core.training.cross_entropy import rows_at_a_time

    width, heads = shape.width, shape.heads
    ranks = ranks_of(processes)
    batch = shape.batch // ranks.world
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
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
        ranks.wait()

    serve_child(ranks, step)
    count = output.numel() + sum(weight.numel() for weight in weights)
    flops = flops_per_token(count, shape.layers, width, shape.context)
    return Contender(step, count, flops, batch * ranks.world * shape.context)


def ranks_of(processes: int) -> Any:
    """This process alone, or forked into ``processes`` that share each batch."""
    from mvlm_core.training.cpu_workers import fork
    from mvlm_core.training.distributed import ALONE

    return fork(processes) if processes > 1 else ALONE


def serve_child(ranks: Any, step: Callable[[], None]) -> None:
    """A child of several processes makes steps for as long as the parent does, and ends with it."""
    if ranks.is_main:
        return
    try:
        while True:
            step()
    finally:
        ranks.end()


def random_batches(shape: Shape):
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab, (16, shape.batch, shape.context + 1), generator=generator)
    while True:
        for batch in tokens:
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def serve(text: str) -> None:
    """One contender: says what it is, then makes as many steps as each line of its input asks for."""
    given = json.loads(text)
    name, shape, precision = given["name"], Shape(**given["shape"]), given["precision"]
    set_process_environment()

    import torch

    from mvlm_core.hardware import choose_hardware
    from mvlm_core.monitor import peak_memory

    hardware = choose_hardware(precision=precision)
    if name in PEERS:  # as they come, on as many threads
        torch.set_num_threads(hardware.threads)
    else:
        hardware.apply()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with tempfile.TemporaryDirectory() as folder:
        if name == "nanoGPT":
            contender = nanogpt(shape, precision, Path(given["nanogpt"]))
        elif name == "litgpt":
            contender = litgpt(shape, precision, Path(given["litgpt"]))
        elif name == PRODUCTS:
            contender = products_alone(shape, precision, given["processes"])
        elif name == "transformers.Trainer":
            contender = huggingface(shape, precision, Path(folder))
        else:
            contender = ours(name, shape, Path(folder), given)
        before = peak_memory()
        for _ in range(WARM_UP):
            contender.step()
        facts = {key: value for key, value in asdict(replace(contender, step=None)).items() if key != "step"}
        print(json.dumps(facts | {"before": before}), file=answers, flush=True)
        for line in sys.stdin:
            seconds = []
            for _ in range(int(line)):
                started = time.perf_counter()
                contender.step()
                seconds.append(time.perf_counter() - started)
            print(json.dumps({"seconds": seconds, "peak": peak_memory()}), file=answers, flush=True)
        os._exit(0)  # a trainer that still waits for its turn would keep the process


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


class Process:
    """A contender's process."""

    def __init__(self, name: str, shape: Shape, options: argparse.Namespace, label: str | None = None) -> None:
        self.name, self.seconds, self.peak = label or name, [], 0
        given = {"name": name, "shape": asdict(shape), "precision": options.precision}
        given |= {option: str(vars(options)[option]) for option in GIVEN_PEERS.values()}
        given["data_dir"] = str(options.data_dir.absolute())
        given["processes"] = options.processes
        job = json.dumps(given)
        command = [sys.executable, "-m", "benchmarks.performance.throughput", "--serve", job]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=REPOSITORY_ROOT
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.name} ended: {self.log.read()[-2000:]}")
        return json.loads(line)

    def turn(self, steps: int) -> None:
        with suppress(BrokenPipeError):  # of one that ended its answer tells
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        answer = self._answer()
        self.seconds.append(statistics.median(answer["seconds"]))
        self.peak = answer["peak"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def contenders(shape: Shape, options: argparse.Namespace) -> list[tuple[str, Shape, str]]:
    """Name, shape and label of each process."""
    if options.contexts:
        tokens = shape.batch * shape.context
        shapes = [replace(shape, context=context, batch=max(1, tokens // context)) for context in options.contexts]
        return [(name, one, f"{name}, context {one.context:,}") for name in CONTENDERS[:2] for one in shapes]
    names = [name for name in CONTENDERS if name not in GIVEN_PEERS or vars(options)[GIVEN_PEERS[name]]]
    return [(name, shape, name) for name in names if not options.only or name in options.only]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of turns; returns each contender's figures."""
    from mvlm_core.hardware import choose_hardware

    choose_hardware(precision=options.precision).apply()
    shape = SHAPES[options.shape]
    if options.batch_size:
        shape = replace(shape, batch=options.batch_size)
    if options.context:
        shape = replace(shape, context=options.context)
    processes: list[Process] = []
    try:
        for name, of_its_own, label in contenders(shape, options):
            processes.append(Process(name, of_its_own, options, label))
            print(f"{label}: ready", file=sys.stderr, flush=True)
        peaks = []
        for _ in range(options.rounds):
            peaks.append(matmul_peak(options.precision))
            for process in processes:
                process.turn(options.steps)
        peak = statistics.median(peaks)
        found = {}
        for process in processes:
            facts, seconds = process.facts, statistics.median(process.seconds)
            rates = [facts["tokens_per_step"] / s for s in process.seconds]
            flops = facts["flops_per_token"] * facts["tokens_per_step"] / seconds
            found[process.name] = facts | {
                "tokens_per_second": statistics.median(rates),
                "least": min(rates),
                "most": max(rates),
                "flops_per_second": flops,
                "share_of_peak": flops / peak,
                "peak_memory": process.peak,
                "step_memory": process.peak - facts["before"],
                "rounds": process.seconds,
            }
        return {"shape": asdict(shape), "precision": options.precision, "matmul_peak": peak, "contenders": found}
    finally:
        for process in processes:
            process.close()


def table(result: dict[str, Any]) -> str:
    contenders = result["contenders"]
    first = next(iter(contenders.values()))
    lines = ["| contender | parameters | tokens/s (least … most) | ratio | GFLOP/s | of the peak | memory, MB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, one in contenders.items():
        # Paired by round: what the machine did in a round met both.
        paired = [theirs / mine for mine, theirs in zip(one["rounds"], first["rounds"], strict=True)]
        scale = first["tokens_per_step"] / one["tokens_per_step"]
        ratio = statistics.median(paired) / scale
        rate = f"{one['tokens_per_second']:,.0f} ({one['least']:,.0f} … {one['most']:,.0f})"
        lines.append(
            f"| {name} | {one['parameters']:,} | {rate} | {ratio:.2f} "
            f"| {one['flops_per_second'] / 1e9:.0f} | {one['share_of_peak']:.0%} "
            f"| {one['peak_memory'] / 1e6:,.0f} ({one['step_memory'] / 1e6:+,.0f} by steps) |"
        )
    lines.append("")
    lines.append(f"{result['precision']}, {result['shape']}; matrix product {result['matmul_peak'] / 1e9:.0f} GFLOP/s.")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(part) for part in text.split(",")]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu", help="[default cpu]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all of them [default fp32]")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender [default 7]")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn [default 3]")
    parser.add_argument("--batch_size", type=int, help="sequences a step [default: the shape's]")
    parser.add_argument("--context", type=int, help="tokens a sequence [default: the shape's]")
    parser.add_argument(
        "--contexts",
        type=numbers,
        help="our two models alone, at each of these contexts, with commas between",
    )
    parser.add_argument("--only", type=lambda text: text.split(";"), help="these contenders, with semicolons between")
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="text of our two")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="that share each batch of our two; their memory is then the first one's alone [default 1]",
    )
    parser.add_argument("--nanogpt", type=Path, help="folder of nanoGPT's model.py")
    parser.add_argument("--litgpt", type=Path, help="folder of the package litgpt and what it needs")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--serve", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    problems = [f"--{name} must be at least 1" for name in ("rounds", "steps", "processes") if vars(options)[name] < 1]
    problems += [f"--contexts {context}: must be at least 2" for context in options.contexts or () if context < 2]
    if options.nanogpt and not (options.nanogpt / "model.py").is_file():
        problems.append(f"--nanogpt {options.nanogpt}: has no model.py")
    if options.litgpt and not (options.litgpt / "litgpt" / "model.py").is_file():
        problems.append(f"--litgpt {options.litgpt}: has no package litgpt")
    if problems:
        raise UserError(problems)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    set_process_environment()
    if options.serve:
        serve(options.serve)
        return 0
    result = measure(options)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
