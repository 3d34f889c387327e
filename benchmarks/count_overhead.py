"""What counting costs: the forward pass of a Llama without its head, nothing counted and counted in four ways.

    stock           nothing counted
    boolean-hook    a forward hook on each gate projection sums (gate > 0)
    published       the published scripts' operations on this model: SiLU written back over the gate, a float copy,
                    sums of its sign and of its values, the number of tokens
    ours            every layer computed by the fused op that counts
    ours-identify   the same as lape-fast identify runs it: without the last layer's up and down projections and
                    without the final norm

The tokens are random, one row of one language. Before anything is timed, the counts are checked.

    python -m benchmarks.count_overhead --json FILE
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.llama import build_llama, option_parser, prepare, random_tokens, settings, share
from benchmarks.measure import interleave, machine_facts, report, timed_rows
from lape_fast.identify.counting_ffn import count_batch, counting_ffns
from lape_fast.models import FFN, find_ffns, forward_hidden
from lape_fast.progress import progress_bar
from lape_fast.text import Packed

# As many as a counting run holds counts of; the row that is counted is of one, as the counting loop's are.
LANGUAGES, LANGUAGE = 100, 42
PEERS = ("stock", "boolean-hook", "published", "ours", "ours-identify")
WARM_UP = 2

COLUMNS = {
    "step ms": lambda row: f"{row['step_ms']:,.1f}",
    "x stock": lambda row: f"{row['ratio_to_stock']:.3f}",
    "95 %": lambda row: "{:.3f}–{:.3f}".format(*row["ratio_ci"]),
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
}


class PublishedFFN(nn.Module):
    """The operations of the published scripts' patched forward, on separate gate and up projections.

    Args:
        ffn: the block, in its model.
        over_zero: int32 ``[F]``, tokens with a positive activation.
        sums: float32 ``[F]``, the activations' sum.
        counts: int32 ``[F]``, tokens.
    """

    def __init__(self, ffn: FFN, over_zero: Tensor, sums: Tensor, counts: Tensor):
        super().__init__()
        self.ffn = ffn
        self.over_zero, self.sums, self.counts = over_zero, sums, counts

    def forward(self, x: Tensor) -> Tensor:  # [R, S, D] -> [R, S, D]
        gate, up = self.ffn.project(x)
        gate[:] = nn.SiLU()(gate)
        activation = gate.float()
        self.over_zero += (activation > 0).sum(dim=(0, 1))
        self.sums += activation.sum(dim=(0, 1))
        self.counts += activation.size(0) * activation.size(1)
        return self.ffn.project_down(gate * up)


def hook_gates(ffns: Sequence[FFN], counts: Tensor) -> list[Any]:
    """Counts positive gates into int64 ``[L, F]`` by forward hooks on the gate projections; returns their handles."""

    def count(layer_counts: Tensor, module: nn.Module, args: tuple, gate: Tensor) -> None:
        layer_counts += (gate > 0).flatten(0, -2).sum(0)

    return [
        ffn.projections["gate"].register_forward_hook(functools.partial(count, layer_counts))
        for ffn, layer_counts in zip(ffns, counts, strict=True)
    ]


def install_published(model: nn.Module, over_zero: Tensor) -> None:
    """Replaces the FFNs by the published operations, counting into int32 ``[L, F]``."""
    sums, counts = torch.zeros_like(over_zero, dtype=torch.float32), torch.zeros_like(over_zero)
    for ffn, *layer_totals in zip(find_ffns(model), over_zero, sums, counts, strict=True):
        ffn.replace(PublishedFFN(ffn, *layer_totals))


def check_counts(steps: dict[str, Callable[[], Any]], our_ffns: Sequence[FFN], counts: dict[str, Tensor]) -> None:
    """Runs every step once and stops unless the peers count the same, each exactly.

    The stock model and ours round h at different places, so their gates in later layers differ in the last bits; ours
    is compared with a hook on its own gates.
    """
    watched = torch.zeros_like(counts["boolean-hook"])
    handles = hook_gates(our_ffns, watched)
    for step in steps.values():
        step()
    for handle in handles:
        handle.remove()
    mine = counts["ours"][:, 0, LANGUAGE]
    expected = {
        "published": (counts["published"].long(), counts["boolean-hook"]),
        "ours": (mine, watched),
        "ours-identify": (counts["ours-identify"][:, 0, LANGUAGE], mine),
    }
    wrong = [name for name, (found, right) in expected.items() if not torch.equal(found, right)]
    if wrong:
        sys.exit(f"The counts of {', '.join(wrong)} are wrong: the speed of a wrong answer is worth nothing.")


def main(arguments: Sequence[str] | None = None) -> None:
    options = option_parser(__doc__, rounds=51).parse_args(arguments)
    device = prepare(options)
    facts = machine_facts(device)

    base, input_ids = build_llama(options).eval(), random_tokens(options)
    models = {name: share(base) for name in PEERS}
    counts = empty_counts(options)
    position_ids = torch.arange(options.tokens, device=device)[None]
    packed = Packed(input_ids, position_ids, torch.full_like(input_ids, LANGUAGE, dtype=torch.int32))
    forward = torch.inference_mode()(forward_hidden)
    steps = {name: functools.partial(forward, model, input_ids, position_ids) for name, model in models.items()}
    our_ffns = find_ffns(models["ours"])

    hook_gates(find_ffns(models["boolean-hook"]), counts["boolean-hook"])
    install_published(models["published"], counts["published"])
    with contextlib.ExitStack() as installed:
        for name, skip_last in (("ours", False), ("ours-identify", True)):
            modules = installed.enter_context(counting_ffns(models[name], counts[name], skip_last=skip_last))
            steps[name] = functools.partial(count_batch, models[name], modules, packed)
        check_counts(steps, our_ffns, counts)
        with progress_bar("count_overhead", (WARM_UP + options.rounds) * len(PEERS)) as advance:
            advance_step = functools.partial(advance, 1, options.tokens)
            interleave(steps, WARM_UP, device, advance_step)
            times = interleave(steps, options.rounds, device, advance_step)

    rows = timed_rows(times, "stock")
    for row in rows:
        row |= {"tokens_per_s": 1000 * options.tokens / row["step_ms"]}
    report(__doc__.partition("\n")[0], rows, COLUMNS, settings(options), facts, options.json)


def empty_counts(options: argparse.Namespace) -> dict[str, Tensor]:
    """Zeros, ``[L, F]`` for the peers of one language and ``[L, 1, G, F]`` for ours."""
    layers, width = options.layers, options.neurons
    return {
        "boolean-hook": torch.zeros(layers, width, dtype=torch.int64, device=options.device),
        "published": torch.zeros(layers, width, dtype=torch.int32, device=options.device),
        "ours": torch.zeros(layers, 1, LANGUAGES, width, dtype=torch.int64, device=options.device),
        "ours-identify": torch.zeros(layers, 1, LANGUAGES, width, dtype=torch.int64, device=options.device),
    }


if __name__ == "__main__":
    main()
