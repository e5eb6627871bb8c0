"""Are loss, gradients and cached decoding right on a device? Both models beside plain references on the CPU.

Every weight is random and none is zero, so that no part of a model can be left out unseen; the text is real, heads are
64 wide. The references share no code with what they judge: transformers' own GPT-2 with eager attention for model 1,
``simone_reference`` for model 2. They run in float64, and twice more with the rounding of float32 and of bf16: how far
that alone moves each figure, times ``FACTOR``, is what a device may differ by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
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
from mvlm_core.hardware import ATTENTION_BACKENDS, Hardware
from mvlm_core.training.preparation import prepare_text

# Beside the measured rounding: sums in another order, and the rounding of what stands between the products.
FACTOR = 6.0
HEAD_WIDTH, SEQUENCES = 64, 2
PROGRESS = 0.2  # of the run: coherence still weighs something
# Parts that a preset may leave out are judged too.
EVERYTHING = {"policy_head": True, "memory_head": True, "alignment_weight": 0.5, "coherence_weight": 0.3}
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")  # of PyTorch's own attention
FUSED = r"\w*(?:_scaled_dot_product|flash|fmha|sdpa)\w*"  # in names of kernels and of PyTorch's operations
NOT_HERE = "not on this machine"
Losses = tuple[Tensor, Tensor]  # the loss, and logits [batch, seq, vocab]
Row = tuple[str, dict[str, Any], bool | None]  # of what, its figures, and whether they are right where that is judged


class RoundedProducts(TorchDispatchMode):
    """Matrix products as in bf16, of rounded factors and with a rounded result, by float32, which is quick."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            return function(*args, **(kwargs or {}))
        rounded = [part.bfloat16().float() if isinstance(part, Tensor) else part for part in args]
        return function(*rounded, **(kwargs or {})).bfloat16().float()


def gpt2_reference(w: dict[str, Tensor], model: Any, _s: Any, ids: Tensor, targets: Tensor, _: Tensor) -> Losses:
    """transformers' own forward pass of the fresh ``model`` with these weights."""
    model.set_attn_implementation("eager")
    logits = functional_call(model, {name.removeprefix("model."): tensor for name, tensor in w.items()}, (ids,)).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


def simone_reference(w: dict[str, Tensor], _: Any, s: Any, ids: Tensor, targets: Tensor, alignment: Tensor) -> Losses:
    """Loss and logits of Enhanced SIM-ONE as its description has it: slow and plain. Shapes are [batch, seq, ...]."""
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
        """What stands at the token before; zero at the first."""
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
    """A loss, logits ``[batch, seq, vocab]`` and gradients by parameter; or, of each, by how much they may be off."""

    loss: float
    logits: Any
    gradients: dict[str, Any]


class Case:
    """One model with random weights, two sequences of real text, and what is right for them.

    Args:
        preset: whose text, vocabulary and width are taken.
        layers, tokens: of the model, and of each sequence.
        places: the settings that say where text and cache are.
    """

    def __init__(self, name: str, preset: str, layers: int, tokens: int, places: dict[str, Any]) -> None:
        self.name, self.recipe = name, recipe_of(name)
        width = HEAD_WIDTH * max(2, SETTINGS[name](preset=preset).hidden_dim // HEAD_WIDTH)
        values = {"hidden_dim": width, "num_heads": width // HEAD_WIDTH, "ff_dim": 4 * width, "num_layers": layers}
        values |= {"max_length": tokens, "batch_size": SEQUENCES, "dropout": 0.0, "quiet": True, "preset": preset}
        values |= EVERYTHING if name == "simone_enhanced" else {}
        self.settings = SETTINGS[name](**values, **places).check()
        text = prepare_text(self.settings, self.recipe.tokenizer_class)
        self.tokenizer, batch = text.tokenizer, text.batches.batch(0)
        alignment = torch.rand(batch.inputs.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        self.batch = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), alignment
        self.right = self._reference(torch.float64)
        self.limits = {"fp32": self._limits(self._reference(torch.float32))}
        with RoundedProducts():
            rounded = self._reference(torch.float32)
        self.limits["bf16"] = self._limits(rounded)

    def build(self, hardware: Hardware) -> tuple[Any, nn.ModuleDict]:
        """The model as a run builds it, with this case's weights, and all its modules, on the device."""
        torch._dynamo.reset()  # a few models of one class, and it would give up compiling
        built = self.recipe.build(self.settings, self.tokenizer, hardware)
        modules, generator = nn.ModuleDict(built.modules), torch.Generator().manual_seed(0)
        for weight in modules.parameters():
            # Vectors vary around 1 or 0, where they start.
            middle, spread = (0.0, weight.shape[1] ** -0.5) if weight.ndim > 1 else (weight.data.mean().round(), 0.3)
            weight.data = middle + spread * torch.randn(weight.shape, generator=generator)
        if self.name == "simone_enhanced":
            built.model.pointer.sentinel.data.fill_(-(HEAD_WIDTH**0.5))  # it starts where hardly a token is copied
        return built, modules.to(hardware.device).train()

    def _reference(self, dtype: torch.dtype) -> Answer:
        built, modules = self.build(Hardware("cpu", "", 0, "fp32", "sdpa", False, 1, {}))
        weights = {name: w.detach().to(dtype).requires_grad_() for name, w in modules.named_parameters()}
        ids, targets, alignment = self.batch
        loss, logits = REFERENCES[self.name](weights, built.model, self.settings, ids, targets, alignment.to(dtype))
        gradients = zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
        return Answer(float(loss.detach()), logits.detach().double(), {name: g.double() for name, g in gradients})

    def _limits(self, rounded: Answer) -> Answer:
        """``FACTOR`` times how far off the reference is when it rounds, relatively.

        One number may be off by little by chance. So the loss may be off as its tokens are, the logits as those of the
        worst token, and a gradient at least as the median of all.
        """
        exact = self.right.gradients
        off = {name: float((g - exact[name]).norm() / exact[name].norm()) for name, g in rounded.gradients.items()}
        median = sorted(off.values())[len(off) // 2]
        nll = [F.cross_entropy(answer.logits.mT, self.batch[1], reduction="none") for answer in (rounded, self.right)]
        loss = FACTOR * float((nll[0] - nll[1]).square().mean().sqrt() / nll[1].mean())
        gradients = {name: FACTOR * max(error, median) for name, error in off.items()}
        return Answer(loss, FACTOR * worst_token(rounded.logits, self.right.logits), gradients)

    def judge_training(self, hardware: Hardware) -> Row:
        """Loss, and every gradient by its direction (cosine similarity) and its length (ratio of norms)."""
        built, modules = self.build(hardware)
        with hardware.autocast():
            total = built.loss(*(part.to(hardware.device) for part in self.batch), PROGRESS).total
        total.backward()
        limits, tensors = self.limits[hardware.precision], {}
        for name, weight in modules.named_parameters():
            exact = self.right.gradients[name]
            found = torch.zeros_like(exact) if weight.grad is None else weight.grad.double().cpu()
            cosine = float(F.cosine_similarity(found.flatten(), exact.flatten(), dim=0))
            ratio = float(found.norm() / exact.norm())
            # What is off by a small share is turned by that angle at most: 1 − cosine is half the angle's square.
            off = max(max(0.0, 2 - 2 * cosine) ** 0.5, abs(ratio - 1)) / limits.gradients[name]
            off = off if math.isfinite(ratio) else math.inf
            tensors[name] = {"its share of limit": off, "1 − cosine": 1 - cosine, "norm ratio": ratio}
        loss = float(total.detach())
        loss_off = abs(loss / self.right.loss - 1) / limits.loss
        worst = max(tensors, key=lambda name: tensors[name]["its share of limit"])
        figures = {"loss": loss, "share of limit": loss_off, "worst gradient": worst, **tensors[worst]}
        right = bool(loss_off <= 1 and tensors[worst]["its share of limit"] <= 1)
        return f"{self.name}, {words(hardware)}", figures | {"tensors": tensors}, right

    @torch.no_grad()
    def judge_decoding(self, hardware: Hardware) -> Row:
        """Logits of a whole pass, and of one by a cache: a short prompt, single tokens, several at once."""
        model, ids = self.build(hardware)[0].model.eval(), self.batch[0].to(hardware.device)
        limit, right, cache, at = self.limits[hardware.precision].logits, self.right.logits, None, 0
        with hardware.autocast():
            errors = [worst_token(model(ids, use_cache=False).logits, right) / limit]
            for count in (2, 1, 1, 1, 4, 1, ids.shape[1] - 12, 1, 1):  # early on, each token read weighs much
                output = model(ids[:, at : at + count], past_key_values=cache, use_cache=True)
                cache, at = output.past_key_values, at + count
                errors.append(worst_token(output.logits, right[:, at - count : at]) / limit)
        figures = {"share of limit": errors[0], "with a cache": max(errors[1:]), "limit": limit}
        return f"{self.name}, {words(hardware)}", figures, all(error <= 1 for error in errors)


def worst_token(found: Tensor, right: Tensor) -> float:
    """The length of the difference, in lengths of what is right, of the token where that is largest."""
    return float(((found.double().cpu() - right).norm(dim=-1) / right.norm(dim=-1)).max())


def words(hardware: Hardware) -> str:
    return f"{hardware.precision}, {hardware.attention_backend}{', compiled' if hardware.compile else ''}"


def cases(o: Any) -> list[Case]:
    """One of each model, of the first preset's width; made when first asked for."""
    for name in list(SETTINGS)[len(o.cases) :]:
        preset = SETTINGS[name](preset=o.presets[0])
        layers, tokens = o.layers or min(preset.num_layers, 4), o.tokens or preset.max_length
        o.cases.append(Case(name, preset.preset, layers, tokens, o.places))
    return o.cases


def precisions(o: Any) -> list[Hardware]:
    """In float32 and in what a run uses (or ``--precision``), not compiled."""
    kinds = dict.fromkeys(("fp32", o.precision or o.hardware.precision))
    return [replace(o.hardware, precision=kind, compile=False, loss_kernel="blocks") for kind in kinds]


def loss_and_gradients(o: Any) -> Iterator[Row]:
    for case in cases(o):
        for hardware in precisions(o):
            yield case.judge_training(hardware)
            if o.hardware.compile:
                yield case.judge_training(replace(hardware, compile=True, loss_kernel=o.hardware.loss_kernel))


def cached_decoding(o: Any) -> Iterator[Row]:
    for case in cases(o):
        yield from map(case.judge_decoding, precisions(o))


def attention_backends(o: Any) -> Iterator[Row]:
    """Each of them, and each kernel of PyTorch's own, with what really ran."""
    hardware = precisions(o)[-1]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (hardware.device == "cuda")
    for case in cases(o):
        known = ATTENTION_BACKENDS[1:] if case.name == "simone_enhanced" else ["sdpa"]
        ways = {name: (replace(hardware, attention_backend=name), nullcontext()) for name in known}
        ways |= {f"sdpa by {name}": (hardware, sdpa_kernel(getattr(SDPBackend, name))) for name in KERNELS}
        for way, (one, only) in ways.items():
            try:
                with profile(activities=activities) as ran, only:
                    _, figures, right = case.judge_training(one)
            except (RuntimeError, ImportError) as error:  # not installed, or no kernel for such tensors
                yield f"{case.name}, {way}", {NOT_HERE: str(error).splitlines()[0]}, None
                continue
            names = {event.key for event in ran.key_averages()}
            fused = sorted({found for name in names for found in re.findall(FUSED, name)})
            ran_as = {"ran": ", ".join(fused) or "matrix products and softmax"}
            yield f"{case.name}, {way}, {one.precision}", ran_as | figures, right
