"""What the pages say is true: files, flags, messages and figures exist, and commands run (``-m integration``)."""

import re
import shutil
import sys

import pytest

from benchmarks.reliability.from_clone import run, shell_blocks
from tests.helpers import REPOSITORY

PAGES = ("README.md", "AGENTS.md", "mvlm_training_dataset_complete/README.md")
ENTRY_POINTS = (
    "train_all_models.py", "mvlm_trainer.py", "SIM-ONE Training/enhanced_train.py", "validate_models.py", "generate.py",
    "make_report.py", "prepare_dataset.py", "setup_environment.sh", "benchmarks/from_clone.py",
)  # fmt: skip
OTHERS_FLAGS = {"--nproc_per_node", "--model", "--check", "--format"}  # torchrun's, lm_eval's, ruff's


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def helps() -> str:
    texts = []
    for script in ENTRY_POINTS:
        command = ["bash" if script.endswith(".sh") else sys.executable, REPOSITORY / script, "--help"]
        texts.append(run(command, REPOSITORY))
    return "\n".join(texts)


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_on_a_page_is_known(name, helps):
    flags = {flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z_]+", page(name))} - OTHERS_FLAGS
    assert not {flag for flag in flags if not re.search(rf"{flag}\b", helps)}


@pytest.mark.parametrize("name", PAGES)
def test_every_file_a_page_links_to_or_names_is_there(name):
    text = page(name)
    named = set(re.findall(r"\]\(([^)#:]+)\)", text)) | set(re.findall(r"`((?:benchmarks|tests|docs)/[\w./]+)`", text))
    missing = {path for path in named if not ((REPOSITORY / name).parent / path).exists()}
    assert named or name != "README.md"
    assert not {path for path in missing if not (REPOSITORY / path).exists()}


def test_every_message_in_the_table_of_troubles_is_one_that_is_said():
    table = page("README.md").split("## When something goes wrong")[1]
    said = "".join(p.read_text(encoding="utf-8") for p in (REPOSITORY / "mvlm_core").glob("*.py")).replace('"\n', "")
    said = re.sub(r"\{[^}]*\}|%\w", "", re.sub(r'\s*f?"(?=[^"]*$)', "", said))
    for message in re.findall(r"^\| `([^`]+)`", table, re.M):
        if message.startswith("ModuleNotFoundError"):
            continue  # Python's own
        parts = [part.strip() for part in re.split(r"…|\bN\b", message) if len(part.strip()) > 4]
        assert parts and all(part in said for part in parts), message


def test_every_score_in_the_readme_stands_in_the_results():
    numbers = {float(number) for number in re.findall(r"\d+\.\d{3,4}\b", page("benchmarks/RESULTS.md"))}
    for number in re.findall(r"(?<![\w,])\d\.\d{3,4}\b", page("README.md")):
        places = len(number.split(".")[1])
        assert any(f"{known:.{places}f}" == number for known in numbers), number


@pytest.mark.integration
def test_every_command_of_the_pages_runs(tmp_path):
    """As written, but for the long ones: trainings at the smoke preset, and the tests are collected only."""
    clone = tmp_path / "clone"
    run(["git", "clone", "--quiet", REPOSITORY, clone], tmp_path)
    (clone / "my_texts").mkdir()
    (clone / "my_texts" / "psalm.md").write_text("# A psalm of my own\n\nSing, all ye machines.\n")
    commands = []
    for name in PAGES:
        for block in shell_blocks(page(name)):
            commands += [line for line in block.splitlines() if line.strip()]
    assert len(commands) > 12
    for command in commands:
        command = re.sub(r"train_all_models\.py$", "train_all_models.py --preset smoke", command)
        command = command.replace("--work_dir /tmp/smoke", f"--work_dir {tmp_path / 'smoke'}")
        command = re.sub(r"_node 8 (.*) --preset h200$", r"_node 2 \1 --preset smoke --fresh", command)
        command = re.sub(r"-m pytest.*", "-m pytest --collect-only --quiet", command)
        print(command, flush=True)
        run(["bash", "-ec", command], clone)
    for model in ("mvlm_gpt2", "simone_enhanced"):
        assert (clone / "models" / model / "manifest.json").is_file()
    shutil.rmtree(clone)
