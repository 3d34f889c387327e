"""The models of the suite: their sizes, random weights built on the device, and the neurons of three languages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lape_fast.identify import NeuronSet, import_masks

# Maltese, Welsh and Georgian: an ordinary, the largest and the smallest mask of the published twelve.
LANGUAGES = ("mlt_Latn", "cym_Latn", "kat_Geor")
PUBLISHED_LANGUAGES = (
    "mlt_Latn", "afr_Latn", "isl_Latn", "cym_Latn", "mkd_Cyrl", "lvs_Latn",
    "lit_Latn", "slv_Latn", "slk_Latn", "est_Latn", "kat_Geor", "npi_Deva",
)  # fmt: skip
PUBLISHED_NEURONS_PER_LAYER = 14336


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        name: of the model.
        kind: transformers' ``model_type``.
        hidden: D.
        neurons: F.
        layers: L.
        heads: of the queries.
        key_value_heads: of keys and values.
        head_size: of one head.
        vocabulary: V.
        selected: per language the number of its neurons in each layer.
    """

    name: str
    kind: str
    hidden: int
    neurons: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    selected: dict[str, tuple[int, ...]]

    def attention_weights(self) -> int:
        """Of one layer's four projections."""
        return 2 * self.hidden * self.head_size * (self.heads + self.key_value_heads)

    def layer_weights(self) -> int:
        """Of one layer's linear projections."""
        return self.attention_weights() + 3 * self.hidden * self.neurons


# The sizes are those of the published configurations; `selected` are facts of the published masks (top_rate 5 %).
LLAMA_8B = Shape(
    "llama-3.1-8b", "llama", 4096, 14336, 32, 32, 8, 128, 128_256,
    {
        "mlt_Latn": (7, 71, 1, 127, 2, 0, 2, 0, 1, 2, 1, 2, 0, 1, 4, 1, 7, 9, 13, 11, 14, 21, 15, 21, 267, 350, 463,
                     588, 572, 258, 163, 21),
        "cym_Latn": (48, 62, 6, 137, 3, 1, 3, 0, 2, 6, 3, 1, 0, 3, 4, 3, 14, 25, 28, 29, 53, 37, 32, 114, 571, 665,
                     1077, 1152, 1014, 531, 335, 61),
        "kat_Geor": (12, 5, 2, 96, 9, 7, 1, 2, 1, 11, 5, 5, 3, 2, 7, 11, 19, 32, 37, 35, 28, 37, 21, 18, 58, 69, 96,
                     91, 73, 86, 196, 75),
    },
)  # fmt: skip
MISTRAL_12B = Shape(
    "mistral-nemo-12b", "mistral", 5120, 14336, 40, 32, 8, 128, 131_072,
    {
        "mlt_Latn": (2, 65, 9, 42, 93, 17, 5, 1, 1, 4, 0, 1, 1, 2, 1, 1, 3, 2, 1, 15, 15, 10, 5, 17, 19, 65, 61, 60,
                     103, 63, 169, 273, 314, 482, 472, 419, 349, 200, 142, 107),
        "cym_Latn": (0, 163, 132, 84, 327, 61, 10, 2, 2, 3, 0, 1, 0, 3, 1, 4, 2, 2, 1, 27, 26, 12, 9, 13, 34, 39, 135,
                     157, 189, 152, 244, 304, 428, 999, 1213, 1180, 1083, 486, 334, 377),
        "kat_Geor": (200, 134, 10, 10, 39, 67, 4, 6, 1, 2, 0, 2, 1, 18, 5, 4, 5, 2, 3, 50, 52, 20, 9, 20, 31, 36, 45,
                     40, 54, 38, 36, 26, 18, 78, 122, 104, 92, 112, 190, 342),
    },
)  # fmt: skip

# The same builds in a few thousand weights, with an empty layer as the published masks have.
TOY_SELECTED = {"mlt_Latn": (1, 0, 5), "cym_Latn": (2, 1, 9), "kat_Geor": (1, 1, 2)}
TOY_LLAMA = Shape("toy-llama", "llama", 64, 176, 3, 4, 2, 16, 300, TOY_SELECTED)
TOY_MISTRAL = Shape("toy-mistral", "mistral", 80, 176, 3, 4, 2, 16, 340, TOY_SELECTED)

# --size -> the 8B model and the 12B model.
SIZES = {"true": (LLAMA_8B, MISTRAL_12B), "toy": (TOY_LLAMA, TOY_MISTRAL)}


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A frozen model in evaluation mode with random weights, which are drawn on the device and in the dtype.

    Zeros would multiply faster than weights do.

    Args:
        shape: its size.
        device: where the weights live from the start.
        dtype: of the weights.
        layers: fewer layers than the shape has.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.kind,
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131_072,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def load_masks(paths: Sequence[Path]) -> list[NeuronSet]:
    """Neuron files, and published masks with their twelve languages.

    Raises:
        FileFormatError: a file is neither.
    """
    return [
        import_masks(path, PUBLISHED_LANGUAGES, PUBLISHED_NEURONS_PER_LAYER)
        if path.suffix == ".pth"
        else NeuronSet.load(path)
        for path in paths
    ]


def choose_neurons(options: argparse.Namespace, shape: Shape, language: str) -> tuple[list[Tensor], str]:
    """The neurons of a language: of the mask that fits the model, else drawn in the published numbers per layer.

    Args:
        options: with ``masks``, the files that were given.
        shape: the model.
        language: one of ``LANGUAGES``.

    Returns:
        One sorted int64 tensor per layer, on the CPU, and where they come from: the mask's file or "synthetic".
    """
    for mask in options.masks:
        fits = (mask.layers, mask.neurons_per_layer) == (shape.layers, shape.neurons)
        if fits and language in mask.languages:
            return mask[language], str(mask.metadata.get("source", "neurons.safetensors"))
    generator = torch.Generator().manual_seed(LANGUAGES.index(language))
    return [
        torch.randperm(shape.neurons, generator=generator)[:size].sort().values for size in shape.selected[language]
    ], "synthetic"
