"""Every setting of a training run, once: its default, its flag, its help and what it may be.

A settings class is a dataclass whose fields are made by ``option``. A value that is not given comes from the preset,
and what the preset does not name from the field's own default: a flag beats the preset, the preset the default.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args, get_type_hints

from mvlm_core.errors import Stopped, UserError, run_main
from mvlm_core.files import output_folder_problems
from mvlm_core.hardware import resolve_preset

__all__ = ["Stopped", "UserError", "run_main", "TrainingSettings", "option", "parse_settings", "PRESET_NAMES"]

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATA_DIR = REPOSITORY_ROOT / "mvlm_training_dataset_complete"
MODELLING_SOURCES = REPOSITORY_ROOT / "SIM-ONE Training" / "simone_transformer"  # the only code an export may hold
CACHE_DIR = REPOSITORY_ROOT / ".cache"
PRESET_NAMES = ("auto", "h200", "cpu", "smoke")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
OPTIMIZERS = ("adamw", "muon")
LENGTHS = ("num_epochs", "max_steps", "max_tokens", "max_bytes")
Settings = TypeVar("Settings", bound="TrainingSettings")
SMALLEST_VOCABULARY = 260  # 256 bytes and four special tokens


def option(
    default: Any,
    help: str,
    group: str = "run",
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    both_ways: bool = False,
    identity: bool = False,
) -> Any:
    """A field of a settings class.

    Args:
        minimum, above, maximum, below: the range, ends included or not.
        both_ways: a switch with a flag for off, ``--no_`` and its name, as well.
        identity: part of what the run *is*: a checkpoint made with another value is not continued.
    """
    rules = {"choices": choices, "minimum": minimum, "above": above, "maximum": maximum, "below": below}
    known = {"default": default, "help": help, "group": group, "both_ways": both_ways, "identity": identity}
    return field(default=None, metadata=known | rules)


@dataclass
class TrainingSettings:
    """What both trainers share. Sizes in tokens, sequences or bytes as said; rates per optimizer step."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # Length here, rates, decay and dropout in the models' own presets: from small runs by the rules of
        # benchmarks/scaling.py, not yet measured at this size. At as little text for each parameter the third pass
        # still helps, the eighth makes both models worse.
        "h200": {
            "num_epochs": 3.0,
            "eval_interval": 100,
            "checkpoint_interval": 250,
        },
        "cpu": {
            # Small and fed well: at equal compute 1.4 M parameters beat 2.6 M (benchmarks/RESULTS.md).
            "batch_size": 8,
            "max_length": 256,
            "vocab_size": 4096,
            "hidden_dim": 128,
            "num_heads": 2,
            "ff_dim": 512,
            "num_layers": 4,
            "max_bytes": 5_500_000,
            # Half of what is read is the King James text, the other half all translations alike.
            "train_mix": "bible/kjv=16",
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
            "data_subset": "bible/kjv",
        },
    }

    data_dir: str = option(str(DEFAULT_DATA_DIR), "folder of .txt files (with optional .json beside them)", "data")
    data_subset: str | None = option(None, "use only this folder below --data_dir", "data")
    train_mix: str | None = option(
        None, "times a pass reads the train text of a folder, such as bible/kjv=8,bible/web=2", "data", identity=True
    )
    output_dir: str | None = option(None, "where the finished model and its checkpoints go", "data")
    cache_dir: str = option(str(CACHE_DIR), "where tokenizers and tokens are kept between runs", "data")
    tokenizer_path: str | None = option(
        None, "a ready tokenizer (folder or tokenizer.json) instead of training one", "data"
    )
    validation_split: float = option(
        0.05, "share of documents without a split of their own held out for validation; as much again for the test",
        "data", above=0, below=0.5, identity=True,
    )  # fmt: skip
    validation_dir: str | None = option(None, "a folder whose files are the validation text", "data")

    vocab_size: int = option(
        32000, "tokenizer entries", "model", minimum=SMALLEST_VOCABULARY, maximum=1_000_000, identity=True
    )
    hidden_dim: int = option(768, "width of the model", "model", minimum=2, identity=True)
    num_heads: int = option(12, "attention heads a layer", "model", minimum=1, identity=True)
    ff_dim: int = option(3072, "classic width of the feed-forward layer", "model", minimum=1, identity=True)
    num_layers: int = option(12, "layers", "model", minimum=1, identity=True)
    max_length: int = option(1024, "training context in tokens", "model", minimum=2, identity=True)
    dropout: float = option(0.1, "dropout", "model", minimum=0, below=1, identity=True)

    preset: str = option(
        "auto", "sizes and budget to start from; auto: h200 with a CUDA device, else cpu", "run", choices=PRESET_NAMES
    )
    batch_size: int = option(32, "sequences in a device's micro-batch", "optimisation", minimum=1)
    gradient_accumulation_steps: int = option(1, "micro-batches an optimizer step", "optimisation", minimum=1)
    learning_rate: float = option(1e-3, "peak learning rate", "optimisation", above=0, identity=True)
    lr_schedule: str = option(
        "cosine", "course of the learning rate after warm-up", "optimisation", choices=SCHEDULES, identity=True
    )
    warmup_steps: int | None = option(
        None, "steps of linear warm-up (default: 2 %% of the run)", "optimisation", minimum=0, identity=True
    )
    input_noise: float = option(
        0.0,
        "share of the input tokens replaced by others of the text, against learning by heart a text that is read often",
        "optimisation",
        minimum=0,
        below=1,
        identity=True,
    )
    weight_decay: float = option(
        0.1, "decoupled weight decay of the matrices", "optimisation", minimum=0, identity=True
    )
    ema_decay: float = option(
        0.0,
        "evaluate and export a running average of the weights with this decay a step, such as 0.999; 0 switches it off",
        "optimisation",
        minimum=0,
        below=1,
        identity=True,
    )
    max_grad_norm: float = option(
        1.0, "gradients are scaled down to this norm; 0 switches it off", "optimisation", minimum=0, identity=True
    )
    optimizer: str = option(
        "adamw",
        "adamw, or muon for the matrices and adamw for the rest",
        "optimisation",
        choices=OPTIMIZERS,
        identity=True,
    )

    num_epochs: float | None = option(1.0, "passes over the training text", "length", above=0)
    max_steps: int | None = option(None, "stop after this many optimizer steps", "length", minimum=1)
    max_tokens: int | None = option(None, "stop after this many tokens", "length", minimum=1)
    max_bytes: int | None = option(None, "stop after this many bytes of training text", "length", minimum=1)
    patience: int | None = option(None, "stop after this many evaluations without a better one", "length", minimum=1)
    min_epochs: float = option(1.0, "never stop early before this many passes", "length", minimum=0)

    seed: int = option(0, "seed of weights, data order and dropout", "run", minimum=0, maximum=2**32 - 1, identity=True)
    device: str = option("auto", "auto, cpu or cuda", "hardware", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "auto, fp32 or bf16", "hardware", choices=("auto", "fp32", "bf16"))
    attention_backend: str = option(
        "auto", "attention kernel", "hardware", choices=("auto", "sdpa", "flash_attn", "xformers", "eager")
    )
    processes: int = option(
        1,
        "processes of one thread that share each batch on a processor's cores, instead of one process of many threads",
        "hardware",
        minimum=1,
    )
    no_mixed_precision: bool = option(False, "train in fp32 wherever it runs", "hardware")
    no_compile: bool = option(False, "do not use torch.compile", "hardware")

    eval_interval: int = option(200, "steps between evaluations", "run", minimum=1)
    log_interval: int = option(10, "steps between log lines", "run", minimum=1)
    checkpoint_interval: int = option(200, "steps between checkpoints", "run", minimum=1)
    keep_checkpoints: int = option(
        2, "newest checkpoints kept, beside the best; never fewer than two", "run", minimum=1
    )
    resume_from: str | None = option(
        None, "continue from this checkpoint folder (default: the newest valid one)", "run"
    )
    dry_run: bool = option(False, "say what the run would take (memory, time), and run nothing", "run")
    fresh: bool = option(False, "throw away what --output_dir holds and start again", "run")
    no_test_score: bool = option(
        False, "leave the test books unread: for sweeps, whose choices must not see them", "run"
    )
    log_file: str | None = option(None, "also write log lines here", "run")
    tensorboard: bool = option(False, "also write TensorBoard event files below the output folder", "run")
    quiet: bool = option(False, "no progress bar", "run")

    def __post_init__(self) -> None:
        if self.preset in (None, "auto"):
            self.preset = "cpu" if self.device == "cpu" else resolve_preset("auto")[0]
        chosen = self.preset_values(self.preset)
        # Lengths that are asked for replace the preset's altogether: --max_steps 5000 means 5,000 steps, not the
        # preset's one epoch. Several given at once hold together: the first one reached ends the run.
        lengths = [name for name in LENGTHS if getattr(self, name) is not None]
        preset_lengths = [name for name in LENGTHS if name in chosen]
        for entry in fields(self):
            if entry.name in LENGTHS and (lengths or preset_lengths) and entry.name not in (lengths or preset_lengths):
                continue
            if getattr(self, entry.name) is None:
                setattr(self, entry.name, chosen.get(entry.name, entry.metadata["default"]))

    @classmethod
    def preset_values(cls, preset: str) -> dict[str, Any]:
        """What ``preset`` says for this class: the shared values, overridden by the class's own."""
        values: dict[str, Any] = {}
        for ancestor in reversed(cls.__mro__):
            values.update(vars(ancestor).get("PRESETS", {}).get(preset, {}))
        return values

    def problems(self) -> list[str]:
        """Everything that is wrong with these values, one sentence each."""
        found = [sentence for entry in fields(self) if (sentence := _range_problem(entry, getattr(self, entry.name)))]
        if _is_number(self.hidden_dim) and _is_number(self.num_heads) and self.num_heads > 0:
            if self.hidden_dim % self.num_heads:
                found.append(
                    f"--hidden_dim {self.hidden_dim} does not split into --num_heads {self.num_heads} equal heads"
                )
        if self.output_dir is not None:
            found += output_folder_problems(self.output_dir)
        return found

    def check(self) -> Self:
        """These settings, or ``UserError`` with every problem."""
        if problems := self.problems():
            raise UserError(problems)
        return self

    @property
    def sequences_per_step(self) -> int:
        """The global batch: what an optimizer step sees, whatever the micro-batch is."""
        return self.batch_size * self.gradient_accumulation_steps

    def identity(self) -> dict[str, Any]:
        """The values that make this run another run when they change."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.metadata["identity"]}
        return values | {"batch_size × gradient_accumulation_steps": self.sequences_per_step}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _range_problem(entry: Any, value: Any) -> str | None:
    """One sentence when ``value`` is outside the field's rules."""
    rules, flag = entry.metadata, f"--{entry.name}"
    if value is None:
        return None
    if rules["choices"]:
        return (
            None
            if value in rules["choices"]
            else f"{flag} {value}: unknown; choose one of {', '.join(rules['choices'])}"
        )
    wanted = []
    if rules["minimum"] is not None:
        wanted.append((f"at least {rules['minimum']}", lambda x: x >= rules["minimum"]))
    if rules["above"] is not None:
        wanted.append((f"above {rules['above']}", lambda x: x > rules["above"]))
    if rules["maximum"] is not None:
        wanted.append((f"at most {rules['maximum']}", lambda x: x <= rules["maximum"]))
    if rules["below"] is not None:
        wanted.append((f"below {rules['below']}", lambda x: x < rules["below"]))
    if not wanted:
        return None
    if not _is_number(value) or not math.isfinite(value) or not all(holds(value) for _, holds in wanted):
        return f"{flag} {value}: must be {' and '.join(words for words, _ in wanted)}"
    return None


def add_options(parser: argparse.ArgumentParser, cls: type[TrainingSettings]) -> None:
    """One flag per field of ``cls``, grouped as the fields are, with help that names default and presets."""
    hints, groups = get_type_hints(cls), {}
    for entry in fields(cls):
        meta = entry.metadata
        group = groups.setdefault(
            meta["group"], parser.add_argument_group(meta["group"]) if meta["group"] not in groups else None
        )
        kind = next((part for part in get_args(hints[entry.name]) if part is not type(None)), hints[entry.name])
        text = meta["help"]
        if kind is bool:
            if meta["both_ways"]:
                text += f" [default {'on' if meta['default'] else 'off'}]"
                group.add_argument(f"--{entry.name}", f"--no_{entry.name}", action=_Switch, nargs=0, help=text)
            else:
                group.add_argument(f"--{entry.name}", action="store_true", default=None, help=text)
            continue
        presets = {name: cls.preset_values(name).get(entry.name, MISSING) for name in PRESET_NAMES}
        notes = [f"{name} {value}" for name, value in presets.items() if value is not MISSING]
        default = (
            []
            if meta["default"] is None or kind is str and "/" in str(meta["default"])
            else [f"default {meta['default']}"]
        )
        if meta["choices"]:
            text += f" ({', '.join(meta['choices'])})" if not all(choice in text for choice in meta["choices"]) else ""
        if default or notes:
            text += f" [{'; '.join(default + notes)}]"
        group.add_argument(f"--{entry.name}", type=kind, default=None, metavar=_metavar(kind), help=text)


class _Switch(argparse.Action):
    """``--name`` sets True, ``--no_name`` False; without either, None: the preset or the default decides."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # noqa: ANN001  (argparse's own)
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def _metavar(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def parse_settings(
    cls: type[Settings], arguments: list[str] | None, *, description: str, epilog: str, output_dir: Path
) -> Settings:
    """Settings of class ``cls`` from a command line, checked.

    Raises:
        UserError: with every problem at once.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser, cls)
    given = vars(parser.parse_args(arguments))
    preset = given["preset"]
    if preset is not None and preset not in PRESET_NAMES:
        # The rest is judged with the smallest preset, so that one message still names every problem.
        others = cls(**{**given, "preset": "smoke"}).problems()
        raise UserError([f"--preset {preset}: unknown; choose one of {', '.join(PRESET_NAMES)}", *others])
    settings = cls(**{**given, "output_dir": given["output_dir"] or str(output_dir)})
    return settings.check()
