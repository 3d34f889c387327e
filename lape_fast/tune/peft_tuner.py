"""The subnetwork as a PEFT method: importing this module registers it with PEFT.

    from peft import get_peft_model
    from lape_fast import SubnetworkConfig

    model = get_peft_model(model, SubnetworkConfig(neurons="out/neurons.safetensors", language="mlt_Latn"))

From there on everything is PEFT's: ``save_pretrained``, ``PeftModel.from_pretrained``, ``set_adapter``,
``disable_adapter``, ``merge_and_unload``, the Trainer's adapter-only checkpoints, and transformers' own
``model.add_adapter`` and ``model.load_adapter``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn

from lape_fast.errors import AdapterError, ConfigError
from lape_fast.identify import NeuronSet, random_like
from lape_fast.models import check_size, model_identity
from lape_fast.text import canonical
from lape_fast.tune.adapter import check_base, check_fingerprint, decode_neurons, encode_neurons
from lape_fast.tune.subnetwork import (
    Subnetwork,
    attach_subnetwork,
    check_name,
    combine,
    fingerprint,
    install,
    installed_layers,
    uninstall,
)
from lape_fast.tune.subnetwork_ffn import PARTS, SubnetworkFFN, check_writable

NAME, PREFIX = "subnetwork", "trained_"

# `subnetwork` tunes the language's own neurons; the others are the control: as many neurons, drawn from all the others,
# over all layers or as many in each layer.
Method = Literal["subnetwork", "random", "random-per-layer"]


def _extend_peft_types(name: str) -> PeftType:
    """Makes ``name`` a member of PEFT's enum of methods, which has no entry point for methods from outside."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        # Of EnumType, __setattr__ refuses members.
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


PEFT_TYPE = _extend_peft_types(NAME.upper())


@dataclass(kw_only=True)
class SubnetworkConfig(PeftConfig):
    """Which neurons to tune, and how: a configuration of PEFT.

    Attributes:
        neurons: a neuron file, a ``NeuronSet``, or the language's neurons themselves: an index tensor per layer, or (as
            an adapter's file holds them) a line of numbers per layer.
        language: whose neurons.
        method: the language's own neurons, or an equally large random set that shares none with them.
        policy: what a subnetwork FFN keeps for its backward pass: save, recompute, checkpoint or auto.
        storage: resident, overlay or auto, see ``attach_subnetwork``.
        seed: of the random set.
        neurons_per_layer: F, filled in.
        base: the identity of the model, filled in.
        replaced_values_sha256: the fingerprint of the base's values at the neurons, filled in.

    Raises:
        LanguageError: the neuron file lacks the language.
        ConfigError: the method is unknown.

    Example:
        >>> config = SubnetworkConfig(neurons="out/neurons.safetensors", language="mlt_Latn", policy="recompute")
        >>> model = peft.get_peft_model(model, config)
    """

    neurons: Any = None
    language: str = ""
    method: Method = "subnetwork"
    policy: str = "save"
    storage: str = "auto"
    seed: int = 0
    neurons_per_layer: int | None = None
    base: dict | None = None
    replaced_values_sha256: str | None = None
    # Trainers read these, and set them where a tokenizer has new tokens.
    modules_to_save: ClassVar[list[str] | None] = None
    trainable_token_indices: ClassVar[dict[str, list[int]] | None] = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.task_type = self.task_type or "CAUSAL_LM"
        if self.method not in get_args(Method):
            raise ConfigError(f"The method {self.method!r} is unknown; choose one of {', '.join(get_args(Method))}.")
        if isinstance(self.neurons, list | tuple):
            if any(isinstance(chosen, Tensor) for chosen in self.neurons):
                self.neurons = encode_neurons(self.neurons)
            return
        if self.neurons is None:
            raise ConfigError("A SubnetworkConfig needs neurons: name a neuron file, such as neurons.safetensors.")
        neurons = self.neurons if isinstance(self.neurons, NeuronSet) else NeuronSet.load(self.neurons)
        self.language = canonical(self.language)
        if self.method != "subnetwork":
            neurons = random_like(neurons, self.language, self.seed, per_layer=self.method == "random-per-layer")
        self.neurons_per_layer = neurons.neurons_per_layer
        self.neurons = encode_neurons(neurons[self.language])

    def indices(self) -> list[Tensor]:
        """The neurons, int64 ``[K]`` per layer."""
        return decode_neurons(self.neurons)

    def attach(self, model: nn.Module) -> Subnetwork:
        """Attaches the subnetwork to a model without PEFT.

        Raises:
            ArchitectureError: the neurons do not fit the model.
        """
        self.check_size(model_identity(model))
        return attach_subnetwork(model, self.indices(), self.policy, storage=self.storage)

    def check_size(self, identity: Mapping[str, Any]) -> None:
        """Raises ArchitectureError unless the neurons were found in a model of this size."""
        made_for = (len(self.neurons), self.neurons_per_layer or identity["neurons_per_layer"])
        check_size(made_for, (identity["layers"], identity["neurons_per_layer"]))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return {name: value.value if isinstance(value, PeftType) else value for name, value in asdict(self).items()}


class SubnetworkLayer(SubnetworkFFN, BaseTunerLayer):
    """A subnetwork FFN that PEFT switches, merges and saves."""

    adapter_layer_names = PARTS
    other_param_names = ("selections",)

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        # PEFT reads every name in adapter_layer_names; an ungated FFN has no up rows.
        for part in PARTS:
            if part not in self.parts:
                setattr(self, part, nn.ParameterDict())
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        _check_one(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._hold_what_counts()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._hold_what_counts()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        name = self.check_merge(safe_merge, adapter_names)
        if name is None or name in self.merged_adapters:
            return
        self.make_resident()
        self.merged_adapters = [name]
        self._hold_what_counts()
        # Masters may have been written in ways that leave no trace.
        self.synchronize()

    def check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> str | None:
        """The adapter that ``merge`` would merge, if any.

        Raises:
            AdapterError: it is unknown, one of several, another is merged, or (safe_merge) its values are not finite.
        """
        name = _check_one(self.active_adapters if adapter_names is None else adapter_names)
        if name is None:
            return None
        if name not in self.selections:
            raise AdapterError(
                f"There is no adapter {name!r} to merge; the model has {', '.join(self.selections) or 'none'}."
            )
        if self.merged_adapters not in ([], [name]):
            raise AdapterError(
                f"The adapter {self.merged_adapters[0]!r} is merged, so {name!r} cannot be merged too; call "
                "unmerge_adapter() first, or combine both by add_weighted_adapter."
            )
        dtype = self.ffn.dtype
        if safe_merge and not all(master.detach().to(dtype).isfinite().all() for master in self.masters(name).values()):
            raise AdapterError(
                f"The adapter {name!r} holds values in layer {self.ffn.layer} that are not finite in {dtype}, "
                "so it was not merged; train it again from its last good checkpoint."
            )
        if self.overlay:
            check_writable(self.ffn)
        return name

    def unmerge(self) -> None:
        # The base goes on holding the values of the language that is active.
        self.merged_adapters = []
        self._hold_what_counts()

    def _hold_what_counts(self) -> None:
        """Holds the merged adapter, else the active one; none of them while adapters are disabled."""
        name = _check_one(self.merged_adapters or self.active_adapters)
        self.hold(name if name in self.selections and not self._disable_adapters else None)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.held == adapter_name:
            self.hold(None)
        super().delete_adapter(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        uninstall(self, self.merged_adapters[0] if self.merged_adapters else None)
        return self.ffn.original


class SubnetworkTuner(BaseTuner):
    """What ``get_peft_model`` wraps a model in; one language is active at a time."""

    prefix = PREFIX
    tuner_layer_cls = SubnetworkLayer
    target_module_mapping: dict[str, list[str]] = {}

    # PEFT may want empty masters on the meta device; ours start as the base's values, which are there already.
    @skip_init_on_device
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Makes the model's FFNs subnetwork FFNs of a language.

        Raises:
            ArchitectureError: the neurons or the adapter do not fit the model; it is left as it was.
            AdapterError: the name is taken, or cannot be one.
        """
        before = installed_layers(model)
        check_name(before, adapter_name)
        try:
            self._inject(model, adapter_name)
        except Exception:
            for layer in installed_layers(model):
                layer.remove(adapter_name)
                if layer not in before:
                    uninstall(layer, None)
            # PEFT and transformers take note of an adapter before it is there.
            self.peft_config.pop(adapter_name, None)
            if not hasattr(model, "peft_config"):
                model.__dict__.pop("_hf_peft_config_loaded", None)
            raise

    def _inject(self, model: nn.Module, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        if config.modules_to_save or config.trainable_token_indices:
            raise AdapterError(
                "A subnetwork trains no other weights, but its configuration was given modules_to_save="
                f"{config.modules_to_save} and trainable_token_indices={config.trainable_token_indices}; add no tokens "
                "to the tokenizer."
            )
        identity, what = model_identity(model), f"The adapter {adapter_name!r}"
        if config.base is not None:
            check_base(config.base, identity, what)
        config.check_size(identity)
        earlier = [(parameter, parameter.requires_grad) for parameter in _trained(model)]
        layers = install(model, config.indices(), adapter_name, config.policy, config.storage, SubnetworkLayer)
        found = fingerprint(layers, adapter_name)
        if config.replaced_values_sha256:
            check_fingerprint(asdict(config), found, what)
        config.base, config.replaced_values_sha256 = identity, found
        paths = {id(module): path for path, module in model.named_modules()}
        self.targeted_module_names = [paths[id(layer)] for layer in layers]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        for parameter, requires_grad in earlier:
            parameter.requires_grad = requires_grad

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> dict[str, int]:
        """Combines languages into a new adapter: the base's values plus the weighted sum of what each changed.

        Args:
            adapters: adapters of this model.
            weights: how much of each.
            adapter_name: of the new one, which is not made active.

        Returns:
            "neurons", how many the new adapter has, and "shared", how many of these are in more than one of the others.

        Raises:
            AdapterError: an adapter is unknown or named twice, the numbers differ, or the new name cannot be had.

        Example:
            >>> model.add_weighted_adapter(["mlt_Latn", "isl_Latn"], [1.0, 1.0], "both")
            {'neurons': 7411, 'shared': 637}
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if not adapters or unknown or len(set(adapters)) < len(adapters) or len(adapters) != len(weights):
            raise AdapterError(
                f"The adapters {', '.join(adapters) or 'given (none)'} with {len(weights)} weights have no sum; name "
                f"adapters of this model ({', '.join(self.peft_config)}), each once and with one weight."
            )
        layers = installed_layers(self.model)
        check_name(layers, adapter_name)
        report = combine(layers, dict(zip(adapters, weights, strict=True)), adapter_name)
        languages = "+".join(self.peft_config[name].language for name in adapters)
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            neurons=encode_neurons(_neurons(layers, adapter_name, len(self.peft_config[adapters[0]].neurons))),
            language=languages,
            replaced_values_sha256=fingerprint(layers, adapter_name),
        )
        for parameter in _trained(self.model, adapter_name):
            parameter.requires_grad_(False)
        return report

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(safe_merge, adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        # All layers before the first one is changed.
        for layer in installed_layers(self.model):
            layer.check_merge(safe_merge, adapter_names)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _create_and_replace(self, *arguments: Any, **options: Any) -> None:
        raise TypeError("Subnetwork FFNs are put in place by inject_adapter, all at once.")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The layer has given the model its own modules back.
        pass


def _check_one(names: str | list[str]) -> str | None:
    """The one language of a list that may hold one or none.

    Raises:
        AdapterError: it holds several.
    """
    names = [names] if isinstance(names, str) else list(names)
    if len(names) > 1:
        raise AdapterError(
            f"A subnetwork FFN computes with the values of one language at a time, but {', '.join(names)} were asked "
            "for; combine them into one adapter with add_weighted_adapter."
        )
    return names[0] if names else None


def _trained(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The masters of a language, or of all languages, in a model."""
    layers = installed_layers(model)
    names = [name] if name else list(layers[0].selections) if layers else []
    return [master for layer in layers for each in names for master in layer.masters(each).values()]


def _neurons(layers: Sequence[SubnetworkFFN], name: str, number: int) -> list[Tensor]:
    """The neurons of a language in all layers of the model."""
    chosen = {layer.ffn.layer: layer.neurons(name).cpu() for layer in layers}
    return [chosen.get(layer, torch.empty(0, dtype=torch.int64)) for layer in range(number)]


# PEFT refuses a second registration, as when this module is reloaded.
for registry in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
    registry.pop(PEFT_TYPE, None)
register_peft_method(name=NAME, config_cls=SubnetworkConfig, model_cls=SubnetworkTuner, prefix=PREFIX)
