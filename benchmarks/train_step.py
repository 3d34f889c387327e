"""One training step of a Llama: loss, backward, AdamW; the same model size and batch for every peer.

    floor            everything frozen: the loss and the gradient of the embeddings' output, no optimizer
    ours             our FFN with its subnetwork and its optimizer, everything else stock
    ours-recompute   the same, keeping for backward only the FFN's input
    ours-checkpoint  the same, keeping only the decoder layers' input
    ours-tune        ours as `lape-fast tune` runs it: the loss without logits
    full             all weights
    ffn              all FFN weights
    masked           the subnetwork by full FFN gradients times a mask
    clone-scatter    the subnetwork as the published scripts train it: each forward clones the weights, writes the
                     trained rows in, and backward goes through the copy
    lora             PEFT, rank 16 on all linear layers
    lora-qv          PEFT, rank 16 on the query and value projections, which is its default for a Llama

``trainable`` counts the weights that training changes. ``saved_bytes_per_token_layer`` are kept by autograd inside the
decoder's layers (a clone of a weight is among them), ``peak_bytes`` are live at the step's peak, weights and optimizer
states among them. ``flops_per_token`` are matrix products and attention.

    python -m benchmarks.train_step --json FILE
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.llama import build_llama, option_parser, prepare, random_tokens, settings, share
from benchmarks.measure import interleave, machine_facts, peak_bytes, report, saved_bytes, timed_rows
from lape_fast.errors import ConfigError
from lape_fast.identify.neurons import NeuronSet
from lape_fast.models import FFN, decoder, find_ffns, without_logits
from lape_fast.progress import progress_bar
from lape_fast.tune.flops import count_flops
from lape_fast.tune.subnetwork import attach_subnetwork
from lape_fast.tune.subnetwork_ffn import Policy

# The drawn subnetwork: its share of all neurons, and which parts of it lie in the last quarter of the layers and in
# the first one, about as in the published neurons.
DENSITY, LAST_QUARTER, FIRST_LAYER = 0.01, 0.88, 0.02

LEARNING_RATE = 1e-4
LORA_RANK = 16
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


@dataclass
class Peer:
    """One way to train, ready to run.

    Attributes:
        model: its model.
        trainable: how many weights training changes.
        parameters: what its optimizer holds; empty for none.
        gradients: those of the selected gate rows, up rows and down columns, ``[K, D]`` each, layer by layer; None
            where the peer trains something else.
    """

    model: nn.Module
    trainable: int
    parameters: Sequence[nn.Parameter]
    gradients: Callable[[], list[Tensor]] | None = None
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.model.train()
        if self.parameters and self.optimizer is None:
            # Fused is the fastest form of torch's AdamW on both devices. No decay: masked weights must stay.
            self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def backward(self, input_ids: Tensor) -> Tensor:
        """Computes the gradients; returns the loss."""
        if self.optimizer:
            self.optimizer.zero_grad()
        loss = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step(self, input_ids: Tensor) -> None:
        """One step of training."""
        self.backward(input_ids)
        if self.optimizer:
            self.optimizer.step()

    def resident(self) -> Iterator[Tensor]:
        """What stays between steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values() if self.optimizer else ():
            yield from (value for value in state.values() if isinstance(value, Tensor))


class CloneScatterFFN(nn.Module):
    """The published scripts' FFN: clones of the frozen weights with the trained rows and columns written in.

    Args:
        ffn: the block, in its model.
        neurons: int64 ``[K]``.
    """

    def __init__(self, ffn: FFN, neurons: Tensor):
        super().__init__()
        self.projections = nn.ModuleDict(ffn.projections)
        self.register_buffer("neurons", neurons)
        self.gate_rows = nn.Parameter(ffn.gate_weight[neurons].clone())
        self.up_rows = nn.Parameter(ffn.up_weight[neurons].clone())
        self.down_columns = nn.Parameter(ffn.down_weight[:, neurons].clone())

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        gate = self.projections["gate"].weight.clone()
        gate[self.neurons] = self.gate_rows
        up = self.projections["up"].weight.clone()
        up[self.neurons] = self.up_rows
        h = F.silu(F.linear(x, gate)) * F.linear(x, up)
        down = self.projections["down"].weight.clone()
        down[:, self.neurons] = self.down_columns
        return F.linear(h, down)


def build_floor(base: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    model = share(base)
    model.enable_input_require_grads()
    return Peer(model, 0, [])


def build_ours(base: nn.Module, neurons: Sequence[Tensor], policy: Policy = "save", logits: bool = True) -> Peer:
    # The trained values live in the FFN weights, so those are not shared.
    model = share(base, ffn_weights(find_ffns(base)))
    subnetwork = attach_subnetwork(model, neurons, policy)
    if not logits:
        without_logits(model)
    parameters = subnetwork.parameters()
    optimizer = subnetwork.optimizer(lr=LEARNING_RATE, weight_decay=0.0)
    gradients = functools.partial(_gradients, parameters)
    return Peer(model, subnetwork.trainable(), parameters, gradients, optimizer)


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters]


def build_full(base: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    model = share(base, base.parameters()).requires_grad_(True)
    return Peer(model, model.num_parameters(), list(model.parameters()))


def build_ffn(base: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    model = share(base, ffn_weights(find_ffns(base)))
    ffns = find_ffns(model)
    weights = ffn_weights(ffns)
    for weight in weights:
        weight.requires_grad_(True)
    gradients = functools.partial(dense_gradients, ffns, neurons)
    return Peer(model, sum(weight.numel() for weight in weights), weights, gradients)


def build_masked(base: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    peer = build_ffn(base, neurons)
    for ffn, chosen in zip(find_ffns(peer.model), neurons, strict=True):
        down = ffn.projections["down"]
        down.register_buffer("mask", torch.zeros_like(ffn.down_weight[0]).index_fill_(0, chosen, 1.0))
        for name, mask in (("gate", down.mask[:, None]), ("up", down.mask[:, None]), ("down", down.mask)):
            ffn.projections[name].weight.register_post_accumulate_grad_hook(functools.partial(mask_gradient, mask))
    peer.trainable = sum(3 * len(chosen) * ffn.hidden_size for chosen in neurons)
    return peer


def mask_gradient(mask: Tensor, weight: nn.Parameter) -> None:
    """Sets the gradient to zero where the mask is."""
    weight.grad.mul_(mask)


def build_clone_scatter(base: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    model = share(base)
    layers = []
    for ffn, chosen in zip(find_ffns(model), neurons, strict=True):
        if len(chosen):
            layers.append(CloneScatterFFN(ffn, chosen))
            ffn.replace(layers[-1])
    parameters = [parameter for layer in layers for parameter in (layer.gate_rows, layer.up_rows, layer.down_columns)]

    def gradients() -> list[Tensor]:
        parts = ((layer.gate_rows.grad, layer.up_rows.grad, layer.down_columns.grad.T) for layer in layers)
        return [gradient for part in parts for gradient in part]

    return Peer(model, sum(parameter.numel() for parameter in parameters), parameters, gradients)


def build_lora(base: nn.Module, neurons: Sequence[Tensor], targets: str | list[str] = "all-linear") -> Peer:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=LORA_RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(share(base), settings)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Peer(model, sum(parameter.numel() for parameter in parameters), parameters)


PEERS = {
    "floor": build_floor,
    "ours": build_ours,
    "ours-recompute": functools.partial(build_ours, policy="recompute"),
    "ours-checkpoint": functools.partial(build_ours, policy="checkpoint"),
    "ours-tune": functools.partial(build_ours, logits=False),
    "full": build_full,
    "ffn": build_ffn,
    "masked": build_masked,
    "clone-scatter": build_clone_scatter,
    "lora": build_lora,
    "lora-qv": functools.partial(build_lora, targets=["q_proj", "v_proj"]),
}


def ffn_weights(ffns: Sequence[FFN]) -> list[nn.Parameter]:
    """Gate, up and down weight of every FFN."""
    return [projection.weight for ffn in ffns for projection in ffn.projections.values()]


def dense_gradients(ffns: Sequence[FFN], neurons: Sequence[Tensor]) -> list[Tensor]:
    """The selected rows and columns of dense weight gradients, in the order of ``Peer.gradients``."""
    selected = []
    for ffn, chosen in zip(ffns, neurons, strict=True):
        if len(chosen):
            gate, up, down = (ffn.projections[name].weight.grad for name in ("gate", "up", "down"))
            selected += [gate[chosen], up[chosen], down[:, chosen].T]
    return selected


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
