"""The documentation is accurate: files, flags, messages and figures exist, and commands run (``-m integration``)."""

import re
import shutil
import sys

import pytest

from benchmarks.reliability.from_clone import run, shell_blocks
from tests.helpers import REPOSITORY

GUIDES = ("docs/h200.md", "docs/your-own-text.md", "docs/troubleshooting.md", "docs/other-formats.md")
PAGES = ("README.md", "AGENTS.md", *GUIDES, "benchmarks/README.md", "mvlm_training_dataset_complete/README.md")
RUN_AS_WRITTEN = ("docs/your-own-text.md", "docs/other-formats.md", "README.md")  # in this order; no GPU needed
SCORED = ("README.md", "docs/h200.md", "benchmarks/README.md")
ENTRY_POINTS = (
    "train_all_models.py",
    "mvlm_trainer.py",
    "SIM-ONE Training/enhanced_train.py",
    "validate_models.py",
    "evaluate_models.py",
    "generate.py",
    "export_formats.py",
    "make_report.py",
    "playground.py",
    "prepare_dataset.py",
    "serve.py",
    "setup_environment.sh",
)
TORCHRUN_FLAGS = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
LINES_OF_README = 130


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def modules_run(text: str) -> set[str]:
    """This repository's modules that a page runs with ``python -m``."""
    return set(re.findall(r"python -m ((?:benchmarks|tests)\.[\w.]+)", text))


@pytest.fixture(scope="module")
def helps() -> str:
    """The help texts of all documented commands."""
    commands = [
        ["bash" if script.endswith(".sh") else sys.executable, REPOSITORY / script, "--help"] for script in ENTRY_POINTS
    ]
    modules = sorted(set().union(*(modules_run(page(name)) for name in PAGES)))
    commands += [[sys.executable, "-m", module, "--help"] for module in modules if module.startswith("benchmarks.")]
    return "\n".join(run(command, REPOSITORY) for command in commands)


@pytest.mark.parametrize("name", PAGES)
def test_documented_flags_exist(name, helps):
    flags = {flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z_]+", page(name))} - TORCHRUN_FLAGS
    assert not {flag for flag in flags if not re.search(rf"{flag}\b", helps)}


@pytest.mark.parametrize("name", PAGES)
def test_files_and_modules_named_in_the_docs_exist(name):
    text, folder = page(name), (REPOSITORY / name).parent
    linked = {path for path in re.findall(r"\]\(([^)#:]+)\)", text)}
    named = set(
        re.findall(r"`((?:benchmarks|tests|docs|mvlm_core|bible_corpus|SIM-ONE Training)/[\w./ -]+\.\w+)`", text)
    )
    assert not {path for path in linked if not (folder / path).exists()}
    assert not {path for path in named if not (REPOSITORY / path).exists()}
    modules = {f"{module.replace('.', '/')}.py" for module in modules_run(text)}
    assert not {path for path in modules if not (REPOSITORY / path).exists()}


def test_agents_guide_answers_ten_questions_with_existing_files():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", page("AGENTS.md").split("## Where do I change")[1], re.M)[2:]
    assert len(rows) >= 10
    for question, place, proof in rows:
        files = re.findall(
            r"`((?:[\w.-]+|SIM-ONE Training)(?:/[\w.-]+)*\.(?:py|sh|md|toml|txt|json|html))", place + proof
        )
        assert files, question
        assert not [file for file in files if not (REPOSITORY / file).exists()], question


def test_documented_error_messages_occur_in_the_code():
    sources = [*(REPOSITORY / "mvlm_core").rglob("*.py"), *REPOSITORY.glob("*.py")]
    said = "".join(path.read_text(encoding="utf-8") for path in sources).replace('"\n', "")
    said = re.sub(r"\{[^}]*\}|%\w", "", re.sub(r'\s*f?"(?=[^"]*$)', "", said))
    messages = re.findall(r"^\| `([^`]+)`", page("docs/troubleshooting.md"), re.M)
    assert len(messages) >= 8
    for message in messages:
        parts = [part.strip() for part in re.split(r"…|\bN\b", message) if len(part.strip()) > 4]
        assert parts and all(part in said for part in parts), message


@pytest.mark.parametrize("name", SCORED)
def test_documented_scores_are_recorded_in_the_log(name):
    numbers = {float(number) for number in re.findall(r"\d+\.\d{3,4}\b", page("benchmarks/LOG.md"))}
    for number in re.findall(r"(?<![\w,.])\d\.\d{3,4}\b", page(name)):
        places = len(number.split(".")[1])
        assert any(f"{known:.{places}f}" == number for known in numbers), number


@pytest.mark.parametrize(
    "name", ["README.md", "mvlm_core/export/model_card.md", "mvlm_core/pipeline/download_instructions.md"]
)
def test_the_version_of_transformers_that_the_exports_need_is_stated(name):
    needed = re.search(r"transformers>=[\d.]+", page("SIM-ONE Training/simone_transformer/enhanced_model.py"))
    assert needed and needed[0] in page(name)


def test_the_readme_stays_short():
    assert page("README.md").count("\n") <= LINES_OF_README


@pytest.mark.integration
def test_documented_commands_run(tmp_path):
    """As written, except for the long ones: training uses the smoke preset, and tests are only collected."""
    clone = tmp_path / "clone"
    run(["git", "clone", "--quiet", REPOSITORY, clone], tmp_path)
    (clone / "my_texts").mkdir()
    for number in range(3):
        text = "# A psalm of my own\n\n" + f"Sing, all ye machines, for the {number}th time.\n" * 200
        (clone / "my_texts" / f"psalm{number}.txt").write_text(text)
    commands = ["bash setup_environment.sh"]
    for name in RUN_AS_WRITTEN:
        for block in shell_blocks(page(name)):
            commands += [line for line in block.splitlines() if line.strip()]
    assert len(commands) > 12
    for command in dict.fromkeys(commands):
        command = re.sub(r"train_all_models\.py(?! --preset)", "train_all_models.py --preset smoke", command)
        command = command.replace("--work_dir /tmp/smoke", f"--work_dir {tmp_path / 'smoke'}")
        command = command.replace("--preset h200 --dry_run", "--preset h200 --dry_run --fresh")  # of finished models
        command = re.sub(r"-m pytest.*", "-m pytest --collect-only --quiet", command)
        print(command, flush=True)
        run(["bash", "-ec", command], clone)
    for model in ("mvlm_gpt2", "simone_enhanced"):
        assert (clone / "models" / model / "manifest.json").is_file()
    shutil.rmtree(clone)
