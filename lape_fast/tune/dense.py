"""Dense weights: whole parameters that a method trains, and the adapters that hold them.

While they train, the trained values are masters in fp32 beside the base, which is computed with the masters rounded to
its own dtype and is never written. Afterwards an adapter exchanges the storage of the base's parameters for that of
the trained values, and back.

``trained_weights.safetensors`` holds the values in the base's dtype by the names of the model's parameters,
``dense_config.json`` the base they belong to and a fingerprint of the values they replace.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lape_fast.errors import ArchitectureError, FileFormatError
from lape_fast.files import SCHEMA_VERSION, fits, read_json, read_tensors, write_json, write_tensors
from lape_fast.models import FFN, decoder, dense_ffns, model_identity
from lape_fast.tune.adapter import check_base, check_fingerprint
from lape_fast.tune.subnetwork_ffn import master_dtype

CONFIG_NAME, TENSORS_NAME = "dense_config.json", "trained_weights.safetensors"

# What is read of the configuration.
CONFIG_SHAPE = {"kind": str, "base": dict, "replaced_values_sha256": str}
KIND = "trained-weights"

OTHER = "other"


class Masters(nn.Module):
    """Computes a model with masters of some of its parameters, rounded to the model's dtype.

    The masters are all that this module owns, so they are all that a checkpoint of it holds.

    Args:
        model: every parameter of it is frozen.
        names: of the parameters that are trained.

    Attributes:
        model: the model, which is not a submodule.
        names: of the trained parameters.
        masters: in fp32 (fp64 for fp64 parameters), in the order of the names.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        # A submodule would put the whole base into every checkpoint.
        object.__setattr__(self, "model", model)
        # From these the Trainer knows that the loss shifts its labels, and switches the cache off, with which a model
        # would let the documents of a row see each other.
        self.config, self.loss_type = model.config, model.loss_type
        model.requires_grad_(False)
        self.names = list(names)
        originals = [model.get_parameter(name).detach() for name in names]
        self._dtypes = [original.dtype for original in originals]
        self.masters = nn.ParameterList(
            nn.Parameter(original.to(master_dtype(original.dtype), copy=True)) for original in originals
        )

    def forward(self, **batch: Any) -> Any:
        return functional_call(self.model, self.rounded(), (), batch)

    def rounded(self) -> dict[str, Tensor]:
        """The values that the model computes with, by name."""
        return {
            name: master.to(dtype) for name, master, dtype in zip(self.names, self.masters, self._dtypes, strict=True)
        }

    def train(self, mode: bool = True) -> Masters:
        self.model.train(mode)
        return super().train(mode)


class MaskedAdamW(torch.optim.AdamW):
    """AdamW of parameters of which only some entries are trained: no other entry ever changes a bit.

    The gradients are masked as soon as they are formed, so that their norm is that of the trained entries.

    Args:
        parameters: to train.
        masks: which of their entries, bool, of the same shapes.
        lr, weight_decay: as of ``torch.optim.AdamW``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], masks: Sequence[Tensor], lr: float, weight_decay: float):
        # Decay is ours: torch's would shrink all entries.
        super().__init__(parameters, lr=lr, weight_decay=0.0)
        self._masks, self._decay = list(masks), weight_decay
        for parameter, mask in zip(parameters, masks, strict=True):
            parameter.register_hook(lambda gradient, mask=mask: gradient.masked_fill(~mask, 0))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter, mask in zip(group["params"], self._masks, strict=True):
                parameter.sub_(torch.where(mask, parameter * (group["lr"] * self._decay), 0))
        return super().step(closure)


class DenseWeights:
    """Trained values in the place of some of a model's parameters.

    Args:
        model: the base.
        values: by the names of its parameters, in their dtype and on their device.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]):
        self.model = model
        self._places = {name: model.get_parameter(name) for name in values}
        self._values = dict(values)
        self._originals = {name: parameter.data for name, parameter in self._places.items()}
        self._put(self._values)

    def values(self) -> dict[str, Tensor]:
        """The trained values by name."""
        return dict(self._values)

    def trainable(self) -> int:
        """How many weights are trained."""
        return sum(value.numel() for value in self._values.values())

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model computes with its original weights, bit for bit."""
        self._put(self._originals)
        try:
            yield
        finally:
            self._put(self._values)

    def detach(self, *, keep: bool) -> None:
        """Leaves the trained values in the model's parameters, or puts the original ones back."""
        self._put(self._values if keep else self._originals)

    def fingerprint(self) -> str:
        """SHA-256 over the original values that are replaced, to know the base again."""
        return fingerprint(self._originals)

    def write(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Writes the two files of an adapter into a folder that exists.

        Args:
            folder: where; use ``atomic_folder`` for an adapter that others shall read.
            config: JSON values that say what was trained: ``method`` and ``language``.
        """
        # Two names of one storage, as of a tied head, are one parameter and so have one name here.
        write_tensors(folder / TENSORS_NAME, KIND, self._values, {"language": config["language"]})
        facts = {"base": model_identity(self.model), "replaced_values_sha256": self.fingerprint()}
        write_json(folder / CONFIG_NAME, {"kind": KIND, "schema_version": SCHEMA_VERSION, **config, **facts})

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._places.items():
            parameter.data = values[name]


def load_dense(model: nn.Module, folder: str | os.PathLike) -> DenseWeights:
    """Puts the values of a dense adapter into its base.

    Raises:
        FileFormatError: the folder is not a complete dense adapter.
        ArchitectureError: the adapter was made for another base.
    """
    path, what = Path(folder) / CONFIG_NAME, f"The adapter {folder}"
    config = read_json(path)
    if not fits(config, CONFIG_SHAPE) or config["kind"] != KIND:
        raise FileFormatError(f"{path} is not the configuration of a dense adapter; name the folder tune wrote.")
    tensors, _ = read_tensors(Path(folder) / TENSORS_NAME, KIND)
    check_base(config["base"], model_identity(model), what)
    known = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in known or known[name].shape != tensor.shape:
            found = list(known[name].shape) if name in known else "no such weight"
            raise FileFormatError(
                f"{folder} is damaged: it holds {list(tensor.shape)} for {name}, of which the model has {found}; copy "
                "the adapter again."
            )
    check_fingerprint(config, fingerprint({name: known[name].data for name in tensors}), what)
    model.requires_grad_(False)
    return DenseWeights(model, {name: tensor.to(known[name].device) for name, tensor in tensors.items()})


def fingerprint(values: Mapping[str, Tensor]) -> str:
    """SHA-256 over named values in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def projection_names(model: nn.Module) -> dict[str, str]:
    """The parameters of the FFN projections, name -> projection ("gate", "up" or "down"; "gate_up" where fused)."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {
        f"{paths[id(module)]}.{name}": projection
        for ffn in _writable_ffns(model)
        for projection, module in ffn.projections.items()
        for name, _ in module.named_parameters(recurse=False)
    }


def decoder_names(model: nn.Module) -> dict[str, str]:
    """The parameters of the decoder and the head, name -> projection, or "other" for all that are in no FFN."""
    projections = projection_names(model)
    own = {id(parameter) for part in (decoder(model), model.get_output_embeddings()) for parameter in part.parameters()}
    return {name: projections.get(name, OTHER) for name, parameter in model.named_parameters() if id(parameter) in own}


@torch.no_grad()
def neuron_masks(model: nn.Module, neurons: Sequence[Tensor]) -> dict[str, Tensor]:
    """Which entries of the FFN projections are weights of some neurons: bool, by the name of the parameter."""
    weights = {name: model.get_parameter(name) for name in projection_names(model) if name.endswith(".weight")}
    before = {name: weight.data for name, weight in weights.items()}
    try:
        # Marked through the views by which the neurons of every layout are reached.
        for weight in weights.values():
            weight.data = torch.zeros_like(weight)
        for ffn, chosen in zip(_writable_ffns(model), neurons, strict=True):
            chosen = chosen.to(ffn.device)
            for rows in (ffn.gate_weight, ffn.up_weight, ffn.down_weight.T):
                if rows is not None:
                    rows[chosen] = 1
        return {name: weight.data != 0 for name, weight in weights.items()}
    finally:
        for name, weight in weights.items():
            weight.data = before[name]


def _writable_ffns(model: nn.Module) -> list[FFN]:
    ffns = dense_ffns(model)
    if not all(ffn.writable for ffn in ffns):
        raise ArchitectureError(
            "The base is quantised or sharded, so whole weights of it cannot be trained; use the methods subnetwork or "
            "lora, or load it on one device in bfloat16, float16 or float32."
        )
    return ffns
