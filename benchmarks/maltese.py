"""The main job on real text: train a small base, identify 123 languages, tune Maltese, compare with random neurons.

    python -m benchmarks.maltese --corpus DIR --workspace DIR --json FILE

DIR holds line-aligned text named by language code; lines 1-1597 train and count, 1598-1797 choose the learning rate,
1798-1997 are measured. The base sees 20 languages, Maltese a quarter as much as the others. Takes about 40 minutes on
2 cores; every stage is kept in the workspace, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.measure import machine_facts
from lape_fast.files import read_json, write_json
from lape_fast.identify import CountingSettings, identify_neurons, parse_rules, select_neurons
from lape_fast.models import load_model
from lape_fast.study import ablate_neurons, prepare_text, score
from lape_fast.text import open_corpus
from lape_fast.tune import BaseSize, SubnetworkConfig, TrainingSettings, load_adapter, train_base_model, tune_language

TARGET = "mlt_Latn"
# fmt: off
BASE_LANGUAGES = (
    "mlt_Latn", "afr_Latn", "isl_Latn", "cym_Latn", "mkd_Cyrl", "lvs_Latn", "lit_Latn", "slv_Latn", "slk_Latn",
    "est_Latn", "kat_Geor", "npi_Deva", "eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn", "rus_Cyrl", "fin_Latn",
    "tur_Latn", "arb_Arab",
)
# fmt: on
TRAIN_LINES, VALIDATION_LINES, TEST_LINES = "1-1597", "1598-1797", "1798-1997"
TARGET_DOCUMENTS, OTHER_DOCUMENTS = 400, 1597

SIZE = BaseSize(hidden_size=192, neurons_per_layer=768, layers=4, heads=4, vocabulary=6000)
BASE_SETTINGS = TrainingSettings(context_length=256, rows_per_step=12, steps=1500, learning_rate=3e-3, save_every=250)
TUNE_STEPS, LEARNING_RATES, RANDOM_SEEDS = 80, (3e-4, 1e-3, 3e-3, 1e-2), (0, 1, 2)
TOKENS_PER_LANGUAGE = 20_000
RULES = {
    "paper": "paper",
    "loose": "lape:top_rate=0.2,filter_rate=0.8,activation_bar=0.8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="folder of line-aligned text")
    parser.add_argument("--workspace", type=Path, default=Path("build/maltese"), help="where the stages are kept")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    options = parser.parse_args()
    write_json(options.json, run(aligned(options.corpus, options.workspace), options.workspace))


def aligned(corpus: str, workspace: Path) -> str:
    """A folder of links to the files of ``corpus`` itself: those in its subfolders are not aligned."""
    folder = workspace / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(corpus).resolve().glob("*.txt")):
        link = folder / path.name
        if not link.is_symlink():
            link.symlink_to(path)
    return str(folder)


def run(corpus: str, workspace: Path) -> dict:
    """All stages; returns the figures."""
    figures = {"machine": machine_facts(torch.device("cpu")), "base": train_base(corpus, workspace)}
    model, tokenizer = load_model(workspace / "base", device="cpu")

    counts, neurons = identify_neurons(
        model,
        tokenizer,
        open_corpus(corpus, lines=TRAIN_LINES),
        workspace / "identify",
        CountingSettings(context_length=256, tokens_per_language=TOKENS_PER_LANGUAGE, rule=RULES["loose"]),
    )
    known = counts.restrict(BASE_LANGUAGES)
    selections = {
        "all languages, loose": neurons,
        "all languages, paper": select_neurons(counts, *parse_rules(RULES["paper"])),
        "base languages, loose": select_neurons(known, *parse_rules(RULES["loose"])),
        "base languages, paper": select_neurons(known, *parse_rules(RULES["paper"])),
    }
    figures["identify"] = {
        "languages": len(counts.languages),
        "tokens": int(counts.tokens.sum()),
        "neurons": {
            name: {language: chosen.count(language) for language in BASE_LANGUAGES}
            for name, chosen in selections.items()
        },
    }
    chosen = selections["base languages, loose"]
    test = prepare_text(
        model, tokenizer, open_corpus(corpus, lines=TEST_LINES, languages=BASE_LANGUAGES), context_length=256
    )
    ablation = workspace / "ablation.json"
    if not ablation.exists():
        write_json(ablation, ablate_neurons(model, chosen, test).to_json())
    figures["ablation"] = read_json(ablation)
    before = bits(score(model, test))
    figures["before"] = before
    figures["tuning"] = {
        "subnetwork": tune_best(corpus, workspace, chosen, test, before, "subnetwork", seed=0),
        **{
            f"random, seed {seed}": tune_best(corpus, workspace, chosen, test, before, "random", seed)
            for seed in RANDOM_SEEDS
        },
    }
    return figures


def train_base(corpus: str, workspace: Path) -> dict:
    """The base and the report of its training."""
    path, report = workspace / "base", workspace / "base-training.json"
    if not path.exists():
        opened = open_corpus(corpus, lines=TRAIN_LINES, languages=BASE_LANGUAGES)
        documents = {
            language: list(opened.documents(language))[: TARGET_DOCUMENTS if language == TARGET else OTHER_DOCUMENTS]
            for language in BASE_LANGUAGES
        }
        write_json(report, train_base_model(documents, path, SIZE, BASE_SETTINGS, workspace / "base.checkpoints"))
        shutil.rmtree(workspace / "base.checkpoints")
    return read_json(report)


def tune_best(corpus: str, workspace: Path, neurons, test, before, method: str, seed: int) -> dict:
    """Tunes with each learning rate and measures the one that is best on the validation lines."""
    runs = {}
    for rate in LEARNING_RATES:
        folder = workspace / f"adapter-{method}-{seed}-{rate:g}"
        if not folder.exists():
            model, tokenizer = load_model(workspace / "base", device="cpu")
            settings = TrainingSettings(
                context_length=256, rows_per_step=12, steps=TUNE_STEPS, learning_rate=rate, evaluate_every=20
            )
            tune_language(
                model,
                tokenizer,
                open_corpus(corpus, lines=TRAIN_LINES, languages=[TARGET]),
                SubnetworkConfig(neurons=neurons, language=TARGET, method=method, seed=seed),
                folder,
                settings,
                open_corpus(corpus, lines=VALIDATION_LINES, languages=[TARGET]),
            )
        log = read_json(folder / "training.json")["log"]
        runs[rate] = min(entry["eval_loss"] for entry in log if "eval_loss" in entry)
    best = min(runs, key=runs.get)
    model, _ = load_model(workspace / "base", device="cpu")
    subnetwork = load_adapter(model, workspace / f"adapter-{method}-{seed}-{best:g}")
    after = bits(score(model, test))
    others = [after[language] - before[language] for language in before if language != TARGET]
    return {
        "learning_rate": best,
        "validation_loss_by_learning_rate": {f"{rate:g}": loss for rate, loss in runs.items()},
        "neurons": sum(len(indices) for indices in subnetwork.neurons().values()),
        "trainable": subnetwork.trainable(),
        "after": after,
        "target_change": after[TARGET] - before[TARGET],
        "others_mean_change": fmean(others),
    }


def bits(scores) -> dict[str, float]:
    """Bits per byte per language."""
    return {language: score.bits_per_byte for language, score in scores.items()}


if __name__ == "__main__":
    main()
