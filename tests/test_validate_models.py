"""The validator finds what is wrong, names it, and finds nothing wrong with a good export."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import validate_models
from mvlm_core.errors import UserError
from mvlm_core.export import file_checks as export_files
from mvlm_core.export import load_probe, rescore
from mvlm_core.export import validation as export_checks
from mvlm_core.export.archive import write_archive
from mvlm_core.export.manifest import read_manifest
from mvlm_core.files import sha256_file
from mvlm_core.run_layout import Layout

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and lose much where other processes want it."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    del os.environ["OMP_NUM_THREADS"]
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def staged(tmp_path_factory, real_text):
    """A tiny GPT-2 with its tokenizer, as the trainer stages it; and its number of parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from mvlm_core.export.folder import stage_model
    from mvlm_trainer import tokenizer_class

    torch.manual_seed(0)
    tokenizer = tokenizer_class().train(real_text, 400)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.vocab_size,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=tokenizer.start_id,
            eos_token_id=tokenizer.start_id,
            pad_token_id=tokenizer.start_id,
        )
    )
    history = [{"step": 1, "bytes": 10, "seconds": 0.1, "train_loss": 6.0, "validation_bpb": 2.0}]
    folder = stage_model(model, tokenizer.for_transformers(32), history, "tiny", tmp_path_factory.mktemp("staged"))
    return folder, model.num_parameters(), tokenizer.vocab_size


SCORES = {}


@pytest.fixture
def export(tmp_path, staged, tiny_corpus):
    """A finished export at <work_dir>/models/mvlm_gpt2 that tells the truth about `tiny_corpus`."""
    from mvlm_core.data.corpus import load_corpus
    from mvlm_core.evaluation.bits_per_byte import score_export

    source, parameters, vocabulary = staged
    folder = tmp_path / "work" / "models" / "mvlm_gpt2"
    shutil.copytree(source, folder)
    (folder / "README.md").write_text("a card\n")
    corpus = load_corpus(tiny_corpus)
    if not SCORES:
        score = score_export(folder, corpus)
        kjv = score.part(lambda path: "/kjv/" in path)
        SCORES.update(test_bpb=score.bits_per_byte, test_bpb_kjv=kjv.bits_per_byte)
    config = {
        "model": "mvlm_gpt2",
        "preset": "smoke",
        "settings": {"validation_split": 0.05},
        "hardware": {"device": "cpu"},
        "data": {"fingerprint": corpus.fingerprint, "only": None, "data_dir": str(tiny_corpus)},
        "tokenizer": {"vocab_size": vocabulary},
        "results": {"parameters": parameters, **SCORES},
    }
    (folder / "training_config.json").write_text(json.dumps(config))
    seal(folder)
    return folder


def seal(folder):
    """Write the manifest anew, so that it agrees with whatever is in the folder."""
    (folder / "manifest.json").unlink(missing_ok=True)
    files = {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "name": "mvlm_gpt2", "files": files}))


def change_config(folder, section, **values):
    path = folder / "training_config.json"
    config = json.loads(path.read_text())
    config[section].update(values)
    path.write_text(json.dumps(config))
    seal(folder)


def pack(folder):
    layout = Layout(folder.parent.parent)
    digest = write_archive(folder, layout.archive("mvlm_gpt2"))
    layout.checksums.write_text(f"{digest}  mvlm_gpt2_model.tar.gz\n")
    return layout


@pytest.fixture
def in_this_process(monkeypatch):
    """Spare the seconds that a fresh process takes to import torch; another test has the real thing."""

    def run(arguments, cwd, seconds=None, **extra):
        for key, value in extra.items():
            monkeypatch.setenv(key, value)
        try:
            if "mvlm_core.export.rescore" in arguments:
                rescore.main(arguments[2:])
                return 0, ""
            folder, request, answer = arguments[2:]
            Path(answer).write_text(json.dumps(load_probe.probe(folder, json.loads(Path(request).read_text()))))
        except Exception as error:
            return 1, repr(error)
        return 0, ""

    monkeypatch.setattr(export_checks, "run_python", run)
    monkeypatch.setattr(validate_models.signal, "signal", lambda *_: None)


def failed(capsys, *arguments) -> dict[str, str]:
    """Failed checks by name, with their details."""
    work_dir = Path(arguments[arguments.index("--work_dir") + 1])
    work_dir.mkdir(exist_ok=True)
    code = validate_models.main(list(arguments))
    capsys.readouterr()
    report = json.loads((work_dir / "models/validation_report.json").read_text())
    found = {
        check["name"]: check["detail"]
        for model in report["models"].values()
        for check in model["checks"]
        if not check["passed"]
    }
    assert code == (1 if found else 0) and report["passed"] == (not found) and len(report["failed"]) >= len(found)
    return found


def test_good_export_in_real_fresh_processes(export, tiny_corpus):
    layout = pack(export)
    layout.summary.write_text(json.dumps({"models": {"mvlm_gpt2": {"status": "finished"}}}))
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "validate_models.py"),
            "--work_dir",
            str(layout.root),
            "--data_dir",
            str(tiny_corpus),
        ],
        text=True,
        capture_output=True,
        cwd=export,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(layout.report.read_text())
    assert report["passed"] and report["rescored"] and list(report["models"]) == ["mvlm_gpt2"]
    checks = {(check["group"], check["name"]) for check in report["models"]["mvlm_gpt2"]["checks"]}
    for group in ("files", "loading", "weights", "tokenizer", "generation", "scores", "archive"):
        assert any(member == group for member, _ in checks), group
        assert f"ok      mvlm_gpt2: {group}" in done.stdout
    samples = report["models"]["mvlm_gpt2"]["samples"]
    assert [sample["prompt"] for sample in samples] == list(validate_models.PROMPTS)
    assert all(sample["text"].startswith(sample["prompt"]) for sample in samples)


def test_export_that_needs_this_repository_does_not_load(export):
    (export / "modeling.py").write_text("import mvlm_core.export.archive\nclass Model: ...\n")
    config = json.loads((export / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "auto_map": {"AutoConfig": "modeling.Model", "AutoModelForCausalLM": "modeling.Model"},
    }
    (export / "config.json").write_text(json.dumps(config))
    seal(export)
    checks = export_files.Checks()
    export_checks.check_loading(export, list(read_manifest(export)["files"]), checks, prompts=(), texts=[])
    (found,) = checks
    assert not found.passed and "needs a module of the repository" in found.detail and "config.json" in found.detail


def test_weights_tokenizer_and_counts_that_are_not_as_said(export, tiny_corpus, tmp_path, capsys, in_this_process):
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(export / "model.safetensors")
    name = next(name for name in weights if "wpe" in name)
    weights[name][3, 3] = torch.nan
    save_file(weights, export / "model.safetensors", {"format": "pt"})
    change_config(export, "results", parameters=7)
    change_config(export, "tokenizer", vocab_size=7)
    found = failed(
        capsys, str(export), "--quick", "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus)
    )
    assert set(found) == {"finite", "parameter count", "vocabulary size", "generates"}
    assert name in found["finite"] and "recorded in training: 7" in found["parameter count"]


def test_tokenizer_that_changes_text_or_reads_special_words(export, tiny_corpus, tmp_path, capsys, in_this_process):
    config = json.loads((export / "tokenizer_config.json").read_text())
    (export / "tokenizer_config.json").write_text(json.dumps(config | {"split_special_tokens": False}))
    tokenizer = json.loads((export / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (export / "tokenizer.json").write_text(json.dumps(tokenizer))
    seal(export)
    found = failed(
        capsys, str(export), "--quick", "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus)
    )
    assert set(found) == {"round trip", "special words are ordinary text"}


def test_scores_are_computed_again(export, tiny_corpus, tmp_path, capsys, in_this_process):
    flags = (str(export), "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus))
    assert failed(capsys, *flags) == {}
    change_config(export, "results", test_bpb=SCORES["test_bpb"] * 1.001, test_bpb_kjv=None)
    assert set(failed(capsys, *flags)) == {"test_bpb", "test_bpb_kjv"}
    (tiny_corpus / "bible" / "kjv" / "01-genesis.txt").write_text("Other text.\n")
    assert set(failed(capsys, *flags)) == {"same text"}


def prepare_problem(folder, kind):
    if kind == "extra":
        (folder / "notes.txt").write_text("x")
    elif kind == "listed extra":
        (folder / "evil.py").write_text("print('x')")
        seal(folder)
    elif kind == "pickle name":
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif kind == "pickle bytes":
        (folder / "README.md").write_bytes(b"\x80\x04\x95harmless looking")
        seal(folder)
    elif kind == "zip bytes":
        (folder / "training_plots.png").write_bytes(b"PK\x03\x04archive/data.pkl")
        seal(folder)
    elif kind == "remote":
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "someone/elses--modeling.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        seal(folder)
    elif kind == "changed byte":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    elif kind == "missing":
        (folder / "generation_config.json").unlink()
        seal(folder)
    elif kind == "link":
        shutil.move(folder / "config.json", folder.parent / "config.json")
        (folder / "config.json").symlink_to(folder.parent / "config.json")
    elif kind == "bad manifest":
        (folder / "manifest.json").write_text('{"format": 1, "name": "m", "files": {"../x": "0"}}')


@pytest.mark.parametrize(
    "kind, check, words",
    [
        ("extra", "no extra files", "notes.txt"),
        ("listed extra", "no extra files", "evil.py"),
        ("pickle name", "no pickle", "pytorch_model.bin"),
        ("pickle bytes", "no pickle", "README.md"),
        ("zip bytes", "no pickle", "training_plots.png"),
        ("remote", "no remote code", "someone/elses--modeling.Model"),
        ("changed byte", "hashes", "model.safetensors"),
        ("missing", "expected files", "generation_config.json"),
        ("link", "hashes", "config.json: a symbolic link"),
        ("bad manifest", "manifest", "manifest.json"),
    ],
)
def test_file_problems_are_named(export, kind, check, words):
    prepare_problem(export, kind)
    checks = export_files.Checks()
    export_files.check_files(export, checks, validate_models.MODELLING_FILES)
    found = {member.name: member.detail for member in checks if not member.passed}
    assert words in found[check], found


def test_what_was_tampered_with_is_not_loaded(export, tiny_corpus, tmp_path, capsys, monkeypatch):
    prepare_problem(export, "remote")
    monkeypatch.setattr(export_checks, "run_python", lambda *_, **__: pytest.fail("it was run"))
    found = failed(capsys, str(export), "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus))
    assert "no remote code" in found and "not tried" in found["loads elsewhere, offline, by itself"]


def test_safetensors_whose_header_length_looks_like_a_pickle(export):
    header = b'{"__metadata__":{"format":"pt"}}'.ljust(0x280)
    (export / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert (export / "model.safetensors").read_bytes().startswith(b"\x80\x02")
    assert export_files.pickles(export, []) == []


@pytest.mark.parametrize("config", [[], {"results": 3, "data": [], "settings": None}, {"results": {"test_bpb": "low"}}])
def test_odd_training_configs_are_failed_checks(export, tiny_corpus, tmp_path, capsys, in_this_process, config):
    (export / "training_config.json").write_text(json.dumps(config))
    seal(export)
    assert failed(capsys, str(export), "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus))


def test_archives_are_compared(export, monkeypatch):
    layout = pack(export)

    def found():
        checks = export_files.Checks()
        export_checks.check_packed("mvlm_gpt2", export, layout, checks)
        return {check.name for check in checks if not check.passed}

    assert found() == set()
    layout.checksums.write_text(f"{'0' * 64}  mvlm_gpt2_model.tar.gz\n")
    assert found() == {"SHA256SUMS"}
    pack(export)
    (export / "README.md").write_text("another card\n")
    seal(export)
    assert found() == {"equals the export"}
    data = bytearray(layout.archive("mvlm_gpt2").read_bytes())
    data[len(data) // 2] ^= 1
    layout.archive("mvlm_gpt2").write_bytes(data)
    assert found() == {"SHA256SUMS", "opens and holds what its manifest says"}
    layout.archive("mvlm_gpt2").unlink()
    assert found() == {"there"}


def test_missing_models_fail_and_missing_folders_are_bad_arguments(tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    assert set(failed(capsys, "--quick", "--work_dir", str(work))) == {"export"}
    with pytest.raises(UserError) as caught:
        validate_models.main(
            [
                str(tmp_path / "none"),
                "--device",
                "abacus",
                "--data_dir",
                str(tmp_path / "no"),
                "--work_dir",
                str(tmp_path / "nowhere"),
            ]
        )
    assert len(caught.value.problems) == 4


def test_help_is_quick_and_light():
    for script in ("validate_models.py", "train_all_models.py"):
        code = f"import runpy, sys; sys.argv = [{script!r}, '--help']\n"
        code += f"try: runpy.run_path({str(REPOSITORY / script)!r}, run_name='__main__')\n"
        code += "except SystemExit: pass\n"
        code += "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=os.environ, timeout=30)
        assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
