"""setup_environment.sh and .ci/run: their decisions, with stand-ins for Python, pip and nvidia-smi.

The script under test is the real one, run on a copy of the files it reads, in a folder with a space in its name.
The stand-in for Python runs `-c` programs for real and logs the commands that would install something.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import executable

TOOLS = "bash sh sed awk df uname flock timeout sleep rm mkdir cp cat dirname env".split()

PYTHON_STAND_IN = """#!/bin/bash
export PYTHONPATH="$CHECKOUT:$CHECKOUT/SIM-ONE Training" PYTHONDONTWRITEBYTECODE=1
case "$0" in *lint-imports) set -- -m lint-imports "$@" ;; esac
case "$1 $2" in
    "-c "*urllib*) exit 1 ;;
    "-c "*resolve_preset*) [ -z "$STAND_IN_CUDA" ] || { echo "torch uses $STAND_IN_CUDA"; exit; } ;;
    "-c "*compiler_problem*) [ -n "$WITHOUT_COMPILER" ] || exit 0 ;;
    "-c "*"import flash_attn"*) exit 1 ;;
    "-m venv")
        echo "$*" >> "$LOG"
        rm -rf "$4"/*; mkdir -p "$4/bin" || exit; cp "$0" "$4/bin/python"
        cp "$0" "$4/bin/lint-imports"
        exit ;;
    "-m "*)
        case "$*" in *$STAND_IN_HANGS*) trap 'exit 1' INT ;; esac
        case "$*" in *--dry-run*) ;; *) echo "$*" >> "$LOG" ;; esac
        case "$*" in *$STAND_IN_HANGS*) [ -z "$STAND_IN_HANGS" ] || { sleep 30 & wait; } ;; esac
        case "$*" in *$STAND_IN_FAILS*) [ -z "$STAND_IN_FAILS" ] || { echo "it failed" >&2; exit 1; } ;; esac
        exit ;;
    *prepare_dataset.py*)
        echo "prepare_dataset.py $2" >> "$LOG"
        if [ "$2" = --check ]; then [ -e "$CHECKOUT/corpus_is_there" ]; exit; fi
        : > "$CHECKOUT/corpus_is_there"
        exit ;;
esac
exec REAL_PYTHON "$@"
"""


class Machine:
    """A checkout, a PATH with only the tools the script may rely on, and an empty home folder."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.checkout = folder / "a checkout"
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.log = folder / "log"
        for path in (self.checkout / ".ci", self.bin, self.home):
            path.mkdir(parents=True)
        for name in ("setup_environment.sh", "pyproject.toml", "requirements.txt", "requirements-dev.txt",
                     "requirements-gpu.txt", "constraints.txt", ".ci/run"):  # fmt: skip
            shutil.copy(repository / name, self.checkout / name)
        shutil.copytree(repository / "mvlm_core", self.checkout / "mvlm_core")
        for name in ("prioritary_mvlm", "simone_transformer"):
            package = self.checkout / "SIM-ONE Training" / name
            package.mkdir(parents=True)
            (package / "__init__.py").touch()
        self.device, self.driver = folder / "nvidiactl", folder / "driver version"
        script = self.checkout / "setup_environment.sh"
        for real, mine in (("/dev/nvidiactl", self.device), ("/proc/driver/nvidia/version", self.driver)):
            text = script.read_text(encoding="utf-8")
            assert text.count(f"={real} ") == 1
            script.write_text(text.replace(f"={real} ", f"='{mine}' "), encoding="utf-8")
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def add_python(self, name: str = "python3") -> Path:
        return executable(self.bin / name, PYTHON_STAND_IN.replace("REAL_PYTHON", f"'{sys.executable}'"))

    def add_gpu(self, driver: str) -> None:
        executable(self.bin / "nvidia-smi", f"#!/bin/bash\necho '{driver}, NVIDIA H200'\n")

    def environment(self) -> dict[str, str]:
        paths = {"PATH": self.bin, "HOME": self.home, "CHECKOUT": self.checkout, "LOG": self.log}
        return {name: str(path) for name, path in paths.items()}

    def run(
        self, *arguments: str, script: str = "setup_environment.sh", **environment: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(self.checkout / script), *arguments], env=self.environment() | environment,
            cwd="/", capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def logged(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []

    def files(self) -> dict[str, tuple[int, int]]:
        found = (path for path in self.checkout.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


@pytest.fixture
def machine(tmp_path: Path, repository: Path) -> Machine:
    return Machine(tmp_path, repository)


def test_help_is_quick_and_names_every_option(machine: Machine) -> None:
    started = time.monotonic()
    answer = machine.run("--help")
    assert time.monotonic() - started < 1
    assert answer.returncode == 0
    for option in ("--python", "--torch_index", "--no_corpus", "--no_compiler", "--help"):
        assert option in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no_corpse"], "--no_corpse"),
        (["--python"], "needs a value"),
        (["--python", "/no/python"], "/no/python: no such program"),
    ],
)
def test_bad_options_exit_with_code_2(machine: Machine, arguments: list[str], says: str) -> None:
    answer = machine.run(*arguments)
    assert answer.returncode == 2
    assert says in answer.stderr
    assert not (machine.checkout / ".venv").exists()


def test_second_set_up_changes_nothing(machine: Machine) -> None:
    machine.add_python()
    first = machine.run()
    assert first.returncode == 0, first.stderr
    logged = machine.logged()
    assert logged[0].startswith("-m venv")
    assert any(line.startswith("-m pip install") and "requirements-dev.txt" in line for line in logged)
    assert all("-c " in line and "constraints.txt" in line for line in logged if line.startswith("-m pip install"))
    assert any(f"-e {machine.checkout}" in line for line in logged)
    assert logged[-2:] == ["prepare_dataset.py --check", "prepare_dataset.py "]
    assert "train_all_models.py" in first.stdout and "-m pytest" in first.stdout

    files = machine.files()
    second = machine.run()
    assert second.returncode == 0, second.stderr
    assert "Packages: complete." in second.stdout and "Corpus: complete." in second.stdout
    assert machine.logged() == [*logged, "prepare_dataset.py --check"]
    assert machine.files() == files
    assert list(machine.home.iterdir()) == []


def test_no_corpus_skips_the_dataset(machine: Machine) -> None:
    machine.add_python()
    assert machine.run("--no_corpus").returncode == 0
    assert not any("prepare_dataset" in line for line in machine.logged())


def test_set_up_over_ssh_without_tmux_is_warned_about(machine: Machine) -> None:
    def is_warned(hangup: str = "default", **environment: str) -> bool:
        script = machine.checkout / "setup_environment.sh"
        command = ["env", f"--{hangup}-signal=HUP", "bash", str(script)]
        variables = machine.environment() | environment
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        return "tmux new -s training" in done.stdout

    ssh = {"SSH_CONNECTION": "10.0.0.2 50000 10.0.0.1 22"}
    assert is_warned(**ssh)
    assert not is_warned() and not is_warned(hangup="ignore", **ssh), "as with nohup"
    assert not is_warned(**ssh, TMUX="/tmp/tmux-0/default,1,0") and not is_warned(**ssh, STY="1.pts-0.host")


def test_no_usable_python_says_what_to_install(machine: Machine) -> None:
    executable(machine.bin / "python3", "#!/bin/bash\necho 'launcher: python3: not found' >&2; exit 127\n")
    executable(machine.bin / "python3.12", "#!/bin/bash\necho '3.9 /usr'\n")
    answer = machine.run()
    assert answer.returncode == 1
    assert "python3 does not run" in answer.stderr
    assert "python3.12 is Python 3.9" in answer.stderr
    assert "apt-get install python3 python3-venv python3-dev build-essential" in answer.stderr
    assert not (machine.checkout / ".venv").exists()


def test_python_without_venv_names_its_package(machine: Machine) -> None:
    executable(machine.bin / "python3", "#!/bin/bash\ncase \"$*\" in *ensurepip*) exit 1 ;; esac; echo '3.12 /usr'\n")
    answer = machine.run()
    assert answer.returncode == 1
    assert "apt-get install python3.12-venv python3.12-dev build-essential" in answer.stderr


def test_broken_python_launcher_is_skipped(machine: Machine) -> None:
    executable(machine.bin / "python3", "#!/bin/bash\nexit 127\n")
    executable(machine.bin / "python3.13", "#!/bin/bash\necho '3.10 /usr'\n")
    good = machine.add_python("python3.11")
    answer = machine.run("--no_corpus")
    assert answer.returncode == 0, answer.stderr
    assert f"Making .venv with {good}" in answer.stdout


def test_interrupted_set_up_is_repaired(machine: Machine) -> None:
    machine.add_python()
    broken = machine.run("--no_corpus", STAND_IN_FAILS="requirements-dev.txt")
    assert broken.returncode == 1
    assert "requirements-dev.txt" in broken.stderr and "Run the same command again" in broken.stderr
    machine.log.unlink()
    again = machine.run("--no_corpus")
    assert again.returncode == 0, again.stderr
    assert "an earlier set-up was interrupted" in again.stdout
    assert machine.logged()[0].startswith("-m venv --clear")
    assert "Packages: complete." in machine.run("--no_corpus").stdout


@pytest.mark.parametrize("damage", ["no python", "python that fails", "a file in its place"])
def test_broken_environment_is_rebuilt(machine: Machine, damage: str) -> None:
    machine.add_python()
    assert machine.run("--no_corpus").returncode == 0
    python = machine.checkout / ".venv" / "bin" / "python"
    python.unlink()
    if damage == "python that fails":
        executable(python, "#!/bin/bash\nexit 1\n")
    elif damage == "a file in its place":
        shutil.rmtree(machine.checkout / ".venv")
        (machine.checkout / ".venv").touch()
    again = machine.run("--no_corpus")
    assert again.returncode == 0, again.stderr
    assert "Making .venv" in again.stdout


def test_symlinked_venv_is_refused_and_not_cleared(machine: Machine, tmp_path: Path) -> None:
    machine.add_python()
    elsewhere = tmp_path / "environment"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (machine.checkout / ".venv").symlink_to(elsewhere)
    answer = machine.run("--no_corpus")
    assert answer.returncode == 1 and "symbolic link" in answer.stderr
    assert (elsewhere / "file").exists() and machine.logged() == []


@pytest.mark.parametrize("changed", ["requirements-dev.txt", "constraints.txt"])
def test_changed_requirements_are_reinstalled_in_place(machine: Machine, changed: str) -> None:
    machine.add_python()
    machine.run("--no_corpus")
    machine.log.unlink()
    with open(machine.checkout / changed, "a", encoding="utf-8") as file:
        file.write("# another line\n")
    answer = machine.run("--no_corpus")
    assert "the requirements have changed" in answer.stdout
    assert not any("-m venv" in line for line in machine.logged())
    assert any("requirements-dev.txt" in line for line in machine.logged())


def test_venv_is_rebuilt_after_moving_the_checkout(machine: Machine) -> None:
    machine.add_python()
    machine.run("--no_corpus")
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("elsewhere"))
    answer = machine.run("--no_corpus")
    assert answer.returncode == 0, answer.stderr
    assert "was made for root=" in answer.stdout and "Making .venv" in answer.stdout


def test_missing_package_is_installed(machine: Machine) -> None:
    machine.add_python()
    machine.run("--no_corpus")
    machine.log.unlink()
    answer = machine.run("--no_corpus", STAND_IN_FAILS="dry-run")
    assert "a package is missing" in answer.stdout
    assert not any("-m venv" in line for line in machine.logged())
    assert any("requirements-dev.txt" in line for line in machine.logged())
    assert answer.returncode == 1 and "incomplete after installation" in answer.stderr  # the stand-in installs nothing


def test_package_of_another_checkout_is_detected(machine: Machine) -> None:
    machine.add_python()
    machine.run("--no_corpus")
    settings = machine.checkout / "mvlm_core" / "settings.py"
    settings.write_text("REPOSITORY_ROOT = '/elsewhere'\n", encoding="utf-8")
    assert "mvlm_core is not installed from this folder" in machine.run("--no_corpus").stdout


def test_venv_is_rebuilt_for_a_different_python(machine: Machine, tmp_path: Path) -> None:
    python = machine.add_python()
    machine.run("--no_corpus")
    assert "Packages: complete." in machine.run("--no_corpus", "--python", str(python)).stdout
    other = executable(tmp_path / "python3.13", "#!/bin/bash\necho '3.13 /opt'\n")
    answer = machine.run("--no_corpus", "--python", str(other))
    assert "now root=" in answer.stdout and "python=3.13 /opt" in answer.stdout
    assert f"Making .venv with {other}" in answer.stdout


def test_full_disk_is_reported_before_the_venv_is_made(machine: Machine) -> None:
    machine.add_python()
    (machine.bin / "df").unlink()
    executable(machine.bin / "df", "#!/bin/bash\necho head\necho '/dev/x 9000000 8500000 500000 95% /'\n")
    answer = machine.run()
    assert answer.returncode == 1
    assert "0 GB free" in answer.stderr
    assert not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("driver", "index", "wanted", "offers_cuda_12"),
    [("550.54.15", None, 580, True), ("470.1", None, 580, False), ("470.1", "whl/cu126", 525, False)],
)
def test_old_driver_is_refused_with_advice(
    machine: Machine, driver: str, index: str | None, wanted: int, offers_cuda_12: bool
) -> None:
    machine.add_python()
    machine.add_gpu(driver)
    answer = machine.run(*(["--torch_index", f"https://example.org/{index}"] if index else []))
    assert answer.returncode == 1
    assert driver in answer.stderr and f"driver {wanted} or newer" in answer.stderr
    assert ("--torch_index https://download.pytorch.org/whl/cu126" in answer.stderr) == offers_cuda_12
    assert machine.logged() == []


def test_hidden_or_failing_gpu_falls_back_to_the_cpu(machine: Machine) -> None:
    machine.add_python()
    machine.add_gpu("470.1")
    assert "hides every GPU" in machine.run("--no_corpus", CUDA_VISIBLE_DEVICES="").stdout
    executable(machine.bin / "nvidia-smi", "#!/bin/bash\necho 'no driver'; exit 9\n")
    answer = machine.run("--no_corpus")
    assert answer.returncode == 0, answer.stderr
    assert "finds no GPU" in answer.stdout and "no driver" in answer.stdout
    assert "train_all_models.py --device cpu " in answer.stdout


@pytest.mark.parametrize("smi", ["missing", "fails"])
def test_gpu_that_cannot_be_queried_is_an_error(machine: Machine, smi: str) -> None:
    machine.add_python()
    machine.device.touch()
    if smi == "fails":
        executable(machine.bin / "nvidia-smi", "#!/bin/bash\necho 'Driver/library version mismatch'; exit 18\n")
    answer = machine.run("--no_corpus")
    assert answer.returncode == 1 and machine.logged() == []
    assert {"missing": "nvidia-smi is not installed", "fails": "version mismatch"}[smi] in answer.stderr
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in answer.stderr and "whl/cu130" in answer.stderr
    hidden = machine.run("--no_corpus", CUDA_VISIBLE_DEVICES="")
    assert hidden.returncode == 0, hidden.stderr


def test_build_chosen_for_a_gpu_that_cannot_be_queried_is_installed(machine: Machine) -> None:
    machine.add_python()
    machine.device.touch()
    answer = machine.run("--no_corpus", "--torch_index", "https://example.org/whl/cu126", STAND_IN_CUDA="CUDA 12.6")
    assert answer.returncode == 0, answer.stderr
    assert "checked after installation" in answer.stdout and "torch uses CUDA 12.6" in answer.stdout
    answer = machine.run("--no_corpus", "--torch_index", "https://example.org/whl/cpu")
    assert answer.returncode == 0, answer.stderr
    assert "torch uses" not in answer.stdout and "train_all_models.py --device cpu " in answer.stdout


def test_container_without_a_gpu_on_a_machine_with_one_is_set_up_for_the_cpu(machine: Machine) -> None:
    machine.add_python()
    machine.driver.touch()
    answer = machine.run("--no_corpus")
    assert answer.returncode == 0, answer.stderr
    assert "given no GPU" in answer.stdout and "--gpus all" in answer.stdout
    assert "train_all_models.py  " in answer.stdout, "no GPU seems to be there, so the CPU need not be requested"


def test_torch_index_is_used_and_remembered(machine: Machine) -> None:
    machine.add_python()
    machine.add_gpu("550.54.15")
    index = "https://example.org/whl/cu126"
    first = machine.run("--no_corpus", "--torch_index", index + "/", STAND_IN_CUDA="NVIDIA H200")
    assert first.returncode == 0, first.stderr
    torch_line = next(line for line in machine.logged() if "--index-url" in line)
    assert f"--index-url {index} torch==" in torch_line
    second = machine.run("--no_corpus", STAND_IN_CUDA="NVIDIA H200")
    assert second.returncode == 0 and "Packages: complete." in second.stdout, second.stderr
    other = machine.run("--no_corpus", "--torch_index", "https://example.org/whl/cpu")
    assert f"torch_source={index}, now root=" in other.stdout


def test_gpu_that_torch_cannot_use_is_an_error(machine: Machine) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch can use CUDA on this machine, so the failure cannot be shown")
    machine.add_python()
    machine.add_gpu("580.65.06")
    answer = machine.run("--no_corpus")
    assert answer.returncode == 1
    assert "cannot use the GPU" in answer.stderr
    assert "is a CPU-only build" in answer.stderr or "no usable CUDA" in answer.stderr
    assert "--torch_index" in answer.stderr


def test_the_error_with_which_cuda_fails_to_start_is_shown(machine: Machine) -> None:
    machine.add_python()
    machine.add_gpu("580.65.06")
    (machine.checkout / "torch.py").write_text("""
import sys, types
__version__, version = "2.13.0", types.SimpleNamespace(cuda="13.0")
class cuda:
    def is_available(): print("a warning", file=sys.stderr)
    def init(): raise RuntimeError("Error 802: system not yet initialized\\nframe #0")
""")
    answer = machine.run("--no_corpus")
    assert answer.returncode == 1
    assert "Error 802: system not yet initialized; on a machine with NVSwitch, start nvidia-fab" in answer.stderr
    assert "a warning" not in answer.stderr and "if it is too old for this build" in answer.stderr


def test_missing_compiler_stops_a_set_up_for_a_gpu_before_anything_is_installed(machine: Machine) -> None:
    machine.add_python()
    without = {"STAND_IN_CUDA": "CUDA 13.0", "WITHOUT_COMPILER": "1"}
    assert machine.run("--no_corpus", **without).returncode == 0, "without a GPU nothing is compiled"
    machine.add_gpu("580.65.06")
    shutil.rmtree(machine.checkout / ".venv")
    machine.log.unlink()
    answer = machine.run("--no_corpus", **without)
    assert answer.returncode == 1 and "--no_compiler" in answer.stderr
    assert "needs a C compiler" in answer.stderr and "sudo apt-get install build-essential" in answer.stderr
    assert [line[:7] for line in machine.logged()] == ["-m venv"]
    accepted = machine.run("--no_corpus", "--no_compiler", **without)
    assert accepted.returncode == 0, accepted.stderr
    assert "build-essential" in accepted.stdout and "runs uncompiled" in accepted.stdout
    later = machine.run("--no_corpus", **without)
    assert later.returncode == 1 and "Packages: complete." in later.stdout, "also once everything is installed"
    executable(machine.bin / "gcc", "#!/bin/bash\n")
    headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    assert machine.run("--no_corpus", **without).returncode == (0 if headers else 1)


def test_optional_gpu_packages_may_fail_and_are_tried_once(machine: Machine) -> None:
    machine.add_python()
    machine.add_gpu("580.65.06")
    answer = machine.run("--no_corpus", STAND_IN_CUDA="NVIDIA H200", STAND_IN_FAILS="xformers")
    assert answer.returncode == 0, answer.stderr
    lines = [line for line in answer.stdout.splitlines() if line.startswith("Optional")]
    assert [line.split(":")[0] for line in lines] == ["Optional flash-attn", "Optional xformers"]
    assert all("no wheel for this torch" in line for line in lines)
    tried = [line for line in machine.logged() if "--only-binary=:all:" in line]
    assert len(tried) == 2 and all("--constraint" in line for line in tried)
    again = machine.run("--no_corpus", STAND_IN_CUDA="NVIDIA H200")
    assert "Optional" not in again.stdout


def test_optional_gpu_packages_get_two_minutes_each(machine: Machine) -> None:
    machine.add_python()
    machine.add_gpu("580.65.06")
    (machine.bin / "timeout").unlink()
    times_out = 'case "$*" in "--foreground 120 "*--only-binary*) exit 124 ;; esac'
    executable(machine.bin / "timeout", f'#!/bin/bash\n{times_out}\nshift 2\nexec "$@"\n')
    answer = machine.run("--no_corpus", STAND_IN_CUDA="NVIDIA H200")
    assert answer.returncode == 0 and answer.stdout.count("or none within 2 minutes") == 2
    assert not any("--only-binary" in line for line in machine.logged())


def test_ctrl_c_ends_the_optional_step_and_the_script(machine: Machine) -> None:
    machine.add_python()
    machine.add_gpu("580.65.06")
    environment = machine.environment() | {"STAND_IN_CUDA": "NVIDIA H200", "STAND_IN_HANGS": "--only-binary"}
    command = ["bash", str(machine.checkout / "setup_environment.sh")]
    pipes = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}

    def accept_ctrl_c():  # the tests may run in the background, where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    script = subprocess.Popen(command, env=environment, preexec_fn=accept_ctrl_c, **pipes)
    deadline = time.monotonic() + 60
    while not any("--only-binary" in line for line in machine.logged()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does
    output, _ = script.communicate(timeout=15)
    assert script.returncode == 130
    last = output.splitlines()[-1]
    assert last == "Trying to install the optional flash-attn and xformers (at most 2 minutes each)"


def test_gpu_that_appears_later_gets_a_cuda_build(machine: Machine) -> None:
    machine.add_python()
    machine.run("--no_corpus")
    machine.add_gpu("580.65.06")
    answer = machine.run("--no_corpus", STAND_IN_CUDA="NVIDIA H200")
    assert answer.returncode == 0, answer.stderr
    assert re.search("torch_source=cpu, now .* torch_source=default", answer.stdout)


def test_other_systems_than_linux_are_refused(machine: Machine) -> None:
    machine.add_python()
    (machine.bin / "uname").unlink()
    executable(machine.bin / "uname", "#!/bin/bash\necho Darwin\n")
    answer = machine.run("--no_corpus")
    assert answer.returncode == 1 and "runs on Linux only (on Windows: in WSL), not on Darwin" in answer.stderr
    assert not (machine.checkout / ".venv").exists()


def test_second_set_up_waits_for_the_running_one(machine: Machine) -> None:
    machine.add_python()
    machine.run("--no_corpus")
    with subprocess.Popen(["flock", str(machine.checkout), "sleep", "1.5"]) as holder:
        time.sleep(0.3)
        started = time.monotonic()
        answer = machine.run("--no_corpus")
        assert "waiting for it" in answer.stdout
        assert answer.returncode == 0 and time.monotonic() - started > 0.5
        holder.wait()


CI_CHECKS = ("-m ruff check .", "-m ruff format --check .", "-m lint-imports --no-logo", "-m mypy", "-m pytest")


@pytest.mark.parametrize("red", CI_CHECKS)
def test_ci_run_stops_at_the_first_failing_check(machine: Machine, red: str) -> None:
    machine.add_python()
    answer = machine.run(script=".ci/run", STAND_IN_FAILS=red)
    assert answer.returncode != 0
    assert machine.logged()[-1] == red


def test_ci_run_runs_all_checks_in_order(machine: Machine) -> None:
    machine.add_python()
    answer = machine.run(script=".ci/run")
    assert answer.returncode == 0, answer.stderr
    assert machine.logged()[-len(CI_CHECKS) :] == list(CI_CHECKS)


def test_requirements_are_pinned_to_exact_versions(repository: Path) -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (repository / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.fullmatch(r"[\w.-]+==[\d.]+", line), f"{name}: {line}"


def pins(file: Path) -> dict[str, str]:
    """Normalized package name → version."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", file.read_text(encoding="utf-8"), re.M)
    return {canonicalize_name(name): version for name, version in lines}


def closure(file: Path) -> set[str]:
    """The installed packages that a requirements file needs on this machine, directly or indirectly."""
    todo = [Requirement(name) for name in pins(file)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(wanted.name) or []:
            needed = Requirement(text)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return {name for name, _ in seen}


def test_constraints_pin_every_installed_version(repository: Path) -> None:
    """On Linux, where the file is made, nothing else may be pinned; elsewhere some packages differ."""
    if not Path(sys.prefix, ".setup-stamp").exists():
        pytest.skip("not in the environment that setup_environment.sh makes")
    constraints = pins(repository / "constraints.txt")
    needed: set[str] = set()
    for name in ("requirements.txt", "requirements-dev.txt"):
        needed |= closure(repository / name)
        assert pins(repository / name).items() <= constraints.items()
    if sys.platform == "linux":
        extras = re.compile("nvidia-(?!ml-py)|cuda-|triton$")
        assert {name for name in needed if not extras.match(name)} == constraints.keys()
    installed = {name: metadata.version(name).partition("+")[0] for name in needed & constraints.keys()}
    assert installed == {name: constraints[name] for name in installed}


@pytest.mark.integration
def test_real_installation(tmp_path: Path, repository: Path) -> None:
    """Takes minutes and needs the network: a real installation from a copy, with an empty home folder."""
    checkout, home = tmp_path / "a checkout", tmp_path / "home"
    home.mkdir()
    left_out = (".venv", ".git", ".cache", "__pycache__", "bible", "*.egg-info", "models*", "logs")
    shutil.copytree(repository, checkout, ignore=shutil.ignore_patterns(*left_out))
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": ""}
    command = ["bash", str(checkout / "setup_environment.sh"), "--no_corpus", "--python", sys.executable]
    first = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=3000)
    assert first.returncode == 0, first.stdout + first.stderr
    assert not (checkout / ".cache" / "pip").exists()
    started = time.monotonic()
    second = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60)
    assert second.returncode == 0 and "Packages: complete." in second.stdout, second.stdout + second.stderr
    assert time.monotonic() - started < 20
    subprocess.run([checkout / ".venv" / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "tqdm"], timeout=60)
    third = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=600)
    assert third.returncode == 0 and "a package is missing" in third.stdout, third.stdout + third.stderr
    assert list(home.iterdir()) == []
    program = "import mvlm_core, prioritary_mvlm, simone_transformer as s; print(s.__file__)"
    python = str(checkout / ".venv" / "bin" / "python")
    found = subprocess.run([python, "-c", program], cwd="/", capture_output=True, text=True, timeout=120)
    assert found.stdout.startswith(str(checkout)), found.stderr
