"""Time the steps of a new user: clone, set-up, the whole job with the smoke preset, and using the archives elsewhere.

    python -m benchmarks.reliability.from_clone      # about five minutes on two cores; downloads packages

The archives are tested in a separate folder and a new virtual environment with only torch and transformers, by running
the commands of DOWNLOAD_INSTRUCTIONS.md verbatim. Uncommitted changes of this repository are not included.
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

USED = ("torch", "transformers")  # packages required by DOWNLOAD_INSTRUCTIONS.md


class StepError(Exception):
    """A step's command failed; the message includes the end of its output."""


def run(words: list[str | Path], cwd: Path, **environment: str) -> str:
    """Run a command and return its output.

    Raises:
        StepError: its exit code is not 0.
    """
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=os.environ | environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise StepError(f"exit code {done.returncode} of {words}:\n{done.stdout[-4000:]}")
    return done.stdout


def shell_blocks(markdown: str) -> list[str]:
    """Return the ```bash blocks of a Markdown page, in order."""
    return re.findall(r"^```bash\n(.*?)^```$", markdown, re.S | re.M)


def first_hour(place: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each completed step and a summary of its result.

    Raises:
        StepError: a step's command failed.
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
    packages = [re.search(rf"^{name}==\S+", pins, re.M)[0] for name in USED]
    run([sys.executable, "-m", "venv", elsewhere / "venv"], place)
    run([tools / "pip", "install", "--quiet", *packages], place)
    yield "new virtual environment", ", ".join(packages)
    output, environment = "", {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
    for block in shell_blocks((downloads / "DOWNLOAD_INSTRUCTIONS.md").read_text(encoding="utf-8")):
        output = run(["bash", "-ec", block], downloads, PATH=f"{tools}:{os.environ['PATH']}", **environment)
    yield "verify, extract, run", output.strip().splitlines()[-1]


def main(arguments: list[str] | None = None) -> int:
    command.new_parser(__doc__, json=False).parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        print(command.head(("step", "seconds", "")), flush=True)
        started = time.monotonic()
        try:
            for step, summary in first_hour(Path(place)):
                print(command.row((step, f"{time.monotonic() - started:.0f}", summary)), flush=True)
                started = time.monotonic()
        except StepError as error:
            print(command.row(("the next step", f"{time.monotonic() - started:.0f}", "FAILED")), error, sep="\n\n")
            return 1
    return 0


if __name__ == "__main__":
    run_main(main)
