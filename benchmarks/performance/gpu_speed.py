"""Measure training speed on a device: real steps and their breakdown, effect of compilation and micro-batch size."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.experiments.runner import SETTINGS, recipe_of
from benchmarks.performance.gpu_session import NOT_HERE, FinishedRun, Row, Session
from mvlm_core.hardware import Hardware, compiled_so_far
from mvlm_core.monitor import peak_memory, reset_peak_memory
from mvlm_core.signals import StopRequest
from mvlm_core.training.checkpoint import checkpoint_folder, save_checkpoint
from mvlm_core.training.cost import step_cost
from mvlm_core.training.cross_entropy import linear_cross_entropy
from mvlm_core.training.loop import TrainingLoop
from mvlm_core.training.preparation import prepare_text
from mvlm_core.training.task import Run, build_task

# Dense bf16 peak in FLOP/s by a substring of the device name, from the vendors' data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
PEAKS |= {"L40": 181e12, "L4": 121e12}
MICRO_BATCHES = (8, 16, 32, 64, 128)


class NeverStops(StopRequest):
    def defer(self) -> None:
        """Leave this process's signal handlers unchanged."""


def loop_of(
    session: Session, name: str, preset: str, hardware: Hardware | None = None, **overrides: Any
) -> TrainingLoop:
    """Create the training loop of a preset in a new folder, without starting it."""
    steps = session.options.steps
    values = {"preset": preset, "output_dir": tempfile.mkdtemp(dir=session.scratch), "max_steps": steps, "quiet": True}
    values |= {"eval_interval": steps, "checkpoint_interval": steps // 2, "keep_checkpoints": 9}
    recipe, settings = recipe_of(name), SETTINGS[name](**values | session.places | overrides).check()
    torch._dynamo.reset()  # dynamo stops compiling after several models of the same class
    text = prepare_text(settings, recipe.tokenizer_class)
    run = Run(recipe, settings, hardware or session.hardware)
    return TrainingLoop(run, build_task(run, text))


def step_of(loop: TrainingLoop) -> Callable[[], None]:
    """Return a function that runs one training step."""
    stop = NeverStops()
    return lambda: (loop.step(stop), loop.step_log.discard())


def once(work: Callable[[], Any]) -> float:
    """Time one call in seconds, synchronizing the device."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def timed(session: Session, work: Callable[[], Any]) -> float:
    """Return the median time of a call, repeated for ``--seconds`` after a warm-up call."""
    seconds, until = [once(work)], time.perf_counter() + session.options.seconds
    while len(seconds) < 4 or time.perf_counter() < until:
        seconds.append(once(work))
    return statistics.median(seconds[1:])


def shares(session: Session, flops: float, precision: str) -> dict[str, float]:
    """Return FLOP/s and their share of the data-sheet peak and of the measured matmul speed, where known."""
    sheet = device_peak(session.hardware.name) if precision == "bf16" else None
    peaks = {"of data sheet": sheet, "of matrix product": session.matmul_peak.get(precision)}
    return {"TFLOP/s": flops / 1e12} | {name: flops / peak for name, peak in peaks.items() if peak}


def device_peak(name: str) -> float | None:
    """Data-sheet peak of a whole GPU in FLOP/s; None if unknown, or for a MIG slice of it."""
    if "MIG" in name:
        return None
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def products_and_clock(session: Session) -> Iterator[Row]:
    """Measure matrix products as the upper bound, and the clock and power during them."""
    device = session.hardware.device
    for precision, dtype, cpu_size in (("fp32", torch.float32, 1024), ("bf16", torch.bfloat16, 192)):
        size = cpu_size if device == "cpu" else 8192
        factor = torch.randn(size, size, device=device).to(dtype)
        flops = 2 * size**3 / timed(session, lambda factor=factor: factor @ factor)
        yield f"{precision}, {size} × {size}", shares(session, flops, precision), None
        session.matmul_peak[precision] = flops
    figures: dict[str, Any] = {NOT_HERE: "no GPU"}
    if device == "cuda":
        for _ in range(500):  # keep the GPU busy while reading NVML
            factor @ factor
        figures = {"MHz": torch.cuda.clock_rate(), "W": torch.cuda.power_draw() / 1000, "°C": torch.cuda.temperature()}
    yield f"clock and power, {session.hardware.name}", figures, None


def real_steps(session: Session) -> Iterator[Row]:
    """Train each model for ``--steps`` steps and break down the step time."""
    hardware = session.hardware
    for preset, name in itertools.product(session.options.presets, SETTINGS):
        loop, case = loop_of(session, name, preset), f"{name}, {preset}, {hardware.precision}"
        seconds = once(lambda loop=loop: loop.run(NeverStops()))
        history = loop.history()
        rate = statistics.median(record["tokens_per_second"] for record in history[len(history) // 2 :])
        flops = step_cost(recipe_of(name).build, loop.settings, hardware, 1).flops_per_token * rate
        figures = {"steps": len(history), "tokens/s": rate} | shares(session, flops, hardware.precision)
        figures |= {"GB": loop.peak_memory() / 1e9, "total s": seconds, "loss": history[-1]["train_loss"]}
        spent = loop.state.spent
        figures |= {"s of evaluations": spent.evaluation_seconds, "s of checkpoints": spent.checkpoint_seconds}
        yield case, figures, None
        weights = {key: value.cpu().clone() for key, value in loop.task.weights().items()}
        session.finished[preset, name] = FinishedRun(loop.checkpoints.root, history, weights)
        yield f"{case}, ms", {part: 1000 * value for part, value in parts(session, loop).items()}, None


def parts(session: Session, loop: TrainingLoop) -> dict[str, float]:
    """Time each part of a step, an evaluation and a checkpoint, in seconds."""
    task, hardware, count = loop.task, loop.hardware, loop.state.micro_batch
    batch = task.batches.batch(0, 0, count)
    given = [torch.from_numpy(part).to(hardware.device) for part in (batch.inputs, batch.targets, batch.weights)]
    hidden = torch.randn(*batch.inputs.shape, loop.settings.hidden_dim, device=hardware.device, requires_grad=True)
    weights, kernel = task.optimizers.parameters(), hardware.loss_kernel

    def backward(loss: Callable[[], Any]) -> float:
        def work() -> None:
            with hardware.autocast():
                total = loss()
            total.backward()

        return timed(session, work)

    teacher = deepcopy(task.model).eval().requires_grad_(False)
    whole, of_student = (backward(lambda t=t: task.loss(*given, 1.0, t).total) for t in (None, teacher))
    loss = backward(lambda: linear_cross_entropy(hidden, task.model.lm_head.weight, given[1], kernel=kernel)[0])
    optimizer = timed(session, lambda: (torch.nn.utils.clip_grad_norm_(weights, 1.0), task.optimizers.step()))
    data, state = timed(session, lambda: task.batches.batch(1, 0, count)), task.state_tensors()
    saved = once(lambda: save_checkpoint(session.scratch / "timed", loop.state.step, state, {}))
    seconds = {"body": whole - loss, "loss": loss, "body and loss with a teacher": of_student, "optimizer": optimizer}
    return seconds | {"data": data, "evaluation": once(task.evaluate), "checkpoint": saved}


def resume(session: Session) -> Iterator[Row]:
    """Resume from the checkpoint in the middle and check whether losses and weights are bit-identical."""
    step = session.options.steps // 2
    for (preset, name), run in session.finished.items():
        loop = loop_of(session, name, preset, resume_from=str(checkpoint_folder(run.checkpoints, step)))
        loop.run(NeverStops())
        again = loop.history()
        pairs = zip(run.history[-len(again) :], again, strict=True)
        off = max(abs(a["train_loss"] - b["train_loss"]) for a, b in pairs)
        same = off == 0 and all(value.cpu().equal(run.weights[key]) for key, value in loop.task.weights().items())
        figures = {"from step": step, "largest loss difference": off, "bitwise equal": "yes" if same else "no"}
        yield f"{name}, {preset}", figures, None


def compiled_or_not(session: Session) -> Iterator[Row]:
    own, preset = session.hardware, session.options.presets[0]
    if not own.compile:
        yield own.name, {NOT_HERE: own.reasons["compile"]}, None
        return
    for name in SETTINGS:
        for hardware in (own, replace(own, compile=False, loss_kernel="blocks")):
            step, (known, spent) = step_of(loop_of(session, name, preset, hardware)), compiled_so_far()
            first, (graphs, seconds) = once(step), compiled_so_far()
            later, (all_graphs, _) = timed(session, step), compiled_so_far()
            figures = {"ms per step": 1000 * later, "s of first step": first, "s of compilation": seconds - spent}
            figures |= {"graphs": graphs - known, "recompiles": all_graphs - graphs}
            yield f"{name}, {'compiled' if hardware.compile else 'not compiled'}", figures, None


def micro_batches(session: Session) -> Iterator[Row]:
    """Measure speed and memory of each micro-batch size, up to the first that does not fit."""
    device, preset = session.hardware.device, session.options.presets[0]
    for name in SETTINGS:
        for size in MICRO_BATCHES:
            loop = loop_of(session, name, preset, batch_size=size)
            reset_peak_memory(device)
            seconds = timed(session, step_of(loop))
            if loop.state.micro_batch < size:  # halved after running out of memory, as in a run
                yield f"{name}, {size}", {"out of memory": ""}, None
                break
            speed = loop.task.batches.tokens_per_batch / seconds
            del loop  # free its memory before the next one
            yield f"{name}, {size}", {"tokens/s": speed, "GB": peak_memory(device) / 1e9}, None


def all_reduce(session: Session, world: int | None = None, megabytes: int = 500) -> Iterator[Row]:
    """All-reduce this many megabytes over all GPUs (or ``world`` CPU processes); check the sum, measure bandwidth."""
    backend = "gloo" if world else "nccl"
    world = world or (torch.cuda.device_count() if session.hardware.device == "cuda" else 0)
    if world < 2:
        yield "NCCL", {NOT_HERE: "no two GPUs"}, None
        return
    arguments = world, backend, megabytes, str(session.scratch)
    torch.multiprocessing.spawn(_reduce, arguments, nprocs=world, daemon=True)
    sums, seconds = torch.load(session.scratch / "reduced.pt", weights_only=True)
    speed = {"ms": 1000 * seconds, "GB/s": 2 * (world - 1) / world * megabytes / 1000 / seconds}
    yield f"{backend}, {world} × {megabytes} MB", speed, sums == [world, world]


def _reduce(rank: int, world: int, backend: str, megabytes: int, folder: str) -> None:
    """Run one rank; rank 0 saves the result."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    values = torch.ones(megabytes * 250_000, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(values)
    sums = [float(values.min()), float(values.max())]
    seconds = once(lambda: [dist.all_reduce(values) for _ in range(10)]) / 10
    if rank == 0:
        torch.save((sums, seconds), f"{folder}/reduced.pt")
    dist.destroy_process_group()


CHECKS: dict[str, Callable[[Session], Iterator[Row]]] = {
    "products_and_clock": products_and_clock,
    "real_steps": real_steps,
    "resume": resume,
    "all_reduce": all_reduce,
    "compiled_or_not": compiled_or_not,
    "micro_batches": micro_batches,
}
