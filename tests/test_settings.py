"""Settings: precedence, ranges, and one error that reports every problem."""

import argparse
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from mvlm_core.errors import UserError
from mvlm_core.hardware import choose_hardware
from mvlm_core.settings import add_options
from mvlm_core.training.cost import StubTokenizer
from mvlm_core.training.distillation import teacher_and_student_settings, with_time_left
from mvlm_trainer import GPT2Settings
from prioritary_mvlm import PrioritaryConfig
from tests.helpers import REPOSITORY, parse_settings, recipe_of

CONTRACT = """
data_dir output_dir tokenizer_path preset batch_size gradient_accumulation_steps max_length learning_rate
lr_schedule warmup_steps num_epochs max_steps max_tokens weight_decay dropout max_grad_norm optimizer patience
min_epochs seed device precision attention_backend validation_split validation_dir eval_interval log_interval
checkpoint_interval keep_checkpoints resume_from fresh no_mixed_precision no_compile log_file quiet vocab_size
hidden_dim num_heads ff_dim num_layers
""".split()


def parse(cls, *arguments, output_dir="models/x"):
    return parse_settings(cls, arguments, output_dir)


@pytest.mark.parametrize("cls", [GPT2Settings, PrioritaryConfig])
def test_all_contract_flags_exist(cls):
    assert set(CONTRACT) <= {entry.name for entry in fields(cls)}


def test_teachers_are_one_flag_with_several_folders():
    chosen = parse(GPT2Settings, "--preset", "smoke", "--teacher", "models/a,b", "models/c", "--seed", "3")
    assert chosen.teacher == ["models/a,b", "models/c"] and chosen.seed == 3
    assert parse(GPT2Settings, "--preset", "smoke").teacher == ()


def test_flags_override_presets_and_presets_override_defaults():
    assert parse(GPT2Settings, "--preset", "smoke").hidden_dim == 64
    assert parse(GPT2Settings, "--preset", "smoke", "--hidden_dim", "96").hidden_dim == 96
    assert parse(GPT2Settings, "--preset", "h200").hidden_dim == 768
    assert PrioritaryConfig(preset="smoke", num_layers=3).num_layers == 3
    assert PrioritaryConfig(preset="smoke", memory_head=False).memory_head is False


@pytest.mark.parametrize(
    ("cls", "alone", "counts"), [(GPT2Settings, 3, [1, 1, 2, 4, 8, 8]), (PrioritaryConfig, 1, [1, 2, 2, 4, 8, 8])]
)
def test_max_hours_sets_the_number_of_models_and_epochs(cls, alone, counts):
    def models(preset, **changes):
        return cls(preset=preset, **changes).num_models

    assert [models("h200", max_hours=hours) for hours in (0.05, 0.08, 0.2, 0.5, 3.0, 30.0)] == counts
    assert models("h200") == 4 and models("h200", max_hours=3.0, num_models=2) == 2
    assert models("cpu", max_hours=3.0) == 1, "enough text for one model"
    assert cls(preset="h200").teacher_epochs == alone
    assert cls(preset="h200", max_hours=0.05).num_epochs == alone, "alone a model overfits after that"
    assert cls(preset="h200", max_hours=0.05, teacher_epochs=2).num_epochs == 2
    assert cls(preset="h200", max_hours=0.5, num_models=1).num_epochs == alone
    assert cls(preset="h200", max_hours=0.5).num_epochs == cls(preset="h200", max_hours=30.0).num_epochs == 60
    assert cls(preset="h200", max_hours=0.5, teacher=("models/x",)).num_epochs == 60
    assert cls(preset="cpu", max_hours=0.5).num_epochs is None
    assert (cls(preset="h200").num_epochs, cls(preset="h200").max_hours) == (18, 0.5)
    assert cls(preset="h200", num_epochs=3.0).max_hours is None, "an explicit length replaces both"
    assert cls(preset="h200", max_hours=0.05, num_epochs=5).num_epochs == 5


@pytest.mark.parametrize("cls", [GPT2Settings, PrioritaryConfig])
def test_teachers_are_given_or_trained_but_not_both(cls):
    for hours in (None, 3.0):
        assert cls(preset="h200", teacher=("models/x",), max_hours=hours).num_models == 1
    with pytest.raises(UserError, match="--teacher cannot be used with --num_models above 1"):
        cls(preset="h200", teacher=("models/x",), num_models=2, output_dir="models/y").check()


@pytest.mark.parametrize("cls", [GPT2Settings, PrioritaryConfig])
def test_a_students_length_is_not_limited_like_that_of_a_model_alone(cls):
    student = teacher_and_student_settings(cls(preset="h200", max_hours=0.09, output_dir="models/x"))[-1]
    assert student.num_epochs == with_time_left(student, 200).num_epochs == 60


def test_head_flags_switch_on_and_off_and_the_last_wins():
    heads = ("policy_head", "memory_head", "trace_head")
    for given, wanted in (
        ([], (True, True, True)),
        ([f"--no_{name}" for name in heads], (False, False, False)),
        (["--no_policy_head", "--policy_head"], (True, True, True)),  # the last one wins
    ):
        settings = parse(PrioritaryConfig, "--preset", "smoke", *given)
        assert tuple(getattr(settings, name) for name in heads) == wanted, given


def test_add_options_adds_only_the_named_flags():
    parser = argparse.ArgumentParser()
    add_options(parser, PrioritaryConfig, ["num_heads", "quiet", "dropout"], title="passed on")
    given = vars(parser.parse_args(["--num_heads", "3", "--dropout", "0.2"]))
    assert given == {"num_heads": 3, "quiet": None, "dropout": 0.2}
    text = parser.format_help()
    assert "passed on:" in text and "attention heads" in text and "[default" not in text and "model:" not in text


def test_h200_preset_has_the_same_shape_for_both_models():
    for cls in (GPT2Settings, PrioritaryConfig):
        s = cls(preset="h200")
        assert (s.hidden_dim, s.num_layers, s.num_heads, s.ff_dim, s.max_length) == (768, 12, 12, 3072, 1024)
        assert s.vocab_size == 32000


@pytest.mark.parametrize("preset", ["h200", "cpu"])
def test_parameter_counts_of_both_models_match_within_2_percent(preset):
    counts = []
    for model, cls in (("mvlm_gpt2", GPT2Settings), ("simone_enhanced", PrioritaryConfig)):
        settings = cls(preset=preset)
        with torch.device("meta"):
            built = recipe_of(model).build(settings, StubTokenizer(settings.vocab_size), choose_hardware(device="cpu"))
        counts.append(built.model.num_parameters())
    assert counts[0] == pytest.approx(counts[1], rel=0.02)


def test_validation_text_defaults():
    for cls in (GPT2Settings, PrioritaryConfig):
        texts = {preset: cls(preset=preset).validation_text for preset in ("h200", "cpu", "smoke")}
        assert texts == {"h200": "all", "cpu": "primary", "smoke": "primary"}


def test_explicit_length_replaces_the_presets():
    assert (PrioritaryConfig(preset="smoke").max_bytes, PrioritaryConfig(preset="smoke").num_epochs) == (190_000, None)
    given = PrioritaryConfig(preset="smoke", num_epochs=2)
    assert (given.max_bytes, given.num_epochs) == (None, 2)


def test_all_problems_are_reported_in_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    bad = "--hidden_dim 100 --num_heads 12 --learning_rate -1 --vocab_size 10 --max_length 0 --batch_size 0"
    bad += " --validation_split 1.5"
    with pytest.raises(UserError) as caught:
        folders = ["--output_dir", f"{tmp_path}/file/below", "--cache_dir", f"{tmp_path}/file"]
        parse(PrioritaryConfig, "--preset", "giant", *bad.split(), *folders)
    named = "\n".join(caught.value.problems)
    for word in (
        "--preset giant",
        "--num_heads 12",
        "--learning_rate -1",
        "--vocab_size 10",
        "--max_length 0",
        "--batch_size 0",
    ):
        assert word in named
    assert "--validation_split 1.5" in named and "not a folder" in named
    assert f"--cache_dir {tmp_path / 'file'} is a file" in named
    assert len(caught.value.problems) == 9


def test_missing_input_is_reported_with_the_other_problems():
    paths = {f"--{name}": f"/none/{name}" for name in ("data_dir", "validation_dir", "tokenizer_path", "resume_from")}
    flags = (word for pair in paths.items() for word in pair)
    with pytest.raises(UserError) as caught:
        parse(GPT2Settings, "--preset", "smoke", "--batch_size", "0", *flags)
    named = [" ".join(problem.split(":")[0].split()) for problem in caught.value.problems]
    assert named == ["--batch_size 0", *(f"{flag} {path}" for flag, path in paths.items())]


def test_empty_paths_are_refused():
    """An unset shell variable: --fresh would delete the default folder, --data_dir would read the current one."""
    names = "data_dir output_dir cache_dir tokenizer_path validation_dir teacher resume_from log_file".split()
    with pytest.raises(UserError) as caught:
        parse(GPT2Settings, "--preset", "smoke", *(word for name in names for word in (f"--{name}", "")))
    assert caught.value.problems == [f"--{name}: an empty path; is a shell variable unset?" for name in names]
    with pytest.raises(UserError, match="--output_dir: an empty path"):
        parse(GPT2Settings, "--preset", "smoke", "--fresh", "--output_dir", "")
    assert "--init_from: an empty path; is a shell variable unset?" in GPT2Settings(init_from="").problems()


def test_combinations_that_would_lose_work_are_refused(tmp_path):
    (tmp_path / "model").mkdir()

    def problem(**changes):
        settings = GPT2Settings(preset="smoke", **{"output_dir": str(tmp_path / "model")} | changes)
        (problem,) = settings.problems()
        return problem

    assert "--resume_from" in problem(fresh=True, resume_from="checkpoint")
    assert "is in --output_dir" in problem(teacher=("models/other", f"{tmp_path}/here/../model"))
    assert "--log_file" in problem(log_file=str(tmp_path / "model"))
    assert "is a file" in problem(log_file=f"{__file__}/log") or "not a folder" in problem(log_file=f"{__file__}/log")
    assert "--max_hours nan" in GPT2Settings(preset="h200", max_hours=float("nan")).problems()[0]


def test_validation_folder_is_recorded_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert GPT2Settings(preset="smoke", validation_dir="held_out").validation_dir == str(tmp_path / "held_out")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning_rate", "nan"),
        ("--weight_decay", "-0.1"),
        ("--dropout", "1"),
        ("--seed", "-1"),
        ("--patience", "0"),
        ("--keep_checkpoints", "1"),
    ],
)
def test_values_out_of_range_are_refused(flag, value):
    with pytest.raises(UserError, match=flag):
        parse(GPT2Settings, "--preset", "smoke", flag, value)


def test_invalid_head_width_and_zero_loss_weights_are_refused():
    with pytest.raises(UserError, match="a multiple of 4"):
        parse(PrioritaryConfig, "--preset", "smoke", "--hidden_dim", "60", "--num_heads", "4")
    with pytest.raises(UserError, match="both 0"):
        parse(PrioritaryConfig, "--preset", "smoke", "--accuracy_weight", "0", "--alignment_weight", "0")


@pytest.mark.parametrize("script", sorted([*REPOSITORY.glob("*.py"), *REPOSITORY.glob("SIM-ONE Training/*.py")]))
def test_help_does_not_import_heavy_packages(script):
    code = f"import sys, runpy; sys.argv = ['x', '--help']; sys.path.insert(0, {str(script.parent)!r})\n"
    code += f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
    code += "finally: assert not {'numpy', 'torch', 'transformers', 'matplotlib'} & sys.modules.keys()\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:")
