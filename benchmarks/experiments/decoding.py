"""Choose sampling settings: compare temperatures and top-p values with the statistics of the books' own text.

    python -m benchmarks.experiments.decoding models/mvlm_gpt2 models/simone_enhanced

Each setting continues the same validation verses by 64 words. Measures repeated word 4-grams, distinct word bigrams,
and bits per byte under PPMd primed with the train text (a scorer that is not a neural network), for the continuations
and for the books' own text. The setting closest to the books is marked.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import command
from mvlm_core.data.corpus import Corpus, load_corpus
from mvlm_core.data.verses import next_words, sample_verses, verses_of
from mvlm_core.errors import UserError, run_main
from mvlm_core.evaluation.compression import compared_texts, ppmd_bits
from mvlm_core.hardware import set_process_environment
from mvlm_core.settings import DEFAULT_DATA_DIR, Sampling

WORDS, PPMD_ORDER = 64, 16
TEMPERATURES, NUCLEI = (0.6, 0.7, 0.8, 0.9, 1.0), (0.9, 0.95, 1.0)


def settings() -> dict[str, Sampling | None]:
    sampled = {f"temperature {t:g}, top-p {p:g}": Sampling(t, p) for t in TEMPERATURES for p in NUCLEI}
    return {"greedy": None} | sampled


def measured(texts: list[str], train: bytes) -> dict[str, float]:
    """Measure texts. PPMd adapts while reading, so each call primes a new one with ``train``."""
    from mvlm_core.evaluation.generation import diversity

    words = [text.split()[:WORDS] for text in texts]
    repetitiveness, data = diversity(words), "\n".join(" ".join(part) for part in words).encode()
    bits = sum(ppmd_bits(train, [data], PPMD_ORDER)) / len(data)
    return {"rep_4": repetitiveness.rep_4.value, "distinct_2": repetitiveness.distinct_2, "bits_per_byte": bits}


def distance(figures: dict[str, float], books: dict[str, float]) -> float:
    """Sum the relative differences to the books in distinct bigrams and bits per byte and the absolute difference in
    repeated 4-grams, which are rare in the books."""
    relative = sum(abs(figures[name] / books[name] - 1) for name in ("distinct_2", "bits_per_byte"))
    return relative + abs(figures["rep_4"] - books["rep_4"])


def measure(export: Path, corpus: Corpus, train: bytes, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the results of ``measured`` for each setting and for the books' own text."""
    from mvlm_core.evaluation.bits_per_byte import load_export
    from mvlm_core.evaluation.generation import continuation_prompts, continuations

    model, tokenizer = load_export(export)
    held_out = corpus.primary_part("validation") or corpus.split("validation")
    verses = sample_verses((v for v in verses_of(held_out) if next_words(v, WORDS) is not None), count, seed)
    prompts, lengths, references = continuation_prompts(model, tokenizer, verses, WORDS)
    results = {"the books": measured(references, train)}
    for name, sample in settings().items():
        results[name] = measured(continuations(model, tokenizer, prompts, lengths, sample=sample, seed=seed), train)
    return results


def table(results: dict[str, dict[str, float]], title: str) -> str:
    books = results["the books"]
    distances = {name: distance(figures, books) for name, figures in results.items() if name != "the books"}
    best = min(distances, key=distances.__getitem__)
    rows = [
        (
            f"**{name}**" if name == best else name,
            f"{figures['rep_4']:.1%}",
            f"{figures['distinct_2']:.1%}",
            f"{figures['bits_per_byte']:.3f}",
            f"{distances[name]:.3f}" if name in distances else "",
        )
        for name, figures in results.items()
    ]
    return command.table((title, "repeated 4-grams", "distinct 2-grams", "bits/byte by PPMd", "distance"), rows)


def main(arguments: list[str] | None = None) -> int:
    parser = command.new_parser(__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path, help="export folders")
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR)
    parser.add_argument("--verses", type=int, default=64, help="number of verses to continue [default 64]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    problems = command.at_least_one(options, "verses")
    problems += [f"{folder}: no such folder" for folder in options.models if not folder.is_dir()]
    if problems:
        raise UserError(problems)
    set_process_environment()
    corpus = load_corpus(options.data_dir)
    if not (train := compared_texts(corpus)[0]):
        raise UserError(f"--data_dir {options.data_dir}: no train and test text to prime PPMd with")
    by_model = {str(folder): measure(folder, corpus, train, options.verses, options.seed) for folder in options.models}
    command.show("\n\n".join(table(results, folder) for folder, results in by_model.items()), by_model, options)
    return 0


if __name__ == "__main__":
    run_main(main)
