"""The structure of the code: import directions, function length, edits of ``sys.path``."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

PACKAGES = ("mvlm_core", "bible_corpus", "SIM-ONE Training/prioritary_mvlm", "SIM-ONE Training/simone_transformer")
MAX_FUNCTION_LINES = 60
# import-linter checks packages only, so the imports of the entry scripts are checked here.
ENTRY_SCRIPTS = sorted([*REPOSITORY.glob("*.py"), *(REPOSITORY / "SIM-ONE Training").glob("*.py")])
MODEL_2 = {"prioritary_mvlm", "simone_transformer", "enhanced_train", "train"}


def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((REPOSITORY / folder).rglob("*.py"))]


def name(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports, including imports inside functions."""
    found: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        pytest.skip("import-linter is not installed beside this Python (requirements-dev.txt)")
    command = [program, "--no-logo", "--no-cache", folder / "pyproject.toml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_import_linter_contracts_hold() -> None:
    answer = lint_imports(REPOSITORY)
    assert answer.returncode == 0, answer.stdout
    assert "0 broken" in answer.stdout


def test_entry_scripts_of_one_model_do_not_import_the_other() -> None:
    assert not imported(REPOSITORY / "mvlm_trainer.py") & MODEL_2
    for script in ("enhanced_train.py", "train.py"):
        assert "mvlm_trainer" not in imported(REPOSITORY / "SIM-ONE Training" / script)


@pytest.mark.parametrize("file", ENTRY_SCRIPTS, ids=name)
def test_entry_scripts_do_not_import_benchmarks_or_tests(file: Path) -> None:
    assert not imported(file) & {"benchmarks", "tests"}


def long_functions(file: Path) -> Iterator[str]:
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{name(file)}: {node.name} has {lines} lines"


def test_functions_stay_within_the_length_limit() -> None:
    files = [*ENTRY_SCRIPTS, *python_files(*PACKAGES, "benchmarks")]
    assert len(files) > 50
    assert [found for file in files for found in long_functions(file)] == []


def edits_sys_path(file: Path) -> bool:
    """Whether a file calls a method of ``sys.path``, assigns to it, or imports it to do so."""
    if "path" not in file.read_text(encoding="utf-8"):
        return False
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.module == "sys" and any(a.name == "path" for a in node.names):
            return True
        if not isinstance(node, ast.Call | ast.Assign | ast.AugAssign):
            continue
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.func if isinstance(node, ast.Call) else node.target]
        )
        if any(re.match(r"sys\.path\b(?!\.(index|count|copy)\b)", ast.unparse(target)) for target in targets):
            return True
    return False


def test_only_entry_scripts_edit_sys_path() -> None:
    files = [*REPOSITORY.glob("*.py"), *python_files(*PACKAGES, "benchmarks", "tests")]
    guilty = {name(file) for file in files if edits_sys_path(file)}
    started = {name(file) for file in python_files("benchmarks") if '__name__ == "__main__"' in file.read_text("utf-8")}
    assert guilty <= started | {name(file) for file in ENTRY_SCRIPTS}


# --- the checks themselves ------------------------------------------------------------------------------------------


FORBIDDEN = (  # importer, import, start of the reported contract
    ("mvlm_core/data/corpus.py", "import mvlm_core.evaluation.generation", "mvlm_core: base <- data"),
    ("mvlm_core/files.py", "import mvlm_core.data.batches", "mvlm_core: base <- data"),
    ("mvlm_core/pipeline/report.py", "import mvlm_core.training.loop", "mvlm_core: base <- data"),
    ("mvlm_core/hardware.py", "def f():\n    import prioritary_mvlm", "mvlm_core knows no model"),
    ("mvlm_core/errors.py", "from benchmarks import experiments", "The product knows no benchmark"),
    ("bible_corpus/books.py", "import mvlm_trainer", "bible_corpus builds on"),
    ("simone_transformer/modern_layers.py", "import mvlm_core.errors", "simone_transformer ships"),
    ("prioritary_mvlm/config.py", "import mvlm_trainer", "Model 2 does not know model 1"),
)


def test_every_forbidden_import_is_reported(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, tmp_path / Path(package).name)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for module, line, _ in FORBIDDEN:
        with open(tmp_path / module, "a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    answer = lint_imports(tmp_path)
    assert answer.returncode == 1
    for module, line, contract in FORBIDDEN:
        assert re.search(rf"^{contract}.* BROKEN$", answer.stdout, re.M), answer.stdout
        importer = module.removesuffix(".py").replace("/", ".")
        target = line.split("import ")[1] if "from" not in line else "benchmarks"
        assert re.search(rf"{importer} -> {target}\b", answer.stdout), f"{importer} -> {target}: {answer.stdout}"


@pytest.mark.parametrize(
    ("text", "edits"),
    [
        ("import sys\nsys.path.insert(0, 'x')", True),
        ("import sys\nsys.path[:0] = ['x']", True),
        ("import sys\nsys.path += ['x']", True),
        ("from sys import path", True),
        ("import sys\nprint(sys.path)", False),
    ],
)
def test_sys_path_edits_are_detected(tmp_path: Path, text: str, edits: bool) -> None:
    file = tmp_path / "some.py"
    file.write_text(text, encoding="utf-8")
    assert edits_sys_path(file) == edits
