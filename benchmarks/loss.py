"""The loss of a frozen head and its gradient for the hidden states: T rows, V words, forward and backward.

    plain        all logits in the model's dtype, and torch's cross entropy of them
    transformers the same, with the logits raised to fp32 first, as its models do; in fp32 it is plain
    torch        torch.nn.functional.linear_cross_entropy, which is not chunked by default (torch 2.13 or later)
    torch-1024   the same with 1,024 rows a chunk
    ours-N       lape_fast.linear_cross_entropy with N rows a chunk; the package uses 1,024

``peak_bytes`` is the most memory that a step has allocated beside the hidden states, the head and the labels.

    python -m benchmarks.loss --json FILE
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.llama import DTYPES, prepare, settings
from benchmarks.measure import interleave, machine_facts, peak_bytes, report, timed_rows
from lape_fast.ops import linear_cross_entropy
from lape_fast.progress import progress_bar

CHUNKS = (256, 512, 1024, 2048)
VOCABULARIES = (32_000, 128_256, 131_072)

# How far the peers' losses may differ, and their gradients, relative to the largest.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

COLUMNS = {
    "step ms": lambda row: f"{row['step_ms']:,.0f}",
    "x plain": lambda row: f"{row['ratio_to_plain']:.3f}",
    "95 %": lambda row: "{:.2f}–{:.2f}".format(*row["ratio_ci"]),
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
}

# (hidden [T, D], weight [V, D], labels [T]) -> the mean loss.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def transformers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def torch_in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=1024)
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


def ours(rows: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # The function of the same name hides the module from an import.
    with mock.patch.object(sys.modules["lape_fast.ops.linear_cross_entropy"], "CHUNK_ROWS", rows):
        return linear_cross_entropy(hidden, weight, labels)


def losses(dtype: torch.dtype) -> dict[str, Loss]:
    """The peers that this torch has and that differ in this dtype."""
    peers: dict[str, Loss] = {"plain": plain}
    if dtype != torch.float32:
        peers["transformers"] = transformers
    if hasattr(F, "linear_cross_entropy"):
        peers |= {"torch": F.linear_cross_entropy, "torch-1024": torch_in_chunks}
    return peers | {f"ours-{rows}": functools.partial(ours, rows) for rows in CHUNKS}


def step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss and the hidden states' gradient."""
    hidden = hidden.detach().requires_grad_()
    computed = loss(hidden, weight, labels)
    computed.backward()
    return computed.detach(), hidden.grad


def draw_inputs(options: argparse.Namespace, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of unit variance, a head with logits of unit variance, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, generator=generator)
    weight = torch.randn(vocabulary, options.hidden, generator=generator) * options.hidden**-0.5
    labels = torch.randint(vocabulary, (options.tokens,), generator=generator)
    dtype = DTYPES[options.dtype]
    return hidden.to(options.device, dtype), weight.to(options.device, dtype), labels.to(options.device)


def added_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The peak of what a step allocates; on the CPU from the allocator's log, as torch's chunks are one operator."""
    if device.type == "cuda":
        return peak_bytes(run, (), device)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def keep(results: dict[str, Any], name: str, run: Callable[[], Any]) -> None:
    """Runs a step and keeps what it returns."""
    results[name] = run()


def check(name: str, found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    """Stops unless the loss and the gradient are those of another peer."""
    tolerance = TOLERANCE[right[1].dtype]
    same = torch.isclose(found[0].float(), right[0].float(), rtol=tolerance)
    same &= (found[1].float() - right[1].float()).abs().max() <= tolerance * right[1].float().abs().max()
    if not same:
        sys.exit(f"The loss or the gradient of {name} is wrong: the speed of a wrong answer is worth nothing.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of hidden states")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument(
        "--vocabulary", type=int, nargs="+", default=VOCABULARIES, metavar="V", help="sizes of the head"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after the warm-up")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options = parser.parse_args(arguments)
    device = prepare(options)
    facts = machine_facts(device)

    rows, peers = [], losses(DTYPES[options.dtype])
    with progress_bar("loss", (1 + options.rounds) * len(peers) * len(options.vocabulary)) as advance:
        advance_step = functools.partial(advance, 1, options.tokens)
        for vocabulary in options.vocabulary:
            inputs = draw_inputs(options, vocabulary)
            steps = {name: functools.partial(step, loss, *inputs) for name, loss in peers.items()}
            peaks, results = {}, {}
            for name, run in steps.items():
                peaks[name] = added_bytes(functools.partial(keep, results, name, run), device)
                check(name, results[name], results["plain"])
                advance_step()
            results.clear()
            for row in timed_rows(interleave(steps, options.rounds, device, advance_step), "plain"):
                name = row.pop("name")
                rows.append({"name": f"{vocabulary} {name}", "vocabulary": vocabulary, "peer": name, **row})
                rows[-1]["peak_bytes"] = peaks[name]
    report(__doc__.partition("\n")[0], rows, COLUMNS, settings(options), facts, options.json)


if __name__ == "__main__":
    main()
