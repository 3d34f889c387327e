"""Tuning: the subnetwork FFN, its adapters, and training on packed rows."""

from lape_fast.tune.adapter import load_adapter, merge_adapter, read_adapter_config, write_adapter
from lape_fast.tune.base_model import BaseSize, train_base_model
from lape_fast.tune.optimizer import IndexedAdamW, Part
from lape_fast.tune.planning import Plan, plan
from lape_fast.tune.policies import measured_peak
from lape_fast.tune.subnetwork import Subnetwork, attach_subnetwork
from lape_fast.tune.subnetwork_ffn import Policy, Storage, SubnetworkFFN
from lape_fast.tune.training import TrainingSettings
from lape_fast.tune.tuning import refuse_tuned, tune_language

__all__ = [
    "BaseSize",
    "IndexedAdamW",
    "Part",
    "Plan",
    "Policy",
    "Storage",
    "Subnetwork",
    "SubnetworkConfig",
    "SubnetworkFFN",
    "TrainingSettings",
    "attach_subnetwork",
    "load_adapter",
    "measured_peak",
    "merge_adapter",
    "plan",
    "read_adapter_config",
    "refuse_tuned",
    "train_base_model",
    "tune_language",
    "write_adapter",
]


def __getattr__(name: str):
    # PEFT takes seconds to import, and only its users need it.
    if name != "SubnetworkConfig":
        raise AttributeError(f"module 'lape_fast.tune' has no attribute {name!r}")
    from lape_fast.tune.peft_tuner import SubnetworkConfig

    return SubnetworkConfig
