"""Settings of a training run, each defined once: default, flag, help text and range.

A settings class is a dataclass whose fields are created with ``option``. A flag overrides the preset, and the preset
overrides the field's default.
"""

from __future__ import annotations

import argparse
import math
import operator
import os
from collections.abc import Collection, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from mvlm_core.errors import UserError
from mvlm_core.files import empty_path_problems, output_file_problems, output_folder_problems
from mvlm_core.hardware import ATTENTION_BACKENDS, DEVICES, LOSS_KERNELS, PRECISIONS, resolve_preset

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATA_DIR = REPOSITORY_ROOT / "mvlm_training_dataset_complete"
CACHE_DIR = REPOSITORY_ROOT / ".cache"
PRESET_NAMES = ("auto", "h200", "cpu", "smoke")
SCHEDULES = ("cosine", "linear")
OPTIMIZERS = ("adamw", "muon")
VALIDATION_TEXTS = ("primary", "all")
PATHS = (  # options that name a path, which must not be empty
    *("data_dir", "output_dir", "cache_dir", "tokenizer_path", "validation_dir"),
    *("init_from", "teacher", "resume_from", "log_file"),
)
STUDENT_EPOCHS = 60.0  # with --max_hours: after more, students are worse (benchmarks/README.md, data-constrained)
LENGTHS = ("num_epochs", "max_steps", "max_tokens", "max_bytes", "max_hours")
FINE_TUNING = "init_from"  # key in PRESETS: values that --init_from applies on top of any preset
FINE_TUNING_RATE = 0.3  # times the preset's peak learning rate
# Upper limits for fine-tuning: a megabyte of text is only seven steps of the h200 preset's 32,768 tokens per epoch.
FINE_TUNING_TOKENS = 4096  # per step; measured with 2,048
FINE_TUNING_INTERVALS = {"eval_interval": 100, "checkpoint_interval": 200}


def is_default_corpus(data_dir: Path | str) -> bool:
    """Whether ``data_dir``, however it is written, is the folder of the corpus that this repository builds."""
    return Path(data_dir).resolve() == DEFAULT_DATA_DIR.resolve()


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751) with a temperature."""

    temperature: float = 1.0
    top_p: float = 0.95


# Default sampling of exports, generate.py and the report: of the values tried, the closest to the repetition and
# predictability of the books themselves (benchmarks/experiments/decoding.py).
DEFAULT_SAMPLING = Sampling(temperature=0.9, top_p=0.9)
MIN_VOCABULARY = 260  # 256 bytes and four special tokens
_BOUNDS = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def option(
    default: Any,
    help: str,
    group: str = "run",
    *,
    choices: tuple[str, ...] | None = None,
    identity: bool = False,
    **bounds: float,
) -> Any:
    """Define a field of a settings class.

    Args:
        identity: whether the value defines the run; a checkpoint with a different value is not resumed.
        bounds: ``minimum``, ``maximum`` (inclusive), ``above``, ``below`` (exclusive).
    """
    metadata = {"default": default, "help": help, "group": group, "choices": choices, "identity": identity}
    return field(default=None, metadata={**metadata, "bounds": bounds})


_data = partial(option, group="data")
_model = partial(option, group="model", identity=True)
_optimization = partial(option, group="optimization", identity=True)
_length = partial(option, group="length", minimum=1)
_hardware = partial(option, group="hardware")
_fine_tuning = partial(option, group="fine-tuning")
_distillation = partial(option, group="distillation")


@dataclass
class TrainingSettings:
    """Settings shared by both trainers."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # The numbers of epochs and models were chosen with smaller models and as much text per parameter
        # (benchmarks/experiments/data_constrained.py): a model without teachers soon overfits; a student of three
        # teachers still improves at 18 epochs. docs/h200.md lists where the models' own values come from. None of this
        # has been measured at this size.
        "h200": {
            "num_epochs": 18.0,
            "num_models": 4,
            "max_hours": 0.5,  # a quarter more than estimated: for a slower GPU the length is fixed to fit
            "teacher_epochs": 3.0,
            "eval_interval": 200,
            "checkpoint_interval": 1000,  # about two minutes by estimate; more often would keep a slow disk busy
            "validation_text": "all",
        },
        "cpu": {
            # A small model on more text: at equal compute 1.4 M parameters beat 2.6 M (benchmarks/LOG.md).
            "batch_size": 8,
            "max_length": 256,
            "vocab_size": 4096,
            "hidden_dim": 128,
            "num_heads": 2,
            "ff_dim": 512,
            "num_layers": 4,
            "max_bytes": 5_500_000,
            "dropout": 0.0,
            "eval_interval": 50,
            "checkpoint_interval": 100,
        },
        "smoke": {
            "batch_size": 8,
            "max_length": 64,
            "vocab_size": 1024,
            "hidden_dim": 64,
            "num_heads": 4,
            "ff_dim": 256,
            "num_layers": 2,
            "max_bytes": 190_000,
            "dropout": 0.0,
            "eval_interval": 40,
            "checkpoint_interval": 20,
            "log_interval": 5,
        },
        FINE_TUNING: {"num_epochs": 2.0, "max_hours": None, "num_models": 1},
    }
    # For presets with teachers: (upper limit of --max_hours, number of models), from the same experiments. By estimate,
    # three epochs of one model take 2.5 to 2.8 minutes on an H200, and teachers should take a quarter to a third of the
    # time.
    MODELS_BY_HOURS: ClassVar[dict[str, tuple[tuple[float, int], ...]]] = {
        "h200": ((0.08, 1), (0.33, 2), (0.83, 4), (math.inf, 8))
    }

    # Default warm-up: share of the run, and steps for a run that only --max_hours limits.
    WARMUP: ClassVar[tuple[float, int]] = (0.02, 50)

    data_dir: str = _data(str(DEFAULT_DATA_DIR), "folder of .txt files, each with an optional .json file")
    data_subset: str | None = _data(None, "use only this folder below --data_dir")
    train_mix: str | None = _data(
        None, "FOLDER=TIMES,...: how many times one epoch repeats the training text of these folders", identity=True
    )
    output_dir: str | None = _data(None, "folder for the finished model and its checkpoints")
    cache_dir: str = _data(str(CACHE_DIR), "folder that keeps tokenizers and tokens between runs")
    tokenizer_path: str | None = _data(None, "use this tokenizer (folder or tokenizer.json) instead of training one")
    validation_split: float = _data(
        0.05, "fraction held out for validation, and the same again for test, of documents without a split in their "
        ".json", above=0, below=0.5, identity=True,
    )  # fmt: skip
    validation_dir: str | None = _data(None, "folder of files to use as validation text")
    validation_text: str = _data(
        "primary", "text that selects the best checkpoint: primary (validation documents of the primary translation, "
        "or, without one, 64 KB of all) or all", choices=VALIDATION_TEXTS, identity=True,
    )  # fmt: skip

    init_from: str | None = _fine_tuning(
        None, "continue training this export (folder or .tar.gz): its weights, shape and tokenizer, and by default its "
        f"preset, with {FINE_TUNING_RATE} times the learning rate, at most {FINE_TUNING_TOKENS:,} tokens per step and "
        "at most 2 epochs",
    )  # fmt: skip
    replay: str | None = _fine_tuning(
        None, "FOLDER=SHARE: to reduce forgetting, draw this share of the sequences from that corpus's training text, "
        "and also score its test text before and after (default: the export's own corpus, if it is unchanged)",
    )  # fmt: skip

    teacher: Sequence[str] = _distillation(
        (), "distill from these exports (one or more folders or .tar.gz with the same tokenizer)"
    )
    num_models: int = _distillation(
        1, "above 1: first train N - 1 teachers; the exported model learns from them and the text; "
        "helps when text is repeated for many epochs", minimum=1,
    )  # fmt: skip
    teacher_epochs: float = _distillation(
        3.0, "maximum epochs per teacher: without distillation, a model overfits sooner", above=0
    )

    vocab_size: int = _model(32000, "vocabulary size", minimum=MIN_VOCABULARY, maximum=1_000_000)
    hidden_dim: int = _model(768, "hidden size", minimum=2)
    num_heads: int = _model(12, "attention heads per layer", minimum=1)
    ff_dim: int = _model(3072, "feed-forward width; SwiGLU uses 2/3 of it, for as many parameters", minimum=1)
    num_layers: int = _model(12, "number of layers", minimum=1)
    max_length: int = _model(1024, "training context in tokens", minimum=2)
    dropout: float = _model(0.1, "dropout rate", minimum=0, below=1)

    preset: str = option(
        "auto", "model size and training budget; auto: h200 with a CUDA device, else cpu", choices=PRESET_NAMES
    )
    batch_size: int = _optimization(
        32, "largest micro-batch per device, in sequences; times --gradient_accumulation_steps, it is the global batch "
        "size, whatever the number of devices", minimum=1, identity=False,
    )  # fmt: skip
    gradient_accumulation_steps: int = _optimization(
        1, "micro-batches per optimizer step on one device; more devices split the same batch",
        minimum=1, identity=False,
    )  # fmt: skip
    learning_rate: float = _optimization(1e-3, "peak learning rate", above=0)
    lr_schedule: str = _optimization("cosine", "learning rate schedule after warm-up", choices=SCHEDULES)
    warmup_steps: int | None = _optimization(
        None,
        "steps of linear warm-up (default: 2 %% of the run, model 1 10 %%; 50 and 200 if only --max_hours limits it)",
        minimum=0,
    )
    weight_decay: float = _optimization(0.1, "decoupled weight decay for matrices", minimum=0)
    max_grad_norm: float = _optimization(1.0, "clip gradients to this norm; 0 disables clipping", minimum=0)
    optimizer: str = _optimization("adamw", "adamw, or muon for matrices with adamw for the rest", choices=OPTIMIZERS)

    num_epochs: float | None = option(1.0, "epochs over the training text", "length", above=0)
    max_steps: int | None = _length(None, "stop after this many optimizer steps")
    max_tokens: int | None = _length(None, "stop after this many tokens")
    max_bytes: int | None = _length(None, "stop after this many bytes of training text")
    max_hours: float | None = option(
        None, "train for at most this many hours, including evaluations and checkpoints, but not set-up and final "
        "scoring; the number of steps is fixed after timing the first minute (or a tenth of the limit); h200: at most "
        "60 epochs, or --teacher_epochs without teachers",
        "length", above=0,
    )  # fmt: skip
    patience: int | None = _length(None, "stop after this many evaluations without improvement (default: never)")
    min_epochs: float = _length(1.0, "no early stopping before this many epochs", minimum=0)

    seed: int = option(0, "seed for weights, data order and dropout", minimum=0, maximum=2**32 - 1, identity=True)
    device: str = _hardware("auto", "auto (cuda if available), cpu or cuda", choices=DEVICES)
    precision: str = _hardware("auto", "auto (bf16 if the device has it, else fp32), fp32 or bf16", choices=PRECISIONS)
    attention_backend: str = _hardware("auto", "attention kernel; auto: PyTorch's (sdpa)", choices=ATTENTION_BACKENDS)
    processes: int = _hardware(
        1,
        "on a CPU, split each batch across this many single-threaded processes instead of using threads",
        minimum=1,
    )
    gpus: int | None = _hardware(None, "GPUs to split each batch across (default: all on this machine)", minimum=1)
    no_mixed_precision: bool = _hardware(False, "train in fp32 on every device")
    deterministic: bool = _hardware(
        False, "on CUDA, use only deterministic kernels, which are slower; CPU training is always deterministic"
    )
    no_compile: bool = _hardware(False, "do not use torch.compile")
    loss_kernel: str = _hardware(
        "auto", "cross-entropy kernel: compiled, or blocks (in chunks); auto: compiled if the model is",
        choices=LOSS_KERNELS,
    )  # fmt: skip

    eval_interval: int = option(200, "steps between evaluations", minimum=1)
    log_interval: int = option(10, "steps between log lines", minimum=1)
    checkpoint_interval: int = option(200, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(2, "newest checkpoints to keep in addition to the best", minimum=2)
    resume_from: str | None = option(None, "resume from this checkpoint folder (default: the newest valid one)")
    dry_run: bool = option(False, "estimate memory and time without training")
    prepare_only: bool = option(False, "only train the tokenizer and tokenize the text into --cache_dir")
    fresh: bool = option(False, "delete the run in --output_dir and start over")
    no_test_score: bool = option(False, "skip test scores and memorization; for hyperparameter sweeps")
    log_file: str | None = option(None, "also append the log to this file")
    tensorboard: bool = option(False, "also write TensorBoard event files to the output folder")
    quiet: bool = option(False, "no progress bar")

    def __post_init__(self) -> None:
        self._conflicts = self.inherit()
        if self.validation_dir:  # recorded with the export, which may be validated from another folder
            self.validation_dir = str(Path(self.validation_dir).absolute())
        self.preset_is_automatic = self.preset in (None, "auto")
        if self.preset_is_automatic:
            self.preset = resolve_preset("auto", self.device)[0]
        chosen = self.preset_values(self.preset)
        by_hours = self.MODELS_BY_HOURS.get(self.preset)
        if self.max_hours is not None and by_hours and self.init_from is None:
            chosen["num_models"] = next((models for hours, models in by_hours if self.max_hours <= hours), 1)
            if self.num_epochs is None:
                has_teachers = self.teacher or (self.num_models or chosen["num_models"]) > 1
                self.num_epochs = STUDENT_EPOCHS if has_teachers else self.teacher_epochs or chosen["teacher_epochs"]
        if self.teacher:
            chosen["num_models"] = 1
        if self.init_from is not None:
            chosen = self._fine_tuning_values(chosen)
        # An explicit length replaces all of the preset's lengths: --max_steps 5000 means 5,000 steps, not the preset's
        # one epoch. If several are given, the first one reached ends the run.
        lengths = [name for name in LENGTHS if getattr(self, name) is not None]
        preset_lengths = [name for name in LENGTHS if name in chosen]
        for entry in fields(self):
            if entry.name in LENGTHS and (lengths or preset_lengths) and entry.name not in (lengths or preset_lengths):
                continue
            if getattr(self, entry.name) is None:
                setattr(self, entry.name, chosen.get(entry.name, entry.metadata["default"]))

    @classmethod
    def preset_values(cls, preset: str) -> dict[str, Any]:
        """Values of ``preset`` for this class: the shared values, overridden by the class's own."""
        values: dict[str, Any] = {}
        for ancestor in reversed(cls.__mro__):
            values.update(vars(ancestor).get("PRESETS", {}).get(preset, {}))
        return values

    def inherit(self) -> list[str]:
        """Copy the values that must match the export of ``--init_from``; return conflicts with it."""
        return []

    def _fine_tuning_values(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """Adapt a preset's values to a run that starts from a trained model, maybe with little text."""
        values = {entry.name: entry.metadata["default"] for entry in fields(self)} | chosen
        rates = {name: FINE_TUNING_RATE * values[name] for name in values if name.endswith("learning_rate")}
        step = (self.max_length or values["max_length"]) * (self.gradient_accumulation_steps or 1)  # of one sequence
        sequences = max(1, FINE_TUNING_TOKENS // step)
        limits = {"batch_size": sequences} | FINE_TUNING_INTERVALS
        limited = {name: min(values[name], limit) for name, limit in limits.items()}
        return chosen | rates | limited | self.preset_values(FINE_TUNING)

    def problems(self) -> list[str]:
        """Return every problem with these values, one sentence each."""
        problems = list(self._conflicts)
        problems += empty_path_problems({f"--{name}": getattr(self, name) for name in PATHS})
        problems += [text for entry in fields(self) if (text := _range_problem(entry, getattr(self, entry.name)))]
        if _is_number(self.hidden_dim) and _is_number(self.num_heads) and self.num_heads > 0:
            if self.hidden_dim % self.num_heads:
                problems.append(f"--hidden_dim {self.hidden_dim} is not divisible by --num_heads {self.num_heads}")
        problems += self._missing_input()
        problems += output_folder_problems(self.cache_dir, "--cache_dir")
        if self.output_dir:
            problems += output_folder_problems(self.output_dir)
            problems += self._teacher_problems(Path(self.output_dir))
        if self.log_file:
            problems += output_file_problems(self.log_file, "--log_file")
        if self.fresh and self.resume_from is not None:
            problems.append("--fresh would delete the run that --resume_from continues: use only one")
        return problems

    def _missing_input(self) -> list[str]:
        """Problems with paths to read that do not exist. What is in them is checked where they are read."""
        problems = []
        if self.data_dir and not os.path.isdir(self.data_dir):
            problems.append(f"--data_dir {self.data_dir}: no such folder")
        if self.validation_dir and not os.path.isdir(self.validation_dir):
            problems.append(f"--validation_dir {self.validation_dir}: no such folder")
        if self.tokenizer_path and self.init_from is None and not os.path.exists(self.tokenizer_path):
            problems.append(f"--tokenizer_path {self.tokenizer_path}: no such file or folder")
        if self.resume_from and not self.fresh and not os.path.isdir(self.resume_from):
            problems.append(f"--resume_from {self.resume_from}: no such checkpoint folder")
        return problems

    def _teacher_problems(self, output_dir: Path) -> list[str]:
        if self.teacher and self.num_models > 1:
            return ["--teacher cannot be used with --num_models above 1, which trains its own teachers: use only one"]
        own = [path for path in self.teacher if Path(path).resolve() == output_dir.resolve()]
        return [f"--teacher {path} is in --output_dir, which will be replaced: choose another folder" for path in own]

    def check(self) -> Self:
        """Return these settings; raise ``UserError`` listing every problem if there is any."""
        if problems := self.problems():
            raise UserError(problems)
        return self

    @property
    def sequences_per_step(self) -> int:
        """The global batch size: sequences per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _range_problem(entry: Field[Any], value: Any) -> str | None:
    """Describe the problem if ``value`` is not one of the field's choices or outside its bounds."""
    choices, bounds = entry.metadata["choices"], entry.metadata["bounds"]
    if value is None:
        return None
    if choices and value not in choices:
        return f"--{entry.name} {value}: unknown; choose one of {', '.join(choices)}"
    if not bounds:
        return None
    limits = [(*_BOUNDS[name], bounds[name]) for name in _BOUNDS if name in bounds]
    if _is_number(value) and abs(value) < math.inf and all(holds(value, bound) for _, holds, bound in limits):
        return None
    return f"--{entry.name} {value}: must be {' and '.join(f'{words} {bound}' for words, _, bound in limits)}"


def add_options(
    parser: argparse.ArgumentParser,
    cls: type[TrainingSettings],
    names: Collection[str] | None = None,
    *,
    title: str | None = None,
) -> None:
    """Add one flag per field of ``cls`` to ``parser``; help shows the default and the presets' values.

    A boolean that is on by default also gets a ``--no_…`` flag.

    Args:
        names: only these fields.
        title: put all flags in one group of this title, without defaults and presets in their help.
    """
    hints = get_type_hints(cls)
    groups: dict[str, Any] = {}
    for entry in fields(cls):
        if names is not None and entry.name not in names:
            continue
        heading = title or entry.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        value_type = _without_none(hints[entry.name])
        help = entry.metadata["help"] if title else _help(cls, entry, value_type)
        add = partial(groups[heading].add_argument, dest=entry.name, default=None)
        if value_type is bool:
            add = partial(add, action="store_true")
        elif get_origin(value_type) is Sequence:
            add = partial(add, nargs="+", metavar="PATH")
        else:
            word = "PATH" if entry.name in PATHS else "VALUE"
            add = partial(add, type=value_type, metavar={int: "N", float: "X"}.get(value_type, word))
        add(f"--{entry.name}", help=help)
        if value_type is bool and entry.metadata["default"]:
            add(f"--no_{entry.name}", action="store_false", help=f"disable --{entry.name}")


def _without_none(hint: Any) -> Any:
    """Return the ``T`` of a type hint ``T`` or ``T | None``."""
    return next(part for part in get_args(hint) if part is not type(None)) if isinstance(hint, UnionType) else hint


def _help(cls: type[TrainingSettings], entry: Field[Any], value_type: type) -> str:
    meta = entry.metadata
    text, default = meta["help"], meta["default"]
    if value_type is bool:
        return f"{text} [default on]" if default else text
    if meta["choices"] and not all(choice in text for choice in meta["choices"]):
        text += f" ({', '.join(meta['choices'])})"
    is_path = value_type is str and "/" in str(default)
    notes = [] if default in (None, ()) or is_path else [f"default {default}"]
    for preset in PRESET_NAMES:
        values = cls.preset_values(preset)
        notes += [f"{preset} {values[entry.name]}"] if entry.name in values else []
    return f"{text} [{'; '.join(notes)}]" if notes else text
