"""CPU cores, memory and GPUs of this machine, and their utilization during a run.

Importing this module does not import torch: entry scripts use it before they parse their arguments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

# Any of these paths means that an NVIDIA driver is loaded (the last one on WSL). Without any of them
# and without nvidia-smi, there is no GPU.
NVIDIA_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
log = logging.getLogger("mvlm")


def nvidia_may_be_there() -> bool:
    """False only if there is certainly no usable NVIDIA GPU, so that torch need not be imported."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return False
    return any(os.path.exists(path) for path in NVIDIA_TRACES) or shutil.which("nvidia-smi") is not None


# --- CPU and memory -----------------------------------------------------------------------------------------


def available_threads(
    *,
    topology: Path | str = "/sys/devices/system/cpu",
    cgroup_root: Path | str = "/sys/fs/cgroup",
    cgroup_membership: Path | str = "/proc/self/cgroup",
) -> tuple[int, str]:
    """Number of threads for CPU matmuls, with the reason.

    OMP_NUM_THREADS takes precedence. Otherwise one per physical core (hyper-threads share its multiplication units) in
    the process's affinity mask, up to the container's CPU quota.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked), "OMP_NUM_THREADS"
    cpus = os.sched_getaffinity(0)
    cores = len({_core_of(cpu, Path(topology)) for cpu in cpus})
    reason = f"physical cores of the {len(cpus)} logical CPUs this process may use"
    quota = _cpu_quota(Path(cgroup_root), Path(cgroup_membership))
    if quota is not None and quota < cores:
        return max(1, int(quota)), f"container limit of {quota:g} CPUs"
    return max(1, cores), reason


def _core_of(cpu: int, topology: Path) -> str:
    """Hyper-threads of the CPU's core, such as "0,4"; without the file each logical CPU counts as a core."""
    try:
        return (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _cgroup_folders(root: Path, membership: Path, controller: str) -> list[Path]:
    """Folders whose limits apply to this process: its cgroup (v1 or v2) and all ancestors."""
    # Inside a container the membership may name a path on the host; the limits are then at the root.
    folders = [root, root / controller]
    with contextlib.suppress(OSError):
        for line in membership.read_text(encoding="utf-8", errors="replace").splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            if not controllers or controller in controllers.split(","):
                base = root / controllers
                group = base / path.lstrip("/")
                folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return folders


def _cpu_quota(root: Path, membership: Path) -> float | None:
    """Smallest CPU quota of the process's cgroups, in CPUs; None if unlimited."""
    quotas = []
    for folder in _cgroup_folders(root, membership, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" means no limit
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # cgroup v1; -1 means no limit
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
            quotas.append(int(quota) / int(period))
    return min((quota for quota in quotas if quota > 0), default=None)


def available_memory(
    *, cgroup_root: Path | str = "/sys/fs/cgroup", cgroup_membership: Path | str = "/proc/self/cgroup"
) -> int:
    """RAM in bytes available to this process: the machine's, or a smaller container limit."""
    limits = [psutil.virtual_memory().total]
    for folder in _cgroup_folders(Path(cgroup_root), Path(cgroup_membership), "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text(encoding="ascii")))
    return min(limits)


def cpuinfo(field: str, file: Path | str = "/proc/cpuinfo") -> str:
    """Value of a field of the first CPU in /proc/cpuinfo, such as "flags"; "" if there is none."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""


def cpu_name(file: Path | str = "/proc/cpuinfo") -> str:
    return cpuinfo("model name", file) or platform.processor() or platform.machine()


def memory_in_use(device: str = "cpu") -> int:
    """Bytes in use: CUDA memory allocated to tensors, or the process's resident memory."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def peak_memory(device: str = "cpu") -> int:
    """Peak of ``memory_in_use`` since the last reset, in bytes."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    # Prefer VmHWM: ru_maxrss starts at the size of the process that forked this one.
    _, found, rest = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").partition("VmHWM:")
    return 1024 * (int(rest.split(maxsplit=1)[0]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def gpu_load(device: str) -> int | None:
    """GPU utilization in percent; None if not available."""
    if device != "cuda":
        return None
    import torch

    try:
        return torch.cuda.utilization()
    except Exception:  # some containers lack NVML, some MIG slices lack utilization; it is optional
        return None


def reset_peak_memory(device: str = "cpu") -> None:
    """Reset ``peak_memory``."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        # "5" resets VmHWM (man 5 proc). If the kernel refuses, the peak remains that of the whole process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


# --- sampling during a run ----------------------------------------------------------------------------------


@contextlib.contextmanager
def resource_lines(callback: Callable[[str], None], seconds: float = 30.0) -> Iterator[None]:
    """Call ``callback(line)`` every ``seconds`` on a background thread while the context is open.

    The line comes from NVML or, without a GPU, from psutil: CPU load and the memory of this process and its children.
    """
    source, read = _open_source()
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            try:
                callback(read())
            except Exception as error:  # sampling must never end a training run
                log.warning("resource sampling with %s stopped: %s: %s", source, type(error).__name__, error)
                return

    thread = threading.Thread(target=run, name="resource lines", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=15)


def _open_source() -> tuple[str, Callable[[], str]]:
    if nvidia_may_be_there():
        try:
            _sample_nvml()
            return "NVML", _sample_nvml
        except Exception as error:  # NVML's own exceptions or a missing library; GPU statistics are optional
            log.info("no GPU statistics from NVML: %s: %s", type(error).__name__, error)
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


def _sample_psutil() -> str:
    """CPU load of the machine, memory of this process and its children, and free memory."""
    process = psutil.Process()
    resident = 0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # a child may end while it is counted
            resident += member.memory_info().rss
    free = psutil.virtual_memory().available
    used = f"memory {resident / 2**30:.1f} GiB used by this run, {free / 2**30:.1f} GiB free"
    return f"CPU {psutil.cpu_percent(interval=0.2):.0f} %, {used}"
