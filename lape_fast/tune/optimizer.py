"""AdamW on the fp32 masters of a subnetwork that also rounds them into the weights they stand for, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lape_fast.errors import ConfigError
from lape_fast.ops import indexed_adamw_


class Part(NamedTuple):
    """What the optimizer trains of one weight: the rows of K neurons, which may be columns of a transpose.

    Attributes:
        parameter: the master ``[K, D]``, fp32 (fp64 for an fp64 weight).
        weight: gives the live ``[F, D]`` view, or None while it shall not be written.
        neurons: int64 ``[K]``, sorted and unique.
        updated: called after every update of the parameter.
    """

    parameter: nn.Parameter
    weight: Callable[[], Tensor | None]
    neurons: Tensor
    updated: Callable[[], None] | None = None


class IndexedAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) as ``torch.optim.AdamW`` computes it, for the parts of a whole model at once.

    Per entry it holds the two moments, 8 bytes, beside the master and its gradient; nothing else grows with K. State
    dicts can be exchanged with ``torch.optim.AdamW`` on the same parameters.

    Args:
        parts: what to train, all in one parameter group.
        lr: learning rate.
        betas: decay of the means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: of the masters, in units of lr; all other entries of the weights stay as they are.
        max_grad_norm: scales all gradients down to this total norm, as ``torch.nn.utils.clip_grad_norm_`` would, but
            on the way; None leaves them as they are.

    Raises:
        ConfigError: an option is out of its range, or there are no parts.

    Example:
        >>> down, neurons = torch.randn(8, 32), torch.tensor([3, 7])  # [D, F], [K]
        >>> master = nn.Parameter(down.T[neurons])
        >>> optimizer = IndexedAdamW([Part(master, lambda: down.T, neurons)], lr=1e-3, max_grad_norm=1.0)
        >>> master.square().sum().backward()
        >>> optimizer.step()  # down[:, neurons] is the rounded master now
    """

    def __init__(
        self,
        parts: Sequence[Part],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
    ):
        self._parts = list(parts)
        self.max_grad_norm = max_grad_norm
        if not self._parts:
            raise ConfigError("IndexedAdamW was given no parts; pass a Part for each weight that is trained.")
        smallest = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm or 0.0}
        for name, value in smallest.items():
            if not value >= 0:
                raise ConfigError(f"{name} is {value}, but it must be at least 0.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas are {betas}, but both must be at least 0 and below 1.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([part.parameter for part in self._parts], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses further groups, whose weights the optimizer would not know.

        Raises:
            ConfigError: always, after construction.
        """
        if self.param_groups:
            raise ConfigError("IndexedAdamW has one parameter group, that of its parts; give it all parts at once.")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # What a deep copy is made of; torch knows its own attributes only.
        return {**super().__getstate__(), "_parts": self._parts, "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ConfigError(f"The state is of an AdamW with {option}=True, which IndexedAdamW does not have.")
        for values in self.state.values():
            # A fused AdamW keeps it on the GPU, where reading it would wait for the device.
            values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step for every parameter that has a gradient; gradients stay as they are.

        Args:
            closure: computes the loss and its gradients anew, as for any optimizer.

        Returns:
            What the closure returned.

        Raises:
            ShapeError: a part's tensors do not fit together.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._parts = [_on_one_device(part) for part in self._parts]
        trained = [part for part in self._parts if part.parameter.grad is not None]
        clip = self._clip([part.parameter.grad for part in trained])
        # One launch, unless some parameters went without a gradient before or layers are on several devices.
        launches: dict[tuple[int, torch.device], list[Part]] = {}
        for part in trained:
            step = int(self._state_of(part)["step"]) + 1
            launches.setdefault((step, part.parameter.device), []).append(part)
        for (step, device), parts in launches.items():
            self._update(parts, step, None if clip is None else clip.to(device))
        return loss

    def _clip(self, grads: list[Tensor]) -> Tensor | None:
        """The factor of all gradients: a tensor, so that nobody waits for the norm."""
        if self.max_grad_norm is None or not grads:
            return None
        return (self.max_grad_norm / (nn.utils.get_total_norm(grads) + 1e-6)).clamp(max=1.0)

    def _state_of(self, part: Part) -> dict[str, Tensor]:
        state = self.state[part.parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(part.parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(part.parameter, memory_format=torch.contiguous_format)
        return state

    def _update(self, parts: Sequence[Part], step: int, clip: Tensor | None) -> None:
        (group,) = self.param_groups
        weights = [part.weight() for part in parts]
        states = [self.state[part.parameter] for part in parts]
        indexed_adamw_(
            [
                part.parameter.new_empty(0) if weight is None else weight
                for part, weight in zip(parts, weights, strict=True)
            ],
            [part.neurons for part in parts],
            [part.parameter.grad.contiguous() for part in parts],
            [part.parameter for part in parts],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            clip=clip,
        )
        for part, state in zip(parts, states, strict=True):
            state["step"] += 1
            if part.updated is not None:
                part.updated()


def _on_one_device(part: Part) -> Part:
    """The part with its neurons where its module was moved."""
    device = part.parameter.device
    return part if part.neurons.device == device else part._replace(neurons=part.neurons.to(device))
