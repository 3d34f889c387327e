"""Operations of a training step per token at a model's true size, counted on meta tensors: nothing is computed.

    floor            all weights frozen, the gradient of the embeddings' output
    full             all weights
    ffn              all FFN weights, which is also what dense masked training costs
    ours-*           the subnetwork under each policy

``formula`` is 4 P + 2 x selected, with P the weights that a token is multiplied by, the head among them. It knows no
attention, which is left out of all figures here, and not that the lowest trained layer forms no gradient of its input.

    python -m benchmarks.flops --mask FILE --language mlt_Latn --json FILE
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import machine_facts, report
from benchmarks.train_step import ffn_weights
from lape_fast.identify import NeuronSet
from lape_fast.models import find_ffns
from lape_fast.tune.flops import count_flops
from lape_fast.tune.subnetwork import attach_subnetwork
from lape_fast.tune.tracing import build_on_meta, trace_step

# Layers, hidden size, FFN width, heads, heads of keys and values, head size, vocabulary.
MODELS = {
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128_256),
    "Mistral-Nemo-12B": (40, 5120, 14336, 32, 8, 128, 131_072),
}

COLUMNS = {
    "GFLOP/token": lambda row: f"{row['flops_per_token'] / 1e9:,.2f}",
    "x full": lambda row: f"{row['ratio_to_full']:.3f}",
    "x ffn": lambda row: f"{row['ratio_to_ffn']:.3f}",
    "x formula": lambda row: f"{row['ratio_to_formula']:.4f}",
}


def build(name: str) -> nn.Module:
    """The model on the meta device, frozen."""
    from transformers import LlamaConfig

    layers, hidden, neurons, heads, kv_heads, head, vocabulary = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    return build_on_meta(config, torch.bfloat16).requires_grad_(False)


def prepare(model: nn.Module, peer: str, neurons: Sequence[Tensor]) -> nn.Module:
    """Sets up what the peer trains."""
    if peer == "floor":
        model.enable_input_require_grads()
    elif peer == "full":
        # The head stays frozen for the loss without logits; `count` adds its gradient.
        model.model.requires_grad_(True)
    elif peer == "ffn":
        for weight in ffn_weights(find_ffns(model)):
            weight.requires_grad_(True)
    else:
        attach_subnetwork(model, neurons, peer.removeprefix("ours-"))
    return model.train()


PEERS = ("floor", "full", "ffn", "ours-save", "ours-recompute", "ours-checkpoint")


def count(model: nn.Module, peer: str, tokens: int) -> float:
    """Operations per token."""
    step = functools.partial(trace_step, model, 1, tokens, packed=False, device="cuda")
    of_the_head = 2 * model.get_output_embeddings().weight.numel() if peer == "full" else 0
    return count_flops(step, attention=False) / tokens + of_the_head


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-8B")
    parser.add_argument("--mask", metavar="FILE", help="a neuron file (default: 98 neurons of every layer)")
    parser.add_argument("--language", help="whose neurons of the file (default: its first language)")
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args(arguments)
    layers, hidden, width, *_ = MODELS[options.model]
    if options.mask:
        chosen = NeuronSet.load(options.mask)
        neurons = chosen[options.language or chosen.languages[0]]
    else:
        neurons = [torch.arange(98)] * layers
    selected = 3 * hidden * sum(map(len, neurons))
    flops = {peer: count(prepare(build(options.model), peer, neurons), peer, options.tokens) for peer in PEERS}
    model = build(options.model)
    multiplied = model.num_parameters() - model.get_input_embeddings().weight.numel()
    formula = 4 * multiplied + 2 * selected
    rows = [
        {
            "name": peer,
            "flops_per_token": per_token,
            "ratio_to_full": per_token / flops["full"],
            "ratio_to_ffn": per_token / flops["ffn"],
            "ratio_to_formula": per_token / formula,
        }
        for peer, per_token in flops.items()
    ]
    settings = {"model": options.model, "tokens": options.tokens, "neurons": sum(map(len, neurons))}
    settings |= {"language": options.language, "trained": selected}
    report(__doc__.partition("\n")[0], rows, COLUMNS, settings, machine_facts(torch.device("cpu")), options.json)


if __name__ == "__main__":
    main()
