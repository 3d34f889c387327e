"""Tuning: the subnetwork FFN, its adapters, and training on packed rows."""

import importlib

from lape_fast.tune.adapter import read_adapter_config, write_adapter
from lape_fast.tune.base_model import BaseSize, train_base_model
from lape_fast.tune.dense import DenseWeights
from lape_fast.tune.flops import count_flops
from lape_fast.tune.loading import adapter_kind, describe_adapter, load_adapter, merge_adapter, name_adapters
from lape_fast.tune.methods import METHODS, Method, TuningConfig, parse_method
from lape_fast.tune.optimizer import IndexedAdamW, Part
from lape_fast.tune.planning import Plan, plan
from lape_fast.tune.policies import measured_peak
from lape_fast.tune.subnetwork import Subnetwork, attach_subnetwork
from lape_fast.tune.subnetwork_ffn import Policy, Storage, SubnetworkFFN
from lape_fast.tune.training import TrainingSettings
from lape_fast.tune.tuning import refuse_tuned, tune_language

__all__ = [
    "METHODS",
    "BaseSize",
    "DenseWeights",
    "IndexedAdamW",
    "Method",
    "Part",
    "Plan",
    "Policy",
    "Storage",
    "Subnetwork",
    "SubnetworkConfig",
    "SubnetworkFFN",
    "TrainingSettings",
    "TuningConfig",
    "adapter_kind",
    "attach_subnetwork",
    "count_flops",
    "describe_adapter",
    "load_adapter",
    "measured_peak",
    "merge_adapter",
    "name_adapters",
    "parse_method",
    "plan",
    "read_adapter_config",
    "read_dynamics",
    "refuse_tuned",
    "train_base_model",
    "tune_language",
    "write_adapter",
]


# PEFT and transformers' trainer take seconds to import, and only their users need them.
_LAZY = {"SubnetworkConfig": "peft_tuner", "read_dynamics": "dynamics"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'lape_fast.tune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lape_fast.tune.{_LAZY[name]}"), name)
