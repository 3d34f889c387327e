"""Bytes that one layer keeps for its backward pass, per token, at a model's true width; exact, and no clock is read.

    frozen           stock autograd, all weights frozen, a gradient flows through
    ffn              stock autograd, all FFN weights trained
    lora             PEFT, rank 16 on the three FFN projections, with its default fp32 adapters
    ours-*           our FFN under each policy, with 98 neurons of the layer trained (the mean of the published masks)

``block`` is the FFN (ours with the norm in front of it, which is part of ours), ``layer`` the whole decoder layer.
Weights are not counted.

    python -m benchmarks.saved_bytes --json FILE
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.llama import share
from benchmarks.measure import machine_facts, report, saved_bytes
from lape_fast.models import find_ffns
from lape_fast.tune.subnetwork import attach_subnetwork

# Hidden size, FFN width, heads, heads of keys and values, head size.
WIDTHS = {"Llama-3.1-8B": (4096, 14336, 32, 8, 128), "Mistral-Nemo-12B": (5120, 14336, 32, 8, 128)}
SELECTED = 98

COLUMNS = {
    "block B/token": lambda row: f"{row['block_bytes_per_token']:,.0f}",
    "layer B/token": lambda row: f"{row['layer_bytes_per_token']:,.0f}",
}


def build_model(width: str) -> nn.Module:
    """A frozen model of two layers with random weights in bf16; the vocabulary is small, as no head is measured."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, neurons, heads, kv_heads, head = WIDTHS[width]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        vocab_size=256,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)


def frozen(model: nn.Module) -> nn.Module:
    return model


def ffn(model: nn.Module) -> nn.Module:
    for layer in find_ffns(model):
        for projection in layer.projections.values():
            projection.weight.requires_grad_(True)
    return model


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=16, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, settings).get_base_model()


def ours(policy: str, model: nn.Module) -> nn.Module:
    chosen = torch.randperm(find_ffns(model)[0].neurons)[:SELECTED].sort().values
    attach_subnetwork(model, [chosen, chosen], policy)
    return model


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": frozen,
    "ffn": ffn,
    "lora": lora,
    "ours-save": functools.partial(ours, "save"),
    "ours-recompute": functools.partial(ours, "recompute"),
    "ours-checkpoint": functools.partial(ours, "checkpoint"),
}


def measure(model: nn.Module, tokens: int) -> tuple[int, int]:
    """Bytes kept by the upper layer's block and by the whole layer."""
    model.train()
    layer = model.model.layers[1]
    x = torch.randn(1, tokens, model.config.hidden_size, dtype=torch.bfloat16).requires_grad_(True)
    positions = torch.arange(tokens)[None]

    def run() -> Tensor:
        embeddings = model.model.rotary_emb(x, positions)
        return layer(x, position_embeddings=embeddings)

    block = saved_bytes(functools.partial(layer.mlp, x), [layer.mlp], model.parameters())
    return block, saved_bytes(run, [layer], model.parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--width", choices=WIDTHS, default="Llama-3.1-8B")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    base, rows = build_model(options.width), []
    for name, build in PEERS.items():
        block, whole = measure(build(share(base, base.parameters())), options.tokens)
        rows.append(
            {
                "name": name,
                "block_bytes_per_token": block / options.tokens,
                "layer_bytes_per_token": whole / options.tokens,
            }
        )
    settings = {"width": options.width, "tokens": options.tokens, "dtype": "bfloat16", "selected": SELECTED}
    report(__doc__.partition("\n")[0], rows, COLUMNS, settings, machine_facts(torch.device("cpu")), options.json)


if __name__ == "__main__":
    main()
