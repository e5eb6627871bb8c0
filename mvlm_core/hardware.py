"""Choice of device, precision, attention kernel and compilation for this machine, with reasons.

Every choice is logged with its reason, so that no GPU run silently falls back to the CPU. Importing this module does
not import torch: entry scripts use it before they parse their arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from mvlm_core.errors import UserError
from mvlm_core.machine import (
    available_memory,
    available_threads,
    compiler_problem,
    cpu_has_bf16,
    cpu_name,
    cuda_state,
    nvidia_gpu_expected,
    nvidia_gpu_possible,
)

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
ATTENTION_BACKENDS = ("auto", "sdpa", "flash_attn", "xformers", "eager")
LOSS_KERNELS = ("auto", "blocks", "compiled")
REQUESTED = "requested"  # the reason for a choice that was not left to this module
SMALL_MODEL = 20_000_000  # parameters
# Settings that are arguments of `choose_hardware`.
HARDWARE_FLAGS = "device precision attention_backend loss_kernel no_mixed_precision no_compile deterministic".split()
CUBLAS_WORKSPACE = ":4096:8"  # one of the two values with which cuBLAS is deterministic, according to NVIDIA's manual
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
ALLOCATOR_ADVICE = "max_split_size_mb:512"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NO_BLOCK_IS_LARGER = 2**31 - 1
OPTIONAL_BACKENDS = {"flash_attn": "flash-attn", "xformers": "xformers"}

Result = TypeVar("Result")
log = logging.getLogger("mvlm")


@dataclass(frozen=True)
class Hardware:
    """Hardware and kernels that a run uses, with the reason for each choice."""

    device: str  # "cpu" | "cuda"
    name: str  # CPU or GPU name
    memory_bytes: int  # GPU memory, or RAM available to this process
    precision: str  # "fp32" | "bf16"; weights stay fp32 either way
    attention_backend: str  # "sdpa" | "flash_attn" | "xformers" | "eager"
    compile: bool
    threads: int
    reasons: dict[str, str]
    loss_kernel: str = "blocks"  # "blocks" | "compiled": see training/cross_entropy.py
    deterministic: bool = False  # on CUDA use only deterministic kernels; CPU kernels always are

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context manager for forward passes: bf16 autocast over fp32 weights, or no-op in fp32."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        import torch

        return torch.autocast(self.device, dtype=torch.bfloat16)

    def compiled(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Compile ``function`` as one graph with static shapes; return it unchanged if compilation is off."""
        if not self.compile:
            return function
        import torch

        torch.compiler.config.recompile_limit = 32  # layer kinds × (student, teacher) × batch sizes
        return torch.compile(function, fullgraph=True, dynamic=False)

    @property
    def compiles(self) -> bool:
        """Whether anything in the run is compiled."""
        return self.compile or self.loss_kernel == "compiled"

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def release(self) -> None:
        """Free the memory of models no longer used. Compiled graphs stay: another model of the same shape uses them."""
        import torch

        gc.collect()  # a training loop and its model refer to each other
        if self.device == "cuda":
            torch.cuda.empty_cache()

    @property
    def muon_dtype(self) -> Any:
        """The dtype in which Muon orthogonalizes: bfloat16 on a GPU or in a bf16 run, else float32."""
        import torch

        return torch.bfloat16 if self.device == "cuda" or self.precision == "bf16" else torch.float32

    def apply(self) -> None:
        """Apply the choice to torch's process-wide settings."""
        import torch

        torch.set_num_threads(self.threads)
        if self.device == "cuda":
            # TF32 for what autocast leaves in fp32; a no-op on GPUs older than Ampere.
            torch.set_float32_matmul_precision("high")
            # Hopper would use cuDNN's attention instead of the flash kernels. Its bf16 backward pass has open reports
            # of NaN gradients, which the loop would take for divergence.
            torch.backends.cuda.enable_cudnn_sdp(False)
            if self.deterministic:
                _use_deterministic_kernels()
        else:
            _keep_freed_memory()


def limit_decoding_threads(models: Iterable[Any]) -> None:
    """Decode small models on one CPU thread: their kernels are too short to parallelize (1.2 to 1.4 times the tokens/s
    at 1.9 million parameters, benchmarks/LOG.md)."""
    import torch

    if all(model.device.type == "cpu" and model.num_parameters() < SMALL_MODEL for model in models):
        torch.set_num_threads(1)


def _use_deterministic_kernels() -> None:
    """Make CUDA bitwise reproducible. Call before the first matmul, which fixes cuBLAS's workspace.

    With ``use_deterministic_algorithms``, the backward passes of flash and memory-efficient attention accumulate in a
    fixed order, cuDNN's attention is not chosen (ATen's attention_backward.cu and sdp_utils.cpp), and an operation
    without a deterministic kernel raises an error. The embedding's backward pass, which is not compiled, is sort-based
    (Embedding.cu). It also disables timing-based autotuning of the compiler, whose choices differ between processes.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    # This code always writes memory before reading it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, unless the user has set malloc options.

    By default, glibc returns large blocks to the system immediately, and they are faulted in again page by page:
    200,000 page faults per step at GPT-2's size, 4 % of its time (measured), and 2 % in small models. No effect with
    other C libraries.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _NO_BLOCK_IS_LARGER)
        mallopt(_M_TRIM_THRESHOLD, -1)


def compile_workers(processes: int) -> int:
    """Worker processes of torch's compiler in each of ``processes`` on this machine, which share its cores.

    At most 32, as by torch's own default (``torch/_inductor/config.py``).
    """
    return max(1, min(32, available_threads()[0] // processes))


def set_process_environment() -> None:
    """Set defaults for torch's allocator, compiler and OpenMP unless set by the user. Call before importing torch.

    Blocks above 512 MB are never split, so that the next step can reuse the large logits buffers. Waiting threads spin
    for some microseconds, then sleep (the spin count applies to libgomp, which PyTorch uses on Linux). A small model
    has thousands of parallel regions per step: if threads sleep immediately, a step takes 1.4 times as long on an idle
    machine; if they never sleep, eight times as long next to one busy process (benchmarks/LOG.md). The compiler would
    start a worker process per CPU of the host, even in a container limited to a few.
    """
    os.environ.setdefault(COMPILE_THREADS, str(compile_workers(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting, which still works
        os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR_ADVICE)


def choose_hardware(
    *,
    device: str = "auto",
    precision: str = "auto",
    attention_backend: str = "auto",
    no_mixed_precision: bool = False,
    no_compile: bool = False,
    loss_kernel: str = "auto",
    deterministic: bool = False,
) -> Hardware:
    """Choose hardware and kernels from the request, whose values are valid, and what is available.

    Raises:
        UserError: lists everything that was requested but is not available.
    """
    problems: list[str] = []
    if no_mixed_precision and precision == "bf16":
        problems.append("--precision bf16 and --no_mixed_precision contradict each other: use only one")
    if no_mixed_precision:
        precision = "fp32"

    why: dict[str, str] = {}
    device, why["device"] = _choose_device(device, problems)
    precision, why["precision"] = _choose_precision(precision, device, problems)
    if no_mixed_precision:
        why["precision"] = "--no_mixed_precision"
    attention_backend, why["attention_backend"] = _choose_attention(attention_backend, device, precision, problems)
    compiled, why["compile"] = _choose_compile(no_compile, device, attention_backend)
    loss_kernel, why["loss_kernel"] = _choose_loss_kernel(loss_kernel, compiled, no_compile, problems)
    why["deterministic"] = _why_deterministic(deterministic, device, attention_backend, problems)
    if problems:
        raise UserError(problems)
    threads, why["threads"] = available_threads()
    name, memory = _name_and_memory(device)
    return Hardware(
        device, name, memory, precision, attention_backend, compiled, threads, why, loss_kernel, deterministic
    )


def describe(hardware: Hardware) -> list[str]:
    """Format each choice with its reason, for the log."""
    reasons = hardware.reasons
    memory = f"{hardware.memory_bytes / 2**30:.1f} GiB"
    exact = hardware.device == "cpu" or hardware.deterministic
    return [
        f"device: {hardware.device}, {hardware.name}, {memory} ({reasons['device']})",
        f"precision: {hardware.precision} ({reasons['precision']})",
        f"attention: {hardware.attention_backend} ({reasons['attention_backend']})",
        f"compile: {'yes' if hardware.compile else 'no'} ({reasons['compile']})",
        f"loss: {hardware.loss_kernel} ({reasons['loss_kernel']})",
        f"deterministic: {'yes' if exact else 'no'} ({reasons['deterministic']})",
        f"CPU threads: {hardware.threads} ({reasons['threads']})",
    ]


def caution(hardware: Hardware, preset: str) -> str | None:
    """Warning about this run's hardware, or None."""
    if preset != "h200" or hardware.device != "cuda" or hardware.compile:
        return None
    return (
        f"THIS RUN IS NOT COMPILED ({hardware.reasons['compile']}): steps are slower, by an amount not measured "
        "yet; to measure it, run `python -m benchmarks.performance.gpu_check`"
    )


def missing_gpu(hardware: Hardware, preset: str, *, automatic: bool) -> str | None:
    """Say that a run would train on the CPU although it should use a GPU, and what to do; None if all is well.

    The h200 preset is made for a GPU; an automatically chosen preset should use the GPU that seems to be there.
    ``--device cpu`` allows both on the CPU.
    """
    expected = preset == "h200" or (automatic and nvidia_gpu_expected())
    if hardware.device == "cuda" or hardware.reasons["device"] == REQUESTED or not expected:
        return None
    return (
        f"--preset {'auto' if automatic else preset} would train on the CPU: {hardware.reasons['device']}; check that "
        "nvidia-smi lists the GPU, and that the driver and the torch build are compatible (bash setup_environment.sh "
        "checks both); to train on the CPU, use --device cpu, with --preset cpu for a small model"
    )


def compiled_so_far() -> tuple[int, float]:
    """Number of graphs compiled in this process so far and the seconds it took, including backward graphs."""
    from torch._dynamo.utils import calculate_time_spent, counters

    return counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]


def resolve_preset(preset: str, device: str | None = None) -> tuple[str, str]:
    """Resolve "auto" to the preset for ``--device`` on this machine and give the reason; return other names unchanged.

    Imports torch only if there may be a GPU, which keeps small commands fast.
    """
    if preset != "auto":
        return preset, REQUESTED
    if device == "cpu":
        return "cpu", "--device cpu"
    if not nvidia_gpu_possible():
        return "cpu", "no NVIDIA GPU found"
    usable, why = cuda_state()
    return ("h200", why) if usable else ("cpu", why)


def _choose_device(requested: str, problems: list[str]) -> tuple[str, str]:
    if requested == "cpu":
        return "cpu", REQUESTED
    usable, why = cuda_state()
    if requested == "cuda":
        if not usable:
            problems.append(f"--device cuda: {why}")
        return "cuda", REQUESTED
    if not usable and not nvidia_gpu_possible():
        why = "no NVIDIA GPU found"
    return ("cuda" if usable else "cpu"), why


def _choose_precision(requested: str, device: str, problems: list[str]) -> tuple[str, str]:
    if requested == "fp32":
        return "fp32", REQUESTED
    has_bf16, why = cpu_has_bf16() if device == "cpu" else _cuda_has_bf16()
    if requested == "bf16":
        if not has_bf16:
            problems.append(f"--precision bf16: {why}; use --precision fp32 or auto")
        return "bf16", REQUESTED
    return ("bf16" if has_bf16 else "fp32"), why


def _cuda_has_bf16() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():  # requested but missing: already reported as a problem
        return True, "no CUDA device to query"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return True, "the GPU multiplies bf16 natively"
    return False, "the GPU has no native bf16 (needs Ampere or newer)"


def _choose_attention(requested: str, device: str, precision: str, problems: list[str]) -> tuple[str, str]:
    if requested == "auto":
        if device == "cuda":
            return "sdpa", "uses PyTorch's flash kernels with is_causal=True and no mask"
        return "sdpa", "PyTorch's fused attention for the CPU"
    if requested in OPTIONAL_BACKENDS:
        package = OPTIONAL_BACKENDS[requested]
        if importlib.util.find_spec(requested) is None:
            problems.append(
                f"--attention_backend {requested}: not installed. Install it with: .venv/bin/pip install "
                f"{'--no-build-isolation ' if requested == 'flash_attn' else ''}{package} "
                "(needs an NVIDIA GPU, see requirements-gpu.txt), or use --attention_backend sdpa"
            )
        elif device != "cuda":
            problems.append(f"--attention_backend {requested}: needs a CUDA device; use sdpa")
        elif precision != "bf16":
            problems.append(f"--attention_backend {requested}: only used in bf16; use --precision bf16, or sdpa")
    return requested, REQUESTED


def _choose_compile(no_compile: bool, device: str, attention_backend: str) -> tuple[bool, str]:
    if no_compile:
        return False, "--no_compile"
    if attention_backend in OPTIONAL_BACKENDS:
        return False, f"torch.compile cannot trace the kernels of {attention_backend}"
    if device != "cuda":
        return False, "on a CPU no speed-up was measured, and compilation takes 44 s"
    missing = compiler_problem()
    return (False, missing) if missing else (True, "CUDA device")


def _choose_loss_kernel(requested: str, compiled: bool, no_compile: bool, problems: list[str]) -> tuple[str, str]:
    if requested == "auto":
        if compiled:
            return "compiled", "one fused kernel over the logits instead of five"
        return "blocks", "PyTorch's own kernels, as nothing else is compiled"
    if requested == "compiled" and no_compile:
        problems.append("--loss_kernel compiled and --no_compile contradict each other: use only one")
    elif requested == "compiled" and (missing := compiler_problem()):
        problems.append(f"--loss_kernel compiled: {missing}; or use --loss_kernel blocks")
    return requested, REQUESTED


def _why_deterministic(requested: bool, device: str, attention_backend: str, problems: list[str]) -> str:
    if device == "cpu":
        return "CPU training always is" + (", with or without --deterministic" if requested else "")
    if not requested:
        return (
            "CUDA sums in varying order, so a resumed run matches only up to rounding; use --deterministic for a "
            "bitwise match"
        )
    if attention_backend in OPTIONAL_BACKENDS:
        problems.append(f"--deterministic cannot be used with --attention_backend {attention_backend}; use sdpa")
    return f"--deterministic: torch's deterministic kernels, cuBLAS workspace {CUBLAS_WORKSPACE}; slower, not measured"


def _name_and_memory(device: str) -> tuple[str, int]:
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    return cpu_name(), available_memory()
