"""What computing a base in fp8 changes: signs of gates, selected neurons, and the loss before and after tuning.

    python -m benchmarks.fp8 [--json FILE] [--model DIR --corpus CORPUS --languages CODE ... --train LINES --test LINES]

Without a model, a small one is trained on the built-in text first. A row is a way to compute the same checkpoint, and
is compared with bfloat16: how large a share of the gates of some tokens has another sign, and how far the neurons of
each language agree (shared over all that either selects). The yardsticks are float32, and how far the two halves of the
text agree.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import machine_facts, report
from lape_fast.demo import BASE_SETTINGS, LANGUAGES, RULE, SIZE, TARGET_SHARE, TARGETS, TRAIN_DOCUMENTS
from lape_fast.identify import CountingSettings, NeuronSet, count_activations, parse_rules, select_neurons
from lape_fast.identify.stability import measure_stability
from lape_fast.models import find_ffns, load_model
from lape_fast.study import EvaluationText, prepare_text, score
from lape_fast.text import open_corpus
from lape_fast.tune import SubnetworkConfig, TrainingSettings, train_base_model, tune_language

BASELINE = "bfloat16"
VARIANTS = {
    "float32": {"dtype": "float32"},
    BASELINE: {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16", "quantise": "fp8"},
}

COLUMNS = {
    "signs changed": lambda row: f"{row['signs_changed']:.3%}",
    "Jaccard, mean": lambda row: f"{row['jaccard_mean']:.3f}",
    "least": lambda row: f"{row['jaccard_least']:.3f}",
    "of halves": lambda row: f"{row['jaccard_of_halves_mean']:.3f}",
    "neurons": lambda row: f"{row['neurons']:,}",
    "loss": lambda row: f"{row['loss']:.4f}",
    "change": lambda row: f"{row['loss_change']:+.4f}",
    "tuned language": lambda row: f"{row['language_loss']:.4f}",
    "after tuning": lambda row: f"{row['tuned_loss']:.4f}",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint; a small model is trained where there is none")
    parser.add_argument("--corpus", default="cldr", help="what open_corpus takes")
    parser.add_argument("--languages", nargs="+", default=LANGUAGES, metavar="CODE")
    parser.add_argument("--target", default="mlt_Latn", metavar="CODE", help="the language to tune")
    parser.add_argument("--train", default="1-1000", metavar="LINES", help="lines to count and to tune on")
    parser.add_argument("--test", default="1061-1120", metavar="LINES", help="lines to measure the loss on")
    parser.add_argument("--rule", default=RULE, help="how neurons are selected")
    parser.add_argument("--tokens", type=int, default=6000, help="of each language to count")
    parser.add_argument("--base-steps", type=int, default=400, help="of the small model's training")
    parser.add_argument("--steps", type=int, default=40, help="of tuning")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of tuning")
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--sign-rows", type=int, default=8, help="rows of test text whose gates' signs are compared")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        model = options.model or train_small(options, Path(folder))
        measured = {}
        for name, loading in VARIANTS.items():
            measured[name] = Measured(options, model, loading)
            gc.collect()
        # All tune the neurons that the baseline selects.
        neurons = measured[BASELINE].neurons
        for name, loading in VARIANTS.items():
            measured[name].tune(options, model, loading, Path(folder) / name, neurons)
        rows = [row_of(name, each, measured[BASELINE], options.target) for name, each in measured.items()]
    kept = ("corpus", "train", "test", "rule", "tokens", "steps", "rate", "context_length", "target")
    settings = {"model": Path(model).name if options.model else f"small, {options.base_steps} steps"}
    settings |= {name: getattr(options, name) for name in kept} | {"languages": len(options.languages)}
    facts = machine_facts(torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    report("A base in fp8; loss in nats per token", rows, COLUMNS, settings, facts, options.json)


class Measured:
    """What one way to compute the checkpoint gives.

    Attributes:
        signs: which gates of some tokens are positive, bool ``[L, T, F]``.
        counts, neurons: of the training text.
        losses: nats per token of each language's test text, and of all.
        tuned: loss of the target's test text after tuning.
    """

    def __init__(self, options, model: str, loading: Mapping[str, str]):
        loaded, tokenizer = load_model(model, device=options.device, **loading)
        text = test_text(options, loaded, tokenizer)
        self.signs = gate_signs(loaded, text, options.sign_rows)
        settings = CountingSettings(
            context_length=options.context_length, tokens_per_language=options.tokens, rule=options.rule
        )
        corpus = open_corpus(options.corpus, lines=options.train, languages=options.languages)
        self.counts = count_activations(loaded, tokenizer, corpus, settings)
        (self.rule,) = parse_rules(options.rule)
        self.neurons = select_neurons(self.counts, self.rule)
        self.losses = losses(loaded, text)

    def tune(self, options, model: str, loading: Mapping[str, str], folder: Path, neurons: NeuronSet) -> None:
        loaded, tokenizer = load_model(model, device=options.device, **loading)
        settings = TrainingSettings(
            context_length=options.context_length,
            rows_per_step=4,
            steps=options.steps,
            learning_rate=options.rate,
            save_every=options.steps,
        )
        tune_language(
            loaded,
            tokenizer,
            open_corpus(options.corpus, lines=options.train, languages=[options.target]),
            SubnetworkConfig(neurons=neurons, language=options.target),
            folder,
            settings,
        )
        self.tuned = losses(loaded, test_text(options, loaded, tokenizer))[options.target]


def train_small(options, folder: Path) -> str:
    """A Llama like the demo's, trained for fewer steps, in a folder."""
    corpus = open_corpus(options.corpus, lines=options.train, languages=options.languages)
    documents = {}
    for language in options.languages:
        share = TARGET_SHARE if language in TARGETS else 1.0
        documents[language] = list(corpus.documents(language))[: int(share * TRAIN_DOCUMENTS)]
    steps = {"steps": options.base_steps, "save_every": options.base_steps}
    settings = TrainingSettings(**{**vars(BASE_SETTINGS), **steps})
    train_base_model(documents, folder / "base", SIZE, settings, folder / "base.checkpoints")
    return str(folder / "base")


def test_text(options, model: nn.Module, tokenizer) -> EvaluationText:
    corpus = open_corpus(options.corpus, lines=options.test, languages=options.languages)
    return prepare_text(model, tokenizer, corpus, context_length=options.context_length)


def losses(model: nn.Module, text: EvaluationText) -> dict[str, float]:
    """Nats per token by language, and of all tokens."""
    scores = score(model, text)
    total = sum(each.nats for each in scores.values()) / sum(each.tokens for each in scores.values())
    return {"all": total, **{language: each.nats / each.tokens for language, each in scores.items()}}


@torch.inference_mode()
def gate_signs(model: nn.Module, text: EvaluationText, rows: int) -> Tensor:
    """Which gates are positive for the tokens of rows spread over a text, bool ``[L, T, F]`` on the CPU."""
    signs = []

    def note(ffn):
        def hook(_module, _inputs, output: Tensor) -> None:
            signs.append((output[..., : ffn.neurons] > 0).flatten(0, -2).cpu())

        return hook

    ffns = find_ffns(model)
    # The first projection is the gate, alone or in front of up.
    handles = [next(iter(ffn.projections.values())).register_forward_hook(note(ffn)) for ffn in ffns]
    ids = text.packed.input_ids
    chosen = ids[:: max(1, len(ids) // rows)][:rows]
    for row in chosen:
        model(input_ids=row[None].to(ffns[0].device), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(signs[layer :: len(ffns)]) for layer in range(len(ffns))])


def row_of(name: str, measured: Measured, baseline: Measured, target: str) -> dict[str, Any]:
    changed = (measured.signs != baseline.signs).double().mean((1, 2))
    agreement = jaccard(measured.neurons, baseline.neurons)
    halves = {language: each["jaccard"] for language, each in measure_stability(measured.counts, measured.rule).items()}
    return {
        "name": name,
        "signs_changed": float(changed.mean()),
        "signs_changed_by_layer": changed.tolist(),
        "tokens_compared": measured.signs.shape[1],
        "jaccard_mean": mean(agreement.values()),
        "jaccard_least": min(each for each in agreement.values() if each is not None),
        "jaccard": agreement,
        "jaccard_of_halves_mean": mean(halves.values()),
        "jaccard_of_halves": halves,
        "neurons": measured.neurons.union_count(),
        "loss": measured.losses["all"],
        "loss_change": measured.losses["all"] - baseline.losses["all"],
        "losses": measured.losses,
        "language_loss": measured.losses[target],
        "tuned_loss": measured.tuned,
    }


def jaccard(first: NeuronSet, second: NeuronSet) -> dict[str, float | None]:
    """Shared neurons over all that either selects, by language; None where neither selects any."""
    result = {}
    for language in first.languages:
        pair = first.flat(language).numpy(), second.flat(language).numpy()
        total = len(np.union1d(*pair))
        result[language] = len(np.intersect1d(*pair)) / total if total else None
    return result


def mean(values: Sequence[float | None]) -> float:
    return fmean(value for value in values if value is not None)


if __name__ == "__main__":
    main()
