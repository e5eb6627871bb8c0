"""A new user's first hour, timed: clone, set-up, the whole job at the smoke preset, then the archives somewhere else.

    python -m benchmarks.reliability.from_clone      # about five minutes on two cores; packages come from the index

Somewhere else is a new virtual environment with torch and transformers only, in a folder of its own, where the blocks
of DOWNLOAD_INSTRUCTIONS.md are run as they stand. Uncommitted changes of this repository do not take part.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import command
from mvlm_core.errors import run_main
from mvlm_core.settings import REPOSITORY_ROOT

USED = ("torch", "transformers")  # what DOWNLOAD_INSTRUCTIONS.md asks for


class Failed(Exception):
    """A step's command failed; its text is the end of the output."""


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """A command's output.

    Raises:
        Failed: it did not end with 0.
    """
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=os.environ | environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"exit code {done.returncode} of {command}:\n{done.stdout[-4000:]}")
    return done.stdout


def shell_blocks(markdown: str) -> list[str]:
    """The ```bash blocks of a page, in their order."""
    return re.findall(r"^```bash\n(.*?)^```$", markdown, re.S | re.M)


def first_hour(place: Path) -> Iterator[tuple[str, str]]:
    """Each step in words once it is done, and what is worth telling of it.

    Raises:
        Failed: a step's command failed.
    """
    clone, elsewhere = place / "clone", place / "elsewhere"
    downloads, tools = elsewhere / "models_for_download", elsewhere / "venv" / "bin"
    run(["git", "clone", "--quiet", REPOSITORY_ROOT, clone], place)
    yield "git clone", ""
    yield "setup_environment.sh", run(["bash", "setup_environment.sh"], clone).strip().splitlines()[-1]
    run([clone / ".venv" / "bin" / "python", "train_all_models.py", "--preset", "smoke"], clone)
    size = (clone / "models" / "report.html").stat().st_size
    yield "train_all_models.py --preset smoke", f"report.html of {size / 1e3:.0f} kB"
    shutil.copytree(clone / "models_for_download", downloads)
    yield "download", ", ".join(sorted(path.name for path in downloads.iterdir()))
    pins = (clone / "requirements.txt").read_text(encoding="utf-8")
    wanted = [re.search(rf"^{name}==\S+", pins, re.M)[0] for name in USED]
    run([sys.executable, "-m", "venv", elsewhere / "venv"], place)
    run([tools / "pip", "install", "--quiet", *wanted], place)
    yield "a new virtual environment", ", ".join(wanted)
    told, environment = "", {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
    for block in shell_blocks((downloads / "DOWNLOAD_INSTRUCTIONS.md").read_text(encoding="utf-8")):
        told = run(["bash", "-ec", block], downloads, PATH=f"{tools}:{os.environ['PATH']}", **environment)
    yield "verify, extract, run", told.strip().splitlines()[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__, json=False)
    parser.add_argument("--scratch", type=Path, help="temporary folder for all of it [default: the system's]")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as place:
        print(command.head(("step", "seconds", "")), flush=True)
        started = time.monotonic()
        try:
            for words, told in first_hour(Path(place)):
                print(command.row((words, f"{time.monotonic() - started:.0f}", told)), flush=True)
                started = time.monotonic()
        except Failed as error:
            print(command.row(("the next step", f"{time.monotonic() - started:.0f}", "FAILED")), error, sep="\n\n")
            return 1
    return 0


if __name__ == "__main__":
    run_main(main)
