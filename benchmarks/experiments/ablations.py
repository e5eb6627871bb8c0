#!/usr/bin/env python3
"""What each mechanism is worth: trainings with one thing changed, compared seed by seed with the unchanged model.

Each run is a process of its own, trains as the trainers do and keeps its finished model below --work_dir. Run the
command again and it goes on where it stopped: finished runs are kept, an interrupted one continues from its
checkpoint. Only the validation books are read.

Exit codes: 0 done, 1 a run failed (the others still ran), 2 bad arguments, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiments.runner import Run, command_line, make, settled, values_of
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import write_json_atomic

REFERENCES = {"mvlm_gpt2": "baseline", "simone_enhanced": "full"}
NOISE = 0.005  # bits per byte: less than this is nothing here (README.md)
OTHER_SIZE = 0.02  # share of the parameters from which a row says that the size is another one


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        what: for the table, in words.
        changes: settings in place of the preset's; ``False``, 0.0 and "" beat the preset as any other value does.
        shapes: preset → settings of the model's shape, which must follow the preset's.
        classic_part: of ``classic_parts.py``, in the place of the modern one.
    """

    model: str
    name: str
    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    classic_part: str | None = None

    def values(self, preset: str) -> dict[str, Any]:
        return self.changes | self.shapes.get(preset, {})


# The shape of model 2 with a tied output and layers in the place of the matrix; of the baseline with model 2's layers
# and width; of the baseline with model 2's layers, as wide as makes up for the others.
DEEPER = {"cpu": {"num_layers": 6, "ff_dim": 640}, "smoke": {"num_layers": 3}}
SHALLOW = {"cpu": {"num_layers": 4, "ff_dim": 512}, "smoke": {"num_layers": 2, "ff_dim": 256}}
WIDER = {"cpu": {"num_layers": 4, "ff_dim": 1054}, "smoke": {"num_layers": 2, "ff_dim": 520}}
MUON = {"optimizer": "muon", "learning_rate": 0.03}
_full, _base = partial(Variant, "simone_enhanced"), partial(Variant, "mvlm_gpt2")
# An optimizer is tried at two rates of its own: AdamW around what the baseline does best with, Muon around model 2's.
VARIANTS = (
    _full("full", "model 2 as the preset has it"),
    _full("policy", "with the policy head", {"policy_head": True}),
    _full("no_memory", "without the memory head", {"memory_head": False}),
    _full("no_coherence", "without the coherence part of the loss", {"coherence_weight": 0.0}),
    _full("alignment", "content alignment 0.5, accuracy 0.5", {"accuracy_weight": 0.5, "alignment_weight": 0.5}),
    _full("no_z_loss", "without z-loss", {"z_loss_weight": 0.0}),
    _full("learned_positions", "learned positions for rotary ones", classic_part="learned_positions"),
    _full("plain_queries", "queries and keys not normalised", classic_part="plain_queries"),
    _full("layer_norm", "LayerNorm for RMSNorm", classic_part="layer_norm"),
    _full("gelu", "GPT-2's feed-forward layer for SwiGLU", classic_part="gelu"),
    _full("tied_head", "output tied to the embedding", {"output_head": "tied"}),
    _full("tied_head_layers", "output tied, more layers in its place", {"output_head": "tied"}, DEEPER),
    _full("adamw_2e-3", "AdamW at 0.002 for Muon", {"optimizer": "adamw", "learning_rate": 2e-3}),
    _full("adamw_4e-3", "AdamW at 0.004 for Muon", {"optimizer": "adamw", "learning_rate": 4e-3}),
    _full("cosine", "cosine to a tenth for linear to zero", {"lr_schedule": "cosine"}),
    _full("no_train_mix", "each text read once a pass", {"train_mix": ""}),
    _base("baseline", "model 1 as the preset has it"),
    _base("base_muon", "Muon, all rates 0.03", MUON),
    _base("base_muon_1e-2", "Muon, all rates 0.01", MUON | {"learning_rate": 0.01}),
    _base("base_linear", "linear to zero for cosine", {"lr_schedule": "linear"}),
    _base("base_muon_linear", "Muon at 0.03 and linear", MUON | {"lr_schedule": "linear"}),
    _base("base_shallow", "layers and width of model 2", shapes=SHALLOW),
    _base("base_shallow_wide", "layers of model 2, wider for the others", shapes=WIDER),
    _base("base_no_train_mix", "each text read once a pass", {"train_mix": ""}),
)


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs in order: seed by seed over all variants, so that an early end still leaves whole seeds."""
    shared = values_of(options)
    runs = []
    for seed in range(options.seeds):
        for variant in chosen(options.only):
            place = {"seed": seed, "output_dir": str(options.root / variant.name / f"seed{seed}")}
            values = shared | variant.values(options.preset) | place
            runs.append(Run(variant.name, variant.model, values, variant.classic_part))
    return runs


def chosen(only: str | None) -> list[Variant]:
    """The variants named, with the references that they are compared with; all without names.

    Raises:
        UserError: names that are none.
    """
    names = [name.strip() for name in only.split(",")] if only else [variant.name for variant in VARIANTS]
    known = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in names if name not in known]:
        raise UserError([f"--only {name!r}: no such variant; --list names them" for name in unknown])
    wanted = {*names, *(REFERENCES[known[name].model] for name in names)}
    return [variant for variant in VARIANTS if variant.name in wanted]


def verdict(differences: list[float]) -> str:
    """What paired differences in bits per byte say: "helps" (lower), "hurts", "noise" or "one seed"."""
    if len(differences) < 2:
        return "one seed" if differences else "no pair"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    if abs(mean) < max(2 * error, NOISE):
        return "noise"
    return "helps" if mean < 0 else "hurts"


def compare(own: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]] | None) -> dict[str, Any]:
    """A variant's figures by seed as a row's numbers.

    Args:
        reference: the figures of the unchanged model by seed; None for that model itself.
    """
    bits = [figures["validation_bpb"] for figures in own.values()]
    row: dict[str, Any] = {
        "parameters": next(iter(own.values()))["parameters"],
        "n": len(bits),
        "mean": statistics.mean(bits),
        "deviation": statistics.stdev(bits) if len(bits) > 1 else None,
    }
    if reference is None:
        return row
    pairs = [(own[seed], reference[seed]) for seed in sorted(own.keys() & reference.keys())]
    differences = [mine["validation_bpb"] - other["validation_bpb"] for mine, other in pairs]
    row |= {"differences": differences, "verdict": verdict(differences)}
    if pairs:
        row["speed"] = statistics.mean(m["tokens_per_second"] / other["tokens_per_second"] for m, other in pairs)
        row["size"] = pairs[0][0]["parameters"] / pairs[0][1]["parameters"]
    return row


def rows_of(results: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each variant with a finished run, in the order of ``VARIANTS``; ``results``: name → seed → figures."""
    rows = []
    for variant in VARIANTS:
        if own := results.get(variant.name):
            name = REFERENCES[variant.model]
            reference = None if variant.name == name else results.get(name, {})
            rows.append({"name": variant.name, "what": variant.what, **compare(own, reference)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| variant | parameters | validation (n) | difference, mean (least … most) | tokens/s, ratio | verdict |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        size, differences = row.get("size", 1.0), row.get("differences")
        share = f" ({size - 1:+.1%})" if abs(size - 1) > OTHER_SIZE else ""
        deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.4f}"
        spread = [f"{of(differences):+.4f}" for of in (statistics.mean, min, max)] if differences else None
        cells = (
            f"`{row['name']}` {row['what']}",
            f"{row['parameters']:,}{share}".replace("-", "−"),
            f"{row['mean']:.4f}{deviation} ({row['n']})",
            "{} ({} … {})".format(*spread).replace("-", "−") if spread else "",
            f"{row['speed']:.3f}" if "speed" in row else "",
            row.get("verdict", "reference"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(runs: list[Run], options: argparse.Namespace) -> None:
    """Print the table of what is finished, with what a reader must know; write it to ``--json`` as well."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        if (result := run.result()) is not None:
            results.setdefault(run.label, {})[run.seed] = result
    rows, finished = rows_of(results), sum(map(len, results.values()))
    origins = {json.dumps(figures["origin"]) for seeds in results.values() for figures in seeds.values()}
    length = f"{options.max_bytes:,} bytes of text" if options.max_bytes else "the preset's length"
    print(table(rows), f"Preset {options.preset}, {length}; {finished} of {len(runs)} runs finished.", sep="\n\n")
    print("Validation in bits per byte. Difference: from the reference above, seed by seed; below 0 is better.")
    print(f"Verdict: what the row's change does; noise under {NOISE} or under twice the mean's standard error.")
    print(f"Where a size differs from the reference's by more than {OTHER_SIZE:.0%}, the parameters say by how much.")
    if len(origins) > 1:
        print("Runs of several kinds, which are not to be compared:", *sorted(origins), sep="\n  ")
    if options.json:
        given = {name: getattr(options, name) for name in ("preset", "max_bytes", "seeds")}
        write_json_atomic(options.json, {**given, "rows": rows, "runs": results})


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: every problem with it.
    """
    parser = command_line(__doc__, "ablations")
    parser.add_argument("--only", help="these variants, with commas between; their references are added")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--list", action="store_true", help="name the variants and end")
    parser.add_argument("--dry_run", action="store_true", help="say what would run and end")
    parser.add_argument("--table", action="store_true", help="only print the table of what is finished")
    return settled(parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.list:
        print("\n".join(f"{variant.name:18} {variant.what}" for variant in chosen(options.only)))
        return 0
    runs = plan(options)
    if problems := sorted({problem for run in runs for problem in run.settings().problems()}):
        raise UserError(problems)
    if options.dry_run:
        for run in runs:
            state = "to do" if run.result() is None else "finished"
            print(f"{state:8}  {run.name}: {run.model}")
        return 0
    if options.table:
        report(runs, options)
        return 0
    try:
        failed = make(runs, options.root)
    finally:
        report(runs, options)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
