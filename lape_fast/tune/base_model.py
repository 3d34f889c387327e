"""A small Llama and its tokenizer, trained from scratch: what the demo and the campaigns on real text tune.

It stands in for a pretrained model where none is at hand; a base trained too briefly has no language neurons.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lape_fast.files import atomic_folder
from lape_fast.tune.training import TrainingSettings, pack_documents, train


@dataclass(frozen=True)
class BaseSize:
    """The shape of a small Llama: 1.6 million parameters by default."""

    hidden_size: int = 128
    neurons_per_layer: int = 512
    layers: int = 4
    heads: int = 4
    vocabulary: int = 4000


def train_base_model(
    documents: Mapping[str, Sequence[str]],
    output: str | os.PathLike,
    size: BaseSize,
    settings: TrainingSettings,
    workspace: str | os.PathLike,
) -> dict:
    """Trains a tokenizer and a model on the documents of several languages and saves both as a Hugging Face model.

    Args:
        documents: per language, in the proportions that the model shall see.
        output: folder of the finished model.
        size: its shape.
        settings: how to train.
        workspace: folder for checkpoints; an interrupted training resumes from there.

    Returns:
        What ``train`` returns, and ``parameters``.

    Raises:
        FileExistsAlreadyError: the output is there already.
    """
    every = [document for language in sorted(documents) for document in documents[language]]
    tokenizer = train_tokenizer(every, size.vocabulary)
    model = new_model(size, len(tokenizer), settings.context_length, settings.seed)
    rows = pack_documents(model, tokenizer, every, settings.context_length)
    with atomic_folder(output) as folder:
        report = train(model.train(), rows, workspace, settings, description="training a base")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {**report, "parameters": model.num_parameters(), "name": Path(output).name}


def train_tokenizer(documents: Sequence[str], vocabulary: int):
    """A byte-level BPE tokenizer with a beginning and an end of sequence and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def new_model(size: BaseSize, vocabulary: int, context_length: int, seed: int):
    """A randomly initialised Llama in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=size.neurons_per_layer,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=max(1024, context_length),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)
