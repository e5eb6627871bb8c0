"""Parameter groups, AdamW and Muon."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mvlm_core.training.distributed import SINGLE_RANK, Ranks

# Newton–Schulz iteration of Muon (Jordan et al. 2024, github.com/KellerJordan/Muon): a quintic whose slope at zero is
# large, so that five iterations bring every singular value near 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MIN_ASPECT_RATIO = 1.5  # from here on, iterating on the square Gram matrix is cheaper
# AdamW's betas for all parameters, and for those not trained by Muon: in runs of a few hundred to a few thousand steps,
# less momentum and a longer second-moment average beat the usual 0.9 and 0.95 (benchmarks/LOG.md, 2026-11-29).
_BETAS, _BETAS_BESIDE_MUON = (0.8, 0.99), (0.5, 0.98)


@torch.no_grad()
def orthogonalize(matrices: Tensor, iterations: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices to ``matrices`` ``[count, rows, columns]``.

    Each iteration multiplies ``x`` from the left by ``p = a + b·gram + c·gram²`` with ``gram = x·xᵀ``. These factors
    commute, so for wide matrices only the small Gram matrix is iterated, as ``p·gram·p``, and ``x`` is multiplied by
    the product of all ``p`` at the end: the same result with a quarter less work. Squaring the spectrum needs float32
    precision.

    Args:
        dtype: of the iteration, by default that of the matrices. bfloat16 is precise enough; it is several times faster
            with hardware support and about a hundred times slower without.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(dtype or matrices.dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype != torch.bfloat16 and x.shape[-1] >= _MIN_ASPECT_RATIO * x.shape[-2]:
        gram, product = x @ x.mT, None
        for number in range(iterations):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
            if number < iterations - 1:
                gram = factor @ gram @ factor
        x = product @ x
    else:
        for _ in range(iterations):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon: orthogonalized momentum for matrices; matrices of the same shape are batched.

    Follows Jordan et al. (2024): Nesterov momentum, step scaled by sqrt(max(1, outputs / inputs)), decoupled weight
    decay. A parameter is ``[outputs, inputs]``, or ``[inputs, outputs]`` in groups with ``transposed``. In groups with
    ``parts``, its outputs are those of several matrices, such as Q, K and V: as one they would share a spectrum.

    Args:
        params: parameters, or groups of them.
        dtype: dtype of the orthogonalization, see ``orthogonalize``.
    """

    def __init__(
        self,
        params: list[Tensor] | list[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = {"transposed": False, "parts": 1}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay} | layout)
        self.dtype = dtype
        self.ranks: Ranks = SINGLE_RANK

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is ever evaluated
        """Take one step; a no-op if the attribute ``found_inf`` is 1, as in PyTorch's own fused optimizers."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for parameters in shapes.values():
                self._step_same_shape(parameters, group, found_inf)

    def _step_same_shape(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        decay = 1 - group["lr"] * group["weight_decay"]
        if found_inf is not None:
            # Decided on the device, without synchronization: replacing the gradient with the buffer leaves the buffer
            # unchanged; a decay of 1 and an update of 0 leave the weights unchanged. A good step is not affected.
            bad = found_inf.bool()
            gradients = [torch.where(bad, b, g) for b, g in zip(buffers, gradients, strict=True)]
            decay = torch.full_like(found_inf, decay, dtype=parameters[0].dtype).masked_fill_(bad, 1.0)
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        lookahead = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        matrices = (
            (lookahead.mT if group["transposed"] else lookahead).unflatten(-2, (group["parts"], -1)).flatten(0, 1)
        )
        outputs, inputs = matrices.shape[-2:]
        updates = self._orthogonalize_batch(matrices).unflatten(0, (-1, group["parts"])).flatten(1, 2)
        updates = updates.mT if group["transposed"] else updates
        if found_inf is not None:
            updates = updates * (1 - found_inf).to(updates.dtype)
        torch._foreach_mul_(parameters, decay)
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * max(1.0, outputs / inputs) ** 0.5)

    def _orthogonalize_batch(self, matrices: Tensor) -> Tensor:
        """Orthogonalize matrices that all ranks hold; each rank computes its share, followed by an all-gather."""
        if self.ranks.world_size == 1:
            return orthogonalize(matrices, dtype=self.dtype)
        per_rank = -(-len(matrices) // self.ranks.world_size)
        padded = torch.zeros_like(matrices[:1]).repeat(per_rank, 1, 1)  # the last ranks may have fewer, or none
        part = matrices[self.ranks.rank * per_rank :][:per_rank]
        if len(part):
            padded[: len(part)] = orthogonalize(part, dtype=self.dtype)
        return self.ranks.all_gather(padded)[: len(matrices)]


# Per-parameter state of each optimizer.
_STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


class Optimizers:
    """Common interface to AdamW alone, or to Muon for matrices with AdamW for the rest.

    Each parameter group has its own peak learning rate (``peak_lr``); ``set_scale`` scales all of them.
    """

    def __init__(self, parts: list[torch.optim.Optimizer], names: dict[Tensor, str]) -> None:
        self.parts, self._names = parts, names
        for group in self.groups():
            group["peak_lr"] = group["lr"]

    def shard_over(self, ranks: Ranks) -> None:
        """Split the work of a step across ranks, instead of repeating it on each."""
        for part in self.parts:
            if isinstance(part, Muon):
                part.ranks = ranks

    def groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups() for parameter in group["params"]]

    def set_scale(self, scale: float) -> float:
        """Set every group's learning rate to ``scale`` times its peak; return the first group's, for logging."""
        for group in self.groups():
            group["lr"] = group["peak_lr"] * scale
        return self.groups()[0]["lr"]

    def step(self, found_inf: Tensor | None = None) -> None:
        """Take one step with every optimizer.

        Args:
            found_inf: 0-dim float32 on the parameters' device; if it is 1, weights and state do not change.
        """
        for part in self.parts:
            part.found_inf = found_inf  # type: ignore[attr-defined]  # torch's own protocol, see GradScaler
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @property
    def state_bytes(self) -> int:
        """Bytes of the moments of all parameters, which exist after the first step."""
        return sum(
            p.nbytes * sum(quantity != "step" for quantity in _STATE[type(part)])
            for part in self.parts
            for group in part.param_groups
            for p in group["params"]
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the full state as tensors named ``<parameter>/<quantity>``."""
        return {
            f"{self._names[parameter]}/{quantity}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for quantity, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what ``state_tensors`` returned: nothing, or the state of every parameter.

        Raises:
            ValueError: a tensor is missing, has the wrong shape, or belongs to no parameter.
        """
        expected = {
            f"{self._names[parameter]}/{quantity}": (part, parameter, quantity)
            for part in self.parts
            for group in part.param_groups
            for parameter in group["params"]
            for quantity in _STATE[type(part)]
        }
        if tensors and (mismatched := sorted(tensors.keys() ^ expected.keys())):
            raise ValueError(f"optimizer state does not match the model: {', '.join(mismatched[:3])}")
        for part in self.parts:
            part.state.clear()
        for name, value in tensors.items():
            part, parameter, quantity = expected[name]
            shape = torch.Size() if quantity == "step" else parameter.shape
            if value.shape != shape:
                raise ValueError(f"optimizer state {name} has shape {list(value.shape)}, not {list(shape)}")
            part.state[parameter][quantity] = value.to(parameter.device)


def build_optimizers(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    kind: str,
    learning_rate: float,
    weight_decay: float,
    adamw_learning_rate: float | None = None,
    embedding_names: tuple[str, ...] = (),
    transposed: bool = False,
    qkv_name: str | None = None,
    muon_dtype: torch.dtype | None = None,
) -> Optimizers:
    """Build the optimizers for named parameters.

    Args:
        kind: "adamw": AdamW for everything at ``learning_rate``. "muon": Muon for matrices at ``learning_rate``; AdamW
            for embeddings, heads of a few rows and vectors at ``adamw_learning_rate``.
        weight_decay: for matrices, not vectors; with "muon" not for embeddings either.
        embedding_names: substrings of the names of embedding and output matrices, which never use Muon.
        transposed: whether matrices are stored as ``[inputs, outputs]``, for Muon.
        qkv_name: substring of the names of matrices that hold those of Q, K and V, for Muon.
        muon_dtype: dtype of Muon's orthogonalization.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    names: dict[Tensor, str] = {parameter: name for name, parameter in named}
    vectors = [p for _, p in named if p.ndim < 2]
    matrices = [(name, p) for name, p in named if p.ndim >= 2]
    if kind == "adamw":
        decayed = [p for _, p in matrices]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return Optimizers([_adamw(groups, learning_rate, _BETAS)], names)

    def uses_muon(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and min(p.shape) >= 32 and not any(part in name for part in embedding_names)

    hidden: dict[int, list[Tensor]] = {1: [], 3: []}  # by the number of matrices that each parameter holds
    for name, p in matrices:
        if uses_muon(name, p):
            hidden[3 if qkv_name is not None and qkv_name in name else 1].append(p)
    others = [p for name, p in matrices if not uses_muon(name, p)]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}]
    adamw = _adamw(groups, adamw_learning_rate or learning_rate, _BETAS_BESIDE_MUON)
    layouts = [{"params": found, "parts": parts, "transposed": transposed} for parts, found in hidden.items() if found]
    muon = [Muon(layouts, lr=learning_rate, weight_decay=weight_decay, dtype=muon_dtype)] if layouts else []
    return Optimizers([*muon, adamw], names)


def _adamw(groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=True)
