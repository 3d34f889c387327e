"""One training step of a Llama: loss, backward, AdamW; the same model size and batch for every peer.

The peers are those of benchmarks/peers.py; ``ours`` is ``ours-save`` there, and ``ours-tune`` the same as `lape-fast
tune` runs it, with the loss without logits.

``trainable`` counts the weights that training changes. ``saved_bytes_per_token_layer`` are kept by autograd inside the
decoder's layers (a clone of a weight is among them), ``peak_bytes`` are live at the step's peak, weights and optimizer
states among them. ``flops_per_token`` are matrix products and attention.

    python -m benchmarks.train_step --json FILE
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.llama import build_llama, option_parser, prepare, random_tokens, settings
from benchmarks.measure import interleave, machine_facts, peak_bytes, report, saved_bytes, timed_rows
from benchmarks.peers import Peer, build_peer
from lape_fast.errors import ConfigError
from lape_fast.identify.neurons import NeuronSet
from lape_fast.models import decoder
from lape_fast.progress import progress_bar
from lape_fast.tune.flops import count_flops

# The drawn subnetwork: its share of all neurons, and which parts of it lie in the last quarter of the layers and in
# the first one, about as in the published neurons.
DENSITY, LAST_QUARTER, FIRST_LAYER = 0.01, 0.88, 0.02

WARM_UP = 1

# How far the peers' gradients of the same weights may differ, relative to the largest.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

COLUMNS = {
    "step ms": lambda row: f"{row['step_ms']:,.0f}",
    "x floor": lambda row: f"{row['ratio_to_floor']:.3f}",
    "95 %": lambda row: "{:.2f}–{:.2f}".format(*row["ratio_ci"]),
    "MFLOP": lambda row: f"{row['flops_per_token'] / 1e6:,.0f}",
    "saved kB": lambda row: f"{row['saved_bytes_per_token_layer'] / 1e3:,.1f}",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    "trained": lambda row: f"{row['trainable'] / 1e6:,.1f} M",
}


# The name here -> how `build_peer` is asked for it.
PEERS = {
    name: functools.partial(build_peer, method, fused_loss=name == "ours-tune")
    for name, method in {
        "floor": "floor",
        "ours": "ours-save",
        "ours-recompute": "ours-recompute",
        "ours-checkpoint": "ours-checkpoint",
        "ours-tune": "ours-save",
        "full": "full",
        "ffn": "ffn",
        "masked": "masked",
        "clone-scatter": "clone-scatter",
        "lora": "lora",
        "lora-qv": "lora-qv",
    }.items()
}


def draw_neurons(layers: int, width: int) -> list[Tensor]:
    """A subnetwork spread over the layers as the published ones are: sorted int64 indices per layer."""
    total, quarter = DENSITY * layers * width, max(1, layers // 4)
    share_of_layer = torch.full((layers,), (1 - LAST_QUARTER - FIRST_LAYER) / layers)
    share_of_layer[0] += FIRST_LAYER
    share_of_layer[-quarter:] += LAST_QUARTER / quarter
    sizes = (share_of_layer * total).round().long()
    # The first layer of a published subnetwork is never empty, so nothing stops backward above it.
    sizes[0].clamp_(min=1)
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(width, generator=generator)[:size].sort().values for size in sizes.tolist()]


def read_neurons(path: str, language: str | None, layers: int, width: int) -> list[Tensor]:
    """The neurons of a language (the file's first, if none is named) from a neuron file.

    Raises:
        ConfigError: the file was made for a model of another size.
    """
    neurons = NeuronSet.load(path)
    if (neurons.layers, neurons.neurons_per_layer) != (layers, width):
        raise ConfigError(
            f"{path} has {neurons.layers} layers of {neurons.neurons_per_layer} neurons, but the benchmark's model has "
            f"{layers} of {width}; set --layers and --neurons to the file's."
        )
    return neurons[language or neurons.languages[0]]


def check_gradients(peers: dict[str, Peer], input_ids: Tensor) -> None:
    """Stops unless all peers have the same loss, and the peers of the subnetwork and ``ffn`` the same gradients."""
    tolerance = GRADIENT_TOLERANCE[next(peers["ffn"].model.parameters()).dtype]
    right_loss = peers["ffn"].backward(input_ids)
    right = [gradient.float() for gradient in peers["ffn"].gradients()]
    for name, peer in peers.items():
        loss = peer.backward(input_ids)
        same = torch.isclose(loss, right_loss, rtol=tolerance)
        for gradient, expected in zip(peer.gradients(), right, strict=True) if peer.gradients else ():
            same &= (gradient.float() - expected).abs().max() <= tolerance * expected.abs().max()
        if not same:
            sys.exit(f"The loss or the gradients of {name} are wrong: the speed of a wrong answer is worth nothing.")


def measure_apart(peer: Peer, input_ids: Tensor) -> dict[str, int | float]:
    """What takes no clock: operations, saved bytes, the peak of live bytes, and the number of trained weights."""
    step, model = functools.partial(peer.step, input_ids), peer.model
    layers = decoder(model.get_base_model() if hasattr(model, "get_base_model") else model).layers
    flops = count_flops(step)
    saved = saved_bytes(functools.partial(model, input_ids=input_ids, use_cache=False), layers, model.parameters())
    if peer.optimizer:
        # Else the last step's gradients would be taken for part of this one's surroundings.
        peer.optimizer.zero_grad()
    return {
        "flops_per_token": flops // input_ids.numel(),
        "saved_bytes_per_token_layer": saved / input_ids.numel() / len(layers),
        "peak_bytes": peak_bytes(step, peer.resident(), input_ids.device),
        "trainable": peer.trainable,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser(__doc__, rounds=9)
    parser.add_argument("--mask", metavar="FILE", help="a neuron file (default: a drawn subnetwork of 1 %%)")
    parser.add_argument("--language", help="whose neurons of the file (default: its first language)")
    options = parser.parse_args(arguments)
    device = prepare(options)
    facts = machine_facts(device)

    base, input_ids = build_llama(options), random_tokens(options)
    size = (options.layers, options.neurons)
    neurons = read_neurons(options.mask, options.language, *size) if options.mask else draw_neurons(*size)
    neurons = [chosen.to(device) for chosen in neurons]
    peers = {name: build(base, neurons) for name, build in PEERS.items()}
    check_gradients(peers, input_ids)

    steps = {name: functools.partial(peer.step, input_ids) for name, peer in peers.items()}
    with progress_bar("train_step", (WARM_UP + 1 + options.rounds) * len(peers)) as advance:
        advance_step = functools.partial(advance, 1, options.tokens)
        interleave(steps, WARM_UP, device, advance_step)
        apart = {}
        for name, peer in peers.items():
            apart[name] = measure_apart(peer, input_ids)
            advance_step()
        times = interleave(steps, options.rounds, device, advance_step)

    rows = [{**row, **apart[row["name"]]} for row in timed_rows(times, "floor")]
    report(__doc__.partition("\n")[0], rows, COLUMNS, settings(options), facts, options.json)


if __name__ == "__main__":
    main()
