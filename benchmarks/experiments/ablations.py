"""Ablations: train with one component changed and compare with the unchanged model, paired by seed.

    python -m benchmarks.experiments.ablations --seeds 3 --max_bytes 1400000
    python -m benchmarks.experiments.ablations --only no_memory,gelu           also runs their references
    python -m benchmarks.experiments.ablations --preset h200 --jobs 2 --hours 0.4 --seeds 1
                                                on a GPU: the preset's learning rates first

Uses the validation books only.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

from benchmarks import command
from benchmarks.experiments import runner
from benchmarks.experiments.runner import Figures, ResultsBySeed, Run, Variant
from mvlm_core.errors import run_main

REFERENCES = {"mvlm_gpt2": "baseline", "simone_enhanced": "full"}
SMALLEST_EFFECT = 0.005  # bits per byte; a smaller mean over seeds does not count, however certain it is
# Student's t: two-sided 95 % quantile by number of seeds. Twice the standard error, the rule for many values, would let
# 18 % of effects of zero pass with three seeds and 10 % with six.
T_QUANTILES = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2))
SIZE_TOLERANCE = 0.02  # relative difference in parameters above which a row shows it

# Shapes derived from the preset's: model 2 with a tied output matrix and more layers; the baseline with model 2's
# layers, widened to keep its parameter count.
DEEPER = {"cpu": {"num_layers": 6, "ff_dim": 640}, "smoke": {"num_layers": 3}}
WIDER = {"cpu": {"num_layers": 4, "ff_dim": 1054}, "smoke": {"num_layers": 2, "ff_dim": 520}}


def rates(model: str, preset: str, factor: float) -> dict[str, float]:
    """Return the preset's learning rates times ``factor``."""
    values = runner.SETTINGS[model].PRESETS[preset]
    return {name: factor * values[name] for name in ("learning_rate", "adamw_learning_rate") if name in values}


def variants_of(preset: str) -> dict[str, Variant]:
    """Return all variants by name, the most important first.

    SIM-ONE is tried with AdamW at two learning rates near the baseline's best, GPT-2 with Muon at one near model 2's.
    """
    full, base = partial(Variant, "simone_enhanced"), partial(Variant, "mvlm_gpt2")
    variants = {
        "full": full("model 2, preset"),
        "baseline": base("model 1, preset"),
        "half_rate": full("half the learning rates", rates("simone_enhanced", preset, 0.5)),
        "double_rate": full("twice the learning rates", rates("simone_enhanced", preset, 2)),
        "base_half_rate": base("half the learning rate", rates("mvlm_gpt2", preset, 0.5)),
        "base_double_rate": base("twice the learning rate", rates("mvlm_gpt2", preset, 2)),
        "no_policy": full("without the policy head", {"policy_head": False}),
        "no_memory": full("without the memory head", {"memory_head": False}),
        "no_pointer": full("without the memory head's pointer", component_swap="no_pointer"),
        "no_coherence": full("without the coherence loss", {"coherence_weight": 0.0}),
        "no_alignment": full(
            "accuracy loss instead of content alignment", {"accuracy_weight": 1.0, "alignment_weight": 0.0}
        ),
        "learned_positions": full("learned position embeddings instead of rotary", component_swap="learned_positions"),
        "plain_queries": full("without QK-norm", component_swap="plain_queries"),
        "layer_norm": full("LayerNorm instead of RMSNorm", component_swap="layer_norm"),
        "gelu": full("GPT-2's feed-forward layer instead of SwiGLU", component_swap="gelu"),
        "adamw_2e-3": full("AdamW at 0.002 instead of Muon", {"optimizer": "adamw", "learning_rate": 2e-3}),
        "adamw_4e-3": full("AdamW at 0.004 instead of Muon", {"optimizer": "adamw", "learning_rate": 4e-3}),
        "cosine": full("cosine decay to a tenth instead of linear to zero", {"lr_schedule": "cosine"}),
    }
    small = preset in DEEPER  # the h200 preset already has a tied output matrix and no mix
    if small:
        variants |= {
            "tied_head_layers": full("tied output matrix, more layers", {"output_head": "tied"} | DEEPER[preset]),
            "no_train_mix": full("each text once per epoch", {"train_mix": ""}),
        }
    variants |= {
        "base_muon": base("Muon, all learning rates 0.015", {"optimizer": "muon", "learning_rate": 0.015}),
        "base_linear": base("linear decay to zero instead of cosine", {"lr_schedule": "linear"}),
    }
    if small:
        variants["base_shallow_wide"] = base("layers of model 2, wider instead of deeper", WIDER[preset])
    return variants


def make_runs(options: argparse.Namespace) -> list[Run]:
    """Create the runs of the variants in ``--only`` and of their references."""
    variants = variants_of(options.preset)
    names = set(command.parse_only(options.only, variants))
    names |= {REFERENCES[variants[name].model] for name in names}
    selected = {name: variant for name, variant in variants.items() if name in names}
    return runner.make_runs(selected, options, runner.shared_values(options))


def verdict(differences: list[float]) -> str:
    """Classify paired differences in bits per byte as "helps" (lower), "hurts", "noise" or "one seed".

    Noise: the mean is below ``SMALLEST_EFFECT``, or the 95 % confidence interval of its t distribution includes 0. Not
    corrected for the number of variants. Beyond ten seeds, the quantile of ten is used.
    """
    if (seeds := len(differences)) < 2:
        return "one seed"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / seeds**0.5
    if abs(mean) < max(T_QUANTILES[min(seeds, max(T_QUANTILES))] * error, SMALLEST_EFFECT):
        return "noise"
    return "helps" if mean < 0 else "hurts"


def row(name: str, variant: Variant, own: dict[int, Figures], reference: dict[int, Figures]) -> list[str]:
    """Compare a variant with the unchanged model, paired by seed."""
    parameters = f"{next(iter(own.values()))['parameters']:,}"
    bits = command.deviation([figures["validation_bpb"] for figures in own.values()])
    cells = [f"`{name}` {variant.description}", parameters, f"{bits} ({len(own)})"]
    if name == REFERENCES[variant.model]:
        return [*cells, "", "", "", "reference"]
    pairs = [(own[seed], reference[seed]) for seed in sorted(own.keys() & reference.keys())]
    differences = [changed["validation_bpb"] - base["validation_bpb"] for changed, base in pairs]
    if not pairs:
        return [*cells, "", "", "", "no pair"]
    size = pairs[0][0]["parameters"] / pairs[0][1]["parameters"] - 1
    if abs(size) > SIZE_TOLERANCE:
        cells[1] += f" ({size:+.1%})".replace("-", "−")
    ratios = [
        f"{statistics.mean(changed[name] / base[name] for changed, base in pairs):.3f}"
        for name in ("tokens_per_second", "peak_memory_bytes")
    ]
    return [*cells, command.spread(differences, "{:+.4f}"), *ratios, verdict(differences)]


def table(results: ResultsBySeed, preset: str = "cpu") -> str:
    compared = ("difference, mean (min … max)", "tokens/s, ratio", "peak memory, ratio")
    rows = [
        row(name, variant, results[name], results.get(REFERENCES[variant.model], {}))
        for name, variant in variants_of(preset).items()
        if name in results
    ]
    return command.table(("variant", "parameters", "validation (n)", *compared, "verdict"), rows) + (
        "\n\nValidation in bits per byte. Difference: from the reference above, seed by seed; below 0 is better.\n"
        f"Verdict: the effect of the row's change; noise below {SMALLEST_EFFECT} or if 0 is in its 95 % interval.\n"
        f"Parameters: relative difference from the reference, shown above {SIZE_TOLERANCE:.0%}."
    )


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    return runner.checked(runner.command_line(__doc__, "ablations", variants_of("cpu")).parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    return runner.run_experiment(make_runs(options), options, partial(table, preset=options.preset))


if __name__ == "__main__":
    run_main(main)
