"""Memory in use, and utilization of the CPU and GPUs during a run.

Importing this module does not import torch: entry scripts use it before they parse their arguments.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from mvlm_core.machine import nvidia_gpu_possible

log = logging.getLogger("mvlm")


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
    if nvidia_gpu_possible():
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
