"""Models: where each architecture keeps its FFN, and how models are loaded and told apart."""

from lape_fast.models.dense import FFN, refuse_new_forward
from lape_fast.models.experts import ExpertFFN
from lape_fast.models.ffn import check_neurons, check_size, check_unshared, dense_ffns, find_ffns, replaced
from lape_fast.models.fp8 import FP8_METHOD, Fp8Linear, is_fp8, quantise_layers
from lape_fast.models.head import without_logits
from lape_fast.models.hidden_states import decoder, forward_hidden, supports_packing, without_final_norm
from lape_fast.models.layouts import layout_of
from lape_fast.models.loading import load_config, load_model, model_identity, named_dtype, tokenizer_hash, weights_hash
from lape_fast.models.quantised import Quantise, dequantise, dequantise_model, quantisation_of
from lape_fast.models.sharding import load_sharded_model

__all__ = [
    "FFN",
    "FP8_METHOD",
    "ExpertFFN",
    "Fp8Linear",
    "Quantise",
    "check_neurons",
    "check_size",
    "check_unshared",
    "decoder",
    "dense_ffns",
    "dequantise",
    "dequantise_model",
    "find_ffns",
    "forward_hidden",
    "is_fp8",
    "layout_of",
    "load_config",
    "load_model",
    "load_sharded_model",
    "model_identity",
    "named_dtype",
    "quantisation_of",
    "quantise_layers",
    "refuse_new_forward",
    "replaced",
    "supports_packing",
    "tokenizer_hash",
    "weights_hash",
    "without_final_norm",
    "without_logits",
]
