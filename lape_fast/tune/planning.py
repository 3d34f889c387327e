"""The memory plan of a training: what it takes under each policy, which batch fits, and on which GPU.

What stays between steps is counted, and a step is traced, on a model of meta tensors (lape_fast/tune/workload.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lape_fast.errors import ConfigError
from lape_fast.identify import NeuronSet
from lape_fast.models import (
    FP8_METHOD,
    Quantise,
    layout_of,
    load_config,
    named_dtype,
)
from lape_fast.tune.policies import POLICIES
from lape_fast.tune.subnetwork_ffn import Policy, SubnetworkFFN
from lape_fast.tune.workload import MOMENTS, Workload

GIB = 2**30

# Assumed: the share of a GPU's nominal memory that training does not get, because the driver and error correction take
# some of it and the allocator leaves gaps.
HELD_BACK = 0.08

# The share of the free memory that `auto` leaves alone: gaps between allocations, workspaces, and what kernels allocate
# inside themselves.
MARGIN = 0.1

# Nominal GiB.
GPUS = {
    "RTX 3060": 12,
    "RTX A4000": 16,
    "L4": 24,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "A100 40GB": 40,
    "L40S": 48,
    "A100 80GB": 80,
    "H100": 80,
    "GH200": 96,
    "H200": 141,
    "B200": 180,
}


@dataclass(frozen=True)
class PolicyPlan:
    """What training takes under one policy, in bytes.

    Attributes:
        activations: kept between forward and backward.
        phases: the most at any time of each part of a step, with all that is resident.
        peak: the most at any time.
        allocated: of the peak, what torch allocates, as ``torch.cuda.max_memory_allocated`` counts it.
    """

    activations: int
    phases: Mapping[str, int]
    peak: int
    allocated: int


@dataclass(frozen=True)
class Plan:
    """What training a subnetwork will take; ``print(plan)`` shows it, all figures are bytes.

    Attributes:
        training: what is planned, by name.
        resident: what stays between steps, by name.
        gradients: of the trained weights, there from backward to the optimizer's step.
        policies: per policy, the fastest first.
        gpu: the name of the GPU that is planned for, or None.
        usable: its bytes that training gets, or None.
        policy: what was asked for, or the fastest that fits; None if none does.
        largest_rows: per GPU and policy, the rows at once that fit.
    """

    training: Mapping[str, Any]
    resident: Mapping[str, int]
    gradients: int
    policies: Mapping[str, PolicyPlan]
    gpu: str | None
    usable: int | None
    policy: str | None
    largest_rows: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> int | None:
        """The peak under ``policy``; None where no policy fits."""
        return None if self.policy is None else self.policies[self.policy].peak

    def fits(self, policy: str) -> bool | None:
        """Whether a policy fits into the GPU; None where there is none."""
        return None if self.usable is None else self.policies[policy].peak <= self.usable

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {**asdict(self), "peak": self.peak, "fits": {policy: self.fits(policy) for policy in self.policies}}

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Headers and rows of what a person reads: what is resident, the policies, and the GPUs."""
        resident = [[name, _gib(size)] for name, size in {**self.resident, "gradients": self.gradients}.items()]
        phases = next(iter(self.policies.values())).phases
        policies = [
            [name, _gib(plan.activations), *map(_gib, plan.phases.values()), _gib(plan.peak), _FITS[self.fits(name)]]
            for name, plan in self.policies.items()
        ]
        gpus = [[name, *(f"{rows:,}" for rows in largest.values())] for name, largest in self.largest_rows.items()]
        return [
            (["resident", "GiB"], resident),
            (["policy", "activations", *phases, "peak GiB", "fits"], policies),
            (["rows at once on", *self.policies], gpus),
        ]

    def summary(self) -> str:
        """What is planned and what comes out, in a sentence or two."""
        what = self.training
        quantised = f" ({what['quantise']})" if what["quantise"] else ""
        sentence = (
            f"{what['neurons']:,} neurons ({what['trained_weights']:,} weights) of {what['model']} in {what['dtype']}"
            f"{quantised}, {what['rows_per_pass']} rows of {what['context_length']:,} tokens at once."
        )
        if self.policy is None:
            advice = self._advise_rows() or "Train shorter rows, or quantise the base."
            return f"{sentence} No policy fits into {self.gpu}. {advice}"
        fits = self.fits(self.policy)
        where = f", which {'fits' if fits else 'does not fit'} into {self.gpu}" if self.gpu else ""
        advice = f" {self._advise_rows()}" if fits is False else ""
        return f"{sentence} With policy {self.policy} the peak is {_gib(self.peak)} GiB{where}.{advice}".rstrip()

    def _advise_rows(self) -> str:
        """The fastest policy that fits with fewer rows at once, and how many; nothing where none does."""
        step = self.training["rows_per_step"]
        for policy in [self.policy] if self.policy else self.policies:
            most = min(self.largest_rows[self.gpu][policy], self.training["rows_per_pass"] - 1)
            # A step is so many whole passes.
            rows = next((rows for rows in range(most, 0, -1) if step % rows == 0), 0)
            if rows:
                return f"Policy {policy} fits with rows_per_pass={rows}, and trains the same to rounding."
        return ""

    def __str__(self) -> str:
        return "\n\n".join([self.summary(), *(_aligned([headers, *rows]) for headers, rows in self.tables())])


def plan(
    model: Any,
    neurons: str | os.PathLike | NeuronSet | Sequence[Tensor] | Sequence[int],
    *,
    language: str | None = None,
    rows_per_step: int,
    context_length: int,
    rows_per_pass: int | None = None,
    policy: Policy | None = None,
    gpu: str | float | None = None,
    quantise: Quantise | None = None,
    dtype: str | torch.dtype = "auto",
    packed: bool | None = None,
    device: str = "cuda",
) -> Plan:
    """Predicts the memory of training a subnetwork, in seconds and without loading a weight.

    The parts that are counted and the activations are exact; a kernel's own workspace is not seen.

    Args:
        model: a config, a model, its folder or its hub id.
        neurons: a neuron file, the neurons, or per layer the indices or how many there are.
        language: whose neurons; may be left out where a set has only one language.
        rows_per_step: rows of an optimizer's step.
        context_length: tokens per row.
        rows_per_pass: rows that are computed at once, with gradients accumulating over passes; None for all.
        policy: what is kept for backward; None and ``auto`` are the fastest that fits.
        gpu: a name of ``GPUS``, how many GiB training can have, or None for this machine's GPU if it has one.
        quantise: plan for weights that are quantised when they are loaded, as by ``load_model``; those that are stored
            quantised are planned so.
        dtype: of the model; "auto" keeps the checkpoint's.
        packed: whether rows hold several documents, so that attention keeps a mask; None where the model can.
        device: "cuda", or "cpu" to account for the CPU's kernels.

    Raises:
        ConfigError: the model cannot be found, the GPU, quantisation, policy or dtype is unknown, or a size makes no
            sense.
        ArchitectureError: the architecture is unknown or a mixture of experts, or the neurons do not fit it.
        LanguageError: the neurons lack the language.
        TrainingError: there is no neuron to train.

    Example:
        >>> print(plan("meta-llama/Llama-3.1-8B", "neurons.safetensors", language="mlt_Latn", rows_per_step=1,
        ...     context_length=4096, gpu="RTX 4090"))
    """
    rows = rows_per_pass or rows_per_step
    for name, value in (("rows_per_step", rows_per_step), ("context_length", context_length), ("rows_per_pass", rows)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    _check_one_of("policy", policy, get_args(Policy))
    _check_one_of("quantisation", quantise, get_args(Quantise))
    _check_one_of("device", device, ("cuda", "cpu"))
    gpu_name, usable = _find_gpu(gpu)
    source, config, model_dtype = _read_model(model, dtype)
    quantise = quantise or _quantisation_of(config)
    workload = Workload(
        config,
        model_dtype,
        functools.partial(_indices, neurons, language),
        rows,
        context_length,
        packed=packed,
        device=device,
        accumulates=rows < rows_per_step,
        quantise=quantise,
        overlay=quantise is not None,
    )
    resident = workload.resident()
    base = sum(resident.values())
    policies = {}
    for name in POLICIES:
        phases = {phase: base + size for phase, size in workload.phases(name, rows).items()}
        peak = max(phases.values())
        activations = workload.trace(name, rows).kept
        policies[name] = PolicyPlan(activations, phases, peak, peak - resident.get("CUDA context", 0))
    if policy in (None, "auto"):
        fitting = [name for name in POLICIES if usable is None or policies[name].peak <= usable]
        policy = fitting[0] if fitting else None
    rooms = {f"{name} ({size} GB)": _usable(size) for name, size in GPUS.items()}
    if usable is not None and gpu_name not in rooms:
        rooms = {gpu_name: usable, **rooms}
    return Plan(
        training={
            "model": source,
            "model_type": config.model_type,
            "dtype": str(model_dtype).removeprefix("torch."),
            "quantise": quantise,
            "device": device,
            "neurons": sum(workload.sizes),
            "trained_weights": workload.trained_weights,
            "rows_per_step": rows_per_step,
            "rows_per_pass": rows,
            "context_length": context_length,
            "packed": workload.packed,
        },
        resident=resident,
        gradients=workload.gradients,
        policies=policies,
        gpu=gpu_name,
        usable=usable,
        policy=policy,
        largest_rows={
            name: {each: workload.largest_rows(each, room - base) for each in POLICIES} for name, room in rooms.items()
        },
    )


def choose_policy(
    model: nn.Module,
    layers: Sequence[SubnetworkFFN],
    rows: int,
    context_length: int,
    free: int,
    *,
    packed: bool,
) -> Policy:
    """The fastest policy whose training step fits into the free memory, or ``checkpoint`` if none does.

    Args:
        model: on its device, with the subnetwork FFNs in it.
        layers: the subnetwork FFNs, from the lowest up.
        rows: of the batch.
        context_length: tokens per row.
        free: bytes; a tenth of them is left for gaps between allocations and for kernels' workspaces.
        packed: whether attention needs a mask.
    """
    sizes = [0] * layers[0].ffn.layer + [0 if layer.held is None else len(layer.neurons()) for layer in layers]
    device = "cuda" if layers[0].ffn.device.type == "cuda" else "cpu"
    workload = Workload(
        model.config,
        layers[0].ffn.dtype,
        functools.partial(_indices, sizes, None),
        rows,
        context_length,
        packed=packed,
        device=device,
        accumulates=True,
        quantise=_quantisation_of(model.config),
        overlay=layers[0].overlay,
    )
    # The first step begins without gradients, which may accumulate, moments and fp8's copies. The masters are there.
    room = (1 - MARGIN) * free - MOMENTS * workload.gradients - workload.transposed
    return next((name for name in POLICIES[:-1] if max(workload.phases(name, rows).values()) <= room), POLICIES[-1])


def _indices(neurons: Any, language: str | None, layers: int, width: int) -> list[Tensor]:
    """One index tensor per layer, of neurons in any of the forms that ``plan`` takes."""
    if isinstance(neurons, (str, os.PathLike)):
        neurons = NeuronSet.load(neurons)
    if not isinstance(neurons, NeuronSet):
        counts = [chosen for chosen in neurons if not isinstance(chosen, Tensor)]
        if counts and min(counts) < 0:
            raise ConfigError(f"A layer is to have {min(counts)} neurons; give how many it has, 0 or more.")
        return [chosen if isinstance(chosen, Tensor) else torch.arange(chosen) for chosen in neurons]
    if language is None and len(neurons.languages) > 1:
        raise ConfigError(
            f"The neurons are of {len(neurons.languages)} languages; say which one to plan for, such as "
            f"language={neurons.languages[0]!r}."
        )
    neurons.check_model(layers, width)
    return neurons[language or neurons.languages[0]]


def _read_model(model: Any, dtype: str | torch.dtype) -> tuple[str, Any, torch.dtype]:
    """The name, the config and the dtype of a model in any of the forms that ``plan`` takes."""
    if isinstance(model, (str, os.PathLike)):
        source, config, own = os.fspath(model), load_config(model), None
    elif isinstance(model, nn.Module):
        layout_of(model)
        source, config, own = model.name_or_path, model.config, model.dtype
    else:
        source, config, own = getattr(model, "name_or_path", ""), model, None
    chosen = named_dtype(dtype)
    if chosen == "auto":
        chosen = own or getattr(config, "dtype", None) or torch.float32
    return source or config.model_type, config, chosen


# What a config calls a method of quantising -> what it is here; bitsandbytes' says which in a setting.
_METHODS = {"bitsandbytes": None, "torchao": "torchao-int8", FP8_METHOD: "fp8"}


def _quantisation_of(config: Any) -> str | None:
    """How the weights of a checkpoint, or of a model that was loaded, are quantised."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = settings.get("quant_method")
    if method not in _METHODS:
        raise ConfigError(
            f"The model is quantised by {method}, which cannot be tuned; use one quantised by bitsandbytes."
        )
    return _METHODS[method] or ("nf4" if settings.get("load_in_4bit") else "int8")


def _find_gpu(gpu: str | float | None) -> tuple[str | None, int | None]:
    """The name of a GPU and the bytes that training gets of it."""
    if gpu is None:
        if not torch.cuda.is_available():
            return None, None
        properties = torch.cuda.get_device_properties(0)
        return properties.name, int((1 - HELD_BACK) * properties.total_memory)
    if isinstance(gpu, (int, float)):
        if gpu <= 0:
            raise ConfigError(f"The GPU is to have {gpu} GiB; give how many GiB training can have.")
        return f"{gpu:g} GiB", int(gpu * GIB)
    plain = {_plain(name): name for name in GPUS}
    if _plain(gpu) not in plain:
        raise ConfigError(f"The GPU {gpu!r} is unknown; give how many GiB it has, or one of {', '.join(GPUS)}.")
    name = plain[_plain(gpu)]
    return f"{name} ({GPUS[name]} GB)", _usable(GPUS[name])


def _usable(nominal: int) -> int:
    return int((1 - HELD_BACK) * nominal * GIB)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _check_one_of(what: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"The {what} {value!r} is unknown; choose one of {', '.join(known)}.")


_FITS = {True: "yes", False: "no", None: "-"}


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
