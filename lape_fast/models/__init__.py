"""Models: where each architecture keeps its FFN, and how models are loaded and told apart."""

from lape_fast.models.layouts import (
    FFN,
    check_neurons,
    decoder,
    find_ffns,
    forward_hidden,
    layout_of,
    replaced,
    supports_packing,
    without_final_norm,
)
from lape_fast.models.loading import load_model, model_identity, tokenizer_hash

__all__ = [
    "FFN",
    "check_neurons",
    "decoder",
    "find_ffns",
    "forward_hidden",
    "layout_of",
    "load_model",
    "model_identity",
    "replaced",
    "supports_packing",
    "tokenizer_hash",
    "without_final_norm",
]
