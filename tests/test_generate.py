"""``generate.py`` with real exports: folders and archives, reproducible sampling, traces, and refused input."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import generate
from mvlm_core.data.tokenizer import ByteLevelBPE
from mvlm_core.errors import UserError
from mvlm_core.export.archive import write_archive
from tests.helpers import REPOSITORY

PROMPT = "In the beginning"


def generated(capsys, *arguments):
    assert generate.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model", ("mvlm_gpt2", "simone_enhanced"))
def test_a_folder_and_its_archive_give_the_same_text(model, trained, tmp_path, capsys):
    archive = tmp_path / f"{model}_model.tar.gz"
    write_archive(trained / model, archive)
    options = ("--max_new_tokens", 12, "--device", "cpu")
    from_folder = generated(capsys, trained / model, PROMPT, *options)
    assert from_folder.startswith(PROMPT) and len(from_folder) > len(PROMPT) + 2
    assert generated(capsys, archive, PROMPT, *options) == from_folder, "the seed decides, not the place"
    assert generated(capsys, archive, PROMPT, *options, "--seed", 1) != from_folder


def test_temperature_zero_is_deterministic_for_any_seed(trained, capsys):
    options = ("--max_new_tokens", 8, "--temperature", 0, "--device", "cpu")
    texts = {generated(capsys, trained / "simone_enhanced", PROMPT, *options, "--seed", seed) for seed in range(3)}
    assert len(texts) == 1


def test_generation_stops_at_the_context_length(trained, capsys):
    options = [str(trained / "simone_enhanced"), "--max_new_tokens", "500", "--trace", "--device", "cpu"]
    assert generate.main(options) == 0
    text, told = capsys.readouterr()
    assert re.search(r"^stopped after \d\d tokens: the model's context is full$", told, re.M)
    rows = text[text.index("token  ") :].splitlines()[1:]
    assert 2 <= len(rows) <= 32, "no more tokens than the context of 32"


def test_trace_columns_are_named_and_in_range(trained, capsys):
    text = generated(
        capsys, trained / "simone_enhanced", PROMPT, "--max_new_tokens", 5, "--temperature", 0, "--trace",
        "--device", "cpu",
    )  # fmt: skip
    head, *rows = text[text.index("token  ") :].splitlines()
    assert head.split() == ["token", "policy", "memory", "entropy", "distance", "copied"]
    prompt = ByteLevelBPE.load(trained / "simone_enhanced").encode(PROMPT)
    assert len(rows) == 1 + len(prompt) + 5, "start token, prompt and new tokens"
    for row in rows:
        policy, memory, entropy, distance, copied = map(float, row.split()[-5:])
        assert 0 <= policy <= 2 and 0 <= memory <= 1 and entropy >= 0 and distance >= 0 and 0 <= copied <= 1
    assert rows[0].split()[-2:] == ["0.000", "0.000"], "the first token can look at itself only, and copies nothing"


def test_trace_of_a_gpt2_is_refused(trained):
    with pytest.raises(UserError, match="has no trace head"):
        generate.main([str(trained / "mvlm_gpt2"), PROMPT, "--trace", "--device", "cpu"])


def test_tampered_weights_and_code_are_refused(trained, tmp_path):
    for name, change in (("model.safetensors", b"\0"), ("rope_attention.py", b"\nprint('ran')\n")):
        folder = tmp_path / name / "simone_enhanced"
        shutil.copytree(trained / "simone_enhanced", folder, ignore=shutil.ignore_patterns("checkpoints"))
        with (folder / name).open("ab") as file:
            file.write(change)
        with pytest.raises(UserError, match=name):
            generate.main([str(folder), PROMPT])


def test_all_bad_arguments_are_reported_in_one_error(tmp_path):
    options = {"--temperature": "-1", "--top_p": "0", "--seed": str(2**63), "--device": "tpu"}
    with pytest.raises(UserError) as caught:
        generate.main([str(tmp_path), PROMPT, *(word for option in options.items() for word in option)])
    *problems, model = caught.value.problems
    assert [problem.split()[0] for problem in problems] == list(options)
    assert model.startswith(f"{tmp_path}: ") and "not a finished export" in model
    with pytest.raises(UserError, match="--seed -1.*not valid UTF-8"):
        generate.main([str(tmp_path), "\udcff", "--seed", "-1"])
    for place, words in ((tmp_path, "not a finished export"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=words):
            generate.main([str(place), PROMPT])


def test_a_prompt_that_fills_the_context_is_refused(trained):
    with pytest.raises(UserError, match="context is 32"):
        generate.main([str(trained / "mvlm_gpt2"), "and it came to pass " * 40, "--device", "cpu"])


def test_piped_output_escapes_control_sequences(trained):
    command = [
        sys.executable,
        REPOSITORY / "generate.py",
        trained / "mvlm_gpt2",
        "\x1b[2JAmen",
        "--max_new_tokens",
        "3",
    ]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("\\x1b[2JAmen") and not done.stderr


@pytest.mark.integration
def test_sigterm_removes_the_unpacked_archive(trained, tmp_path):
    archive, scratch = tmp_path / "mvlm_gpt2_model.tar.gz", tmp_path / "scratch"
    write_archive(trained / "mvlm_gpt2", archive)
    scratch.mkdir()
    command = [sys.executable, REPOSITORY / "generate.py", archive, PROMPT, "--device", "cpu"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(scratch.glob("mvlm-open-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert not list(scratch.glob("mvlm-open-*"))
