"""The validator detects and names defects, and passes a good export."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

import validate_models
from mvlm_core.data.corpus import load_corpus
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import Score, score_export
from mvlm_core.export import load_probe, scores, validation
from mvlm_core.export.archive import write_archive
from mvlm_core.export.manifest import training_config
from tests.export.exports import change_config, moved_validation_text, pack, seal, set_json
from tests.helpers import REPOSITORY


@pytest.fixture
def in_this_process(monkeypatch):
    """Saves the seconds that a fresh process takes to import torch; another test uses real processes."""

    def run(arguments, cwd, seconds=None, **extra):
        for key, value in extra.items():
            monkeypatch.setenv(key, value)
        try:
            *_, request, answer = arguments
            if "mvlm_core.export.scores" in arguments:
                scores.main(request, answer)
            else:
                Path(answer).write_text(json.dumps(load_probe.probe(json.loads(Path(request).read_text()))))
        except Exception as error:
            return 1, repr(error)
        return 0, ""

    monkeypatch.setattr(validation, "run_python", run)


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


def test_good_export_passes_in_fresh_processes(export, tiny_corpus):
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
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # a second thread would only slow down other processes
        timeout=300,  # 20 seconds on an idle machine
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(layout.validation_report.read_text())
    assert report["passed"] and report["rescored"] and list(report["models"]) == ["mvlm_gpt2"]
    checks = {(check["group"], check["name"]) for check in report["models"]["mvlm_gpt2"]["checks"]}
    for group in ("files", "loading", "weights", "tokenizer", "generation", "scores", "archive"):
        assert any(made == group for made, _ in checks), group
        assert f"ok      mvlm_gpt2: {group}" in done.stdout
    samples = report["models"]["mvlm_gpt2"]["samples"]
    assert [sample["prompt"] for sample in samples] == list(validate_models.PROMPTS)
    assert all(sample["text"].startswith(sample["prompt"]) for sample in samples)


def test_nan_weights_and_wrong_recorded_sizes_fail(export, tiny_corpus, tmp_path, capsys, in_this_process):
    import torch

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


def test_lossy_tokenizer_and_parsed_special_tokens_fail(export, tiny_corpus, tmp_path, capsys, in_this_process):
    set_json(export / "tokenizer_config.json", split_special_tokens=False)
    set_json(export / "tokenizer.json", normalizer={"type": "Lowercase"})
    seal(export)
    found = failed(
        capsys, str(export), "--quick", "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus)
    )
    assert set(found) == {"round trip", "text of special tokens is ordinary text"}


def test_scores_are_recomputed_and_mismatches_fail(export, tiny_corpus, tmp_path, capsys, in_this_process):
    flags = (str(export), "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus))
    assert failed(capsys, *flags) == {}
    score = training_config(export)["results"]["test_bpb"]
    change_config(export, "results", test_bpb=score * 1.001, test_bpb_kjv=None)
    assert set(failed(capsys, *flags)) == {"test_bpb", "test_bpb_kjv"}
    (tiny_corpus / "bible" / "kjv" / "01-genesis.txt").write_text("Other text.\n")
    assert set(failed(capsys, *flags)) == {"same text"}


def test_scores_are_recomputed_on_the_text_that_each_model_was_trained_on(
    export, tiny_corpus, tmp_path, capsys, in_this_process, monkeypatch
):
    monkeypatch.setattr(validate_models, "DEFAULT_DATA_DIR", tmp_path / "default")
    flags = (str(export), "--work_dir", str(tmp_path / "other"))
    change_config(export, "data", data_dir=str(tiny_corpus))
    assert failed(capsys, *flags) == {}
    change_config(export, "data", data_dir=str(tmp_path / "gone"))
    assert f"{tmp_path / 'default'}" in failed(capsys, *flags)["recomputed"], "not here: the default corpus"
    tiny_corpus.rename(tmp_path / "default")
    assert failed(capsys, *flags) == {}


def test_validation_text_may_be_in_another_folder(export, tiny_corpus, tmp_path, capsys, in_this_process):
    flags = (str(export), "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus))
    own = moved_validation_text(export, tiny_corpus, tmp_path)
    (found,) = failed(capsys, *flags).values()
    assert "validation folder /gone does not exist; choose it with --validation_dir" in found
    assert failed(capsys, *flags, "--validation_dir", str(own)) == {}


def test_recorded_scores_are_sampled_and_checked(export, tiny_corpus, real_text, tmp_path, capsys, in_this_process):
    flags = (str(export), "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus), "--seed", "7")
    chapters = tiny_corpus / "bible" / "kjv" / "chapters"  # not of the primary translation
    chapters.mkdir()
    for number, text in enumerate(real_text[:15]):
        (chapters / f"{number}.txt").write_text(text)
        (chapters / f"{number}.json").write_text('{"split": "test"}')
    corpus = load_corpus(tiny_corpus, only="bible/kjv")
    change_config(export, "data", fingerprint=corpus.fingerprint)
    score = score_export(export, corpus)
    drawn = [document.path for document in scores.draw_sample(corpus.split("test"), 7)]

    def record(change=lambda path, nats: nats, **results):
        """Record the scores of all documents, some of them changed, and test scores that agree unless given."""
        changed = Score({path: replace(it, nats=change(path, it.nats)) for path, it in score.documents.items()})
        primary = changed.part({document.path for document in corpus.primary_part("test")})
        nats = {path: document.nats for path, document in changed.documents.items()}
        set_json(export / "training_config.json", test_nats=nats)
        agreeing = {"test_bpb": changed.bits_per_byte, "test_bpb_kjv": primary.bits_per_byte}
        change_config(export, "results", **agreeing | results)

    record()
    assert failed(capsys, *flags, "--whole") == failed(capsys, *flags) == {}
    report = json.loads((tmp_path / "other/models/validation_report.json").read_text())
    (sample,) = [check for check in report["models"]["mvlm_gpt2"]["checks"] if check["name"] == "sample"]
    assert sample["detail"] == "8 of 16 documents as recorded in training, drawn with seed 7"
    for name in ("test_bpb", "test_bpb_kjv"):
        record(**{name: score.bits_per_byte * 1.00001})
        assert set(failed(capsys, *flags)) == {name}, "the record must be the sum of the parts"
    for wrong, more in ((drawn[0], ()), (min(score.documents.keys() - drawn), ("--whole",))):
        record(lambda path, nats, wrong=wrong: nats * 1.01 if path == wrong else nats)
        found = failed(capsys, *flags, *more)
        assert set(found) == {"sample"} and found["sample"].startswith(f"{wrong}: ")
    record(lambda path, nats: nats * 0.9995)
    assert set(failed(capsys, *flags)) == {"sample"}, "each by little, all of them"
    set_json(export / "training_config.json", test_nats={drawn[0]: 1.0})
    seal(export)
    assert "test_nats is not a number of nats for each test document" in failed(capsys, *flags)["recomputed"]
    weights = load_file(export / "model.safetensors")
    weights["transformer.wte.weight"] *= 1.2
    save_file(weights, export / "model.safetensors", {"format": "pt"})
    record()
    assert set(failed(capsys, *flags)) == {"sample"}, "weights that never had these scores"


def test_only_an_export_without_test_score_may_lack_the_record(
    export, tiny_corpus, tmp_path, capsys, in_this_process, monkeypatch
):
    flags = (str(export), "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus))
    set_json(export / "training_config.json", test_nats={})
    seal(export)
    assert "test_nats is not a number of nats for each test document" in failed(capsys, *flags)["recomputed"]
    monkeypatch.setattr(scores, "load_export", Mock(side_effect=AssertionError("there is nothing to rescore")))
    change_config(export, "settings", no_test_score=True)
    assert set(failed(capsys, *flags)) == {"test_bpb", "test_bpb_kjv"}, "scores that no run has measured"
    change_config(export, "results", test_bpb=None, test_bpb_kjv=None)
    assert failed(capsys, *flags) == {}


@pytest.mark.parametrize("config", [[], {"results": 3, "data": [], "settings": None}, {"results": {"test_bpb": "low"}}])
def test_malformed_training_configs_fail_checks(export, tiny_corpus, tmp_path, capsys, in_this_process, config):
    (export / "training_config.json").write_text(json.dumps(config))
    seal(export)
    assert failed(capsys, str(export), "--work_dir", str(tmp_path / "other"), "--data_dir", str(tiny_corpus))


def test_archive_is_required_only_of_models_that_a_run_was_to_pack(export, tmp_path, capsys, in_this_process):
    work = tmp_path / "work"
    summary = work / "models" / "training_summary.json"
    flags = ("--quick", "--work_dir", str(work), "--data_dir", str(tmp_path))

    def missing(*folder, **entry):
        if entry:
            summary.write_text(json.dumps({"models": {"mvlm_gpt2": entry}}))
        found = failed(capsys, *folder, *flags)
        (model,) = json.loads((work / "models/validation_report.json").read_text())["models"].values()
        assert any(check["name"] == validate_models.NOT_PACKED for check in model["checks"]) == (not found)
        return set(found)

    assert missing(str(export)) == missing() == set(), "trained with its own trainer, like the other one not at all"
    assert missing(str(export), status="failed", archive=None) == set(), "then trained with its own trainer"
    assert missing(status="failed", archive=None) == {"exists"}
    assert missing(str(export), status="finished", archive="x.tar.gz") == missing() == {"exists"}
    assert missing(str(export.parent / ".." / "models" / export.name)) == {"exists"}, "the same folder"
    pack(export)
    (work / "models_for_download" / "SHA256SUMS").unlink()
    summary.unlink()
    assert set(failed(capsys, str(export), *flags)) == {"SHA256SUMS"}, "an archive that is there must be right"


def test_missing_models_fail_and_bad_arguments_are_refused(tmp_path, capsys):
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
                "--seed",
                "-1",
            ]
        )
    assert len(caught.value.problems) == 5
    with pytest.raises(UserError) as caught:
        validate_models.main(["", "--quick", "--work_dir", "", "--data_dir", "", "--validation_dir", ""])
    flags = ("MODEL_DIR", "--work_dir", "--data_dir", "--validation_dir")
    assert caught.value.problems == [f"{flag}: an empty path; is a shell variable unset?" for flag in flags]


def test_an_archive_is_checked_and_only_a_named_work_dir_gets_a_report(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validate_models, "REPOSITORY_ROOT", tmp_path)
    packed = tmp_path / "mvlm_gpt2_model.tar.gz"
    write_archive(trained / "mvlm_gpt2", packed)
    assert validate_models.main([str(packed), "--quick"]) == 0
    assert "checks passed (no report: give --work_dir for one)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [packed.name]
    assert validate_models.main([str(packed), "--quick", "--work_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "models/validation_report.json").read_text())
    assert report["passed"] and list(report["models"]) == ["mvlm_gpt2"]
