"""What this machine can do, what is chosen from it and why; what a run uses of it.

Every choice carries its reason in words, because a silent fallback is how a GPU run ends up on a CPU.
Importing this module does not import torch: entry scripts use it before they parse their arguments.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from mvlm_core.errors import UserError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
ATTENTION_BACKENDS = ("auto", "sdpa", "flash_attn", "xformers", "eager")
ALLOCATOR_ADVICE = "max_split_size_mb:512"
# Multiplication units for bf16. Without one of them a bf16 matrix product is emulated: on 2 cores of an AVX2
# EPYC fp32 reached 170 GFLOP/s and bf16 0.3.
BF16_PROCESSOR_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
# Any of these paths means a loaded NVIDIA driver (the last one is WSL). None, and no nvidia-smi: no GPU.
NVIDIA_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
OPTIONAL_BACKENDS = {"flash_attn": "flash-attn", "xformers": "xformers"}

log = logging.getLogger("mvlm")


@dataclass(frozen=True)
class Hardware:
    """What a run uses, with the reason for each choice."""

    device: str  # "cpu" | "cuda"
    name: str  # processor or GPU name
    memory_bytes: int  # GPU memory, or RAM that this process may use
    precision: str  # "fp32" | "bf16"; weights stay fp32 either way
    attention_backend: str  # "sdpa" | "flash_attn" | "xformers" | "eager"
    compile: bool
    threads: int
    reasons: dict[str, str]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context for forward passes: bf16 autocast over fp32 weights, or nothing in fp32."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        import torch

        return torch.autocast(self.device, dtype=torch.bfloat16)

    def apply(self) -> None:
        """Set the process-wide switches of torch that follow from the choice."""
        import torch

        torch.set_num_threads(self.threads)
        if self.device == "cuda":
            # TF32 for what autocast leaves in fp32; a no-op on GPUs older than Ampere.
            torch.set_float32_matmul_precision("high")


def set_process_environment() -> None:
    """Advise CUDA's caching allocator and OpenMP; a user's own advice stays. Call it before torch is imported.

    Blocks above 512 MB are never split, so the large logits buffers of one step fit those of the next. Threads that
    wait sleep instead of spinning: on an idle machine that costs nothing (measured on 2 cores: 3,770 against 3,560
    tokens/s), and beside another busy process spinning made training some twenty times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name of the same setting
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR_ADVICE)


def choose_hardware(
    *,
    device: str = "auto",
    precision: str = "auto",
    attention_backend: str = "auto",
    no_mixed_precision: bool = False,
    no_compile: bool = False,
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
        )
        if value not in known
    ]
    if no_mixed_precision and precision == "bf16":
        problems.append("--precision bf16 and --no_mixed_precision contradict each other: give one of them")
    if problems:
        raise UserError(problems)
    if no_mixed_precision:
        precision = "fp32"

    chosen_device, device_reason = _choose_device(device, problems)
    chosen_precision, precision_reason = _choose_precision(precision, chosen_device, problems)
    if no_mixed_precision:
        precision_reason = "--no_mixed_precision"
    backend, backend_reason = _choose_attention(attention_backend, chosen_device, chosen_precision, problems)
    if problems:
        raise UserError(problems)
    compiled, compile_reason = _choose_compile(no_compile, chosen_device)
    threads, threads_reason = available_threads()
    name, memory_bytes = _name_and_memory(chosen_device)
    return Hardware(
        device=chosen_device,
        name=name,
        memory_bytes=memory_bytes,
        precision=chosen_precision,
        attention_backend=backend,
        compile=compiled,
        threads=threads,
        reasons={
            "device": device_reason,
            "precision": precision_reason,
            "attention_backend": backend_reason,
            "compile": compile_reason,
            "threads": threads_reason,
        },
    )


def describe(hardware: Hardware) -> list[str]:
    """Lines for the log: each choice with its reason."""
    reasons = hardware.reasons
    memory = f"{hardware.memory_bytes / 2**30:.1f} GiB"
    return [
        f"device: {hardware.device}, {hardware.name}, {memory} ({reasons['device']})",
        f"precision: {hardware.precision} ({reasons['precision']})",
        f"attention: {hardware.attention_backend} ({reasons['attention_backend']})",
        f"compile: {'yes' if hardware.compile else 'no'} ({reasons['compile']})",
        f"CPU threads: {hardware.threads} ({reasons['threads']})",
    ]


def resolve_preset(preset: str) -> tuple[str, str]:
    """Turn "auto" into the preset for this machine, with the reason; any other name passes through unchanged.

    Does not import torch where a GPU is plainly absent, which keeps small commands quick.
    """
    if preset != "auto":
        return preset, "asked for"
    if not nvidia_may_be_there():
        return "cpu", "no NVIDIA GPU found"
    usable, why = _cuda_state()
    return ("h200", why) if usable else ("cpu", why)


def nvidia_may_be_there() -> bool:
    """False only where no NVIDIA GPU can be usable: then torch need not be asked."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return False
    return any(os.path.exists(path) for path in NVIDIA_TRACES) or shutil.which("nvidia-smi") is not None


# --- the single choices -------------------------------------------------------------------------------------


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
    return True, f"CUDA {torch.version.cuda} with {torch.cuda.get_device_name(0)}"


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
    if device == "cuda":
        has_bf16, why = _cuda_has_bf16()
    else:
        has_bf16, why = processor_has_bf16()
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


def processor_has_bf16(cpuinfo: Path | str = "/proc/cpuinfo") -> tuple[bool, str]:
    """Whether the processor multiplies bf16 in hardware, with the reason.

    Args:
        cpuinfo: where the kernel lists the processor's flags; a machine without that file counts as "no".
    """
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                flags.update(line.partition(":")[2].split())
                break
    found = sorted(BF16_PROCESSOR_FLAGS & flags)
    if found:
        return True, f"the processor has {', '.join(found)}"
    return False, "no AMX-BF16 or AVX512-BF16 in the processor: emulated, bf16 is some 500 times slower"


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


def compiler_problem() -> str | None:
    """What Triton, under torch.compile, misses to build its launchers; None when all is there."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if not any(name and shutil.which(name) for name in compilers):
        return "torch.compile needs a C compiler: sudo apt-get install build-essential"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return f"torch.compile needs Python.h: sudo apt-get install {package}"
    return None


# --- processor and memory -----------------------------------------------------------------------------------


def available_threads(
    *,
    topology: Path | str = "/sys/devices/system/cpu",
    cgroup_root: Path | str = "/sys/fs/cgroup",
    cgroup_membership: Path | str = "/proc/self/cgroup",
) -> tuple[int, str]:
    """Threads for the CPU's matrix products, with the reason.

    OMP_NUM_THREADS wins. Otherwise one for each physical core (two hyper-threads share one multiplication
    unit) that affinity lets the process use, and not more than the container's CPU quota pays for.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked), "OMP_NUM_THREADS"
    try:
        processors = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        processors = list(range(psutil.cpu_count(logical=False) or 1))
    cores = len({_core_of(processor, Path(topology)) for processor in processors})
    reason = f"physical cores of the {len(processors)} processors this process may use"
    quota = _cpu_quota(Path(cgroup_root), Path(cgroup_membership))
    if quota is not None and quota < cores:
        return max(1, int(quota)), f"container limit of {quota:g} processors"
    return max(1, cores), reason


def _core_of(processor: int, topology: Path) -> str:
    """What the hyper-threads of one core share, such as "0,4"; a processor without the file counts alone."""
    siblings = topology / f"cpu{processor}/topology/thread_siblings_list"
    try:
        return siblings.read_text(encoding="ascii").strip()
    except OSError:
        return str(processor)


def _cgroup_folders(root: Path, membership: Path, controller: str) -> list[Path]:
    """Folders whose limits hold for this process: its own group and all above it, version 2 and version 1."""
    folders = []
    lines = []
    with contextlib.suppress(OSError):
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        group = base / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]
    # Inside a container the membership may name a path of the host; the limits then stand at the root.
    return [*folders, root, root / controller]


def _cpu_quota(root: Path, membership: Path) -> float | None:
    """Processors' worth of time that the control groups allow, the smallest of all; None if unlimited."""
    quotas = []
    for folder in _cgroup_folders(root, membership, "cpu"):
        for read in (_quota_version_2, _quota_version_1):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quotas.append(read(folder))
    return min((quota for quota in quotas if quota > 0), default=None)


def _quota_version_2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return int(quota) / int(period)  # "max" is no number: no limit


def _quota_version_1(folder: Path) -> float:
    quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))  # -1: no limit
    return quota / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))


def available_memory(
    *, cgroup_root: Path | str = "/sys/fs/cgroup", cgroup_membership: Path | str = "/proc/self/cgroup"
) -> int:
    """RAM in bytes that this process may use: the machine's, or a smaller container limit."""
    limits = [psutil.virtual_memory().total]
    for folder in _cgroup_folders(Path(cgroup_root), Path(cgroup_membership), "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text(encoding="ascii")))
    return min(limits)


def _name_and_memory(device: str) -> tuple[str, int]:
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    return processor_name(), available_memory()


def processor_name(cpuinfo: Path | str = "/proc/cpuinfo") -> str:
    with contextlib.suppress(OSError):
        for line in Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_in_use(device: str = "cpu") -> int:
    """Bytes in use now: CUDA memory held by tensors, or the process's resident memory."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def peak_memory(device: str = "cpu") -> int:
    """Most bytes in use so far, counted as `memory_in_use` counts."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    # VmHWM before getrusage: ru_maxrss starts at the size of the process that forked this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """Peak bytes of a stretch of work: ``with PeakMemory("cpu") as peak: ...`` then ``peak.bytes``.

    It starts the process's own count anew: afterwards `peak_memory` counts from the last such start.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> Self:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            # "5" resets VmHWM (man 5 proc). Where the kernel refuses, the peak is the whole process's.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bytes = peak_memory(self.device)


# --- sampling while a run goes on ---------------------------------------------------------------------------

_SMI_QUERY = "utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw"


class ResourceSampler:
    """Calls ``callback(line)`` every ``seconds`` on a background thread, from construction until ``stop()``.

    The line comes from NVML, nvidia-smi where NVML does not answer, or psutil where there is no GPU:
    then it tells the CPU's load and the memory of this process with its children.
    """

    def __init__(self, callback: Callable[[str], None], seconds: float = 30.0) -> None:
        self._callback = callback
        self._seconds = seconds
        self._stop = threading.Event()
        self.source, self._read = _open_source()
        self._thread = threading.Thread(target=self._run, name="resource-sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self._callback(self._read())
            except Exception as error:  # sampling must never end a training run; say why it went quiet
                log.warning("resource sampling by %s ended: %s: %s", self.source, type(error).__name__, error)
                return

    def stop(self) -> None:
        """End the thread; returns when no further callback can come."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=15)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _open_source() -> tuple[str, Callable[[], str]]:
    if nvidia_may_be_there():
        for name, read in (("NVML", _sample_nvml), ("nvidia-smi", _sample_nvidia_smi)):
            try:
                read()
                return name, read
            except Exception as error:  # each source has its own exception classes; the next one takes over
                log.info("no GPU statistics from %s: %s: %s", name, type(error).__name__, error)
    psutil.cpu_percent()  # the first call only starts the measurement
    return "psutil", _sample_psutil


def _sample_nvml() -> str:
    import pynvml

    pynvml.nvmlInit()
    try:
        count = pynvml.nvmlDeviceGetCount()
        if count == 0:
            raise RuntimeError("no GPU listed")
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return "; ".join(_nvml_part(pynvml, index, handle) for index, handle in enumerate(handles))
    finally:
        pynvml.nvmlShutdown()


def _nvml_part(pynvml: Any, index: int, handle: Any) -> str:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    parts = [f"GPU {index}: memory {memory.used / 2**30:.1f} of {memory.total / 2**30:.1f} GiB"]
    readings: list[tuple[str, Callable[[], str]]] = [
        ("busy", lambda: f"{pynvml.nvmlDeviceGetUtilizationRates(handle).gpu} %"),
        ("temperature", lambda: f"{pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)} C"),
        ("power", lambda: f"{pynvml.nvmlDeviceGetPowerUsage(handle) / 1000:.0f} W"),
    ]
    for name, read in readings:
        with contextlib.suppress(pynvml.NVMLError_NotSupported):  # MIG slices lack some of these
            parts.append(f"{name} {read()}")
    return ", ".join(parts)


def _sample_nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={_SMI_QUERY}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    parts = []
    for index, line in enumerate(answer.strip().splitlines()):
        busy, used, total, temperature, power = (field.strip() for field in line.split(","))
        parts.append(
            f"GPU {index}: memory {float(used) / 1024:.1f} of {float(total) / 1024:.1f} GiB, busy {busy} %, "
            f"temperature {temperature} C, power {power} W"
        )
    if not parts:
        raise RuntimeError("no GPU listed")
    return "; ".join(parts)


def _sample_psutil() -> str:
    """CPU load of the machine, memory of this process with its children, memory that the machine has left."""
    process = psutil.Process()
    resident = 0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # a child may end while it is counted
            resident += member.memory_info().rss
    free = psutil.virtual_memory().available
    used = f"memory {resident / 2**30:.1f} GiB used here, {free / 2**30:.1f} GiB free"
    return f"CPU {psutil.cpu_percent():.0f} %, {used}"
