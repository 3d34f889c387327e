"""The ways to train that the benchmarks compare, each built on the weights of a frozen base model.

floor            everything frozen: the loss and the gradient of the embeddings' output, no optimizer
floor-fused      the same with the parts of ours: our FFNs without a trained neuron, our norms, no logits
ours-*           our FFN with its subnetwork and its optimizer under each policy, everything else stock
full             all weights
ffn              all FFN weights
masked           the subnetwork by full FFN gradients times a mask
clone-scatter    the subnetwork as the published scripts train it: each forward clones the weights, writes the
                 trained rows in, and backward goes through the copy
lora             PEFT, rank 16 on all linear layers, with its default fp32 adapters
lora-bf16        the same with adapters in the model's dtype
lora-qv          PEFT, rank 16 on the query and value projections, which is its default for a Llama
shira            PEFT's sparse adapters on the FFN, with as many trained values as the subnetwork has
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.llama import share
from lape_fast.models import FFN, find_ffns, without_logits
from lape_fast.tune.norms import slim_norms
from lape_fast.tune.subnetwork import attach_subnetwork
from lape_fast.tune.subnetwork_ffn import Policy, SubnetworkFFN

LEARNING_RATE = 1e-4
LORA_RANK = 16

# Rows of logits at once, where the head is trained too; as many as ours computes.
CHUNK_ROWS = 1024


@dataclass
class Peer:
    """One way to train, ready to run.

    Attributes:
        model: its model.
        trainable: how many weights training changes.
        parameters: what its optimizer holds; empty for none.
        gradients: those of the selected gate rows, up rows and down columns, ``[K, D]`` each, layer by layer; None
            where the peer trains something else.
        loss: computes the loss of token ids ``[R, S]``; None for the model's own.
        surroundings: entered for each step.
        undo: what gives the base back as it was.
    """

    model: nn.Module
    trainable: int
    parameters: Sequence[nn.Parameter]
    gradients: Callable[[], list[Tensor]] | None = None
    optimizer: torch.optim.Optimizer | None = None
    loss: Callable[[Tensor], Tensor] | None = None
    surroundings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.model.train()
        if self.parameters and self.optimizer is None:
            # Fused is the fastest form of torch's AdamW on both devices. No decay: masked weights must stay.
            self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def backward(self, input_ids: Tensor) -> Tensor:
        """Computes the gradients; returns the loss."""
        if self.optimizer:
            self.optimizer.zero_grad()
        with self.surroundings():
            if self.loss is not None:
                loss = self.loss(input_ids)
            else:
                loss = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
        return loss.detach()

    def step(self, input_ids: Tensor) -> Tensor:
        """One step of training; returns the loss."""
        loss = self.backward(input_ids)
        if self.optimizer:
            self.optimizer.step()
        return loss

    def resident(self) -> Iterator[Tensor]:
        """What stays between steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values() if self.optimizer else ():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def close(self) -> None:
        """Gives the base back as it was: its values, frozen, and without gradients."""
        self.undo.close()
        freeze(self.model)


def freeze(model: nn.Module) -> None:
    """Nothing in the model needs a gradient or holds one any more."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


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


def prepare_floor(model: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    model.enable_input_require_grads()
    return Peer(model, 0, [])


def prepare_fused_floor(model: nn.Module, neurons: Sequence[Tensor], policy: Policy = "save") -> Peer:
    for ffn in find_ffns(model):
        ffn.replace(SubnetworkFFN(ffn, policy, "resident"), with_norm=True)
        slim_norms(ffn.decoder_layer)
    without_logits(model)
    return prepare_floor(model, neurons)


def prepare_ours(model: nn.Module, neurons: Sequence[Tensor], policy: Policy = "save") -> Peer:
    subnetwork = attach_subnetwork(model, neurons, policy)
    parameters = subnetwork.parameters()
    optimizer = subnetwork.optimizer(lr=LEARNING_RATE, weight_decay=0.0)
    peer = Peer(model, subnetwork.trainable(), parameters, functools.partial(gradients_of, parameters), optimizer)
    peer.undo.callback(subnetwork.detach, keep=False)
    return peer


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters]


def prepare_full(model: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    model.requires_grad_(True)
    gradients = functools.partial(dense_gradients, find_ffns(model), neurons)
    return Peer(model, model.num_parameters(), list(model.parameters()), gradients)


def prepare_ffn(model: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    ffns, weights = find_ffns(model), ffn_weights(model)
    for weight in weights:
        weight.requires_grad_(True)
    gradients = functools.partial(dense_gradients, ffns, neurons)
    return Peer(model, sum(weight.numel() for weight in weights), weights, gradients)


def prepare_masked(model: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    peer = prepare_ffn(model, neurons)
    for ffn, chosen in zip(find_ffns(model), neurons, strict=True):
        down = ffn.projections["down"]
        down.register_buffer("mask", torch.zeros_like(ffn.down_weight[0]).index_fill_(0, chosen, 1.0))
        for name, mask in (("gate", down.mask[:, None]), ("up", down.mask[:, None]), ("down", down.mask)):
            weight = ffn.projections[name].weight
            hook = weight.register_post_accumulate_grad_hook(functools.partial(mask_gradient, mask))
            peer.undo.callback(hook.remove)
    peer.trainable = sum(3 * len(chosen) * ffn.hidden_size for chosen in neurons)
    return peer


def mask_gradient(mask: Tensor, weight: nn.Parameter) -> None:
    """Sets the gradient to zero where the mask is."""
    weight.grad.mul_(mask)


def prepare_clone_scatter(model: nn.Module, neurons: Sequence[Tensor]) -> Peer:
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


def prepare_lora(
    model: nn.Module, neurons: Sequence[Tensor], targets: str | list[str] = "all-linear", fp32: bool = True
) -> Peer:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=LORA_RANK, target_modules=targets, task_type="CAUSAL_LM")
    return _adapted(get_peft_model(model, settings, autocast_adapter_dtype=fp32))


def prepare_shira(model: nn.Module, neurons: Sequence[Tensor]) -> Peer:
    from peft import ShiraConfig, get_peft_model

    ffns = find_ffns(model)
    # Its number of values is a rank times inputs and outputs of every projection.
    wanted = sum(3 * len(chosen) * ffn.hidden_size for ffn, chosen in zip(ffns, neurons, strict=True))
    rank = max(1, round(wanted / sum(sum(weight.shape) for weight in ffn_weights(model))))
    settings = ShiraConfig(r=rank, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    # Its own draws its positions on the CPU, which takes seconds per projection.
    settings.mask_fn = draw_shira_mask
    return _adapted(get_peft_model(model, settings))


def draw_shira_mask(projection: nn.Linear, r: int, **options) -> Tensor:
    """A random mask of r times inputs and outputs, as PEFT's default, drawn on the weight's device."""
    weight = projection.weight
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]] = True
    return mask.view_as(weight)


def _adapted(model: nn.Module) -> Peer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Peer(model, sum(parameter.numel() for parameter in parameters), parameters)


def ffn_weights(model: nn.Module) -> list[nn.Parameter]:
    """Gate, up and down weight of every FFN."""
    return [projection.weight for ffn in find_ffns(model) for projection in ffn.projections.values()]


def dense_gradients(ffns: Sequence[FFN], neurons: Sequence[Tensor]) -> list[Tensor]:
    """The selected rows and columns of dense weight gradients, in the order of ``Peer.gradients``."""
    selected = []
    for ffn, chosen in zip(ffns, neurons, strict=True):
        if len(chosen):
            gate, up, down = (ffn.projections[name].weight.grad for name in ("gate", "up", "down"))
            selected += [gate[chosen], up[chosen], down[:, chosen].T]
    return selected


def chunked_loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The loss without all logits at once where the head is trained too: each chunk is computed again in backward."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)  # [T, D]
    labels, total = input_ids[:, 1:].flatten(), 0.0

    def loss_of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.get_output_embeddings()(hidden).float(), labels, reduction="sum")

    for chunk, targets in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        total = total + checkpoint(loss_of_chunk, chunk, targets, use_reentrant=False)
    return total / len(labels)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        prepare: makes a model, which it changes, into a peer.
        writes: the base's weights that training writes into.
        checkpointed: the name of the method that is this one with checkpointed layers, if it brings its own.
    """

    prepare: Callable[[nn.Module, Sequence[Tensor]], Peer]
    writes: Callable[[nn.Module], Iterable[Tensor]] = lambda model: ()
    checkpointed: str | None = None


def _ours(policy: Policy) -> Method:
    return Method(functools.partial(prepare_ours, policy=policy), ffn_weights, "ours-checkpoint")


def _fused_floor(policy: Policy) -> Method:
    return Method(functools.partial(prepare_fused_floor, policy=policy), checkpointed="floor-fused-checkpoint")


METHODS = {
    "floor": Method(prepare_floor),
    "floor-fused": _fused_floor("save"),
    "floor-fused-checkpoint": _fused_floor("checkpoint"),
    "ours-save": _ours("save"),
    "ours-recompute": _ours("recompute"),
    "ours-checkpoint": _ours("checkpoint"),
    "full": Method(prepare_full, nn.Module.parameters),
    "ffn": Method(prepare_ffn, ffn_weights),
    "masked": Method(prepare_masked, ffn_weights),
    "clone-scatter": Method(prepare_clone_scatter),
    "lora": Method(prepare_lora),
    "lora-bf16": Method(functools.partial(prepare_lora, fp32=False)),
    "lora-qv": Method(functools.partial(prepare_lora, targets=["q_proj", "v_proj"])),
    "shira": Method(prepare_shira),
}


def build_peer(
    name: str | Method,
    base: nn.Module,
    neurons: Sequence[Tensor],
    *,
    copied: bool = True,
    checkpointed: bool = False,
    fused_loss: bool = False,
) -> Peer:
    """A peer on the weights of a frozen base.

    Args:
        name: one of ``METHODS``, or a method of one's own.
        base: left as it is but for its weights, which peers share.
        neurons: of the subnetwork, int64 ``[K]`` per layer on the base's device.
        copied: whether the peer gets copies of the weights that it writes into, so that others can train beside it.
            Else it writes into the base's own, at a learning rate of zero: the same kernels move the same bytes, and
            the next peer finds the same weights. ``Peer.close`` gives the base back.
        checkpointed: whether of each decoder layer only the input is kept for backward.
        fused_loss: whether the loss is computed without all logits at once.

    Raises:
        ImportError: the peer's library is not installed, or too old.
    """
    method = METHODS[name] if isinstance(name, str) else name
    if checkpointed and method.checkpointed:
        method = METHODS[method.checkpointed]
    written = list(method.writes(base))
    model = share(base, written if copied else ())
    if checkpointed and not method.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head = model.get_output_embeddings()
    try:
        peer = method.prepare(model, neurons)
        if fused_loss and head.weight.requires_grad:
            peer.loss = functools.partial(chunked_loss, model)
        elif fused_loss:
            without_logits(model)
    except BaseException:
        freeze(model)
        raise
    if written and not copied:
        for group in peer.optimizer.param_groups:
            group["lr"] = 0.0
    return peer
