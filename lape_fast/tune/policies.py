"""The policy ``auto``: what is kept for backward is decided at the first training step, from the memory free then."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch._compile import _disable_dynamo

from lape_fast.models import decoder

if TYPE_CHECKING:
    from lape_fast.tune.subnetwork_ffn import Policy, SubnetworkFFN

# The fastest first.
POLICIES: tuple[Literal["save", "recompute", "checkpoint"], ...] = ("save", "recompute", "checkpoint")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def set_policies(layers: Sequence[SubnetworkFFN], policy: Policy) -> None:
    """Sets a policy for all layers of a model, from the lowest up."""
    lowest = next((layer for layer in layers if layer.held is not None and len(layer.neurons())), None)
    for layer in layers:
        layer.set_policy(policy_of_layer(policy, layer is lowest))


def policy_of_layer(policy: Policy, lowest: bool) -> Policy:
    """The policy of one layer: the lowest trained one is not checkpointed.

    Computing it a second time would bring nothing, for no gradient passes through it.
    """
    return "save" if policy == "checkpoint" and lowest else policy


def decide_at_first_step(model: nn.Module) -> None:
    """Lets the first forward pass in training mode that records gradients decide for the layers that say ``auto``."""

    base = decoder(model)

    # Nothing of the planner is to be compiled.
    @_disable_dynamo
    def decide(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        from lape_fast.tune.planning import choose_policy
        from lape_fast.tune.subnetwork import installed_layers

        if not (module.training and torch.is_grad_enabled()):
            return
        # A copy of the model has the same hook, and may be the first to train.
        if module is base:
            handle.remove()
        layers = installed_layers(module)
        if not any(layer.policy == "auto" for layer in layers):
            return
        inputs = next(
            value
            for value in (options.get("input_ids"), options.get("inputs_embeds"), *arguments)
            if isinstance(value, torch.Tensor)
        )
        # Either may lead to a mask, which attention then keeps.
        packed = any(options.get(name) is not None for name in ("position_ids", "attention_mask"))
        free = free_bytes(layers[0].ffn.device)
        policy = choose_policy(model, layers, *inputs.shape[:2], free, packed=packed)
        set_policies(layers, _agreed(policy, layers[0].ffn.device))

    handle = base.register_forward_pre_hook(decide, with_kwargs=True)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: on CUDA with what torch's allocator holds unused, else of free RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available


@contextlib.contextmanager
def measured_peak(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures the most memory that was used inside the ``with`` block, into the dict that it yields.

    ``bytes`` is, on CUDA, the most that torch had allocated (``kind`` "allocated"), to be compared with
    ``PolicyPlan.allocated``; on the CPU, where that is not counted, how far the process's peak of resident memory rose
    above where it began (``kind`` "resident growth"), or None where the system does not tell.

    Example:
        >>> with measured_peak(torch.device("cpu")) as peak:
        ...     values = torch.ones(1_000_000)
        >>> peak["kind"]
        'resident growth'
    """
    peak: dict[str, Any] = {"bytes": None, "kind": "allocated" if device.type == "cuda" else "resident growth"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    # Writing 5 makes the kernel forget the peak so far (man 5 proc).
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")
    before = _resident("VmRSS")
    yield peak
    after = _resident("VmHWM")
    if before is not None and after is not None:
        peak["bytes"] = after - before


def _resident(field: str) -> int | None:
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _agreed(policy: Policy, device: torch.device) -> Policy:
    """The slowest policy that a process chose: sharded layers are gathered together, in forward as in backward."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return policy
    number = torch.tensor(POLICIES.index(policy), device=device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return POLICIES[int(number)]
