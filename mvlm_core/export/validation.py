"""The checks of an exported model and its archive: what `validate_models.py` runs and reports.

What is looked at is not trusted: files are judged before anything is loaded, and loading and scoring happen
in processes of their own.
"""

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

from mvlm_core.errors import Stopped, UserError
from mvlm_core.export.archive import MANIFEST, check_archive, matches_export, read_checksums
from mvlm_core.export.file_checks import Checks, part
from mvlm_core.files import read_json, sha256_file, write_json_atomic
from mvlm_core.run_layout import Layout
from mvlm_core.settings import REPOSITORY_ROOT
from mvlm_core.signals import PARENT_VARIABLE

PROMPTS = (
    "In the beginning God",
    "The LORD is my shepherd",
    "Blessed are the",
    "And it came to pass",
    "For God so loved the world",
    "Thou shalt not",
)
VERSES = (
    "In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void;",
    "The LORD is my shepherd; I shall not want.\nHe maketh me to lie down in green pastures:",
    "Jesus wept.\n\nThen said the Jews, Behold how he loved him!",
)
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
SAME_MACHINE, OTHER_MACHINE = (
    1e-4,
    1e-3,
)  # relative; sums are ordered otherwise on another device or precision
LOADING_SECONDS = 900  # a real model takes a few; a hostile configuration may ask for endless layers
PROBE = Path(__file__).with_name("load_probe.py")
VALIDATOR = REPOSITORY_ROOT / "validate_models.py"


# --- loading ------------------------------------------------------------------------------------------------


def copy_export(folder: Path, manifest: dict, target: Path) -> None:
    """Only the manifest's files, as hard links where the file system allows it."""
    for name in (*manifest["files"], MANIFEST):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, target / name, follow_symlinks=False)
        except OSError:
            shutil.copyfile(folder / name, target / name, follow_symlinks=False)


def run_python(arguments: list[str], cwd: Path, *, seconds: float = math.inf, **extra: str) -> tuple[int, str]:
    """A fresh Python, Hugging Face's libraries offline; returns its exit code and last lines of output.

    Args:
        seconds: after so many it is killed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", PARENT_VARIABLE)}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    } | extra
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
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


def _output_in_time(process: subprocess.Popen, seconds: float) -> str:
    """The child's output; raises Stopped when the pipeline that started this process is gone."""
    parent, end = os.environ.get(PARENT_VARIABLE, ""), time.monotonic() + seconds
    while True:
        try:
            return process.communicate(timeout=1)[0]
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                process.kill()
                return f"{process.communicate()[0]}\nkilled: not done after {seconds:.0f} seconds"
            if parent.isdecimal() and os.getppid() != int(parent):
                raise Stopped(signal.SIGTERM) from None


def check_loading(folder: Path, manifest: dict, texts: list[str], checks: Checks) -> list[dict]:
    """What a stranger's process finds in a copy of the export; returns the generated texts."""
    with tempfile.TemporaryDirectory(prefix="mvlm-validate-") as place:
        place = Path(place)
        copy = place / f"another_name_{secrets.token_hex(4)}"
        copy_export(folder, manifest, copy)
        request, answer, elsewhere = place / "request.json", place / "answer.json", place / "cwd"
        elsewhere.mkdir()
        request.write_text(
            json.dumps(
                {
                    "prompts": PROMPTS,
                    "texts": [*VERSES, *texts, *ODD_TEXTS],
                    "specials": ["<eos>", "<bos>", "<|endoftext|>"],
                }
            ),
            encoding="utf-8",
        )
        code, output = run_python(
            ["-I", str(PROBE), str(copy), str(request), str(answer)],
            elsewhere,
            seconds=LOADING_SECONDS,
            HF_MODULES_CACHE=str(place / "modules"),
            HF_HOME=str(place / "home"),
        )
        found = read_json(answer)
    if not checks.add(
        "loading",
        "loads elsewhere, offline, by itself",
        code == 0 and bool(found),
        f"as {found['weights']['class']}" if found else f"exit code {code}: {output}",
    ):
        return []
    config = read_json(folder / "training_config.json")
    _check_weights(found["weights"], config, checks)
    _check_tokenizer(found["tokenizer"], found["weights"]["rows"], config, checks)
    bad = [
        f"{sample['prompt']!r} gave {sample['new_tokens']} tokens" + ("" if sample["finite"] else ", logits not finite")
        for sample in found["samples"]
        if not (sample["whole"] and sample["finite"] and sample["within_vocabulary"])
    ]
    checks.add_problems("generation", "generates", bad, f"{len(found['samples'])} prompts, greedy")
    return [{key: sample[key] for key in ("prompt", "text", "new_tokens")} for sample in found["samples"]]


def _check_weights(found: dict, config: dict, checks: Checks) -> None:
    checks.add_problems("weights", "finite", found["not_finite"], "all values finite")
    checks.add_problems(
        "weights", "fit the architecture", found["unfilled"], "no missing, unexpected or mismatched weight"
    )
    said = part(config, "results").get("parameters")
    checks.add(
        "weights",
        "parameter count",
        found["parameters"] == said,
        f"{found['parameters']:,}, training said {said}",
    )


def _check_tokenizer(found: dict, rows: int, config: dict, checks: Checks) -> None:
    checks.add_problems(
        "tokenizer", "round trip", [ascii(text[:40]) for text in found["failed"]], "exact on every text"
    )
    checks.add(
        "tokenizer",
        "vocabulary fits the embedding",
        max(found["size"], found["highest_id"] + 1) <= rows,
        f"{found['size']:,} entries, highest id {found['highest_id']:,}, {rows:,} rows",
    )
    said = part(config, "tokenizer").get("vocab_size")
    checks.add("tokenizer", "vocabulary size", found["size"] == said, f"{found['size']:,}, training said {said}")
    wanted = [role for role in ("bos_token", "eos_token") if not found["specials"].get(role)]
    if found["start_id"] is None or found["end_id"] is None:
        wanted.append("ids of start and end")
    strange = [
        str(number) for number in found["config_ids"] if number is not None and number not in found["special_ids"]
    ]
    checks.add_problems(
        "tokenizer",
        "special tokens",
        [f"{role} missing" for role in wanted]
        + [f"generation_config names {number}, no special token" for number in strange],
        ", ".join(sorted(set(map(str, found["specials"].values())))),
    )
    checks.add_problems(
        "tokenizer", "special words are ordinary text", found["taken"], "none is turned into a special token"
    )


# --- scores -------------------------------------------------------------------------------------------------


def rescore(folder: str, data_dir: str, device: str, answer: str) -> int:
    """In a process of its own: test bits per byte of an export, all translations and KJV, in one pass."""
    from mvlm_core.data.corpus import load_corpus
    from mvlm_core.evaluation.bits_per_byte import score_export
    from mvlm_core.hardware import choose_hardware

    config = Path(folder) / "training_config.json"
    data = part(read_json(config), "data")
    corpus = load_corpus(data_dir, **corpus_choice(config))
    hardware = choose_hardware(device=device)
    hardware.apply()
    result = {
        "fingerprint": corpus.fingerprint,
        "device": hardware.device,
        "test_bpb": None,
        "test_bpb_kjv": None,
    }
    if corpus.fingerprint == data.get("fingerprint") and corpus.split("test"):
        score = score_export(folder, corpus, split="test", device=hardware.device)
        kjv = {document.path for document in corpus.split("test") if document.translation == "kjv"}
        result["test_bpb"] = score.bits_per_byte
        result["test_bpb_kjv"] = score.part(lambda path: path in kjv).bits_per_byte if kjv else None
    write_json_atomic(answer, result)
    return 0


def corpus_choice(config: Path) -> dict:
    """Which part of the corpus a model was trained on, as `load_corpus` takes it. Raises UserError."""
    settings, data = part(read_json(config), "settings"), part(read_json(config), "data")
    choice = {
        "validation_split": settings.get("validation_split", 0.05),
        "validation_dir": settings.get("validation_dir"),
        "only": data.get("only"),
    }
    problems = []
    if not isinstance(choice["validation_split"], int | float):
        problems.append(f"{config}: validation_split is no number")
    for key in ("validation_dir", "only"):
        if choice[key] is not None and (not isinstance(choice[key], str) or "\0" in choice[key]):
            problems.append(f"{config}: {key} is no path")
    if problems:
        raise UserError(problems)
    return choice


def same_score(said: object, found: object, tolerance: float) -> bool:
    """Whether two values are scores and alike. An integer is none, and may be too large for the comparison."""
    numbers = isinstance(said, float) and isinstance(found, float)
    return numbers and math.isclose(said, found, rel_tol=tolerance)


def check_scores(folder: Path, data_dir: str, device: str, checks: Checks) -> None:
    config = read_json(folder / "training_config.json")
    with tempfile.TemporaryDirectory(prefix="mvlm-validate-") as place:
        answer = Path(place) / "answer.json"
        code, output = run_python(
            [
                str(VALIDATOR),
                "--rescore",
                str(answer),
                "--data_dir",
                data_dir,
                "--device",
                device,
                str(folder),
            ],
            REPOSITORY_ROOT,
            HF_MODULES_CACHE=str(Path(place) / "modules"),
        )
        found = read_json(answer)
    if not checks.add(
        "scores",
        "recomputed",
        code == 0 and bool(found),
        f"on {found['device']}" if found else f"exit code {code}: {output}",
    ):
        return
    same_text = found["fingerprint"] == part(config, "data").get("fingerprint")
    if not checks.add(
        "scores",
        "same text",
        same_text,
        "the corpus is the one it was trained and scored on"
        if same_text
        else f"the text in {data_dir} is not the one it was trained and scored on: no score can be compared",
    ):
        return
    trained_on = part(config, "hardware").get("device")
    tolerance = SAME_MACHINE if trained_on == found["device"] == "cpu" else OTHER_MACHINE
    for key in ("test_bpb", "test_bpb_kjv"):
        said, now_found = part(config, "results").get(key), found[key]
        if said is None and (now_found is None or part(config, "settings").get("no_test_score") is True):
            checks.add("scores", key, True, "no such text" if now_found is None else "left unread by --no_test_score")
            continue
        checks.add(
            "scores", key, same_score(said, now_found, tolerance), f"{now_found} from the files, training said {said}"
        )


# --- archives -----------------------------------------------------------------------------------------------


def check_packed(name: str, folder: Path, layout: Layout, checks: Checks) -> None:
    archive = layout.archive(name)
    if not archive.is_file():
        checks.add("archive", "there", False, f"{archive} is missing")
        return
    checks.add("archive", "there", True, f"{archive.stat().st_size / 1e6:.1f} MB")
    good = checks.add_problems("archive", "opens and holds what its manifest says", check_archive(archive), "good")
    said = read_checksums(layout.checksums).get(archive.name)
    try:
        found = sha256_file(archive)
    except OSError as error:
        found = f"nothing ({error.strerror})"
    checks.add(
        "archive",
        "SHA256SUMS",
        said == found,
        "equal"
        if said == found
        else f"{archive.name}: {layout.checksums.name} says {said or 'nothing'}, the file gives {found}",
    )
    if good:
        equal = matches_export(archive, folder)
        checks.add(
            "archive",
            "equals the export",
            equal,
            "the same files" if equal else f"{archive.name} does not hold what is in {folder}",
        )
