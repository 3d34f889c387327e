"""Methods put into a model: what the trainer trains, and the adapter that comes of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lape_fast.models import without_logits
from lape_fast.tune.adapter import write_adapter
from lape_fast.tune.dense import DenseWeights, MaskedAdamW, Masters, decoder_names, fingerprint, neuron_masks
from lape_fast.tune.dense import projection_names as dense_projections
from lape_fast.tune.methods import TuningConfig
from lape_fast.tune.subnetwork import Subnetwork
from lape_fast.tune.subnetwork_ffn import PARTS

if TYPE_CHECKING:
    from lape_fast.tune.peft_tuner import SubnetworkConfig

# Of the names that the subnetwork FFN has for its parts.
PROJECTIONS = dict(zip(PARTS, ("gate", "up", "down"), strict=True))


@dataclass(frozen=True)
class Run:
    """A method that was put into a model and is ready to be trained.

    Attributes:
        module: what the trainer is given; its checkpoints hold what is trained and no more.
        parts: the trained parameters by projection: gate, up, down, gate_up where they are fused, other.
        identity: of the base and the method; a run of something else is not resumed.
        optimizer: makes AdamW from ``lr`` and ``weight_decay``.
        held: within this context the model computes with the values trained so far.
        finish: ends training, and returns the adapter, whose values the model then computes with.
        write: writes that adapter into a folder that exists.
        undo: makes the model the base again, instead of ``finish``.
        cheap_loss: within this context the model computes its loss as cheaply as the method allows.
        trainable: how many weights are trained.
        neurons: how many are trained; None where none were chosen.
        subnetwork: the neurons per layer, where subnetwork FFNs train them.
    """

    module: nn.Module
    parts: dict[str, list[nn.Parameter]]
    identity: str
    optimizer: Callable[..., torch.optim.Optimizer]
    held: Callable[[], contextlib.AbstractContextManager]
    finish: Callable[[], Any]
    write: Callable[[Any, Path], None]
    undo: Callable[[], None]
    cheap_loss: Callable[[], contextlib.AbstractContextManager]
    trainable: int
    neurons: int | None = None
    subnetwork: list[Tensor] | None = None


def prepare(model: nn.Module, config: TuningConfig | SubnetworkConfig) -> Run:
    """Puts a method into a model.

    Raises:
        ArchitectureError: the model does not fit the neurons or the method.
        ConfigError: PEFT has no default for this architecture.
    """
    if not isinstance(config, TuningConfig):
        return _subnetwork_run(model, config)
    return _RUNS[config.method.name](model, config)


def subnetwork_config(config: TuningConfig) -> SubnetworkConfig:
    """The configuration of PEFT for a method that trains chosen neurons."""
    from lape_fast.tune.peft_tuner import SubnetworkConfig

    # A mask is how they are trained, not which they are.
    method = "subnetwork" if config.method.name == "masked" else config.method.name
    return SubnetworkConfig(
        neurons=config.neurons, language=config.language, method=method, policy=config.policy, seed=config.seed
    )


def _subnetwork_run(model: nn.Module, config: SubnetworkConfig) -> Run:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks the model by the older name of activation checkpointing.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        peft_model = get_peft_model(model, config)
    subnetwork = Subnetwork(model, peft_model.active_adapter)
    parts: dict[str, list[nn.Parameter]] = {}
    for layer in subnetwork.layers:
        for part, master in layer.masters(subnetwork.name).items():
            parts.setdefault(PROJECTIONS[part], []).append(master)

    return Run(
        module=peft_model,
        parts=parts,
        identity=config.replaced_values_sha256,
        optimizer=subnetwork.optimizer,
        held=contextlib.nullcontext,
        finish=lambda: subnetwork,
        write=lambda adapter, folder: write_adapter(adapter, folder, config.to_dict()),
        undo=lambda: subnetwork.detach(keep=False),
        cheap_loss=lambda: without_logits(model),
        trainable=subnetwork.trainable(),
        neurons=sum(map(len, subnetwork.neurons().values())),
        subnetwork=config.indices(),
    )


def _chosen_run(model: nn.Module, config: TuningConfig) -> Run:
    return _subnetwork_run(model, subnetwork_config(config))


def _masked_run(model: nn.Module, config: TuningConfig) -> Run:
    chosen = replace(subnetwork_config(config), policy="save")
    # Attached for a moment: it checks the neurons, and knows the values that they replace.
    subnetwork = chosen.attach(model)
    base, replaced, neurons = subnetwork.base, subnetwork.fingerprint(), subnetwork.neurons()
    trained = subnetwork.trainable()
    subnetwork.detach(keep=False)
    chosen = replace(chosen, base=base, replaced_values_sha256=replaced)
    masks = neuron_masks(model, chosen.indices())
    names = {name: projection for name, projection in dense_projections(model).items() if name in masks}
    run = _dense_run(model, config, names)
    masters = run.module

    def finish() -> Subnetwork:
        # Its values are those that a subnetwork attached to the trained weights would start from.
        weights = DenseWeights(model, masters.rounded())
        values = [parameter.detach().clone() for parameter in _taken_out(chosen.attach(model))]
        weights.detach(keep=False)
        trained = chosen.attach(model)
        with torch.no_grad():
            for parameter, value in zip(trained.parameters(), values, strict=True):
                parameter.copy_(value)
        trained.synchronize()
        return trained

    return replace(
        run,
        identity=f"{config.method} {config.language} {replaced}",
        optimizer=lambda lr, weight_decay: MaskedAdamW(
            list(masters.masters), [masks[name] for name in masters.names], lr, weight_decay
        ),
        finish=finish,
        write=lambda adapter, folder: write_adapter(adapter, folder, chosen.to_dict()),
        trainable=trained,
        neurons=sum(map(len, neurons.values())),
    )


def _taken_out(subnetwork: Subnetwork) -> list[nn.Parameter]:
    """The masters of a subnetwork that is detached again."""
    parameters = subnetwork.parameters()
    subnetwork.detach(keep=False)
    return parameters


def _dense_run(model: nn.Module, config: TuningConfig, names: dict[str, str]) -> Run:
    masters = Masters(model, list(names))
    parts: dict[str, list[nn.Parameter]] = {}
    for name, master in zip(masters.names, masters.masters, strict=True):
        parts.setdefault(names[name], []).append(master)
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    replaced = fingerprint({name: model.get_parameter(name).data for name in names})
    trains_head = any(id(model.get_parameter(name)) in head for name in names)

    @contextlib.contextmanager
    def held():
        weights = DenseWeights(model, masters.rounded())
        try:
            yield
        finally:
            weights.detach(keep=False)

    return Run(
        module=masters,
        parts=parts,
        identity=f"{config.method} {config.language} {replaced}",
        optimizer=lambda lr, weight_decay: adamw(masters.masters, lr, weight_decay),
        held=held,
        finish=lambda: DenseWeights(model, masters.rounded()),
        write=lambda adapter, folder: adapter.write(
            folder, {"method": str(config.method), "language": config.language}
        ),
        undo=lambda: None,
        # A head that is trained needs its logits.
        cheap_loss=contextlib.nullcontext if trains_head else lambda: without_logits(model),
        trainable=sum(master.numel() for master in masters.masters),
    )


def _peft_run(model: nn.Module, config: TuningConfig) -> Run:
    from transformers import set_seed

    from lape_fast.tune.peft_adapter import attach_peft

    # LoRA's first values are drawn.
    set_seed(config.seed)
    adapter = attach_peft(model, config.method)
    return Run(
        module=adapter.peft_model,
        parts=adapter.parts(),
        identity=f"{config.method} {config.language} seed {config.seed} {adapter.base['weights_hash']}",
        optimizer=lambda lr, weight_decay: adamw(adapter.parameters(), lr, weight_decay),
        held=contextlib.nullcontext,
        finish=lambda: adapter,
        write=lambda adapter, folder: adapter.write(folder),
        undo=lambda: adapter.detach(keep=False),
        cheap_loss=lambda: without_logits(model),
        trainable=adapter.trainable(),
    )


_RUNS: dict[str, Callable[[nn.Module, TuningConfig], Run]] = {
    "subnetwork": _chosen_run,
    "random": _chosen_run,
    "random-per-layer": _chosen_run,
    "masked": _masked_run,
    "ffn": lambda model, config: _dense_run(model, config, dense_projections(model)),
    "full": lambda model, config: _dense_run(model, config, decoder_names(model)),
    "lora": _peft_run,
    "ia3": _peft_run,
}


def adamw(parameters, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's fused AdamW. Matrices decay; norms, biases and IA3's factors, whose neutral value is not 0, do not."""
    decaying = [parameter for parameter in parameters if min(parameter.shape, default=0) > 1 and parameter.dim() > 1]
    ids = {id(parameter) for parameter in decaying}
    others = [parameter for parameter in parameters if id(parameter) not in ids]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
