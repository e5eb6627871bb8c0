"""Checks of an exported model and its archive, run and reported by `validate_models.py`.

Exports are untrusted: their files are checked before anything is loaded (`file_checks`), and loading and scoring run in
separate processes (`load_probe`, `scores`, `onnx_format`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mvlm_core.errors import Stopped
from mvlm_core.export.archive import check_archive, read_checksums
from mvlm_core.export.file_checks import Checks
from mvlm_core.export.formats import LOGITS_TOLERANCE, formats_of
from mvlm_core.export.manifest import MANIFEST, training_config
from mvlm_core.files import read_json, sha256_file
from mvlm_core.metrics import PRIMARY_TEST_BPB
from mvlm_core.run_layout import Layout
from mvlm_core.settings import REPOSITORY_ROOT
from mvlm_core.signals import PARENT_VARIABLE, parent_is_gone

EDGE_CASE_TEXTS = (
    "",
    " ",
    "  two  spaces  ",
    "\n\n\ttab\r\n",
    "<eos> is text, and so are <pad><bos><unk> and <|endoftext|>",
    "\U0001f54a\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\x00\x01\x1b[31m\x7f",
    "Ἐν ἀρχῇ ἦν ὁ λόγος",
    "בְּרֵאשִׁית",
    "don't  “quote” — dash…",
    "a" * 300,
    "1 + 1 = 2",
)
ORDINARY_WORDS = ("<eos>", "<bos>", "<|endoftext|>")  # must not be encoded as special tokens
_SUM_TOLERANCE = 1e-9  # relative, for a score that is the sum of stored numbers
LOADING_SECONDS = 900  # a real model takes a few; a malicious config may request endless layers
LOADING = "loads offline in another folder, without this repository"
PROBE = Path(__file__).with_name("load_probe.py")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


# --- processes ----------------------------------------------------------------------------------------------


def run_python(arguments: list[str], cwd: Path, *, seconds: float = math.inf, **extra: str) -> tuple[int, str]:
    """Run a new Python process with Hugging Face libraries offline; return its exit code and last lines of output.

    Args:
        seconds: timeout after which it is killed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", PARENT_VARIABLE)}
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment | OFFLINE | extra,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            output = _wait_for_output(process, seconds)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "\n".join(output.strip().splitlines()[-8:])


def _wait_for_output(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for the child's output; raises Stopped if the pipeline that started this process has exited."""
    end = time.monotonic() + seconds
    while True:
        try:
            return process.communicate(timeout=1)[0]
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                process.kill()
                return f"{process.communicate()[0]}\nkilled: not done after {seconds:.0f} seconds"
            if parent_is_gone():
                raise Stopped(signal.SIGTERM) from None


def answer_of(
    arguments: list[str], request: dict[str, Any], cwd: Path = REPOSITORY_ROOT, *, seconds: float = math.inf
) -> tuple[dict[str, Any], str]:
    """Run Python with request and answer passed as JSON files; return the answer, or {} and the reason."""
    with tempfile.TemporaryDirectory(prefix="mvlm-validate-") as scratch:
        folder = Path(scratch)
        request_file, answer_file = folder / "request.json", folder / "answer.json"
        request_file.write_text(json.dumps(request), encoding="utf-8")
        caches = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "home")}
        code, output = run_python([*arguments, str(request_file), str(answer_file)], cwd, seconds=seconds, **caches)
        return read_json(answer_file) if code == 0 else {}, f"exit code {code}: {output}"


# --- loading ------------------------------------------------------------------------------------------------


def copy_export(folder: Path, files: list[str], target: Path) -> None:
    """Copy only the given files, as hard links if the file system supports it."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, target / name, follow_symlinks=False)
        except OSError:
            shutil.copyfile(folder / name, target / name, follow_symlinks=False)


def check_loading(
    folder: Path, files: list[str], checks: Checks, *, prompts: tuple[str, ...], texts: list[str]
) -> list[dict[str, Any]]:
    """Run ``load_probe`` on a copy of the export and add its checks; return the generated texts.

    Args:
        files: the manifest's files.
        prompts: to continue.
        texts: for the tokenizer's round trip, in addition to ``EDGE_CASE_TEXTS``.
    """
    with tempfile.TemporaryDirectory(prefix="mvlm-validate-") as scratch:
        elsewhere = Path(scratch)
        copy = elsewhere / f"another_name_{secrets.token_hex(4)}"
        copy_export(folder, [*files, MANIFEST], copy)
        request = {
            "folder": str(copy),
            "prompts": prompts,
            "texts": [*texts, *EDGE_CASE_TEXTS],
            "specials": ORDINARY_WORDS,
        }
        config = training_config(folder)
        request["parameters"] = config.get("results", {}).get("parameters")
        request["vocabulary"] = config.get("tokenizer", {}).get("vocab_size")
        answer, reason = answer_of(["-I", str(PROBE)], request, elsewhere, seconds=LOADING_SECONDS)
    if not checks.add("loading", LOADING, bool(answer), f"as {answer['class']}" if answer else reason):
        return []
    for group, name, problems, good in answer["checks"]:
        checks.add_problems(group, name, problems, good)
    return answer["samples"]


# --- scores -------------------------------------------------------------------------------------------------


def same_score(recorded: object, now: object) -> bool:
    """Whether two values are floats and close. Integers are invalid, and may be too large to compare."""
    return (
        isinstance(recorded, float) and isinstance(now, float) and math.isclose(recorded, now, rel_tol=_SUM_TOLERANCE)
    )


def check_scores(folder: Path, checks: Checks, *, data_dir: str, seed: int, **options: Any) -> None:
    """Recompute the test scores and compare them with those recorded in training.

    Args:
        seed: for the sample of documents to rescore.
        options: the other arguments of ``scores.rescore``.
    """
    config = training_config(folder)
    request = {"folder": str(folder), "data_dir": data_dir, "seed": seed, **options}
    answer, reason = answer_of(["-m", "mvlm_core.export.scores"], request)
    if not checks.add("scores", "recomputed", bool(answer), f"on {answer['device']}" if answer else reason):
        return
    same_text = answer["fingerprint"] == config.get("data", {}).get("fingerprint")
    detail = "the corpus is the one it was trained and scored on"
    if not same_text:
        detail = (
            f"{data_dir} is not the corpus that the model was trained and scored on: pass that one with --data_dir, or "
            "skip the scores with --quick"
        )
    if not checks.add("scores", "same text", same_text, detail):
        return
    if sample := answer["sample"]:
        good = f"{sample['documents']:,} of {sample['of']:,} documents as recorded in training, drawn with seed {seed}"
        checks.add_problems("scores", "sample", sample["problems"], good)
    unscored = config.get("settings", {}).get("no_test_score") is True
    for key in ("test_bpb", PRIMARY_TEST_BPB):
        recorded, now = config.get("results", {}).get(key), answer[key]
        if recorded is None and now is None:
            checks.add("scores", key, True, "not scored (--no_test_score)" if unscored else "no such text")
        else:
            detail = f"{now} from test_nats, recorded in training: {recorded}"
            checks.add("scores", key, same_score(recorded, now), detail)


# --- archives -----------------------------------------------------------------------------------------------


def check_packed(group: str, archive: Path, folder: Path, layout: Layout, checks: Checks) -> None:
    """Check the archive of a folder: valid, listed in SHA256SUMS, and equal to the folder."""
    if not archive.is_file():
        checks.add(group, "exists", False, f"{archive} is missing")
        return
    checks.add(group, "exists", True, f"{archive.stat().st_size / 1e6:.1f} MB")
    equal_to = "the export" if group == "archive" else "its folder"
    problems = check_archive(archive, folder)
    checks.add_problems(group, f"intact and equal to {equal_to}", problems, "the same files")
    listed = read_checksums(layout.checksums).get(archive.name)
    try:
        actual = sha256_file(archive)
    except OSError as error:
        actual = f"nothing ({error.strerror})"
    detail = f"{archive.name}: {layout.checksums.name} lists {listed or 'nothing'}, the file has {actual}"
    checks.add(group, "SHA256SUMS", listed == actual, "equal" if listed == actual else detail)


def check_formats(name: str, folder: Path, layout: Layout, checks: Checks) -> None:
    """Check other formats of the model, if any: files, archive, and ONNX Runtime's logits."""
    made = layout.formats(name)
    if not made.is_dir() and not layout.formats_archive(name).is_file():
        return
    formats = formats_of(made, folder)
    detail = ", ".join(formats) or f"{made}: a file differs from its manifest, or it was made from another export"
    if not checks.add("formats", "made from this export", bool(formats), detail):
        return
    check_packed("formats", layout.formats_archive(name), made, layout, checks)
    if "onnx" in formats:
        _check_logits(folder, made / "onnx" / "model.onnx", checks)


def _check_logits(folder: Path, graph: Path, checks: Checks) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        detail = "onnxruntime is not installed (pip install -r requirements-extras.txt)"
        checks.add("formats", "ONNX logits skipped", True, detail)
        return
    answer, reason = answer_of(["-m", "mvlm_core.export.onnx_format"], {"folder": str(folder), "graph": str(graph)})
    difference = answer.get("largest_difference", math.inf)
    detail = f"largest difference {difference:.2g}" if answer else reason
    checks.add("formats", "ONNX logits", difference <= LOGITS_TOLERANCE, detail)
