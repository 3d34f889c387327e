"""The ops: each module holds the plain PyTorch reference, the registration and the public function of one op."""

from lape_fast.ops.gated_activation import ACTIVATIONS, gated_activation
from lape_fast.ops.gated_activation_backward import gated_activation_backward, slot_map
from lape_fast.ops.indexed_adamw import indexed_adamw_
from lape_fast.ops.linear_cross_entropy import linear_cross_entropy
from lape_fast.ops.quantise_rows import quantise_rows

__all__ = [
    "ACTIVATIONS",
    "gated_activation",
    "gated_activation_backward",
    "indexed_adamw_",
    "linear_cross_entropy",
    "quantise_rows",
    "slot_map",
]
