"""Measure the speed of a training step, interleaved with other training codebases on the same machine.

    python -m benchmarks.performance.throughput                      both models, and transformers.Trainer with GPT-2
    python -m benchmarks.performance.throughput --nanogpt FOLDER         and nanoGPT (FOLDER contains its model.py)
    python -m benchmarks.performance.throughput --litgpt FOLDER          and litgpt (pip install --target FOLDER litgpt)
    python -m benchmarks.performance.throughput --shape 124m             GPT-2's shape, vocabulary and context

Each contender runs in its own process. They take turns of a few steps, so that other load affects all of them. A step
includes batch, forward, backward, clipping and optimizer. The table shows medians over rounds. FLOP/s count the forward
and backward pass, not the optimizer; their share is relative to the speed of a matrix product, measured between rounds.
All peers train a GPT-2 and are assigned model 1's FLOPs per token.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.experiments.runner import SETTINGS, recipe_of
from mvlm_core.errors import UserError, run_main
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import CACHE_DIR, DEFAULT_DATA_DIR, TrainingSettings

WARM_UP = 2  # untimed steps that allocate memory
CONTEXT = multiprocessing.get_context("spawn")
Contender = tuple[Callable[[], None], int]  # a function that runs one step, and the number of parameters
_steps: list[Callable[[], None]] = []  # in a contender's process: its step function


# Settings of model 1 and its peers, and model 2's overrides of them. "cpu" is the preset, but its baseline uses GPT-2's
# own feed-forward width, which the peers cannot change.
SHAPES = {
    "cpu": (
        {"hidden_dim": 128, "num_layers": 7, "num_heads": 2, "ff_dim": 512, "vocab_size": 4096, "batch_size": 8},
        {"num_layers": 4, "output_head": "own"},
    ),
    "124m": (
        {"hidden_dim": 768, "num_layers": 12, "num_heads": 12, "ff_dim": 3072, "vocab_size": 50257, "batch_size": 2},
        {"vocab_size": 32000, "output_head": "tied"},
    ),
}
CONTEXTS = {"cpu": 256, "124m": 1024}
# Name → model and overrides.
OURS = {
    "mvlm_gpt2": ("mvlm_gpt2", {}),
    "simone_enhanced": ("simone_enhanced", {"coherence_weight": 0.0}),
    "simone_enhanced with coherence": ("simone_enhanced", {"coherence_weight": 0.3}),
}


def settings_of(name: str, options: argparse.Namespace) -> TrainingSettings:
    """Return the settings of one of ``OURS``; a peer gets model 1's."""
    model, overrides = OURS.get(name, OURS["mvlm_gpt2"])
    shape, model_2_shape = SHAPES[options.shape]
    values = {"preset": "cpu", "quiet": True, "max_steps": 10**6, "precision": options.precision}
    values |= shape | {"max_length": CONTEXTS[options.shape]}
    values |= {"data_dir": str(options.data_dir.absolute()), "cache_dir": str(CACHE_DIR)}
    values |= {"output_dir": f"{options.folder}/{name}"}
    if options.batch_size:
        values["batch_size"] = options.batch_size
    if model == "simone_enhanced":
        values |= model_2_shape | overrides
    return SETTINGS[model](**values).check()


def ours(name: str, settings: TrainingSettings, options: argparse.Namespace) -> Contender:
    """Set up one of our models, on one or several processes."""
    from benchmarks.forked_ranks import fork_ranks
    from mvlm_core.hardware import choose_hardware
    from mvlm_core.signals import StopRequest
    from mvlm_core.training.distributed import SINGLE_RANK, init_ranks
    from mvlm_core.training.loop import TrainingLoop
    from mvlm_core.training.preparation import prepare_text
    from mvlm_core.training.task import Run, build_task

    recipe, ranks = recipe_of(OURS[name][0]), SINGLE_RANK
    text = prepare_text(settings, recipe.tokenizer_class)
    if options.processes > 1:
        fork_ranks(options.processes, Path(tempfile.mkdtemp(dir=options.folder)))
        ranks = init_ranks("cpu")
    run = Run(recipe, settings, choose_hardware(precision=options.precision), ranks)
    task = build_task(run, text)
    loop, stop = TrainingLoop(run, task), StopRequest()

    def step() -> None:
        loop.step(stop)
        loop.step_log.discard()

    if not ranks.is_main:  # other ranks run steps until their parent exits
        try:
            while True:
                step()
        finally:
            os._exit(0)
    return step, task.model.num_parameters()


def nanogpt(s: TrainingSettings, options: argparse.Namespace) -> Contender:
    """Set up nanoGPT's model, optimizer and loss."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", options.nanogpt / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sizes = {"block_size": s.max_length, "vocab_size": s.vocab_size, "n_layer": s.num_layers, "n_head": s.num_heads}
    model = module.GPT(module.GPTConfig(**sizes, n_embd=s.hidden_dim, dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    return plain_loop(model, optimizer, lambda inputs, targets: model(inputs, targets)[1], s)


def litgpt(s: TrainingSettings, options: argparse.Namespace) -> Contender:
    """Set up litgpt's GPT-NeoX at GPT-2's shape: rotary embeddings, untied output matrix, litgpt's own loss."""
    import torch

    sys.path.append(str(options.litgpt))  # a folder given by the user, with litgpt's dependencies
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    sizes = {"block_size": s.max_length, "padded_vocab_size": s.vocab_size, "n_layer": s.num_layers}
    sizes |= {"n_head": s.num_heads, "n_embd": s.hidden_dim, "intermediate_size": s.ff_dim}
    layer = {"parallel_residual": False, "mlp_class_name": "GptNeoxMLP", "gelu_approximate": "tanh"}
    model = GPT(Config(**sizes, **layer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss(inputs: Any, targets: Any) -> Any:
        return chunked_cross_entropy(model(inputs), targets, chunk_size=0)

    return plain_loop(model, optimizer, loss, s)


def plain_loop(model: Any, optimizer: Any, loss: Callable[..., Any], s: TrainingSettings) -> Contender:
    """Train like nanoGPT's train.py and litgpt's pretrain.py, with prepared batches."""
    import torch

    size = (16, s.batch_size, s.max_length + 1)
    tokens = torch.randint(s.vocab_size, size, generator=torch.Generator().manual_seed(0))
    batches = itertools.cycle([(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in tokens])
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=s.precision == "bf16")

    def step() -> None:
        inputs, targets = next(batches)
        with context:
            value = loss(inputs, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters())


def huggingface(s: TrainingSettings, _options: argparse.Namespace) -> Contender:
    """Set up ``transformers.Trainer`` with ``GPT2LMHeadModel``, default optimizer and collator, and no dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    sizes = {"vocab_size": s.vocab_size, "n_positions": s.max_length, "n_embd": s.hidden_dim, "n_layer": s.num_layers}
    dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, n_head=s.num_heads))
    ids = torch.randint(s.vocab_size, (64 * s.batch_size, s.max_length), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class TakesTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    length = {"per_device_train_batch_size": s.batch_size, "max_steps": s.max_steps}
    precision = {"bf16": s.precision == "bf16", "use_cpu": True}
    arguments = TrainingArguments(output_dir=s.output_dir, **quiet, **length, **precision)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[TakesTurns()])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()

    return step, sum(p.numel() for p in model.parameters())


# Peers run with their default settings. Two of them need a folder: name → its option, and a file it must contain.
PEERS = {"transformers.Trainer": huggingface, "nanoGPT": nanogpt, "litgpt": litgpt}
GIVEN_PEERS = {"nanoGPT": ("nanogpt", "model.py"), "litgpt": ("litgpt", "litgpt/model.py")}
CONTENDERS = {name: partial(ours, name) for name in OURS} | PEERS


def prepare(name: str, settings: TrainingSettings, options: argparse.Namespace) -> tuple[int, int]:
    """Child process: set up a contender; return its parameter count and the peak memory before its first step."""
    set_process_environment()
    os.dup2(2, 1)  # keep the libraries' output out of the table

    import torch

    from mvlm_core.hardware import choose_hardware
    from mvlm_core.monitor import peak_memory

    hardware = choose_hardware(precision=options.precision)
    if name in PEERS:  # default settings, with the same number of threads
        torch.set_num_threads(hardware.threads)
    else:
        hardware.apply()
    step, parameters = CONTENDERS[name](settings, options)
    before = peak_memory()
    for _ in range(WARM_UP):
        step()
    _steps.append(step)
    return parameters, before


def turn(steps: int) -> tuple[float, int]:
    """Child process: run these steps; return their median time in seconds and the peak memory so far."""
    from mvlm_core.monitor import peak_memory

    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        _steps[0]()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), peak_memory()


def available(options: argparse.Namespace) -> list[str]:
    """Return all contenders but the peers whose folder is not given."""
    return [name for name in CONTENDERS if name not in GIVEN_PEERS or vars(options)[GIVEN_PEERS[name][0]]]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds; return each contender's figures."""
    from mvlm_core.hardware import choose_hardware
    from mvlm_core.training.cost import step_cost
    from mvlm_core.training.plan import matmul_flops

    hardware = choose_hardware(precision=options.precision)
    hardware.apply()
    facts, pools, peaks, contenders = {}, {}, [], {}
    with ExitStack() as stack:
        # Other ranks may still write to their file store while the folder is removed.
        options.folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        for name in options.contenders:
            settings = settings_of(name, options)
            recipe = recipe_of(OURS.get(name, OURS["mvlm_gpt2"])[0])
            per_token = step_cost(recipe.build, settings, hardware, 1).flops_per_token
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, CONTEXT))
            facts[name] = per_token, *pools[name].submit(prepare, name, settings, options).result()
            print(f"{name}: ready", file=sys.stderr, flush=True)
        turns: dict[str, list[tuple[float, int]]] = {name: [] for name in pools}
        for _ in range(options.rounds):
            peaks.append(matmul_flops(options.precision, 2048))
            for name, pool in pools.items():
                turns[name].append(pool.submit(turn, options.steps).result())
    peak, tokens = statistics.median(peaks), settings.batch_size * settings.max_length
    for name, (per_token, parameters, before) in facts.items():
        rounds, memory = [seconds for seconds, _ in turns[name]], turns[name][-1][1]
        flops = per_token * tokens / statistics.median(rounds)
        contenders[name] = {
            "parameters": parameters,
            "flops_per_token": per_token,
            "tokens_per_second": tokens / statistics.median(rounds),
            "rounds": rounds,
            "peak_memory": memory,
            "step_memory": memory - before,
            "flops_per_second": flops,
            "share_of_peak": flops / peak,
        }
    result = {"shape": options.shape, "tokens_per_step": tokens, "precision": options.precision}
    return result | {"matmul_peak": peak, "contenders": contenders}


def table(result: dict[str, Any]) -> str:
    first, rows = next(iter(result["contenders"].values())), []
    for name, one in result["contenders"].items():
        # Paired by round, because machine load in a round affects both.
        ratio = statistics.median(base / own for own, base in zip(one["rounds"], first["rounds"], strict=True))
        rates = [result["tokens_per_step"] / seconds for seconds in one["rounds"]]
        rate = command.spread(rates, "{:,.0f}", statistics.median)
        flops = (f"{one['flops_per_second'] / 1e9:.0f}", f"{one['share_of_peak']:.0%}")
        memory = f"{one['peak_memory'] / 1e6:,.0f} ({one['step_memory'] / 1e6:+,.0f} by steps)"
        rows.append((name, f"{one['parameters']:,}", rate, f"{ratio:.2f}", *flops, memory))
    columns = ("contender", "parameters", "tokens/s (min … max)", "ratio", "GFLOP/s", "share of peak", "memory, MB")
    end = f"{result['precision']}, {result['tokens_per_step']:,} tokens per step, shape {result['shape']}"
    end += f"; matrix product {result['matmul_peak'] / 1e9:.0f} GFLOP/s."
    return f"{command.table(columns, rows)}\n\n{end}"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command.new_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), default="cpu", help="[default cpu]")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="for all contenders [default fp32]")
    add("--rounds", type=int, default=7, help="turns per contender [default 7]")
    add("--steps", type=int, default=3, help="steps per turn [default 3]")
    add("--batch_size", type=int, help="sequences per step [default: the shape's]")
    add("--only", metavar="CONTENDERS", help=f"comma-separated contenders, from: {', '.join(CONTENDERS)}")
    add("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="corpus for our two models")
    workers = "data-parallel CPU workers of our two models; memory is then that of the first only [default 1]"
    add("--processes", type=int, default=1, help=workers)
    add("--nanogpt", type=Path, help="folder with nanoGPT's model.py")
    add("--litgpt", type=Path, help="folder with the litgpt package and its dependencies")
    options = parser.parse_args(arguments)
    problems = command.at_least_one(options, "rounds", "steps", "processes", "batch_size")
    for option, file in GIVEN_PEERS.values():
        if (folder := vars(options)[option]) and not (folder / file).is_file():
            problems.append(f"--{option} {folder}: contains no {file}")
    if problems:
        raise UserError(problems)
    options.contenders = command.parse_only(options.only, available(options))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    set_process_environment()
    result = measure(options)
    command.show(table(result), result, options)
    return 0


if __name__ == "__main__":
    run_main(main)
