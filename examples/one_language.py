"""One language from text to a tuned model, in Python: find its neurons, tune them, and see what changed.

    python examples/one_language.py --model HuggingFaceTB/SmolLM2-135M --language mlt_Latn --output out

The built-in text is formulaic; for a model that you mean to use, give --corpus a folder of running text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lape_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--language", default="mlt_Latn", help="whose neurons to tune")
    parser.add_argument("--others", default="isl_Latn,cym_Latn,kat_Geor,eng_Latn,deu_Latn", help="to compare it with")
    parser.add_argument("--corpus", default="cldr", help="folder of text, hub id, or cldr")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True, help="folder for counts, neurons, adapter and atlas")
    options = parser.parse_args()
    languages = [options.language, *options.others.split(",")]

    model, tokenizer = lape_fast.load_model(options.model)
    training = lape_fast.open_corpus(options.corpus, lines="1-1000", languages=languages)
    held_out = lape_fast.open_corpus(options.corpus, lines="1001-1060", languages=languages)

    # Among six languages few neurons are specific by the paper's thresholds; a budget gives each language as many.
    counts = lape_fast.count_activations(model, tokenizer, training)
    neurons = lape_fast.select_neurons(counts, lape_fast.Budget(0.01, floor=0.05))
    options.output.mkdir(parents=True, exist_ok=True)
    counts.save(options.output / "counts.safetensors")
    neurons.save(options.output / "neurons.safetensors")

    text = lape_fast.prepare_text(model, tokenizer, held_out)
    before = lape_fast.score(model, text)
    config = lape_fast.TuningConfig(method="subnetwork", language=options.language, neurons=neurons)
    settings = lape_fast.TrainingSettings(steps=options.steps, learning_rate=3e-4)
    lape_fast.tune_language(model, tokenizer, training, config, options.output / "adapter", settings)
    after = lape_fast.score(model, text)

    for language in languages:
        old, new = before[language].bits_per_byte, after[language].bits_per_byte
        print(f"{language}: {old:.3f} -> {new:.3f} bits per byte ({new - old:+.3f})")  # noqa: T201


if __name__ == "__main__":
    main()
