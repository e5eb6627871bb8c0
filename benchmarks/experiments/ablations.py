"""What each mechanism is worth: trainings with one thing changed, compared seed by seed with the unchanged model.

    python -m benchmarks.experiments.ablations --seeds 3 --max_bytes 1400000
    python -m benchmarks.experiments.ablations --only no_memory,gelu           their references are added

Only the validation books are read.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

from benchmarks import command
from benchmarks.experiments import runner
from benchmarks.experiments.runner import Figures, Found, Line, Run
from mvlm_core.errors import run_main

REFERENCES = {"mvlm_gpt2": "baseline", "simone_enhanced": "full"}
NOISE = 0.005  # bits per byte: single-run differences below this say nothing (benchmarks/LOG.md)
OTHER_SIZE = 0.02  # share of the parameters from which a row says that the model has another size

# Shapes that follow the preset's: model 2 with a tied output and more layers in place of the matrix; the baseline with
# model 2's layers and width; the baseline with model 2's layers, wider to make up for the others.
DEEPER = {"cpu": {"num_layers": 6, "ff_dim": 640}, "smoke": {"num_layers": 3}}
SHALLOW = {"cpu": {"num_layers": 4, "ff_dim": 512}, "smoke": {"num_layers": 2, "ff_dim": 256}}
WIDER = {"cpu": {"num_layers": 4, "ff_dim": 1054}, "smoke": {"num_layers": 2, "ff_dim": 520}}
MUON = {"optimizer": "muon", "learning_rate": 0.03}


def lines(preset: str) -> dict[str, Line]:
    """Every variant by its name.

    An optimizer is tried at two learning rates of its own: AdamW around the baseline's best, Muon around model 2's.
    """
    full, base = partial(Line, "simone_enhanced"), partial(Line, "mvlm_gpt2")
    return {
        "full": full("model 2 as the preset has it"),
        "no_policy": full("without the policy head", {"policy_head": False}),
        "no_memory": full("without the memory head", {"memory_head": False}),
        "no_pointer": full("without the memory head's pointer", classic_part="no_pointer"),
        "no_coherence": full("without the coherence part of the loss", {"coherence_weight": 0.0}),
        "no_alignment": full(
            "accuracy in place of content alignment", {"accuracy_weight": 1.0, "alignment_weight": 0.0}
        ),
        "learned_positions": full("learned positions for rotary ones", classic_part="learned_positions"),
        "plain_queries": full("queries and keys not normalised", classic_part="plain_queries"),
        "layer_norm": full("LayerNorm for RMSNorm", classic_part="layer_norm"),
        "gelu": full("GPT-2's feed-forward layer for SwiGLU", classic_part="gelu"),
        "tied_head": full("output tied to the embedding", {"output_head": "tied"}),
        "tied_head_layers": full("output tied, more layers in its place", {"output_head": "tied"} | DEEPER[preset]),
        "adamw_2e-3": full("AdamW at 0.002 for Muon", {"optimizer": "adamw", "learning_rate": 2e-3}),
        "adamw_4e-3": full("AdamW at 0.004 for Muon", {"optimizer": "adamw", "learning_rate": 4e-3}),
        "cosine": full("cosine to a tenth for linear to zero", {"lr_schedule": "cosine"}),
        "no_train_mix": full("each text read once a pass", {"train_mix": ""}),
        "baseline": base("model 1 as the preset has it"),
        "base_muon": base("Muon, all learning rates 0.03", MUON),
        "base_muon_1e-2": base("Muon, all learning rates 0.01", MUON | {"learning_rate": 0.01}),
        "base_linear": base("linear to zero for cosine", {"lr_schedule": "linear"}),
        "base_muon_linear": base("Muon at 0.03 and linear", MUON | {"lr_schedule": "linear"}),
        "base_shallow": base("layers and width of model 2", SHALLOW[preset]),
        "base_shallow_wide": base("layers of model 2, wider for the others", WIDER[preset]),
        "base_no_train_mix": base("each text read once a pass", {"train_mix": ""}),
    }


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs of the chosen variants and of the references that they are compared with."""
    known = lines(options.preset)
    names = set(command.chosen(options.only, known))
    names |= {REFERENCES[known[name].model] for name in names}
    wanted = {name: line for name, line in known.items() if name in names}
    return runner.plan(wanted, options, runner.shared_values(options))


def verdict(differences: list[float]) -> str:
    """What paired differences in bits per byte say: "helps" (lower), "hurts", "noise" or "one seed"."""
    if len(differences) < 2:
        return "one seed" if differences else "no pair"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    if abs(mean) < max(2 * error, NOISE):
        return "noise"
    return "helps" if mean < 0 else "hurts"


def row(name: str, line: Line, own: dict[int, Figures], reference: dict[int, Figures]) -> list[str]:
    """A variant's figures by seed beside those of the unchanged model."""
    parameters = f"{next(iter(own.values()))['parameters']:,}"
    bits = command.deviation([figures["validation_bpb"] for figures in own.values()])
    cells = [f"`{name}` {line.what}", parameters, f"{bits} ({len(own)})"]
    if name == REFERENCES[line.model]:
        return [*cells, "", "", "reference"]
    pairs = [(own[seed], reference[seed]) for seed in sorted(own.keys() & reference.keys())]
    differences = [mine["validation_bpb"] - theirs["validation_bpb"] for mine, theirs in pairs]
    if not pairs:
        return [*cells, "", "", verdict([])]
    size = pairs[0][0]["parameters"] / pairs[0][1]["parameters"] - 1
    if abs(size) > OTHER_SIZE:
        cells[1] += f" ({size:+.1%})".replace("-", "−")
    speed = statistics.mean(mine["tokens_per_second"] / theirs["tokens_per_second"] for mine, theirs in pairs)
    return [*cells, command.spread(differences, "{:+.4f}"), f"{speed:.3f}", verdict(differences)]


def table(found: Found, preset: str = "cpu") -> str:
    columns = ("variant", "parameters", "validation (n)", "difference, mean (least … most)", "tokens/s, ratio")
    rows = [
        row(name, line, found[name], found.get(REFERENCES[line.model], {}))
        for name, line in lines(preset).items()
        if name in found
    ]
    return command.table((*columns, "verdict"), rows) + (
        "\n\nValidation in bits per byte. Difference: from the reference above, seed by seed; below 0 is better.\n"
        f"Verdict: the effect of the row's change; noise below {NOISE} or below twice the mean's standard error.\n"
        f"Parameters say by how much a size differs from the reference's, where by more than {OTHER_SIZE:.0%}."
    )


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    return runner.settled(runner.command_line(__doc__, "ablations", lines("cpu")).parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    return runner.conduct(plan(options), options, partial(table, preset=options.preset))


if __name__ == "__main__":
    run_main(main)
