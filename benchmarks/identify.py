"""Identification from text to counts: how close it comes to a forward pass that has nothing else to do.

    stock-body          the model without its head, token ids ready in memory, nothing counted
    boolean-hook-full   the whole model with its head; a hook on each gate projection sums (gate > 0)
    published-full      the whole model with its head, each FFN with the published scripts' operations
    ours                count_activations: reading, tokenising and packing included

All see the same rows: the batches that ours makes of the text, several languages in a row. The peers' sums do not tell
the languages apart, which favours them. Before anything is timed, the counts are checked.

The head's share of the model decides what leaving it out brings; the default vocabulary gives it that of Llama 3.2 1B.

Memory is counted rather than timed: the live bytes of a whole run of a small model, also over ten times the text.

    python -m benchmarks.identify --json FILE
"""

from __future__ import annotations

import functools
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.count_overhead import hook_gates, install_published
from benchmarks.llama import build_llama, option_parser, prepare, settings, share
from benchmarks.measure import LiveBytes, interleave, machine_facts, report, timed_rows
from lape_fast.identify import CountingSettings, count_activations
from lape_fast.identify.chunks import queues, read_groups
from lape_fast.identify.counting_ffn import zero_counts
from lape_fast.models import find_ffns, forward_hidden
from lape_fast.progress import progress_bar
from lape_fast.text import Corpus, Packed, open_corpus, pack_for_model
from lape_fast.tune.base_model import train_tokenizer

LANGUAGES = ("amh_Ethi", "cym_Latn", "kat_Geor", "mlt_Latn")
VOCABULARY_OF_TEXT = 8000
PEERS = ("stock-body", "boolean-hook-full", "published-full", "ours")
# What memory is counted with; it depends on sizes and not on speed.
SMALL = {"hidden": 256, "neurons": 1024, "layers": 4}
COLUMNS = {
    "seconds": lambda row: f"{row['step_ms'] / 1000:,.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "x stock-body": lambda row: f"{row['speed_over_stock_body']:.3f}",
    "95 %": lambda row: "{:.3f}–{:.3f}".format(*row["speed_ci"]),
}


def write_text(folder: Path, documents: int) -> Corpus:
    """As many documents of the built-in text for each language, in one file each."""
    folder.mkdir()
    for language in LANGUAGES:
        texts = open_corpus("cldr", lines=f"1-{documents}").documents(language)
        (folder / f"{language}.txt").write_text("\n".join(texts), encoding="utf-8")
    return open_corpus(folder)


def batches_of(model: nn.Module, tokenizer, corpus: Corpus, plan: CountingSettings) -> list[Packed]:
    """The batches that ours runs, in its order."""
    pack = functools.partial(pack_for_model, model, tokenizer, context_length=plan.context_length)
    targets = {str(shard): float("inf") for queue in queues(corpus.languages, 1) for shard in queue}
    return [
        batch
        for queue in queues(corpus.languages, 1)
        for group in read_groups(pack, tokenizer, corpus, plan, queue, {}, targets)
        for batch in group.packed.batches(plan.batch_tokens)
    ]


def run_batches(forward: Callable[[Packed], Any], batches: Sequence[Packed]) -> None:
    """Everything that a peer does in a round."""
    with torch.inference_mode():
        for batch in batches:
            forward(batch)


def run_body(model: nn.Module, batch: Packed) -> Tensor:
    """The decoder without the head."""
    return forward_hidden(model, batch.input_ids, batch.position_ids)


def run_full(model: nn.Module, batch: Packed) -> Tensor:
    """The whole model, head included."""
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


def measure_memory(options: Namespace, tokenizer, plan: CountingSettings, folder: Path) -> dict[str, Any]:
    """The peaks of live bytes: of the stock body, and of counting one and ten times the text, all in one process."""
    model = build_llama(Namespace(**{**vars(options), **SMALL, "device": "cpu"})).eval()
    peaks: dict[str, Any] = {"model": SMALL}
    for times in (1, 10):
        corpus = write_text(folder / f"{times}x", times * options.documents)
        batches = batches_of(model, tokenizer, corpus, plan)
        with LiveBytes() as live:
            run_batches(functools.partial(run_body, model), batches)
        peaks[f"stock_body_{times}x"] = live.peak
        with LiveBytes() as live:
            counts = count_activations(model, tokenizer, corpus, plan, workers=0)
        peaks[f"ours_{times}x"] = live.peak
        peaks[f"tokens_{times}x"] = int(counts.tokens.sum())
    ffn = find_ffns(model)[0]
    peaks["counts"] = zero_counts(model, 2 * len(LANGUAGES)).nbytes
    peaks["one_activation"] = plan.batch_tokens * ffn.neurons * ffn.gate_weight.element_size()
    return peaks


def check_counts(corpus: Corpus, counts: Any, sums: dict[str, Tensor], batches: Sequence[Packed]) -> None:
    """Stops unless ours has counted all tokens, and the peers, which count padding and prefixes too, all places."""
    counted = sum(int((batch.language_ids >= 0).sum()) for batch in batches)
    if int(counts.tokens.sum()) != counted or counts.languages != corpus.languages:
        sys.exit(f"Ours counted {int(counts.tokens.sum())} tokens of {counted}: speed of a wrong answer is nothing.")
    if not torch.equal(sums["boolean-hook-full"], sums["published-full"].long()):
        sys.exit("The peers' counts differ: the speed of a wrong answer is worth nothing.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser(__doc__, rounds=9)
    parser.add_argument("--documents", type=int, default=60, help="documents of each of the four languages")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens per forward pass")
    parser.set_defaults(tokens=512, vocabulary=28_672)
    options = parser.parse_args(arguments)
    device = prepare(options)
    facts = machine_facts(device)
    base = build_llama(options).eval()
    plan = CountingSettings(context_length=options.tokens, batch_tokens=options.batch_tokens)
    with tempfile.TemporaryDirectory() as temporary:
        corpus = write_text(Path(temporary) / "texts", options.documents)
        documents = [text for language in LANGUAGES for text in corpus.documents(language)]
        tokenizer = train_tokenizer(documents, min(VOCABULARY_OF_TEXT, options.vocabulary))
        rows = measure_speed(options, base, tokenizer, corpus, plan, device)
        memory = measure_memory(options, tokenizer, plan, Path(temporary))
    report(
        __doc__.partition("\n")[0],
        rows,
        COLUMNS,
        {**settings(options), "head_share": head_share(base), "memory_bytes": memory},
        facts,
        options.json,
    )


def measure_speed(
    options: Namespace, base: nn.Module, tokenizer, corpus: Corpus, plan: CountingSettings, device: torch.device
) -> list[dict[str, Any]]:
    """A row per peer."""
    models = {name: share(base) for name in PEERS}
    batches = [
        Packed(*(part.to(device) for part in vars(batch).values()))
        for batch in batches_of(base, tokenizer, corpus, plan)
    ]
    tokens = sum(int((batch.language_ids >= 0).sum()) for batch in batches)
    sums = {
        name: torch.zeros(options.layers, options.neurons, dtype=dtype, device=device)
        for name, dtype in (("boolean-hook-full", torch.int64), ("published-full", torch.int32))
    }
    hook_gates(find_ffns(models["boolean-hook-full"]), sums["boolean-hook-full"])
    install_published(models["published-full"], sums["published-full"])
    steps: dict[str, Callable[[], Any]] = {
        "stock-body": functools.partial(run_batches, functools.partial(run_body, models["stock-body"]), batches)
    }
    for name in ("boolean-hook-full", "published-full"):
        steps[name] = functools.partial(run_batches, functools.partial(run_full, models[name]), batches)
    steps["ours"] = functools.partial(count_activations, models["ours"], tokenizer, corpus, plan)
    for name in PEERS[:3]:
        steps[name]()
    check_counts(corpus, steps["ours"](), sums, batches)
    with progress_bar("identify", options.rounds * len(PEERS)) as advance:
        times = interleave(steps, options.rounds, device, functools.partial(advance, 1, tokens))
    rows = timed_rows(times, "stock-body")
    for row in rows:
        row["tokens_per_s"] = 1000 * tokens / row["step_ms"]
        row["speed_over_stock_body"] = 1 / row["ratio_to_stock-body"]
        row["speed_ci"] = [1 / bound for bound in reversed(row["ratio_ci"])]
    return rows


def head_share(model: nn.Module) -> float:
    """The head's weights over those that a forward pass without it multiplies by."""
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    return model.lm_head.weight.numel() / layers


if __name__ == "__main__":
    main()
