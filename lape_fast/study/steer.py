"""Steering a model by a language's neurons: their activations scaled, or replaced by what they are in the language.

A neuron's activation is its h = act(gate) * up (without the gate's partner in an ungated FFN), and it reaches the rest
of the model only through its column of the down projection. Scaling h is scaling that column. Replacing h by the mean
that it has on a language's own text is one of the interventions of 2507.22608; silencing is scaling by 0.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lape_fast.errors import ArchitectureError, ConfigError, FileFormatError, LanguageError
from lape_fast.models import FFN, ExpertFFN, check_neurons, find_ffns, forward_hidden, model_identity
from lape_fast.progress import progress_bar
from lape_fast.study.ablate import outgoing_scaled, refuse_overlay
from lape_fast.study.results import read_result, write_result
from lape_fast.text import Corpus, canonical, pack_for_model, tokenize

KIND = "steering"

# What the file needs itself, each in the shape it has; the rest is metadata.
TEXTS = ("prompts", "plain", "steered", "plain_languages", "steered_languages")
STORED = {"language": str, **dict.fromkeys(TEXTS, [str])}

# Says in which language a text is, as a code of this package.
Identify = Callable[[str], str]


@contextlib.contextmanager
def steered(
    model: nn.Module,
    neurons: Sequence[Tensor],
    *,
    scale: float | None = None,
    values: Sequence[Tensor] | None = None,
) -> Iterator[None]:
    """Within the context the given neurons' activations are scaled or replaced; afterwards the model is what it was.

    Where the base can be written, scaling scales the neurons' columns of the down projections, which costs nothing and
    is undone bit for bit. Replacing, and scaling in a quantised base, changes the input of the down projections by
    hooks; ``torch.compile`` the model inside the context, if at all.

    Args:
        model: a causal language model of a known architecture.
        neurons: one index tensor per layer.
        scale: what to multiply the activations by; 0 silences the neurons.
        values: what to replace them by, ``[K]`` per layer, such as ``mean_activations`` returns.

    Raises:
        ConfigError: neither or both of scale and values, a scale that is not finite, or values that do not fit.
        ArchitectureError: the neurons do not fit the model, or it is a mixture of experts and its activations are to be
            replaced.
        AdapterError: an adapter is attached in overlay storage, whose neurons do not use the base's columns.

    Example:
        >>> with steered(model, neurons["mlt_Latn"], scale=2.0):
        ...     model.generate(input_ids)
    """
    ffns = find_ffns(model)
    check_neurons(ffns, neurons)
    _check_intervention(neurons, scale, values)
    refuse_overlay(model)
    experts = isinstance(ffns[0], ExpertFFN)
    if scale is not None and (experts or all(ffn.writable for ffn in ffns)):
        with outgoing_scaled(ffns, neurons, scale):
            yield
        return
    if experts:
        raise ArchitectureError(
            f"This {model.config.model_type} model is a mixture of experts, whose activations can be scaled but not "
            "replaced; give a scale."
        )
    changes = [None] * len(ffns) if values is None else values
    with contextlib.ExitStack() as hooks:
        for ffn, chosen, replacement in zip(ffns, neurons, changes, strict=True):
            if len(chosen):
                hooks.callback(_change_activations(ffn, chosen, scale, replacement).remove)
        yield


@torch.inference_mode()
def mean_activations(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    language: str,
    neurons: Sequence[Tensor],
    *,
    context_length: int = 512,
    batch_tokens: int = 8192,
) -> list[Tensor]:
    """The mean activation h of neurons over a language's text, fp32 ``[K]`` per layer, for ``steered``.

    Args:
        model: a dense causal language model of a known architecture.
        tokenizer: its tokenizer.
        corpus: has text in the language; special tokens do not count.
        language: a canonical code.
        neurons: one index tensor per layer.
        context_length: tokens per row.
        batch_tokens: tokens per forward pass.

    Raises:
        ArchitectureError: the neurons do not fit the model, or it is a mixture of experts.
        CorpusError: the corpus has no text in the language.

    Example:
        >>> values = mean_activations(model, tokenizer, open_corpus("texts/"), "mlt_Latn", neurons["mlt_Latn"])
        >>> with steered(model, neurons["mlt_Latn"], values=values):
        ...     model.generate(input_ids)
    """
    ffns = find_ffns(model)
    check_neurons(ffns, neurons)
    if isinstance(ffns[0], ExpertFFN):
        raise ArchitectureError(
            f"This {model.config.model_type} model is a mixture of experts, in which a neuron has no activation where "
            "its expert is not chosen; steer it by a scale."
        )
    tokens = tokenize(tokenizer, list(corpus.documents(language)))
    packed = pack_for_model(model, tokenizer, tokens, [0] * len(tokens), context_length)
    device = next(model.parameters()).device
    sums = [torch.zeros(len(chosen), dtype=torch.float64, device=device) for chosen in neurons]
    counted = torch.empty(0, dtype=torch.bool)

    def watch(total: Tensor, chosen: Tensor):
        def add(module, arguments):
            # OPT flattens rows and places to one dimension.
            h = arguments[0].reshape(-1, arguments[0].shape[-1])
            total.add_(h[counted][:, chosen].double().sum(0))

        return add

    with contextlib.ExitStack() as hooks, progress_bar("activations", len(packed.input_ids)) as advance:
        for ffn, chosen, total in zip(ffns, neurons, sums, strict=True):
            hook = watch(total, chosen.to(device))
            hooks.callback(ffn.projections["down"].register_forward_pre_hook(hook).remove)
        for batch in packed.batches(batch_tokens):
            counted = (batch.language_ids >= 0).flatten().to(device)
            forward_hidden(model, batch.input_ids.to(device), batch.position_ids.to(device))
            advance(len(batch.input_ids), int(counted.sum()))
    count = int((packed.language_ids >= 0).sum())
    return [(total / count).float() for total in sums]


@dataclass(frozen=True)
class Steering:
    """What a model wrote with and without steering, and in which languages that is.

    Attributes:
        language: whose neurons were steered by.
        prompts: what the model was given.
        plain, steered: how it went on, without the prompts.
        plain_languages, steered_languages: the language of each, as the identifier says.
        metadata: JSON values that say how it was steered (model, scale ...).
    """

    language: str
    prompts: tuple[str, ...]
    plain: tuple[str, ...]
    steered: tuple[str, ...]
    plain_languages: tuple[str, ...]
    steered_languages: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def plain_accuracy(self) -> float:
        """The share of texts in the language without steering."""
        return self.plain_languages.count(self.language) / len(self.prompts)

    @property
    def steered_accuracy(self) -> float:
        """The share of texts in the language with steering."""
        return self.steered_languages.count(self.language) / len(self.prompts)

    def shares(self) -> dict[str, tuple[float, float]]:
        """Language -> its share without and with steering; the one steered by first, then the most frequent ones."""
        plain, steered = Counter(self.plain_languages), Counter(self.steered_languages)
        others = sorted((plain + steered).items(), key=lambda item: (-item[1], item[0]))
        codes = {self.language: None, **dict(others)}
        return {code: (plain[code] / len(self.prompts), steered[code] / len(self.prompts)) for code in codes}

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        accuracies = {"plain_accuracy": self.plain_accuracy, "steered_accuracy": self.steered_accuracy}
        texts = {name: list(getattr(self, name)) for name in TEXTS}
        return {**self.metadata, "language": self.language, **accuracies, **texts}

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``to_json`` to a file, atomically."""
        write_result(path, KIND, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Steering:
        """Reads what ``save`` wrote.

        Raises:
            FileFormatError: no steering, of a newer schema, or incomplete.
        """
        found = read_result(path, KIND, "steer", STORED)
        language, *texts = (found.pop(name) for name in STORED)
        if not texts[0] or len(set(map(len, texts))) > 1:
            raise FileFormatError(f"{path} holds no prompts, or not as many texts as prompts; steer again.")
        for derived in ("plain_accuracy", "steered_accuracy"):
            found.pop(derived, None)
        return cls(language, *map(tuple, texts), metadata=found)


def force_language(
    model: nn.Module,
    tokenizer,
    neurons: Sequence[Tensor],
    language: str,
    prompts: Sequence[str],
    identify: Identify,
    *,
    scale: float | None = None,
    values: Sequence[Tensor] | None = None,
    max_new_tokens: int = 64,
) -> Steering:
    """Lets a model go on from prompts with and without steering, and counts how often it does so in the language.

    Args:
        model: a causal language model of a known architecture.
        tokenizer: its tokenizer.
        neurons: the language's, one index tensor per layer.
        language: its code.
        prompts: texts to go on from, none of them empty.
        identify: says in which language a text is: ``train_identifier`` makes one, and any function from a text to a
            code will do.
        scale, values: see ``steered``.
        max_new_tokens: how long each text becomes.

    Raises:
        ConfigError: no prompt, an empty one, or as for ``steered``.
        ArchitectureError, AdapterError: as for ``steered``.

    Example:
        >>> identify = train_identifier(open_corpus("texts/"))
        >>> force_language(model, tokenizer, neurons["mlt_Latn"], "mlt_Latn", ["I"], identify, scale=3).steered_accuracy
    """
    if not prompts or not all(prompts):
        raise ConfigError(
            f"{len(prompts)} prompts were given, {list(prompts).count('')} of them empty; give some text."
        )
    if not sum(map(len, neurons)):
        raise LanguageError(f"{language} has no neurons to steer by; select neurons with a looser rule.")
    # Before anything is generated for nothing.
    with steered(model, neurons, scale=scale, values=values):
        pass
    with progress_bar("generating", 2 * len(prompts)) as advance:
        plain = generate(model, tokenizer, prompts, max_new_tokens, advance)
        with steered(model, neurons, scale=scale, values=values):
            forced = generate(model, tokenizer, prompts, max_new_tokens, advance)
    languages = [tuple(identify(text) for text in texts) for texts in (plain, forced)]
    metadata = {
        **model_identity(model),
        "neurons": sum(map(len, neurons)),
        "scale": scale,
        "replaced": values is not None,
        "max_new_tokens": max_new_tokens,
    }
    return Steering(canonical(language), tuple(prompts), plain, forced, *languages, metadata)


@torch.inference_mode()
def generate(
    model: nn.Module, tokenizer, prompts: Sequence[str], max_new_tokens: int, advance: Callable = lambda steps: None
) -> tuple[str, ...]:
    """How a model goes on from each prompt by the most likely token each time, without the prompt."""
    texts = []
    # One by one: padding in front would move positions in some architectures.
    for prompt in prompts:
        (tokens,) = tokenize(tokenizer, [prompt])
        ids = torch.tensor([tokens], device=model.device)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        texts.append(tokenizer.decode(written[0, len(tokens) :], skip_special_tokens=True))
        advance(1)
    return tuple(texts)


def _check_intervention(neurons: Sequence[Tensor], scale: float | None, values: Sequence[Tensor] | None) -> None:
    if (scale is None) == (values is None):
        raise ConfigError("Steering needs either a scale or values that replace the activations; give one of the two.")
    if scale is not None and not math.isfinite(scale):
        raise ConfigError(f"The scale {scale} is not finite; 2 doubles the activations, and 0 silences the neurons.")
    if values is not None and [len(chosen) for chosen in neurons] != [len(each) for each in values]:
        raise ConfigError(
            f"The values are for {sum(map(len, values)):,} neurons in {len(values)} layers, but "
            f"{sum(map(len, neurons)):,} in {len(neurons)} are to be steered, or they lie in other layers; give one "
            "value per neuron."
        )


def _change_activations(ffn: FFN, chosen: Tensor, scale: float | None, values: Tensor | None):
    """Hooks the input of a down projection; returns the hook's handle."""
    chosen = chosen.to(ffn.device)
    values = None if values is None else values.to(ffn.device)

    def change(module, arguments):
        h = arguments[0].clone()  # [..., F]
        h[..., chosen] = h[..., chosen] * scale if values is None else values.to(h.dtype)
        return h, *arguments[1:]

    return ffn.projections["down"].register_forward_pre_hook(change)
