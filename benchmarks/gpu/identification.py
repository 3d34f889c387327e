"""What counting costs on the real sizes, and how fast text becomes counts.

Count overhead: forward passes without the head over random token ids, in rows of at most 4,096, interleaved.

    stock           transformers' own FFN, nothing counted
    boolean-hook    a forward hook on each gate projection sums (gate > 0)
    published       the published scripts' operations on this model
    uncounted       our fused op in every layer, nothing counted: what ours is compared with
    ours            the same, counting
    ours-identify   the same as `lape-fast identify` runs it, without the last up and down projections and final norm

The peers' counts do not tell languages apart, which favours them. Identification: `count_activations` from text on the
disk to counts, beside forward passes over the same batches ready in memory:

    body            the model without its head, nothing counted
    hooks           transformers with hooks on its gates, and with its logits
    ours-ready      counting the batches that are ready in memory
    ours            everything included: reading, tokenising, packing

The roofline is what a device reaches that runs nothing but the products that counting needs at the speed of the 8192^3
product measured here: ceiling / (2 * (L * W - 2 * D * F) + 2 * S * H * L) tokens per second, with W the weights of a
layer's projections, of which the last layer needs neither up nor down, S the length of the documents, and H the width
of all query heads: a token attends to S / 2 others on average, 2 operations each for its scores and for its values.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.count_overhead import hook_gates, install_published
from benchmarks.gpu.kernels import PRODUCT, measure_product
from benchmarks.gpu.shapes import SIZES, Shape, build_model
from benchmarks.gpu.stage import Stage
from benchmarks.identify import batches_of, run_batches, run_body, run_full
from benchmarks.llama import share
from benchmarks.measure import interleave, timed_rows
from lape_fast.identify import CountingSettings, count_activations, count_batch, counting_ffns
from lape_fast.identify.counting_ffn import by_language, zero_counts
from lape_fast.models import FFN, find_ffns, forward_hidden
from lape_fast.ops import gated_activation
from lape_fast.text import Corpus, Packed, open_corpus
from lape_fast.tune.base_model import train_tokenizer

DTYPE = torch.bfloat16
WARM_UP = 2

# By --size: tokens per pass with the rounds that are timed, the longest row, and what the text is made of.
PASSES = {"true": {4096: 25, 2048: 25, 16384: 7}, "toy": {32: 2, 16: 2, 64: 2}}
ROW = {"true": 4096, "toy": 32}
# Of each of the text's languages.
TEXT_TOKENS = {"true": 65536, "toy": 200}
BATCH_TOKENS = {"true": 16384, "toy": 64}
TEXT_ROUNDS = {"true": 5, "toy": 2}
SHORT_DOCUMENT = {"true": 512, "toy": 8}

PACKED_LANGUAGES = 16
TEXT_LANGUAGES = ("cym_Latn", "est_Latn", "isl_Latn", "mlt_Latn")


def run(stage: Stage, options: argparse.Namespace) -> None:
    """A row per model, tokens and languages, in the order of what matters most."""
    size, device = options.size, stage.device
    product = stage.measure(
        f"product {PRODUCT[size]}^3", functools.partial(measure_product, device, size, *[PRODUCT[size]] * 3)
    )
    models = Models(device)
    small, large = SIZES[size]
    long_row, *other_rows = PASSES[size]

    def overhead(shape: Shape, tokens: int, languages: int) -> None:
        stage.measure(
            f"count overhead, {shape.name}, {tokens} tokens, {languages} languages",
            functools.partial(measure_overhead, models, shape, size, tokens, languages),
            **describe(shape),
            tokens=tokens,
            languages=languages,
        )

    def identify(shape: Shape, document: int) -> None:
        stage.measure(
            f"identification, {shape.name}, documents of {document} tokens",
            functools.partial(
                measure_identification, models, shape, size, document, product and product["flops_per_s"]
            ),
            **describe(shape),
            context_length=ROW[size],
            batch_tokens=BATCH_TOKENS[size],
        )

    for shape in (small, large):
        for languages in (1, PACKED_LANGUAGES):
            overhead(shape, long_row, languages)
        identify(shape, ROW[size])
        if shape is small:
            identify(shape, SHORT_DOCUMENT[size])
        for tokens in other_rows:
            for languages in (1, PACKED_LANGUAGES):
                overhead(shape, tokens, languages)


def describe(shape: Shape) -> dict[str, Any]:
    """The labels of a model."""
    return {
        "model": shape.name,
        "hidden": shape.hidden,
        "neurons": shape.neurons,
        "layers": shape.layers,
        "vocabulary": shape.vocabulary,
        "dtype": str(DTYPE).removeprefix("torch."),
    }


class Models:
    """The model that is measured, built when a measure first asks for it; only one at a time is held."""

    def __init__(self, device: torch.device):
        self.device = device
        self._shape: Shape | None = None
        self._model: nn.Module | None = None

    def get(self, shape: Shape) -> nn.Module:
        """The model of a shape."""
        if shape is not self._shape:
            # First let go of the other, for which there may be no room beside this one.
            self._shape = self._model = None
            self._model = build_model(shape, self.device, DTYPE)
            self._shape = shape
        return self._model


class UncountedFFN(nn.Module):
    """An FFN through the fused op, as the counting one but for the counts."""

    def __init__(self, ffn: FFN):
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        gate, up = self.ffn.project(x)
        return self.ffn.project_down(gated_activation(gate, up, self.ffn.activation))


def draw_batch(shape: Shape, tokens: int, row: int, languages: int, device: torch.device) -> Packed:
    """Rows of random token ids, one document each; the languages have equal runs of neighbouring tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, tokens // row)
    input_ids = torch.randint(shape.vocabulary, (rows, tokens // rows), generator=generator)
    position_ids = torch.arange(tokens // rows).expand(rows, -1)
    language_ids = (torch.arange(rows * (tokens // rows)) * languages // tokens).int().view_as(input_ids)
    return Packed(*(part.to(device) for part in (input_ids, position_ids, language_ids)))


@contextlib.contextmanager
def overhead_steps(base: nn.Module, batch: Packed, languages: int) -> Iterator[dict[str, Callable[[], Any]]]:
    """The peers by name, ready to run and checked: all that count have counted the same gates alike."""
    ffns = find_ffns(base)
    layers, width = len(ffns), ffns[0].neurons
    device = batch.input_ids.device
    names = ("stock", "boolean-hook", "published", "uncounted", "ours", "ours-identify")
    models = {name: share(base) for name in names}
    hooked = torch.zeros(layers, width, dtype=torch.int64, device=device)
    published = torch.zeros(layers, width, dtype=torch.int32, device=device)
    ours = torch.zeros(2, layers, 1, languages, width, dtype=torch.int64, device=device)
    hook_gates(find_ffns(models["boolean-hook"]), hooked)
    install_published(models["published"], published)
    for ffn in find_ffns(models["uncounted"]):
        ffn.replace(UncountedFFN(ffn))
    our_ffns = find_ffns(models["ours"])
    forward = torch.inference_mode()(forward_hidden)
    steps = {
        name: functools.partial(forward, model, batch.input_ids, batch.position_ids) for name, model in models.items()
    }
    with contextlib.ExitStack() as installed:
        for name, counts, skip_last in (("ours", ours[0], False), ("ours-identify", ours[1], True)):
            modules = installed.enter_context(counting_ffns(models[name], counts, skip_last=skip_last))
            steps[name] = functools.partial(count_batch, models[name], modules, batch)
        # The stock model and ours round h at different places, so ours is compared with a hook on its own gates.
        watched = torch.zeros_like(hooked)
        handles = hook_gates(our_ffns, watched)
        for step in steps.values():
            step()
        for handle in handles:
            handle.remove()
        require_counts("published", published, hooked)
        require_counts("ours", ours[0].sum((1, 2)), watched)
        require_counts("ours-identify", ours[1], ours[0])
        yield steps


def require_counts(name: str, found: Tensor, right: Tensor) -> None:
    """Raises unless the counts are equal: the speed of a wrong answer is worth nothing."""
    wrong = int((found != right).sum())
    assert wrong == 0, f"{wrong} of {found.numel()} counts of {name} are wrong."


def measure_overhead(models: Models, shape: Shape, size: str, tokens: int, languages: int) -> dict[str, Any]:
    """Medians and paired ratios: to "uncounted" what counting costs, and to "stock" what all that ours does costs."""
    batch = draw_batch(shape, tokens, ROW[size], languages, models.device)
    with overhead_steps(models.get(shape), batch, languages) as steps:
        interleave(steps, WARM_UP, models.device, lambda: None)
        times = interleave(steps, PASSES[size][tokens], models.device, lambda: None)
    peers = timed_rows(times, "uncounted")
    for row, over_stock in zip(peers, timed_rows(times, "stock"), strict=True):
        row |= {"ratio_to_stock": over_stock["ratio_to_stock"], "ratio_to_stock_ci": over_stock["ratio_ci"]}
        row["tokens_per_s"] = 1000 * batch.input_ids.numel() / row["step_ms"]
    ratios = {row["name"]: row for row in peers}
    added = ratios["ours"]["ratio_to_uncounted"] - 1
    over_stock = {name: f"{row['ratio_to_stock']:.3f}" for name, row in ratios.items()}
    result = {
        "peers": peers,
        "added_by_counting": added,
        "shown": f"counting adds {added:+.2%}; x stock: ours {over_stock['ours']}, as identify "
        f"{over_stock['ours-identify']}, hook {over_stock['boolean-hook']}, published {over_stock['published']}",
    }
    if tokens == next(iter(PASSES[size])):
        result["goals"] = {"count-overhead": added}
    return result


def write_texts(folder: Path, tokens: int, document: int) -> Corpus:
    """Random words of four languages, a file each, in documents of so many tokens.

    A tokenizer of enough pieces that is trained on them has one for each word; one more stands before each document.
    """
    draw = random.Random(0)
    for language in TEXT_LANGUAGES:
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 6))) for _ in range(1000)]
        texts = (" ".join(draw.choices(words, k=document - 1)) for _ in range(max(1, tokens // document)))
        (folder / f"{language}.txt").write_text("\n".join(texts), encoding="utf-8")
    return open_corpus(folder)


def measure_identification(
    models: Models, shape: Shape, size: str, document: int, ceiling: float | None
) -> dict[str, Any]:
    """Tokens per second of the peers, and their shares of the roofline."""
    device, base = models.device, models.get(shape)
    plan = CountingSettings(context_length=ROW[size], batch_tokens=BATCH_TOKENS[size])
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_texts(Path(folder), TEXT_TOKENS[size], document)
        texts = [text for language in TEXT_LANGUAGES for text in corpus.documents(language)]
        tokenizer = train_tokenizer(texts, min(8000, shape.vocabulary))
        batches = [
            Packed(*(part.to(device) for part in vars(batch).values()))
            for batch in batches_of(base, tokenizer, corpus, plan)
        ]
        with identification_steps(base, tokenizer, corpus, plan, batches) as (steps, tokens):
            times = interleave(steps, TEXT_ROUNDS[size], device, lambda: None)
    roofline = ceiling / operations_per_token(shape, document) if ceiling else None
    peers = timed_rows(times, "hooks")
    for row in peers:
        row["tokens_per_s"] = 1000 * tokens / row["step_ms"]
        row["faster_than_hooks"] = 1 / row["ratio_to_hooks"]
        if roofline:
            row["of_roofline"] = row["tokens_per_s"] / roofline
    ours = next(row for row in peers if row["name"] == "ours")
    shown = f"{ours['tokens_per_s']:,.0f} tokens/s, {ours['faster_than_hooks']:.2f} x hooks with logits"
    goals = {"identify-over-hooks": ours["faster_than_hooks"]}
    if roofline:
        shown += f", {ours['of_roofline']:.1%} of the roofline of {roofline:,.0f}"
        goals["identify-roofline"] = ours["of_roofline"]
    result = {"peers": peers, "tokens": tokens, "roofline_tokens_per_s": roofline, "mfu": ours.get("of_roofline")}
    is_goal = shape is SIZES[size][0] and document == ROW[size]
    return {**result, "shown": shown, **({"goals": goals} if is_goal else {})}


def operations_per_token(shape: Shape, document: int) -> int:
    """What counting cannot do without: see the top of this module."""
    weights = shape.layers * shape.layer_weights() - 2 * shape.hidden * shape.neurons
    return 2 * weights + 2 * document * shape.heads * shape.head_size * shape.layers


@contextlib.contextmanager
def identification_steps(
    base: nn.Module, tokenizer, corpus: Corpus, plan: CountingSettings, batches: Sequence[Packed]
) -> Iterator[tuple[dict[str, Callable[[], Any]], int]]:
    """The peers by name, run once and checked, and the number of tokens that each of them sees."""
    ffns = find_ffns(base)
    device = batches[0].input_ids.device
    models = {name: share(base) for name in ("body", "hooks", "ours-ready", "ours")}
    hooked = torch.zeros(len(ffns), ffns[0].neurons, dtype=torch.int64, device=device)
    hook_gates(find_ffns(models["hooks"]), hooked)
    # The batches number the two halves of each language's text.
    counts = zero_counts(models["ours-ready"], 2 * len(TEXT_LANGUAGES))
    with counting_ffns(models["ours-ready"], counts) as modules:
        steps: dict[str, Callable[[], Any]] = {
            "body": functools.partial(run_batches, functools.partial(run_body, models["body"]), batches),
            "hooks": functools.partial(run_batches, functools.partial(run_full, models["hooks"]), batches),
            "ours-ready": functools.partial(count_batches, models["ours-ready"], modules, batches),
            "ours": functools.partial(count_activations, models["ours"], tokenizer, corpus, plan),
        }
        results = {name: step() for name, step in steps.items()}
        tokens = sum(int((batch.language_ids >= 0).sum()) for batch in batches)
        require_counts("ours", results["ours"].positive, sum(by_language(counts).chunk(2)))
        assert int(results["ours"].tokens.sum()) == tokens, "Ours counted other tokens than its batches hold."
        assert hooked.any(), "The hooks counted nothing."
        yield steps, tokens


def count_batches(model: nn.Module, modules: Sequence[nn.Module], batches: Sequence[Packed]) -> None:
    """Counts batches that are ready."""
    for batch in batches:
        count_batch(model, modules, batch)
