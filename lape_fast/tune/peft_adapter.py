"""LoRA and IA3 through PEFT, with what all adapters have in common."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lape_fast.errors import ArchitectureError, ConfigError, FileFormatError
from lape_fast.files import read_json, write_json
from lape_fast.models import dense_ffns, model_identity, weights_hash
from lape_fast.tune.adapter import check_base
from lape_fast.tune.methods import Method

# Beside PEFT's own files: the base, which PEFT knows by its name alone.
BASE_NAME = "base.json"

OTHER = "other"


class PeftAdapter:
    """An adapter of PEFT in a model.

    Attributes:
        model: the base, in which PEFT has put its layers.
        peft_model: PEFT's own view of it.
        projections: the path of each FFN projection -> "gate", "up" or "down" ("gate_up" where fused).
        base: the identity of the base, with the hash of its weights.
    """

    def __init__(self, model: nn.Module, put: Any):
        self.model = model
        # While the base is whole.
        self.projections = projection_paths(model)
        self.base = base_facts(model)
        with _quiet():
            try:
                self.peft_model: PeftModel = put(model)
            except Exception:
                _take_out(model)
                raise

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parts in self.parts().values() for parameter in parts]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by the projection they belong to; "other" are those outside of the FFN."""
        parts: dict[str, list[nn.Parameter]] = {}
        prefix = self.peft_model.base_model.prefix
        for name, parameter in self.model.named_parameters():
            if prefix in name:
                path = name[: name.index(f".{prefix}")]
                parts.setdefault(self.projections.get(path, OTHER), []).append(parameter)
        return parts

    def trainable(self) -> int:
        """How many weights are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model computes with its original weights, bit for bit."""
        with self.peft_model.disable_adapter():
            yield

    def detach(self, *, keep: bool) -> None:
        """Gives the model its own modules back, with the update merged into its weights or the original ones."""
        if keep:
            self.peft_model.merge_and_unload()
        _take_out(self.model)

    def write(self, folder: Path) -> None:
        """Writes PEFT's files and the identity of the base into a folder that exists."""
        self.peft_model.save_pretrained(folder)
        write_json(folder / BASE_NAME, self.base)


def attach_peft(model: nn.Module, method: Method) -> PeftAdapter:
    """Puts a fresh adapter of a method of PEFT into a model.

    Raises:
        ConfigError: PEFT has no default for this architecture, or none of the targets is there.
    """
    config = _CONFIGS[method.name](model, method.options)
    try:
        return PeftAdapter(model, lambda base: get_peft_model(base, config))
    except ValueError as error:
        raise ConfigError(
            f"PEFT cannot put {method} into this {model.config.model_type} model ({error}); name its targets, as in "
            f"{method.name}:targets=down."
        ) from error


def load_peft(model: nn.Module, folder: str | os.PathLike) -> PeftAdapter:
    """Puts the adapter of a folder that PEFT wrote into its base.

    Raises:
        ArchitectureError: the adapter was made for another base, or does not fit this one.
        FileFormatError: the folder is not a complete adapter.
    """
    facts = Path(folder) / BASE_NAME
    if facts.is_file():
        made_for = read_json(facts)
        check_base(made_for, model_identity(model), f"The adapter {folder}")
        if made_for.get("weights_hash") != weights_hash(model):
            raise ArchitectureError(
                f"The adapter {folder} was made for another base: the weights of {made_for['model']} are not those of "
                "this model; load the checkpoint it names, in the dtype and quantisation it was trained in."
            )
    return put_peft(model, folder)


def put_peft(model: nn.Module, folder: str | os.PathLike) -> PeftAdapter:
    """``load_peft`` for a base that was made from the adapter's own, as by dequantising it."""
    try:
        adapter = PeftAdapter(model, lambda base: PeftModel.from_pretrained(base, os.fspath(folder)))
    except RuntimeError as error:
        raise ArchitectureError(
            f"The adapter {folder} does not fit this model ({str(error).splitlines()[0]}); load it on its own base."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{folder} cannot be read by PEFT ({error}); copy the adapter again.") from error
    adapter.peft_model.eval()
    return adapter


def base_facts(model: nn.Module) -> dict[str, Any]:
    """What tells a base from others whose weights are not replaced: its identity and the hash of its weights."""
    return {**model_identity(model), "weights_hash": weights_hash(model)}


def projection_paths(model: nn.Module) -> dict[str, str]:
    """The path of each FFN projection in the model -> its name."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(module)]: name for ffn in dense_ffns(model) for name, module in ffn.projections.items()}


def _lora(model: nn.Module, options: Mapping[str, Any]) -> PeftConfig:
    return LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=_targets(model, options["targets"]),
        task_type="CAUSAL_LM",
    )


def _ia3(model: nn.Module, options: Mapping[str, Any]) -> PeftConfig:
    if options["targets"] is None:
        return IA3Config(task_type="CAUSAL_LM")
    targets = _targets(model, options["targets"])
    # Factors of the neurons themselves: of what goes into down.
    into = _targets(model, ("down",)) if "down" in options["targets"] else []
    return IA3Config(target_modules=targets, feedforward_modules=into, task_type="CAUSAL_LM")


_CONFIGS = {"lora": _lora, "ia3": _ia3}


def _targets(model: nn.Module, projections: tuple[str, ...]) -> list[str]:
    """The paths within a layer of some projections, as PEFT matches them; fused ones are in it with either half."""
    found = set()
    for ffn in dense_ffns(model):
        paths = {id(module): path for path, module in ffn.decoder_layer.named_modules()}
        for name, module in ffn.projections.items():
            if set(name.split("_")) & set(projections):
                found.add(paths[id(module)])
    return sorted(found)


def _take_out(model: nn.Module) -> None:
    """Gives a model its own modules back, whatever PEFT has put around them."""
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())
    # PEFT would take the next adapter for a second one.
    model.__dict__.pop("peft_config", None)
    model.requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT asks the model by the older name of activation checkpointing.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # gpt2's Conv1D; PEFT sets what the warning tells it to.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        yield
