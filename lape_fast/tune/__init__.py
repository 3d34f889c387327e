"""Tuning: the subnetwork FFN, its adapters, and training on packed rows."""

from lape_fast.tune.adapter import load_adapter, read_adapter_config, write_adapter_files
from lape_fast.tune.base_model import BaseSize, train_base_model
from lape_fast.tune.optimizer import IndexedAdamW, Part
from lape_fast.tune.subnetwork import Policy, Subnetwork, SubnetworkFFN, attach_subnetwork
from lape_fast.tune.training import TrainingSettings
from lape_fast.tune.tuning import Method, SubnetworkConfig, tune_language

__all__ = [
    "BaseSize",
    "IndexedAdamW",
    "Method",
    "Part",
    "Policy",
    "Subnetwork",
    "SubnetworkConfig",
    "SubnetworkFFN",
    "TrainingSettings",
    "attach_subnetwork",
    "load_adapter",
    "read_adapter_config",
    "train_base_model",
    "tune_language",
    "write_adapter_files",
]
