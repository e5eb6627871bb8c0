"""The checks of an exported model and its archive: what `validate_models.py` runs and reports.

What is looked at is not trusted: its files are judged before anything is loaded (`file_checks`), and loading and
scoring happen in processes of their own (`load_probe`, `scores`, `onnx_format`).
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
from mvlm_core.export.archive import check_archive, matches_export, read_checksums
from mvlm_core.export.file_checks import Checks
from mvlm_core.export.formats import LOGITS_TOLERANCE, formats_of
from mvlm_core.export.manifest import MANIFEST, TEST_SCORES, training_config
from mvlm_core.files import read_json, sha256_file
from mvlm_core.metrics import PRIMARY_TEST_BPB
from mvlm_core.run_layout import Layout
from mvlm_core.settings import REPOSITORY_ROOT
from mvlm_core.signals import PARENT_VARIABLE, parent_is_gone

ODD_TEXTS = (
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
ORDINARY_WORDS = ("<eos>", "<bos>", "<|endoftext|>")  # that must not become special tokens
_SUM_TOLERANCE = 1e-9  # relative, of a score that is the sum of stored numbers
LOADING_SECONDS = 900  # a real model takes a few; a hostile configuration may ask for endless layers
LOADING = "loads elsewhere, offline, by itself"
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
    """A fresh Python, Hugging Face's libraries offline; returns its exit code and last lines of output.

    Args:
        seconds: after so many it is killed.
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
            output = _output_in_time(process, seconds)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "\n".join(output.strip().splitlines()[-8:])


def _output_in_time(process: subprocess.Popen[str], seconds: float) -> str:
    """The child's output; raises Stopped when the pipeline that started this process is gone."""
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
    """What such a process answers to a request, both in JSON files; or {} and why it gave no answer."""
    with tempfile.TemporaryDirectory(prefix="mvlm-validate-") as scratch:
        place = Path(scratch)
        asked, answer = place / "request.json", place / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        caches = {"HF_MODULES_CACHE": str(place / "modules"), "HF_HOME": str(place / "home")}
        code, output = run_python([*arguments, str(asked), str(answer)], cwd, seconds=seconds, **caches)
        return read_json(answer) if code == 0 else {}, f"exit code {code}: {output}"


# --- loading ------------------------------------------------------------------------------------------------


def copy_export(folder: Path, files: list[str], target: Path) -> None:
    """Only the given files, as hard links where the file system allows it."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, target / name, follow_symlinks=False)
        except OSError:
            shutil.copyfile(folder / name, target / name, follow_symlinks=False)


def check_loading(
    folder: Path, files: list[str], checks: Checks, *, prompts: tuple[str, ...], texts: list[str]
) -> list[dict[str, Any]]:
    """What a stranger's process finds in a copy of the export; returns the generated texts.

    Args:
        files: that the manifest lists.
        prompts: to continue.
        texts: for the tokenizer's round trip, beside ``ODD_TEXTS``.
    """
    with tempfile.TemporaryDirectory(prefix="mvlm-validate-") as scratch:
        elsewhere = Path(scratch)
        copy = elsewhere / f"another_name_{secrets.token_hex(4)}"
        copy_export(folder, [*files, MANIFEST], copy)
        request = {"folder": str(copy), "prompts": prompts, "texts": [*texts, *ODD_TEXTS], "specials": ORDINARY_WORDS}
        config = training_config(folder)
        request["parameters"] = config.get("results", {}).get("parameters")
        request["vocabulary"] = config.get("tokenizer", {}).get("vocab_size")
        found, why = answer_of(["-I", str(PROBE)], request, elsewhere, seconds=LOADING_SECONDS)
    if not checks.add("loading", LOADING, bool(found), f"as {found['class']}" if found else why):
        return []
    for group, name, problems, good in found["checks"]:
        checks.add_problems(group, name, problems, good)
    return found["samples"]


# --- scores -------------------------------------------------------------------------------------------------


def same_score(recorded: object, found: object, tolerance: float) -> bool:
    """Whether two values are scores and alike. An integer is none, and may be too large for the comparison."""
    return isinstance(recorded, float) and isinstance(found, float) and math.isclose(recorded, found, rel_tol=tolerance)


def check_scores(folder: Path, checks: Checks, *, data_dir: str, device: str, seed: int, whole: bool) -> None:
    """Compute the test scores again and compare them with those that training recorded.

    Args:
        seed: of the sample of windows that is scored again where the nats of all of them lie beside the export.
        whole: score all of them again nevertheless.
    """
    config = training_config(folder)
    asked = {"folder": str(folder), "data_dir": data_dir, "device": device, "seed": seed, "whole": whole}
    found, why = answer_of(["-m", "mvlm_core.export.scores"], asked)
    if not checks.add("scores", "recomputed", bool(found), f"on {found['device']}" if found else why):
        return
    same_text = found["fingerprint"] == config.get("data", {}).get("fingerprint")
    detail = "the corpus is the one it was trained and scored on"
    if not same_text:
        detail = f"the text in {data_dir} is not the one it was trained and scored on: no score can be compared"
    if not checks.add("scores", "same text", same_text, detail):
        return
    if sample := found["sample"]:
        detail = f"{sample['windows']:,} of {sample['of']:,} windows as recorded in training, drawn by seed {seed}"
        checks.add_problems("scores", "sample", sample["problems"], detail)
    where, tolerance = ("the files", found["tolerance"]) if sample is None else (TEST_SCORES, _SUM_TOLERANCE)
    unscored = config.get("settings", {}).get("no_test_score") is True
    for key in ("test_bpb", PRIMARY_TEST_BPB):
        recorded, now = config.get("results", {}).get(key), found[key]
        if recorded is None and (now is None or unscored):
            checks.add("scores", key, True, "no such text" if now is None else "left unread by --no_test_score")
        else:
            detail = f"{now} from {where}, recorded in training: {recorded}"
            checks.add("scores", key, same_score(recorded, now, tolerance), detail)


# --- archives -----------------------------------------------------------------------------------------------


def check_packed(group: str, archive: Path, folder: Path, layout: Layout, checks: Checks) -> None:
    """Judge the archive of a folder: whole, as in SHA256SUMS, and equal to the folder."""
    if not archive.is_file():
        checks.add(group, "there", False, f"{archive} is missing")
        return
    checks.add(group, "there", True, f"{archive.stat().st_size / 1e6:.1f} MB")
    good = checks.add_problems(group, "opens and holds what its manifest says", check_archive(archive), "good")
    listed = read_checksums(layout.checksums).get(archive.name)
    try:
        found = sha256_file(archive)
    except OSError as error:
        found = f"nothing ({error.strerror})"
    detail = f"{archive.name}: {layout.checksums.name} says {listed or 'nothing'}, the file gives {found}"
    checks.add(group, "SHA256SUMS", listed == found, "equal" if listed == found else detail)
    if good:
        equal = matches_export(archive, folder)
        detail = "the same files" if equal else f"{archive.name} does not hold what is in {folder}"
        checks.add(group, "equals the export" if group == "archive" else "equals its folder", equal, detail)


def check_formats(name: str, folder: Path, layout: Layout, checks: Checks) -> None:
    """Judge what other programs read, where there is any: its files, its archive, and the logits of ONNX Runtime."""
    made = layout.formats(name)
    if not made.is_dir() and not layout.formats_archive(name).is_file():
        return
    formats = formats_of(made, folder)
    detail = ", ".join(formats) or f"{made}: a file differs from its manifest, or it was made of another export"
    if not checks.add("formats", "made of this export", bool(formats), detail):
        return
    check_packed("formats", layout.formats_archive(name), made, layout, checks)
    if "onnx" in formats:
        _check_logits(folder, made / "onnx" / "model.onnx", checks)


def _check_logits(folder: Path, graph: Path, checks: Checks) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        checks.add("formats", "ONNX logits left out", True, "onnxruntime is not installed: requirements-extras.txt")
        return
    found, why = answer_of(["-m", "mvlm_core.export.onnx_format"], {"folder": str(folder), "graph": str(graph)})
    difference = found.get("largest_difference", math.inf)
    detail = f"largest difference {difference:.2g}" if found else why
    checks.add("formats", "ONNX logits", difference <= LOGITS_TOLERANCE, detail)
