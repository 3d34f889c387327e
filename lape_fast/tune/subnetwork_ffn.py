"""The subnetwork FFN: a feed-forward block in which k of its F neurons are trained.

A neuron's weights are its row of the gate projection, its row of the up projection and its column of the down
projection. The small parameters are masters in fp32. Where the values that the block computes with live:

    resident   the base weight itself holds them: the forward pass costs nothing extra and there is nothing to merge.
               The k original values are kept, so switching to another language or to none is a copy of k rows.
    overlay    the base is never written, because it is quantised or sharded: the k columns of gate and up are computed
               from the trained rows over the base's, and the k neurons reach the output through the trained columns.

A block can hold the values of several languages, by name, and computes with those of one at a time.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lape_fast.errors import AdapterError, ConfigError, TrainingError
from lape_fast.models import FFN, refuse_new_forward
from lape_fast.ops import slot_map
from lape_fast.tune import subnetwork_function

# What is kept for backward: `save` the block's input, gate and up; `recompute` its input alone, and the two projections
# are computed a second time; `checkpoint` the input of the whole decoder layer alone, which is computed a second time;
# `auto` the fastest of these that fits into the free memory, decided at the first training step.
Policy = Literal["save", "recompute", "checkpoint", "auto"]
Storage = Literal["auto", "resident", "overlay"]

# The names of the trained parameters, [K, D] each; a column of the down projection is a row of its transpose.
PARTS = ("trained_gate_rows", "trained_up_rows", "trained_down_columns")

# The attributes by which transformers checkpoints a decoder layer.
_SWITCH = ("gradient_checkpointing", "_gradient_checkpointing_func")

# Every subnetwork FFN there is, for the hook that follows an optimizer's step.
ATTACHED: weakref.WeakSet[SubnetworkFFN] = weakref.WeakSet()


class Selection(nn.Module):
    """Which neurons of a block one language trains, and the values that the base has there.

    Attributes:
        neurons: int64 ``[K]``, sorted.
        slots: int32 ``[F]``, see ``slot_map``.
        original_*: ``[K, D]`` per part in the base's dtype, in resident storage; without effect on a state dict.
    """

    def __init__(self, neurons: Tensor, width: int, originals: dict[str, Tensor]):
        super().__init__()
        self.register_buffer("neurons", neurons, persistent=False)
        self.register_buffer("slots", slot_map(neurons, width), persistent=False)
        for part, values in originals.items():
            self.register_buffer(f"original_{part}", values, persistent=False)


class SubnetworkFFN(nn.Module):
    """One feed-forward block with k trained neurons per language (where k is 0 it only passes gradients through).

    Where the layout names the norm in front of the block, the block absorbs it: it then keeps the residual stream for
    its backward pass instead of the normed copy, and computes the norm a second time.

    Args:
        ffn: the block, in its model.
        policy: what is kept for backward.
        storage: where the trained values live; ``auto`` is overlay for a quantised or sharded base, else resident.
    """

    def __init__(self, ffn: FFN, policy: Policy, storage: Storage):
        super().__init__()
        self.ffn = ffn
        # The original modules stay submodules, so that .to(), .train() and state dicts still reach the base weights.
        self.base_layer = nn.Module()
        for name, module in ffn.projections.items():
            self.base_layer.add_module(name, module)
        if ffn.norm is not None:
            self.base_layer.add_module("norm", ffn.norm)
        self.selections = nn.ModuleDict()
        for part in self.parts:
            setattr(self, part, nn.ParameterDict())
        if storage not in get_args(Storage):
            raise ConfigError(f"The storage {storage!r} is unknown; choose one of {', '.join(get_args(Storage))}.")
        self.overlay = storage == "overlay" or (storage == "auto" and not ffn.writable)
        # Whose values the block computes with, and how often each language's changed.
        self.held: str | None = None
        self.writes: Counter[str | None] = Counter()
        # What the masters of each language showed when they were last written.
        self._written: dict[str, tuple] = {}
        self.policy: Policy = "save"
        self.training = ffn.decoder_layer.training
        self.set_policy(policy)
        self.register_load_state_dict_post_hook(_take_loaded)
        ATTACHED.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy is made without __init__, and its optimizer must find it too.
        super().__setstate__(state)
        ATTACHED.add(self)

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        refuse_new_forward(self, "A subnetwork FFN")
        return super().__call__(*arguments, **options)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the trained parameters; an ungated FFN has no up rows."""
        return PARTS if self.ffn.gated else (PARTS[0], PARTS[2])

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}: {len(chosen.neurons)}" for name, chosen in self.selections.items())
        storage = "overlay" if self.overlay else "resident"
        return f"layer={self.ffn.layer}, {sizes} of {self.ffn.neurons} neurons, {self.policy}, {storage}"

    def add(self, name: str, neurons: Tensor) -> None:
        """Adds a language's neurons; their masters start as the values of the base.

        Args:
            name: a new one.
            neurons: int64 ``[K]``, sorted and unique.
        """
        neurons = neurons.to(device=self.ffn.device, dtype=torch.int64)
        values = {part: self._read_original(part, neurons) for part in self.parts} if len(neurons) else {}
        self.selections[name] = Selection(neurons, self.ffn.neurons, {} if self.overlay else values)
        for part, rows in values.items():
            # A copy even where the dtype is the same: the original must not move with the master.
            master = nn.Parameter(rows.to(master_dtype(rows.dtype), copy=True))
            getattr(self, part)[name] = master
            if not self.ffn.writable and not self.ffn.quantised:
                # The model was sharded before this parameter was there, so nobody else reduces its gradient.
                mesh = self.base_weight(part).device_mesh
                master.register_post_accumulate_grad_hook(functools.partial(average_gradient, mesh))

    def remove(self, name: str) -> None:
        """Forgets a language that is not held, if it is known."""
        if name in self.selections:
            del self.selections[name]
        self._written.pop(name, None)
        for part in self.parts:
            if name in getattr(self, part):
                del getattr(self, part)[name]

    def hold(self, name: str | None) -> None:
        """Computes with the values of ``name`` from now on, or with the base's own: a copy of k rows, or none.

        A graph from before the switch stays valid for the time after a switch back.
        """
        if name == self.held:
            self.synchronize_if_changed()
            return
        if self.held is not None:
            self._write(self.held, {} if self.overlay else self.originals())
        self.held = name
        if name is None:
            return
        if self._written.get(name) == self._stamp():
            self._write(name, self.masters())
        elif name not in self._written and self._holds_base_values():
            # Freshly attached: there is nothing to write.
            self._written[name] = self._stamp()
        else:
            self.synchronize()

    @contextlib.contextmanager
    def holding(self, name: str | None):
        """``hold`` for the length of a ``with`` block."""
        before = self.held
        self.hold(name)
        try:
            yield
        finally:
            self.hold(before)

    def synchronize(self) -> None:
        """Rounds the held masters into the base weight.

        Every torch optimizer's step does this by itself, and so does a forward pass after anything that leaves a
        trace: masters that were exchanged, or written by any operation but a fused optimizer's or one on ``.data``.
        """
        if self.held is not None:
            self._write(self.held, self.masters())
            self.note_update(self.held)

    def synchronize_if_changed(self) -> None:
        """``synchronize`` if the held masters show that they were written since."""
        if self.held is not None and self._written.get(self.held) != self._stamp():
            self.synchronize()

    def make_resident(self) -> None:
        """Changes from overlay to resident storage.

        Raises:
            AdapterError: the base cannot be written.
        """
        if not self.overlay:
            return
        check_writable(self.ffn)
        held, self.held = self.held, None
        for chosen in self.selections.values():
            for part in self.parts if len(chosen.neurons) else ():
                chosen.register_buffer(f"original_{part}", self._read(part, chosen.neurons), persistent=False)
        self.overlay = False
        self.hold(held)

    def masters(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """The ``[K, D]`` trained values of ``name`` (of the held language); none where it has no neurons here."""
        name = name or self.held
        return {part: getattr(self, part)[name] for part in self.parts if name in getattr(self, part)}

    def note_update(self, name: str) -> None:
        """Counts a change of a language's values, which the base has by now if it holds them.

        Graphs from before it are noticed by that.
        """
        self.writes[name] += 1
        if name == self.held:
            self._written[name] = self._stamp()

    def follow(self, stepped: set[int]) -> None:
        """Takes over what an optimizer did to parameters of these ``id``s, which fused ones leave no other trace of."""
        for name in self.selections:
            if any(id(master) in stepped for master in self.masters(name).values()):
                if name == self.held:
                    self.synchronize()
                else:
                    self.note_update(name)

    def trained(self) -> list[nn.Parameter | None]:
        """Gate rows, up rows and down columns of the held language; None where there are none."""
        held = self.masters() if self.held is not None else {}
        return [held.get(part) for part in PARTS]

    def originals(self, name: str | None = None) -> dict[str, Tensor]:
        """The ``[K, D]`` values of the base at the neurons of ``name`` (of the held language), in its dtype."""
        chosen = self.selections[name or self.held]
        if not len(chosen.neurons):
            return {}
        if self.overlay:
            return {part: self._read(part, chosen.neurons) for part in self.parts}
        return {part: getattr(chosen, f"original_{part}") for part in self.parts}

    def neurons(self, name: str | None = None) -> Tensor:
        """The neurons of ``name`` (of the held language), int64 ``[K]``."""
        return self.selections[name or self.held].neurons

    def base_weight(self, part: str) -> Tensor:
        """The base weight that a part belongs to, as ``[F, D]``; dequantised where it is quantised."""
        weights = dict(zip(PARTS, ("gate_weight", "up_weight", "down_weight"), strict=True))
        weight = getattr(self.ffn, weights[part])
        return weight.T if part == PARTS[2] else weight

    def set_policy(self, policy: Policy) -> None:
        """Chooses what is kept for backward, for this block and (``checkpoint``) its decoder layer.

        Raises:
            ConfigError: the policy is unknown.
        """
        if policy not in get_args(Policy):
            raise ConfigError(f"The policy {policy!r} is unknown; choose one of {', '.join(get_args(Policy))}.")
        # transformers' own switch, of this one layer.
        switch = self.ffn.decoder_layer.__dict__
        if self.policy == "checkpoint" and switch.get("_gradient_checkpointing_func") is _checkpoint:
            for name in _SWITCH:
                switch.pop(name, None)
            switch.update(self._switch_before)
        self.policy = policy
        if policy == "checkpoint":
            self._switch_before = {name: switch[name] for name in _SWITCH if name in switch}
            switch.update(gradient_checkpointing=self.training, _gradient_checkpointing_func=_checkpoint)

    def train(self, mode: bool = True) -> SubnetworkFFN:
        super().train(mode)
        # Only in training is the switch on: PEFT takes it as a sign that the embeddings must give gradients on, which
        # would cost a backward pass through the layers below the lowest trained one.
        switch = self.ffn.decoder_layer.__dict__
        if self.policy == "checkpoint" and switch.get("_gradient_checkpointing_func") is _checkpoint:
            switch["gradient_checkpointing"] = mode
        return self

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return subnetwork_function.compute(self, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubnetworkFFN:
        # What .to(), .half() and .cuda() call. Masters stay as wide as masters are, with all their bits.
        before = {id(master): master.data for name in self.selections for master in self.masters(name).values()}
        base = self.ffn.dtype
        super()._apply(fn, recurse)
        dtype = master_dtype(self.ffn.dtype)
        for name in self.selections:
            for master in self.masters(name).values():
                if master.dtype != dtype and id(master) in before:
                    _set_values(master, before[id(master)].to(master.device, dtype))
        if self.ffn.dtype != base:
            self.synchronize()
        return self

    @torch.no_grad()
    def _write(self, name: str, values: dict[str, Tensor]) -> None:
        """Writes ``[K, D]`` values into the base weight's rows and columns, rounded to its dtype."""
        neurons = self.selections[name].neurons
        for part, rows in {} if self.overlay else values.items():
            weight = self.base_weight(part)
            if isinstance(weight, DTensor):
                raise TrainingError(
                    f"The weights of layer {self.ffn.layer} were sharded after a subnetwork was attached to them, so "
                    "its values cannot be written into them; attach it with storage='overlay'."
                )
            # .data: the base is frozen, and a graph that must not see this write is caught by counting writes.
            _copy_rows(weight.data, neurons, rows.detach().to(weight.dtype))

    def _holds_base_values(self) -> bool:
        """Whether the held language's masters are, rounded, what the base has by itself."""
        # Meta tensors, on which a step is planned, have no values.
        if self.overlay or self.ffn.device.type == "meta":
            return False
        originals = self.originals()
        return all(torch.equal(master.to(self.ffn.dtype), originals[part]) for part, master in self.masters().items())

    def _stamp(self) -> tuple:
        return tuple((part, id(master), master._version) for part, master in self.masters().items())

    @torch.no_grad()
    def _read(self, part: str, neurons: Tensor) -> Tensor:
        return _rows(whole(self.base_weight(part).detach()), neurons)

    def _read_original(self, part: str, neurons: Tensor) -> Tensor:
        """What the base has at ``neurons``, in whose place the held language's values may stand."""
        rows = self._read(part, neurons)
        if self.held is not None and not self.overlay and self.masters():
            slots = self.selections[self.held].slots[neurons]
            rows[slots >= 0] = self.originals()[part][slots[slots >= 0]]
        return rows


def _rows(weight: Tensor, neurons: Tensor) -> Tensor:
    """A copy of weight[neurons], for ``[F, D]``: ``[K, D]``."""
    if weight.stride(-1) == 1:
        return weight[neurons]
    return weight.T[:, neurons].T.contiguous()


def _copy_rows(weight: Tensor, neurons: Tensor, rows: Tensor) -> None:
    """weight[neurons] = rows, for ``[F, D]`` and ``[K, D]``."""
    if weight.stride(-1) == 1:
        weight.index_copy_(0, neurons, rows)
    else:
        # Columns in memory, which are written several times as fast in the order in which they lie.
        weight.T[:, neurons] = rows.T.contiguous()


def _checkpoint(function: Callable, *arguments: Any, **keywords: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, **keywords)


def _take_loaded(layer: SubnetworkFFN, keys: Any) -> None:
    """After ``load_state_dict``: masters that were exchanged are what masters are again, and the base holds them."""
    place = {"device": layer.ffn.device, "dtype": master_dtype(layer.ffn.dtype)}
    for part in layer.parts:
        for master in getattr(layer, part).values():
            # A file may hold the base's dtype, and may have been read onto another device.
            if (master.device, master.dtype) != tuple(place.values()):
                master.data = master.data.to(**place)
    layer.synchronize_if_changed()


def _set_values(master: nn.Parameter, values: Tensor) -> None:
    """Exchanges a master's storage for values of another dtype, and its gradient's with it."""
    grad, master.grad = master.grad, None
    master.data = values
    master.grad = None if grad is None else grad.to(values.dtype)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that processes may share, in full; all of them must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradient(mesh: DeviceMesh, parameter: nn.Parameter) -> None:
    """Makes a replicated parameter's gradient its mean over the processes that each computed a share of the rows.

    What was averaged before stays as it is, so gradients may accumulate over several backward passes.
    """
    for dimension in range(mesh.ndim):
        dist.all_reduce(parameter.grad, group=mesh.get_group(dimension))
    parameter.grad.div_(mesh.size())


def master_dtype(base: torch.dtype) -> torch.dtype:
    """fp32, in which small updates are not rounded away; fp64 for an fp64 base."""
    return torch.float64 if base == torch.float64 else torch.float32


def check_writable(ffn: FFN) -> None:
    """Makes sure that trained values can be written into the base.

    Raises:
        AdapterError: the base is quantised or sharded.
    """
    if not ffn.writable:
        raise AdapterError(
            f"The base is quantised or sharded (in layer {ffn.layer}), so trained values cannot be written into it; "
            "`lape-fast merge --model BASE --adapter ADAPTER --output FOLDER` writes them into a 16-bit copy."
        )
