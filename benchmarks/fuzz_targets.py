"""What the fuzzer reads: one whole file of each kind that lape_fast takes from strangers, and what reads it.

A target's ``seeds`` are whole files, ``read`` takes the path of a changed one, and everything around it is as it should
be. Everything is made offline in a second.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import torch
import typer
from pyarrow import parquet

from benchmarks.fuzz_reports import REPORTS
from benchmarks.fuzz_sources import LANGUAGES, LAYERS, NEURONS, Sources, Target, make_sources
from lape_fast.cli import app
from lape_fast.identify import (
    ActivationCounts,
    CountingSettings,
    NeuronSet,
    count_activations,
    export_masks,
    import_masks,
    merge_files,
    publish_release,
)
from lape_fast.information import describe_file, match_ablations
from lape_fast.study import AblationMatrix, read_recipe
from lape_fast.text import open_corpus
from lape_fast.tune import attach_subnetwork, dense, load_adapter
from lape_fast.tune.adapter import CONFIG_NAME, TENSORS_NAME, write_adapter
from lape_fast.tune.training import SETTINGS_NAME, TrainingSettings, pack_documents, train

TEXT = "Il-qattus qagħad fuq it-tapit.\r\n\n  Bonġu, dinja!  \nმშვიდობა 日本語 שלום\n<bos> is text.\n"
RECORDS = "".join(json.dumps({"id": number, "text": line}) + "\n" for number, line in enumerate(TEXT.splitlines()))

OPTIONS = """\
# A recipe.
rule: [lape:top_rate=0.05, "percentile"]
min-tokens: 1_000
languages: mlt_Latn, cym_Latn
"""


def make_targets(folder: Path, names: Sequence[str] = ()) -> dict[str, Target]:
    """The targets by name, with all that they need below a folder; only some of them where names are given."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = names or list(MAKERS)
    return {name: MAKERS[name](folder / name, make_sources(folder)) for name in wanted}


def _counts(folder: Path, sources: Sources) -> Target:
    def read(path: Path) -> None:
        counts = ActivationCounts.load(path)
        json.dumps(counts.summary())
        counts.fingerprint()
        if counts.first_half_positive is not None:
            counts.halves()

    return Target("counts.safetensors", "safetensors", [sources.counts_path.read_bytes()], read, folder)


def _merge(folder: Path, sources: Sources) -> Target:
    other = folder.parent / "other.safetensors"
    metadata = {**sources.counts.metadata, "part": 2}
    metadata["shards"] = {
        code: [{**shards[0], "shard": [1], "shards": 2}] for code, shards in metadata["shards"].items()
    }
    ActivationCounts(sources.counts.positive, sources.counts.tokens, LANGUAGES, metadata).save(other)
    return Target(
        "counts.safetensors",
        "safetensors",
        [sources.counts_path.read_bytes()],
        lambda path: merge_files([path, other]),
        folder,
    )


def _neurons(folder: Path, sources: Sources) -> Target:
    def read(path: Path) -> None:
        describe_file(path)
        repr(NeuronSet.load(path))

    return Target("neurons.safetensors", "safetensors", [sources.neurons_path.read_bytes()], read, folder)


def _mask(folder: Path, sources: Sources) -> Target:
    folder.mkdir(parents=True, exist_ok=True)
    export_masks(sources.neurons, folder / "seed.pth")
    lists = [[layer.int() for layer in sources.neurons[code]] for code in LANGUAGES]
    old = io.BytesIO()
    torch.save(lists, old, _use_new_zipfile_serialization=False)
    seeds = [(folder / "seed.pth").read_bytes(), old.getvalue()]
    return Target("mask.pth", "zip", seeds, lambda path: import_masks(path, LANGUAGES, NEURONS), folder)


def _released(folder: Path, sources: Sources) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    publish_release(folder, sources.counts_path, [sources.neurons_path])
    return folder


def _release_index(folder: Path, sources: Sources) -> Target:
    release = _released(folder / "release", sources)
    seed = (release / "release.json").read_bytes()
    return Target("release.json", "json", [seed], lambda path: NeuronSet.from_pretrained(path.parent), release)


def _release_neurons(folder: Path, sources: Sources) -> Target:
    release = _released(folder / "release", sources)
    return Target(
        "neurons.safetensors",
        "safetensors",
        [sources.neurons_path.read_bytes()],
        lambda path: NeuronSet.from_pretrained(release, rule="lape-20"),
        release / "neurons" / "lape-20",
    )


def _publish(folder: Path, sources: Sources) -> Target:
    def read(path: Path) -> None:
        try:
            publish_release(folder / "out", path, [sources.neurons_path])
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)

    return Target("counts.safetensors", "safetensors", [sources.counts_path.read_bytes()], read, folder)


def _ablation(folder: Path, sources: Sources) -> Target:
    def read(path: Path) -> None:
        match_ablations({"neurons": sources.neurons}, beside=[path])
        matrix = AblationMatrix.load(path)
        matrix.to_json()
        matrix.save_csv(path.with_suffix(".csv"))

    seed = json.dumps(sources.ablation).encode()
    return Target("ablation.json", "json", [seed], read, folder)


def _published_ablation(folder: Path, sources: Sources) -> Target:
    def read(path: Path) -> None:
        try:
            publish_release(folder / "out", sources.counts_path, [sources.neurons_path], [path])
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)

    return Target("ablation.json", "json", [json.dumps(sources.ablation).encode()], read, folder)


def _tiny_model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def _adapter(name: str, structure: str) -> Callable[[Path, Sources], Target]:
    def make(folder: Path, sources: Sources) -> Target:
        model = _tiny_model()
        folder.mkdir(parents=True, exist_ok=True)
        subnetwork = attach_subnetwork(model, sources.neurons["mlt_Latn"])
        config = {
            "peft_type": "SUBNETWORK",
            "language": "mlt_Latn",
            "neurons": [" ".join(map(str, layer.tolist())) for layer in sources.neurons["mlt_Latn"]],
        }
        write_adapter(subnetwork, folder, config)
        subnetwork.detach(keep=False)

        def read(path: Path) -> None:
            describe_file(folder)
            load_adapter(model, folder).detach(keep=False)

        return Target(name, structure, [(folder / name).read_bytes()], read, folder)

    return make


def _dense(name: str, structure: str) -> Callable[[Path, Sources], Target]:
    def make(folder: Path, sources: Sources) -> Target:
        model = _tiny_model()
        folder.mkdir(parents=True, exist_ok=True)
        values = {path: model.get_parameter(path).data.clone() + 1 for path in dense.projection_names(model)}
        adapter = dense.DenseWeights(model, values)
        adapter.write(folder, {"method": "ffn", "language": "mlt_Latn"})
        adapter.detach(keep=False)

        def read(path: Path) -> None:
            describe_file(folder)
            load_adapter(model, folder).detach(keep=False)

        return Target(name, structure, [(folder / name).read_bytes()], read, folder)

    return make


def _recipe(folder: Path, sources: Sources) -> Target:
    recipes = Path(__file__).parents[1] / "recipes"
    seeds = [(recipes / name).read_bytes() for name in ("quick.yaml", "paper-llama-3.1-8b.yaml")]
    return Target("recipe.yaml", "bytes", seeds, lambda path: read_recipe(path).to_json(), folder)


def _options(folder: Path, sources: Sources) -> Target:
    command = typer.main.get_command(app).commands["select"]

    def read(path: Path) -> None:
        try:
            command.make_context("select", ["counts.safetensors", "--output", "out", "--config", str(path)])
        except typer.BadParameter as error:
            # A sentence of typer's, with the option and its value.
            str(error)

    return Target("recipe.yaml", "bytes", [OPTIONS.encode(), b"min-tokens: 5\n"], read, folder)


def _corpus(suffix: str, structure: str, seeds: Sequence[bytes]) -> Callable[[Path, Sources], Target]:
    def read(path: Path) -> None:
        stream = open_corpus(path).stream("mlt_Latn", seed=0, shards=2)
        for text in stream:
            text.encode()
        stream.restore(stream.state())

    def make(folder: Path, sources: Sources) -> Target:
        return Target(f"mlt_Latn{suffix}", structure, seeds, read, folder)

    return make


def _parquet_seeds() -> list[bytes]:
    table = pyarrow.table({"id": list(range(40)), "text": [f"{line} Bonġu" for line in range(39)] + [None]})
    seeds = []
    for options in ({"compression": "zstd"}, {"compression": "none", "use_dictionary": False}):
        target = io.BytesIO()
        parquet.write_table(table, target, **options)
        seeds.append(target.getvalue())
    return seeds


def _checkpoint(folder: Path, sources: Sources) -> Target:
    model, tokenizer = _tiny_model(), _tiny_tokenizer()
    texts, saved = folder / "texts", folder / "run"
    texts.mkdir(parents=True, exist_ok=True)
    saved.mkdir(exist_ok=True)
    for code in LANGUAGES:
        (texts / f"{code}.txt").write_text(TEXT, encoding="utf-8")
    corpus = open_corpus(texts)
    settings = CountingSettings(context_length=32, batch_tokens=32)
    count_activations(model, tokenizer, corpus, settings, checkpoint=saved, checkpoint_seconds=0, workers=0)
    (name,) = (path.name for path in saved.glob("*.safetensors"))
    seed = (saved / name).read_bytes()

    def read(path: Path) -> None:
        count_activations(model, tokenizer, corpus, settings, checkpoint=saved, workers=0)

    return Target(name, "safetensors", [seed], read, saved)


def _tuning_checkpoint(name: str, structure: str) -> Callable[[Path, Sources], Target]:
    def make(folder: Path, sources: Sources) -> Target:
        model, run = _tiny_model(), folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        attach_subnetwork(model, sources.neurons["mlt_Latn"])
        rows = pack_documents(model, _tiny_tokenizer(), TEXT.splitlines() * 3, 16)
        settings = TrainingSettings(context_length=16, rows_per_step=1, steps=2, save_every=1)
        train(model, rows, run, settings)
        # A step is left to do.
        shutil.rmtree(run / "checkpoint-2")
        checkpoint = run / "checkpoint-1"
        kept = folder / "kept"
        shutil.copytree(run, kept, dirs_exist_ok=True)
        place = run if name == SETTINGS_NAME else checkpoint

        def read(path: Path) -> None:
            data = path.read_bytes()
            shutil.rmtree(run)
            shutil.copytree(kept, run)
            path.write_bytes(data)
            train(model, rows, run, settings)

        return Target(name, structure, [(place / name).read_bytes()], read, place)

    return make


MAKERS: dict[str, Callable[[Path, Sources], Target]] = {
    "counts": _counts,
    "merged counts": _merge,
    "neurons": _neurons,
    "mask": _mask,
    "release index": _release_index,
    "release neurons": _release_neurons,
    "published counts": _publish,
    "ablation": _ablation,
    "published ablation": _published_ablation,
    "adapter config": _adapter(CONFIG_NAME, "json"),
    "adapter tensors": _adapter(TENSORS_NAME, "safetensors"),
    "dense config": _dense(dense.CONFIG_NAME, "json"),
    "dense tensors": _dense(dense.TENSORS_NAME, "safetensors"),
    "options": _options,
    "text": _corpus(".txt", "bytes", [TEXT.encode()]),
    "jsonl": _corpus(".jsonl", "bytes", [RECORDS.encode()]),
    "text gz": _corpus(".txt.gz", "gzip", [gzip.compress(TEXT.encode())]),
    "jsonl zst": _corpus(".jsonl.zst", "zstd", [pyarrow.compress(RECORDS.encode(), "zstd", asbytes=True)]),
    "parquet": _corpus(".parquet", "bytes", _parquet_seeds()),
    "recipe": _recipe,
    "counting checkpoint": _checkpoint,
    "tuning settings": _tuning_checkpoint(SETTINGS_NAME, "json"),
    "tuning state": _tuning_checkpoint("trainer_state.json", "json"),
    "tuning optimizer": _tuning_checkpoint("optimizer.pt", "zip"),
    "tuning rng": _tuning_checkpoint("rng_state.pth", "zip"),
    **REPORTS,
}

# How many inputs a target gets, beside 1: more where strangers' files are read, fewer where each takes long.
SHARES = {
    "counts": 2.0,
    "neurons": 2.0,
    "mask": 2.0,
    "release index": 2.0,
    "ablation": 2.0,
    "adapter config": 0.5,
    "adapter tensors": 0.5,
    "dense config": 0.2,
    "dense tensors": 0.2,
    "published counts": 0.2,
    "published ablation": 0.2,
    "counting checkpoint": 0.2,
    "tuning settings": 0.01,
    "tuning state": 0.01,
    "tuning optimizer": 0.01,
    "tuning rng": 0.01,
    "atlas neurons": 0.1,
    "atlas counts": 0.1,
    "study results": 0.01,
}
