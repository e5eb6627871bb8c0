"""This machine: CPU cores, memory, GPUs and build tools.

Importing this module imports no package: entry scripts use it before they parse their arguments, and
setup_environment.sh before it installs anything.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

# Any of these paths means that an NVIDIA driver is loaded (the last one on WSL). Without any of them
# and without nvidia-smi, there is no GPU.
DEVICE_FILE = "/dev/nvidiactl"
NVIDIA_TRACES = ("/proc/driver/nvidia/version", DEVICE_FILE, "/dev/dxg")
# CPU flags for native bf16 multiplication. Without one of them bf16 matmuls are emulated: on 2 cores of an AVX2 EPYC
# fp32 reached 170 GFLOP/s and bf16 0.3.
BF16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})


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
    import psutil

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


def cpu_has_bf16(file: Path | str = "/proc/cpuinfo") -> tuple[bool, str]:
    """Whether the CPU has native bf16 multiplication, with the reason.

    Args:
        file: lists the CPU's flags; a missing file counts as "no".
    """
    flags = sorted(BF16_CPU_FLAGS & set(cpuinfo("flags", file).split()))
    if flags:
        return True, f"the CPU has {', '.join(flags)}"
    return False, "the CPU has no AMX-BF16 or AVX512-BF16: bf16 would be emulated, about 500 times slower"


def compiler_problem() -> str | None:
    """Say which build tools torch.compile or Triton lacks, and how to install them; None if complete."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    missing = {}  # tool → Debian package
    if not any(name and shutil.which(name) for name in compilers):
        missing["a C compiler"] = "build-essential"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing["Python.h"] = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    if not missing:
        return None
    return f"torch.compile needs {' and '.join(missing)}: sudo apt-get install {' '.join(missing.values())}"


def nvidia_gpu_possible() -> bool:
    """False only if there is certainly no usable NVIDIA GPU, so that torch need not be imported."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return False
    return any(os.path.exists(path) for path in NVIDIA_TRACES) or shutil.which("nvidia-smi") is not None


def nvidia_gpu_expected() -> bool:
    """Whether this system seems to have been given an NVIDIA GPU, which torch may or may not be able to use.

    The driver's files in /proc are no sign of that: a container without a GPU shows them if its host has one.
    """
    given = os.path.exists(DEVICE_FILE) or shutil.which("nvidia-smi") is not None
    return nvidia_gpu_possible() and given


def cuda_state() -> tuple[bool, str]:
    """Whether torch can use a CUDA device, with the reason."""
    import torch

    if torch.version.cuda is None:
        return False, (
            f"torch {torch.__version__} is a CPU-only build; to install one with CUDA: "
            "bash setup_environment.sh --torch_index https://download.pytorch.org/whl/cu130"
        )
    if not torch.cuda.is_available():
        return False, (
            f"torch {torch.__version__} finds no usable CUDA device "
            f"(no GPU, driver too old, or hidden by CUDA_VISIBLE_DEVICES: see nvidia-smi){_cuda_error()}"
        )
    return True, f"CUDA {torch.version.cuda}"  # not the GPU's name: querying it would allocate GPU memory


def _cuda_error() -> str:
    """The error with which CUDA fails to start, which ``is_available`` does not tell."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        text = str(error).partition("\n")[0]
        fabric = "; on a machine with NVSwitch, start nvidia-fabricmanager" if "Error 802" in text else ""
        return f": {text}{fabric}"
    return ""


def gpu_count() -> int:
    """Number of GPUs that torch can use, counted through the driver without allocating GPU memory."""
    if not nvidia_gpu_possible():
        return 0
    import torch

    return torch.cuda.device_count() if cuda_state()[0] else 0  # the driver also counts GPUs that CUDA cannot use
