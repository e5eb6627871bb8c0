"""Device, precision, attention kernel and compilation: what is chosen for this machine, and why.

Every choice is logged with its reason, because a silent fallback is how a GPU run ends up on a CPU.
Importing this module does not import torch: entry scripts use it before they parse their arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mvlm_core.errors import UserError
from mvlm_core.monitor import available_memory, available_threads, cpu_name, cpuinfo, nvidia_may_be_there

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
ATTENTION_BACKENDS = ("auto", "sdpa", "flash_attn", "xformers", "eager")
LOSS_KERNELS = ("auto", "blocks", "compiled")
# Settings that are arguments of `choose_hardware`.
HARDWARE_FLAGS = "device precision attention_backend loss_kernel no_mixed_precision no_compile deterministic".split()
CUBLAS_WORKSPACE = ":4096:8"  # one of the two with which cuBLAS gives the same bits each time, by NVIDIA's manual
ALLOCATOR_ADVICE = "max_split_size_mb:512"
# Multiplication units for bf16. Without one of them a bf16 matrix product is emulated: on 2 cores of an AVX2
# EPYC fp32 reached 170 GFLOP/s and bf16 0.3.
BF16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NO_BLOCK_IS_LARGER = 2**31 - 1
OPTIONAL_BACKENDS = {"flash_attn": "flash-attn", "xformers": "xformers"}

Result = TypeVar("Result")
log = logging.getLogger("mvlm")


@dataclass(frozen=True)
class Hardware:
    """What a run uses, with the reason for each choice."""

    device: str  # "cpu" | "cuda"
    name: str  # CPU or GPU name
    memory_bytes: int  # GPU memory, or RAM that this process may use
    precision: str  # "fp32" | "bf16"; weights stay fp32 either way
    attention_backend: str  # "sdpa" | "flash_attn" | "xformers" | "eager"
    compile: bool
    threads: int
    reasons: dict[str, str]
    loss_kernel: str = "blocks"  # "blocks" | "compiled": see training/cross_entropy.py
    deterministic: bool = False  # on CUDA only kernels that give the same bits each time; a CPU's all do

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context for forward passes: bf16 autocast over fp32 weights, or nothing in fp32."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        import torch

        return torch.autocast(self.device, dtype=torch.bfloat16)

    def compiled(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """``function`` compiled as one graph of fixed shapes, or as it is in a run that is not compiled."""
        if not self.compile:
            return function
        import torch

        torch._dynamo.config.optimize_ddp = False  # compiled layer by layer, gradients come in time for their buckets
        return torch.compile(function, fullgraph=True, dynamic=False)

    @property
    def compiles(self) -> bool:
        """Whether anything in the run is compiled."""
        return self.compile or self.loss_kernel == "compiled"

    def release(self) -> None:
        """Give freed memory back to the device, and forget compiled graphs that are no longer needed: beyond eight of a
        function torch.compile gives up."""
        import torch

        if self.device == "cuda":
            torch.cuda.empty_cache()
        if self.compiles:
            torch.compiler.reset()

    @property
    def muon_dtype(self) -> Any:
        """The dtype in which Muon orthogonalizes: bfloat16 on a GPU or in a bf16 run, else float32."""
        import torch

        return torch.bfloat16 if self.device == "cuda" or self.precision == "bf16" else torch.float32

    def apply(self) -> None:
        """Set the process-wide switches of torch that follow from the choice."""
        import torch

        torch.set_num_threads(self.threads)
        if self.device == "cuda":
            # TF32 for what autocast leaves in fp32; a no-op on GPUs older than Ampere.
            torch.set_float32_matmul_precision("high")
            if self.deterministic:
                _be_deterministic()
        else:
            _keep_freed_memory()


def _be_deterministic() -> None:
    """Have CUDA compute the same bits each time. Before the first matrix product, which fixes cuBLAS's workspace.

    Under torch's switch the backward passes of flash and memory-efficient attention keep one order of addition, cuDNN's
    attention is not chosen (ATen's attention_backward.cu and sdp_utils.cpp), and an operation that has no such kernel
    raises an error. The embedding's backward pass, which is not compiled, sorts (Embedding.cu). The switch also keeps
    the compiler from choosing between kernels by their speed at the moment, which differs from process to process.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    # Ours is always written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step, unless the user has set its options.

    By default it returns large blocks to the system at once and faults them in again page by page: 200,000 page faults
    per step at GPT-2's size, 4 % of its time (measured), and 2 % in small models. No effect with another C library.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _NO_BLOCK_IS_LARGER)
        mallopt(_M_TRIM_THRESHOLD, -1)


def set_process_environment() -> None:
    """Set options of torch's caching allocator and OpenMP that the user has not set. Call it before importing torch.

    Blocks above 512 MB are never split, so the large logits buffers of one step fit those of the next. Waiting threads
    sleep instead of spinning: on an idle machine that costs nothing (measured on 2 cores: 3,770 against 3,560
    tokens/s), and beside another busy process spinning made training some twenty times slower.
    """
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
    """Choose from what is asked for and what is there.

    Raises:
        UserError: names everything that was asked for and is not there.
    """
    problems = [
        f"unknown {what} {value!r}: choose one of {', '.join(known)}"
        for what, value, known in (
            ("device", device, DEVICES),
            ("precision", precision, PRECISIONS),
            ("attention backend", attention_backend, ATTENTION_BACKENDS),
            ("loss kernel", loss_kernel, LOSS_KERNELS),
        )
        if value not in known
    ]
    if no_mixed_precision and precision == "bf16":
        problems.append("--precision bf16 and --no_mixed_precision contradict each other: give one of them")
    if problems:
        raise UserError(problems)
    if no_mixed_precision:
        precision = "fp32"

    why: dict[str, str] = {}
    device, why["device"] = _choose_device(device, problems)
    precision, why["precision"] = _choose_precision(precision, device, problems)
    if no_mixed_precision:
        why["precision"] = "--no_mixed_precision"
    attention_backend, why["attention_backend"] = _choose_attention(attention_backend, device, precision, problems)
    compiled, why["compile"] = _choose_compile(no_compile, device)
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
    """Lines for the log: each choice with its reason."""
    reasons = hardware.reasons
    memory = f"{hardware.memory_bytes / 2**30:.1f} GiB"
    exact = hardware.device == "cpu" or hardware.deterministic
    return [
        f"device: {hardware.device}, {hardware.name}, {memory} ({reasons['device']})",
        f"precision: {hardware.precision} ({reasons['precision']})",
        f"attention: {hardware.attention_backend} ({reasons['attention_backend']})",
        f"compile: {'yes' if hardware.compile else 'no'} ({reasons['compile']})",
        f"loss: {hardware.loss_kernel} ({reasons['loss_kernel']})",
        f"the same bits each time: {'yes' if exact else 'no'} ({reasons['deterministic']})",
        f"CPU threads: {hardware.threads} ({reasons['threads']})",
    ]


def caution(hardware: Hardware, preset: str) -> str | None:
    """What a run of this preset must hear about its hardware; None if nothing."""
    if preset != "h200" or hardware.device != "cuda" or hardware.compile:
        return None
    return (
        f"THIS RUN IS NOT COMPILED ({hardware.reasons['compile']}): each step takes longer, on a GPU that is paid by "
        "the hour. By how much is not measured; `python -m benchmarks.performance.gpu_check` measures it here"
    )


def compiled_so_far() -> tuple[int, float]:
    """How many graphs torch.compile has made in this process, and the seconds that took, backward graphs included."""
    from torch._dynamo.utils import calculate_time_spent, counters

    return counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]


def resolve_preset(preset: str) -> tuple[str, str]:
    """Turn "auto" into the preset for this machine, with the reason; any other name passes through unchanged.

    Imports torch only where there may be a GPU, which keeps small commands quick.
    """
    if preset != "auto":
        return preset, "asked for"
    if not nvidia_may_be_there():
        return "cpu", "no NVIDIA GPU found"
    usable, why = _cuda_state()
    return ("h200", why) if usable else ("cpu", why)


def _cuda_state() -> tuple[bool, str]:
    """Whether torch can use a CUDA device, with the reason in words."""
    import torch

    if torch.version.cuda is None:
        return False, (
            f"torch {torch.__version__} is a build without CUDA; "
            "for one with it: bash setup_environment.sh --torch_index https://download.pytorch.org/whl/cu130"
        )
    if not torch.cuda.is_available():
        return False, (
            f"torch {torch.__version__} finds no usable CUDA device "
            "(no GPU, driver too old, or hidden by CUDA_VISIBLE_DEVICES: see nvidia-smi)"
        )
    return True, f"CUDA {torch.version.cuda}"  # a GPU's name would take memory on it, also in a supervisor


def gpu_count() -> int:
    """GPUs that torch can use. They are counted by the driver's library: this process takes no memory on any."""
    if not nvidia_may_be_there():
        return 0
    import torch

    return torch.cuda.device_count()


def _choose_device(asked: str, problems: list[str]) -> tuple[str, str]:
    if asked == "cpu":
        return "cpu", "asked for"
    usable, why = _cuda_state()
    if asked == "cuda":
        if not usable:
            problems.append(f"--device cuda: {why}")
        return "cuda", "asked for"
    if not usable and not nvidia_may_be_there():
        why = "no NVIDIA GPU found"
    return ("cuda" if usable else "cpu"), why


def _choose_precision(asked: str, device: str, problems: list[str]) -> tuple[str, str]:
    if asked == "fp32":
        return "fp32", "asked for"
    has_bf16, why = cpu_has_bf16() if device == "cpu" else _cuda_has_bf16()
    if asked == "bf16":
        if not has_bf16:
            problems.append(f"--precision bf16: {why}; use --precision fp32 or auto")
        return "bf16", "asked for"
    return ("bf16" if has_bf16 else "fp32"), why


def _cuda_has_bf16() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():  # asked for and missing: already named among the problems
        return True, "no CUDA device to ask"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return True, "the GPU multiplies bf16 natively"
    return False, "the GPU has no native bf16 (needs Ampere or newer)"


def cpu_has_bf16(file: Path | str = "/proc/cpuinfo") -> tuple[bool, str]:
    """Whether the CPU multiplies bf16 in hardware, with the reason.

    Args:
        file: where the kernel lists the CPU's flags; a machine without that file counts as "no".
    """
    found = sorted(BF16_CPU_FLAGS & set(cpuinfo("flags", file).split()))
    if found:
        return True, f"the CPU has {', '.join(found)}"
    return False, "the CPU has no AMX-BF16 or AVX512-BF16: bf16 would be emulated, some 500 times slower"


def _choose_attention(asked: str, device: str, precision: str, problems: list[str]) -> tuple[str, str]:
    if asked == "auto":
        if device == "cuda":
            return "sdpa", "PyTorch's own flash kernels run under it when is_causal=True and no mask is given"
        return "sdpa", "PyTorch's fused attention for the CPU"
    if asked in OPTIONAL_BACKENDS:
        package = OPTIONAL_BACKENDS[asked]
        if importlib.util.find_spec(asked) is None:
            problems.append(
                f"--attention_backend {asked}: not installed. Install it with: .venv/bin/pip install "
                f"{'--no-build-isolation ' if asked == 'flash_attn' else ''}{package} "
                "(needs an NVIDIA GPU, see requirements-gpu.txt), or use --attention_backend sdpa"
            )
        elif device != "cuda":
            problems.append(f"--attention_backend {asked}: runs on a CUDA device only; use sdpa")
        elif asked == "flash_attn" and precision != "bf16":
            problems.append("--attention_backend flash_attn: has no fp32 kernels; use --precision bf16")
    return asked, "asked for"


def _choose_compile(no_compile: bool, device: str) -> tuple[bool, str]:
    if no_compile:
        return False, "--no_compile"
    if device != "cuda":
        return False, "measured on a CPU: no gain, and 44 s to compile"
    missing = compiler_problem()
    return (False, missing) if missing else (True, "CUDA device")


def _choose_loss_kernel(asked: str, compiled: bool, no_compile: bool, problems: list[str]) -> tuple[str, str]:
    if asked == "auto":
        if compiled:
            return "compiled", "one kernel over the logits instead of five"
        return "blocks", "PyTorch's own kernels, block by block, where nothing is compiled"
    if asked == "compiled" and no_compile:
        problems.append("--loss_kernel compiled and --no_compile contradict each other: give one of them")
    elif asked == "compiled" and (missing := compiler_problem()):
        problems.append(f"--loss_kernel compiled: {missing}; or use --loss_kernel blocks")
    return asked, "asked for"


def _why_deterministic(asked: bool, device: str, attention_backend: str, problems: list[str]) -> str:
    if device == "cpu":
        return "as always on a CPU" + (", with --deterministic or without" if asked else "")
    if not asked:
        return "CUDA adds in any order, so a resumed run is the same to rounding only; --deterministic makes it exact"
    if attention_backend in OPTIONAL_BACKENDS:
        problems.append(f"--deterministic: not with --attention_backend {attention_backend}; use sdpa")
    return f"--deterministic: torch's deterministic kernels, cuBLAS workspace {CUBLAS_WORKSPACE}; slower, not measured"


def compiler_problem() -> str | None:
    """What torch.compile lacks to build its kernels, or Triton under it its launchers; None if nothing."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    missing = {}  # what for → its package
    if not any(name and shutil.which(name) for name in compilers):
        missing["a C compiler"] = "build-essential"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing["Python.h"] = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    if not missing:
        return None
    return f"torch.compile needs {' and '.join(missing)}: sudo apt-get install {' '.join(missing.values())}"


def _name_and_memory(device: str) -> tuple[str, int]:
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    return cpu_name(), available_memory()
