"""The model that the benchmarks run: a Llama of any size with random weights, and the options that choose its size."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

HEAD_SIZE = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def option_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that the benchmarks on a model share.

    Args:
        description: shown by ``--help``.
        rounds: the default number of timed rounds.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--hidden", type=int, default=1024, help=f"hidden size, a multiple of {HEAD_SIZE}")
    parser.add_argument("--neurons", type=int, default=3584, help="FFN neurons per layer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the one row that each step sees")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds after the warm-up")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    return parser


def prepare(options: argparse.Namespace) -> torch.device:
    """Sets the number of threads and returns the device."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return torch.device(options.device)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is measured, as JSON values."""
    return {name: value for name, value in vars(options).items() if name != "json"}


def build_llama(options: argparse.Namespace) -> nn.Module:
    """A frozen Llama with random weights (zeros would multiply faster) and grouped queries as in Llama 3."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = options.hidden // HEAD_SIZE
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.neurons,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=HEAD_SIZE,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.tokens,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])
    return model.to(options.device).requires_grad_(False)


def random_tokens(options: argparse.Namespace) -> Tensor:
    """One row of token ids, int64 ``[1, T]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(options.vocabulary, (1, options.tokens), generator=generator).to(options.device)


def share(base: nn.Module, own: Iterable[Tensor] = ()) -> nn.Module:
    """A model with modules of its own on the parameters of ``base``; only the parameters in ``own`` are copied."""
    copied = {id(parameter) for parameter in own}
    shared = {id(parameter): parameter for parameter in base.parameters() if id(parameter) not in copied}
    return copy.deepcopy(base, shared)
