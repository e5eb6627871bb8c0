"""Check loss, gradients and cached decoding on a device against simple CPU references, for both models.

All weights are random and non-zero, so that every part of a model affects the result; the text is real, and the head
dimension is 64. The references share no code with the tested implementations: transformers' GPT-2 with eager attention
for model 1, ``simone_reference`` for model 2. They run in float64, and again with float32 and bf16 rounding: the error
of that rounding alone, times ``FACTOR``, is the tolerance for the device.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.experiments.runner import SETTINGS, recipe_of
from benchmarks.performance.gpu_session import NOT_HERE, Row, Session
from benchmarks.performance.gpu_speed import loop_of
from mvlm_core.hardware import ATTENTION_BACKENDS, OPTIONAL_BACKENDS, Hardware
from mvlm_core.training.distillation import DISTILLATION_WEIGHT
from mvlm_core.training.preparation import prepare_text

# Allows for a different summation order and for rounding between the matrix products.
FACTOR = 6.0
HEAD_WIDTH, SEQUENCES = 64, 2
PROGRESS = 0.2  # fraction of the run completed; the coherence weight is still above 0
# Also check parts that a preset may disable.
EVERYTHING = {"policy_head": True, "memory_head": True, "alignment_weight": 0.5, "coherence_weight": 0.3}
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")  # PyTorch's attention kernels
FUSED = r"\w*(?:_scaled_dot_product|flash|fmha|sdpa)\w*"  # matches names of kernels and of PyTorch operators
Losses = tuple[Tensor, Tensor]  # the loss, and logits [batch, seq, vocab]


class RoundedProducts(TorchDispatchMode):
    """Emulate bf16 matrix products in float32, which is faster on a CPU: round the factors and the result."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            return function(*args, **(kwargs or {}))
        rounded = [part.bfloat16().float() if isinstance(part, Tensor) else part for part in args]
        return function(*rounded, **(kwargs or {})).bfloat16().float()


def gpt2_reference(w: dict[str, Tensor], model: Any, _s: Any, ids: Tensor, targets: Tensor, _: Tensor) -> Losses:
    """Run transformers' forward pass of ``model`` with these weights."""
    model.set_attn_implementation("eager")
    logits = functional_call(model, {name.removeprefix("model."): tensor for name, tensor in w.items()}, (ids,)).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


def simone_reference(w: dict[str, Tensor], _: Any, s: Any, ids: Tensor, targets: Tensor, alignment: Tensor) -> Losses:
    """Reference implementation of Enhanced SIM-ONE's loss and logits: simple and slow. Shapes are [batch, seq, ...]."""
    (batch, seq), half = ids.shape, HEAD_WIDTH // 2
    dtype = w["model.embed_tokens.weight"].dtype
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (torch.arange(seq)[:, None] * frequencies)[:, None]  # [seq, 1, half]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    causal = torch.arange(seq)[:, None] >= torch.arange(seq)
    odd = torch.arange(HEAD_WIDTH) % 2 == 1

    def norm(x: Tensor, gain: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{gain}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def before(x: Tensor) -> Tensor:
        """Shift right by one token; the first becomes zero."""
        return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)

    x, first_value = norm(w["model.embed_tokens.weight"][ids], "model.embed_norm"), None
    for layer in (f"model.layers.{number}" for number in range(s.num_layers)):
        entering = x
        y, attention = norm(x, f"{layer}.attention_norm"), f"{layer}.attention"
        query, key, value = (linear(y, f"{attention}.{p}_proj").view(batch, seq, -1, HEAD_WIDTH) for p in "qkv")
        query, key = (rotate(norm(p, f"{attention}.{n}_norm")) for p, n in ((query, "q"), (key, "k")))
        key = torch.where(odd, before(key), key)
        if first_value is None:
            first_value = value
        else:
            share = linear(y, f"{attention}.memory_head").sigmoid()[..., None]
            value = (1 - share) * value + share * first_value
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / HEAD_WIDTH**0.5
        probabilities = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        read = torch.einsum("bhqk,bkhd->bqhd", probabilities, value)
        read = read * 2 * linear(y[..., :12], f"{attention}.policy_head").sigmoid()[..., None]
        x = x + linear(read.flatten(2), f"{attention}.o_proj")
        y, feed = norm(x, f"{layer}.feed_forward_norm"), f"{layer}.feed_forward"
        y = y + w[f"{layer}.previous_gain"] * before(value.flatten(2))
        x = x + linear(F.silu(linear(y, f"{feed}.gate_proj")) * linear(y, f"{feed}.up_proj"), f"{feed}.down_proj")
    x = norm(x, "model.final_norm")
    output = w.get("model.lm_head.weight", w["model.embed_tokens.weight"])
    logits = x @ output.T
    y = norm(entering, "model.pointer.norm")
    query, key = (norm(linear(y, f"model.pointer.{n}_proj"), f"model.pointer.{n}_norm") for n in "qk")
    scores = (query @ before(key).mT / HEAD_WIDTH**0.5).masked_fill(~causal, -torch.inf)
    sentinel = linear(y, "model.pointer.policy_head") + w["model.pointer.sentinel"] + HEAD_WIDTH**0.5
    pointed, share = torch.cat((scores, sentinel), -1).softmax(-1).split([seq, 1], -1)
    mixed = share * logits.softmax(-1) + pointed @ F.one_hot(ids, output.shape[0]).to(dtype)
    nll = -mixed.gather(-1, targets[..., None]).squeeze(-1).log()
    loss = ((s.accuracy_weight + s.alignment_weight * alignment) * nll).mean()
    ahead = (x + linear(x, "loss.ahead"))[:, :-1] @ output.T
    weight = s.coherence_weight * (1 - PROGRESS / s.coherence_until)
    return loss + weight * F.cross_entropy(ahead.flatten(0, 1), targets[:, 1:].flatten()), mixed.log()


REFERENCES = {"mvlm_gpt2": gpt2_reference, "simone_enhanced": simone_reference}


@dataclass(frozen=True)
class Answer:
    """Loss, logits ``[batch, seq, vocab]`` and gradients by parameter; or the tolerance of each."""

    loss: float
    logits: Any
    gradients: dict[str, Any]


class Case:
    """One model with random weights, two sequences of real text, and the reference results.

    Args:
        preset: preset that defines text, vocabulary and width.
        layers, tokens: number of layers, and sequence length.
        places: data_dir and cache_dir settings.
        is_student: whether the loss includes distillation from a teacher, which has other random weights.
    """

    def __init__(
        self, name: str, preset: str, layers: int, tokens: int, places: dict[str, Any], *, is_student: bool = False
    ) -> None:
        self.name, self.recipe, self.is_student = name, recipe_of(name), is_student
        self.label = f"{name}, student" if is_student else name
        width = HEAD_WIDTH * max(2, SETTINGS[name](preset=preset).hidden_dim // HEAD_WIDTH)
        values = {"hidden_dim": width, "num_heads": width // HEAD_WIDTH, "ff_dim": 4 * width, "num_layers": layers}
        values |= {"max_length": tokens, "batch_size": SEQUENCES, "dropout": 0.0, "quiet": True, "preset": preset}
        values |= EVERYTHING if name == "simone_enhanced" else {}
        self.settings = SETTINGS[name](**values, **places).check()
        text = prepare_text(self.settings, self.recipe.tokenizer_class)
        self.tokenizer, batch = text.tokenizer, text.batches.batch(0)
        alignment = torch.rand(batch.inputs.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        self.batch = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), alignment
        self.reference = self._reference(torch.float64)
        self.limits = {"fp32": self._limits(self._reference(torch.float32))}
        with RoundedProducts():
            rounded = self._reference(torch.float32)
        self.limits["bf16"] = self._limits(rounded)

    def build(self, hardware: Hardware, seed: int = 0) -> tuple[Any, nn.ModuleDict]:
        """Build the model as a run does, with random weights; return it and its modules on the device."""
        torch._dynamo.reset()  # dynamo stops compiling after several models of the same class
        built = self.recipe.build(self.settings, self.tokenizer, hardware)
        modules, generator = nn.ModuleDict(built.modules), torch.Generator().manual_seed(seed)
        for weight in modules.parameters():
            # Vectors are drawn around their initial value, 1 or 0.
            center, spread = (0.0, weight.shape[1] ** -0.5) if weight.ndim > 1 else (weight.data.mean().round(), 0.3)
            weight.data = center + spread * torch.randn(weight.shape, generator=generator)
        if self.name == "simone_enhanced":
            built.model.pointer.sentinel.data.fill_(-(HEAD_WIDTH**0.5))  # the initial value would hardly copy any token
        return built, modules.to(hardware.device).train()

    def _reference(self, dtype: torch.dtype) -> Answer:
        weights, loss, logits = self._reference_loss(dtype, seed=0)
        if self.is_student:
            teacher = self._reference_loss(dtype, seed=1)[2].detach().softmax(-1)
            distillation = -(teacher * logits.log_softmax(-1)).sum(-1).mean()
            loss = (1 - DISTILLATION_WEIGHT) * loss + DISTILLATION_WEIGHT * distillation
        gradients = zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
        return Answer(float(loss.detach()), logits.detach().double(), {name: g.double() for name, g in gradients})

    def _reference_loss(self, dtype: torch.dtype, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the weights of ``build`` with this seed, and their reference loss and logits."""
        built, modules = self.build(Hardware("cpu", "", 0, "fp32", "sdpa", False, 1, {}), seed)
        weights = {name: w.detach().to(dtype).requires_grad_() for name, w in modules.named_parameters()}
        ids, targets, alignment = self.batch
        return weights, *REFERENCES[self.name](weights, built.model, self.settings, ids, targets, alignment.to(dtype))

    def _limits(self, rounded: Answer) -> Answer:
        """Return ``FACTOR`` times the relative error of the rounded reference.

        A single error can be small by chance. So the loss tolerance uses the RMS error of the tokens, the logits the
        worst token, and each gradient at least the median error of all gradients.
        """
        off = relative_errors(rounded.gradients, self.reference.gradients)
        median = sorted(off.values())[len(off) // 2]
        nll = [
            F.cross_entropy(answer.logits.mT, self.batch[1], reduction="none") for answer in (rounded, self.reference)
        ]
        loss = FACTOR * float((nll[0] - nll[1]).square().mean().sqrt() / nll[1].mean())
        gradients = {name: FACTOR * max(error, median) for name, error in off.items()}
        return Answer(loss, FACTOR * worst_token(rounded.logits, self.reference.logits), gradients)

    def check_training(self, hardware: Hardware) -> Row:
        """Check the loss, and each gradient by cosine similarity and norm ratio."""
        teacher = self.build(hardware, seed=1)[0].model.eval().requires_grad_(False) if self.is_student else None
        built, modules = self.build(hardware)
        with hardware.autocast():
            total = built.loss(*(part.to(hardware.device) for part in self.batch), PROGRESS, teacher).total
        total.backward()
        limits, tensors = self.limits[hardware.precision], {}
        for name, weight in modules.named_parameters():
            exact = self.reference.gradients[name]
            gradient = torch.zeros_like(exact) if weight.grad is None else weight.grad.double().cpu()
            cosine = float(F.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0))
            ratio = float(gradient.norm() / exact.norm())
            # A small relative error rotates a vector by at most that angle, and 1 − cosine is half the angle squared.
            off = max(max(0.0, 2 - 2 * cosine) ** 0.5, abs(ratio - 1)) / limits.gradients[name]
            off = off if math.isfinite(ratio) else math.inf
            tensors[name] = {"its share of limit": off, "1 − cosine": 1 - cosine, "norm ratio": ratio}
        loss = float(total.detach())
        loss_off = abs(loss / self.reference.loss - 1) / limits.loss
        worst = max(tensors, key=lambda name: tensors[name]["its share of limit"])
        figures = {"loss": loss, "share of limit": loss_off, "worst gradient": worst, **tensors[worst]}
        passed = bool(loss_off <= 1 and tensors[worst]["its share of limit"] <= 1)
        return f"{self.label}, {words(hardware)}", figures | {"tensors": tensors}, passed

    @torch.no_grad()
    def check_decoding(self, hardware: Hardware) -> Row:
        """Check the logits of a full pass and of cached decoding with a short prompt, single tokens and chunks."""
        model, ids = self.build(hardware)[0].model.eval(), self.batch[0].to(hardware.device)
        limit, exact, cache, at = self.limits[hardware.precision].logits, self.reference.logits, None, 0
        with hardware.autocast():
            errors = [worst_token(model(ids, use_cache=False).logits, exact) / limit]
            for count in (2, 1, 1, 1, 4, 1, ids.shape[1] - 12, 1, 1):  # early tokens have the most influence
                output = model(ids[:, at : at + count], past_key_values=cache, use_cache=True)
                cache, at = output.past_key_values, at + count
                errors.append(worst_token(output.logits, exact[:, at - count : at]) / limit)
        figures = {"share of limit": errors[0], "with a cache": max(errors[1:]), "limit": limit}
        return f"{self.label}, {words(hardware)}", figures, all(error <= 1 for error in errors)


def worst_token(logits: Tensor, exact: Tensor) -> float:
    """Return the largest relative error of any token's logits, by norm."""
    return float(((logits.double().cpu() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def words(hardware: Hardware) -> str:
    return f"{hardware.precision}, {hardware.attention_backend}{', compiled' if hardware.compile else ''}"


def checked_layers(session: Session, name: str) -> int:
    """Return the number of layers of the checked models: ``--layers``, or the first preset's, at most 4."""
    return session.options.layers or min(SETTINGS[name](preset=session.options.presets[0]).num_layers, 4)


def cases(session: Session, *, students: bool = False) -> list[Case]:
    """Return a case per model, with the first preset's width; created on first use."""
    options = session.options
    for name in SETTINGS:
        if (name, students) not in session.cases:
            preset = SETTINGS[name](preset=options.presets[0])
            layers, tokens = checked_layers(session, name), options.tokens or preset.max_length
            case = Case(name, preset.preset, layers, tokens, session.places, is_student=students)
            session.cases[name, students] = case
    return [session.cases[name, students] for name in SETTINGS]


def precisions(session: Session) -> list[Hardware]:
    """Return uncompiled hardware settings for float32 and for a run's precision (or ``--precision``)."""
    kinds = dict.fromkeys(("fp32", session.options.precision or session.hardware.precision))
    return [replace(session.hardware, precision=kind, compile=False, loss_kernel="blocks") for kind in kinds]


def loss_and_gradients(session: Session) -> Iterator[Row]:
    own = session.hardware
    for case in [*cases(session), *cases(session, students=True)]:
        for hardware in precisions(session):
            yield case.check_training(hardware)
            if own.compile:
                yield case.check_training(replace(hardware, compile=True, loss_kernel=own.loss_kernel))


def compiled_gradients(session: Session) -> Iterator[Row]:
    """Check each gradient of the compiled model at the run's own batch size, where the compiler generates other kernels
    than for the few rows of ``loss_and_gradients``."""
    own = session.hardware
    for name in SETTINGS:
        if not own.compiles:
            yield name, {NOT_HERE: "nothing is compiled"}, None
            continue
        uncompiled = replace(own, compile=False, loss_kernel="blocks")
        exact = full_size_gradients(session, name, replace(uncompiled, precision="fp32"))
        rounded = relative_errors(full_size_gradients(session, name, uncompiled), exact)
        errors = relative_errors(full_size_gradients(session, name, own), exact)
        # In fp32 nothing is rounded but the order of the sums.
        least = max(statistics.median(rounded.values()), 1e-4)
        limits = {weight: FACTOR * max(error, least) for weight, error in rounded.items()}
        worst = max(errors, key=lambda weight: errors[weight] / limits[weight])
        figures = {"share of limit": errors[worst] / limits[worst], "worst gradient": worst, "error": errors[worst]}
        yield f"{name}, {words(own)}", figures, errors[worst] <= limits[worst]


def full_size_gradients(session: Session, name: str, hardware: Hardware) -> dict[str, Tensor]:
    """Return the gradients of the first batch of a preset, with random weights and ``--layers`` layers."""
    shape = {"num_layers": checked_layers(session, name), "num_models": 1, "dropout": 0.0}
    loop = loop_of(session, name, session.options.presets[0], hardware, **shape)
    modules, generator = nn.ModuleDict(loop.task.modules), torch.Generator().manual_seed(0)
    for weight in modules.parameters():  # some are initialized with zeros, which would hide errors
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator).to(weight.device)
    loop.gradients.run_micro_batch(0, 0, loop.settings.batch_size, PROGRESS)
    return {key: weight.grad.double().cpu() for key, weight in modules.named_parameters() if weight.grad is not None}


def relative_errors(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each gradient by norm; infinite if it is missing or not finite."""
    errors = {}
    for name, expected in exact.items():
        error = float((gradients[name] - expected).norm() / expected.norm()) if name in gradients else math.inf
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def cached_decoding(session: Session) -> Iterator[Row]:
    for case in cases(session):
        yield from map(case.check_decoding, precisions(session))


def attention_backends(session: Session) -> Iterator[Row]:
    """Check each backend and each of PyTorch's attention kernels, and report which kernel ran."""
    hardware = precisions(session)[-1]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (hardware.device == "cuda")
    for case in cases(session):
        known = ATTENTION_BACKENDS[1:] if case.name == "simone_enhanced" else ["sdpa"]
        ways = {name: (replace(hardware, attention_backend=name), nullcontext()) for name in known}
        ways |= {f"sdpa by {name}": (hardware, sdpa_kernel(getattr(SDPBackend, name))) for name in KERNELS}
        for way, (one, only) in ways.items():
            if way in OPTIONAL_BACKENDS and (one.device, one.precision) != ("cuda", "bf16"):
                yield f"{case.name}, {way}", {NOT_HERE: "used on a GPU in bf16 only"}, None
                continue
            try:
                with profile(activities=activities) as ran, only:
                    _, figures, passed = case.check_training(one)
            except (RuntimeError, ImportError) as error:  # not installed, or no kernel for these tensors
                yield f"{case.name}, {way}", {NOT_HERE: str(error).splitlines()[0]}, None
                continue
            names = {event.key for event in ran.key_averages()}
            fused = sorted({kernel for name in names for kernel in re.findall(FUSED, name)})
            ran_as = {"ran": ", ".join(fused) or "matrix products and softmax"}
            yield f"{case.name}, {way}, {one.precision}", ran_as | figures, passed


CHECKS: dict[str, Callable[[Session], Iterator[Row]]] = {
    "loss_and_gradients": loss_and_gradients,
    "compiled_gradients": compiled_gradients,
    "cached_decoding": cached_decoding,
    "attention_backends": attention_backends,
}
