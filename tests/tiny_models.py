"""Tiny random models and a real tokenizer for the tests, all made offline in milliseconds.

    model = tiny_model("llama")                     # 2 layers, hidden 32, FFN 48, float32, eval mode
    tokenizer = tiny_tokenizer()                    # byte-level BPE: any text in any script has tokens
    folder = save_tiny(tmp_path / "base")           # what load_model() and the command line read
    model = quantised_tiny_model("nf4")             # hidden 64, FFN 128, projections quantised, bfloat16

``TINY_TYPES`` names every architecture of the layout table, for ``pytest.mark.parametrize``. The same arguments give
the same weights, and the global random state is left as it was. Token ids 0, 1 and 2 are <bos>, <eos> and <pad>.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import torch

VOCABULARY = 300
MAX_POSITIONS = 128
SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}

# Half of the layers slide over fewer positions than a test's documents have, so that windows matter.
SLIDING_WINDOW = 8

SENTENCES = (
    "The cat sat on the mat and looked at the other cats.",
    "Il-qattus qagħad fuq it-tapit u ħares lejn il-qtates l-oħra.",
    "Die Katze saß auf der Matte und sah die anderen Katzen an.",
    "Кошка сидела на коврике и смотрела на других кошек.",
    "ድመቷ ምንጣፉ ላይ ተቀምጣ ሌሎቹን ድመቶች ተመለከተች።",
)

DENSE_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "olmo2",
    "cohere",
    "cohere2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
)
EXPERT_TYPES = ("mixtral", "qwen3_moe", "gpt_oss")
TINY_TYPES = DENSE_TYPES + EXPERT_TYPES

# Of a mixture of experts; three experts per token add up to different bits in another order.
EXPERTS, EXPERTS_PER_TOKEN = 5, 3


@functools.cache
def tiny_tokenizer():
    """A ``PreTrainedTokenizerFast`` of 300 pieces: 3 specials, 256 bytes, 41 merges; it adds no special token itself.

    Callers share one object: copy it before changing it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **SPECIAL_TOKENS)


def tiny_model(
    model_type: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    hidden: int = 32,
    neurons: int = 48,
    layers: int = 2,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    **config_fields,
):
    """A random causal language model with its head, in eval mode on the CPU, without any dropout.

    Args:
        model_type: one of ``TINY_TYPES``.
        dtype: of every parameter.
        seed: of the weights.
        hidden: D, a multiple of 16 (4 heads, rotary halves).
        neurons: F, the FFN width, of one expert where there are any; BLOOM has no choice but ``4 * hidden``.
        layers: L.
        attn_implementation: "sdpa" or "eager"; None takes transformers' choice.
        experts_implementation: "grouped_mm" or "eager", the only one for float64; None takes transformers' choice
            (the first), and the second where it must.
        config_fields: any other field of the model's (text) config, such as ``mlp_bias``.
    """
    from transformers import AutoModelForCausalLM

    config = _config(model_type, hidden, neurons, layers, config_fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation or ("eager" if dtype == torch.float64 else None),
        )
        # Fresh biases are zeros and fresh matrices too small for an activation to bend anything.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() in (2, 3):
                torch.nn.init.normal_(parameter, std=hidden**-0.5)
    return model.eval()


def quantised_tiny_model(
    kind: str, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, *, hidden: int = 64, **model_arguments
):
    """``tiny_model`` as ``load_model`` quantises it, at the smallest size that bitsandbytes' blocks of 64 divide.

    Args:
        kind: "nf4", "int8", "torchao-int8" or "fp8".
        model_type, dtype, hidden, model_arguments: as for ``tiny_model``, whose weights these are before quantisation;
            by default ``neurons`` is 128.
    """
    from lape_fast.models import load_model

    arguments = {"neurons": 128, **model_arguments}
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(folder, model_type, dtype=dtype, hidden=hidden, **arguments)
        model, _ = load_model(folder, device="cpu", quantise=kind)
    # The folder's name would make the same model another one at every call.
    model.name_or_path = model.config.name_or_path = ""
    return model


def tiny_neurons(model_type: str) -> int:
    """How many neurons a layer of ``tiny_model(model_type)`` has."""
    return {"bloom": 128}.get(model_type, 48) * (EXPERTS if model_type in EXPERT_TYPES else 1)


def save_tiny(path: str | os.PathLike, model_type: str = "llama", **model_arguments) -> Path:
    """Writes ``tiny_model(model_type, **model_arguments)`` and the tokenizer to a folder, and returns the folder."""
    tiny_model(model_type, **model_arguments).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return Path(path)


def _config(model_type: str, hidden: int, neurons: int, layers: int, config_fields: dict):
    from transformers import AutoConfig

    common = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    head = {"head_dim": hidden // 4}
    kinds = ("sliding_attention", "full_attention")
    sliding = {"sliding_window": SLIDING_WINDOW, "layer_types": [kinds[layer % 2] for layer in range(layers)]}
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN}
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    by_type = {
        "llama": sizes,
        "mistral": {**sizes, "sliding_window": SLIDING_WINDOW},
        "qwen2": sizes,
        "qwen3": {**sizes, **head},
        "gemma2": {**sizes, **head, **sliding},
        "gemma3_text": {**sizes, **head, **sliding},
        "olmo2": sizes,
        "cohere": sizes,
        "cohere2": {**sizes, **head, **sliding},
        "phi3": sizes,
        "gpt2": {"n_embd": hidden, "n_inner": neurons, "n_layer": layers, "n_head": 4, **no_dropout},
        "gpt_neox": sizes,
        "opt": {**sizes, "ffn_dim": neurons, "dropout": 0.0},
        "bloom": {"hidden_size": hidden, "n_layer": layers, "n_head": 4},
        "mixtral": {**sizes, **experts, "sliding_window": SLIDING_WINDOW},
        "qwen3_moe": {**sizes, **head, **experts, "moe_intermediate_size": neurons, "intermediate_size": 2 * neurons},
        "gpt_oss": {**sizes, **head, **experts, **sliding},
    }
    if model_type != "gemma3":
        return AutoConfig.for_model(model_type, **{**common, **by_type[model_type], **config_fields})
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoConfig.for_model(
        "gemma3",
        text_config={"model_type": "gemma3_text", **common, **by_type["gemma3_text"], **config_fields},
        vision_config={"model_type": "siglip_vision_model", **vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
