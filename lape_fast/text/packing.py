"""Packing documents into rows of tokens, with restarting positions that keep attention inside each document."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from lape_fast.errors import ShapeError
from lape_fast.models import supports_packing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
NOT_COUNTED = -1


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[list[int]]:
    """The tokens of each document, behind one token that starts it.

    The text itself never yields special tokens: ``</s>`` in a web page is text.

    Args:
        tokenizer: any Hugging Face tokenizer; its beginning-of-text token starts a document, else its end-of-text
            token, else none.
        documents: texts.
    """
    if not documents:
        return []
    encoded = tokenizer(
        list(documents),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    starts = (token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None)
    prefix = list(itertools.islice(starts, 1))
    return [prefix + tokens for tokens in encoded["input_ids"]]


def pack_for_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    token_lists: Sequence[Sequence[int]],
    language_of_document: Sequence[int],
    context_length: int,
) -> Packed:
    """``pack`` with what follows from the model and its tokenizer.

    Padding is neither seen, counted nor predicted, so any id will do where the tokenizer has none for it. Documents
    share rows where the model can tell them apart.
    """
    return pack(
        token_lists,
        language_of_document,
        context_length,
        pad_id=tokenizer.pad_token_id or 0,
        special_ids=set(tokenizer.all_special_ids),
        one_document_per_row=not supports_packing(model),
    )


def pack(
    token_lists: Sequence[Sequence[int]],
    language_of_document: Sequence[int],
    context_length: int,
    *,
    pad_id: int,
    special_ids: Collection[int],
    one_document_per_row: bool = False,
) -> Packed:
    """Packs documents into rows, first-fit-decreasing, and orders each row by language.

    A document longer than a row is cut into pieces that overlap by one token, so every token of a document is counted
    once and every one but the first is predicted once. The layout depends on nothing but the arguments.

    Args:
        token_lists: the tokens of each document.
        language_of_document: the language of each document as a number from 0, or -1 to count none of its tokens.
        context_length: S, the tokens of a row; at least 2.
        pad_id: the token that fills rows up.
        special_ids: tokens that are never counted.
        one_document_per_row: for models in which positions do not separate documents. Rows then are as long as the
            longest piece, in order of decreasing length, so that batches of neighbouring rows can be cut shorter.

    Raises:
        ShapeError: the arguments do not fit together, or one is out of range.
    """
    arrays = (
        _int_array(list(itertools.chain.from_iterable(token_lists)), np.int32, "token ids"),
        _int_array([len(tokens) for tokens in token_lists], np.int64, "lengths"),
        _int_array(language_of_document, np.int32, "languages"),
    )
    special = _int_array(sorted(special_ids), np.int32, "special ids")
    try:
        rows = _packer()(*arrays, context_length, pad_id, special, one_document_per_row)
    except ValueError as error:
        raise ShapeError(f"The documents cannot be packed: {error}; check what was given to pack().") from error
    return Packed(*(torch.from_numpy(array) for array in rows))


def pack_documents(
    tokens: np.ndarray,
    lengths: np.ndarray,
    languages: np.ndarray,
    context_length: int,
    pad_id: int,
    special_ids: np.ndarray,
    one_document_per_row: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reference of the C++ packer, with its signature and exactly its result.

    Args:
        tokens: the documents' tokens one after the other, int32 [T].
        lengths: tokens of each document, int64 [documents].
        languages: language of each document, int32 [documents].
        special_ids: tokens that are never counted, int32.

    Returns:
        input_ids int64 [R, S], position_ids int64 [R, S], language_ids int32 [R, S].

    Raises:
        ValueError: the arguments do not fit together, or one is out of range.
    """
    _check(tokens, lengths, languages, context_length, special_ids)
    pieces = _cut(lengths, context_length)
    order = sorted(range(len(pieces)), key=lambda piece: -pieces[piece].length)
    if one_document_per_row:
        width = max((piece.length for piece in pieces), default=0)
        places = [(row, 0) for row in range(len(pieces))]
    else:
        width = context_length
        rows = dict(zip(order, _first_fit([pieces[piece].length for piece in order], context_length), strict=True))
        # The counting kernels add to memory where the language changes.
        order.sort(key=lambda piece: (rows[piece], languages[pieces[piece].document]))
        ends = [0] * (1 + max(rows.values(), default=-1))
        places = []
        for piece in order:
            places.append((rows[piece], ends[rows[piece]]))
            ends[rows[piece]] += pieces[piece].length

    shape = (1 + max((row for row, _ in places), default=-1), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    language_ids = np.full(shape, NOT_COUNTED, dtype=np.int32)
    for (row, column), number in zip(places, order, strict=True):
        piece = pieces[number]
        where = slice(column, column + piece.length)
        input_ids[row, where] = tokens[piece.start : piece.start + piece.length]
        position_ids[row, where] = np.arange(piece.length)
        language_ids[row, where] = languages[piece.document]
        if piece.continued:
            language_ids[row, column] = NOT_COUNTED
    # Where special tokens are used as padding they are uncounted already.
    language_ids[np.isin(input_ids, special_ids)] = NOT_COUNTED
    return input_ids, position_ids, language_ids


@dataclass(frozen=True)
class Packed:
    """Rows of packed documents.

    Attributes:
        input_ids: int64 [R, S].
        position_ids: int64 [R, S], starting from 0 in every piece of a document and 0 in padding.
        language_ids: int32 [R, S], -1 where a token is not to be counted.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    language_ids: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        """What each position is to be predicted as, int64 [R, S]; -100 at the start of pieces and in padding.

        They are not shifted: a model's loss compares its output at one position with the label at the next.
        """
        return self.input_ids.masked_fill(self.position_ids == 0, IGNORED_LABEL)

    def batches(self, tokens: int) -> Iterator[Packed]:
        """Cuts the rows into batches of at most ``tokens`` places, each at least a row, without the padding behind
        the longest row."""
        used = (self.language_ids >= 0) | (self.position_ids > 0)
        lengths = (used * torch.arange(1, used.shape[1] + 1)).amax(1).tolist() if used.numel() else []
        start = 0
        while start < len(lengths):
            # Where a row is one document the longest come first, so the first row's length holds for all behind it.
            rows = slice(start, start + max(1, tokens // max(lengths[start], 1)))
            width = max(lengths[rows])
            start = rows.stop
            if width:
                yield Packed(*(part[rows, :width] for part in (self.input_ids, self.position_ids, self.language_ids)))


@dataclass(frozen=True)
class _Piece:
    document: int
    start: int
    length: int
    continued: bool


def _cut(lengths: np.ndarray, context_length: int) -> list[_Piece]:
    pieces = []
    start = 0
    for document, length in enumerate(lengths.tolist()):
        # The last token of a piece is the first of the next, so a piece of one token would only repeat.
        for offset in range(0, max(length - 1, min(length, 1)), context_length - 1):
            piece = min(context_length, length - offset)
            pieces.append(_Piece(document, start + offset, piece, continued=offset > 0))
        start += length
    return pieces


def _first_fit(lengths: Sequence[int], context_length: int) -> list[int]:
    """The row of each piece: the first with room for it, found in a tree of the maxima of free space."""
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    free = [context_length] * (2 * leaves)
    rows = []
    for length in lengths:
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= length else 2 * node + 1
        rows.append(node - leaves)
        free[node] -= length
        while node := node // 2:
            free[node] = max(free[2 * node], free[2 * node + 1])
    return rows


def _check(
    tokens: np.ndarray, lengths: np.ndarray, languages: np.ndarray, context_length: int, special_ids: np.ndarray
) -> None:
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}, but must be at least 2")
    if len(lengths) != len(languages):
        raise ValueError(f"{len(lengths)} lengths do not match {len(languages)} languages")
    if (lengths < 0).any() or lengths.sum() != len(tokens):
        raise ValueError(f"the lengths add up to {lengths.sum()}, but there are {len(tokens)} tokens")
    if (languages < NOT_COUNTED).any():
        raise ValueError(f"the language {languages.min()} is below -1")
    for ids in (tokens, special_ids):
        if (ids < 0).any():
            raise ValueError(f"token ids must not be negative, but one is {ids.min()}")


def _int_array(values: Sequence[int], dtype: type, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.int64)
    limits = np.iinfo(dtype)
    if array.size and (array.max() > limits.max or array.min() < limits.min):
        raise ShapeError(f"The {name} reach from {array.min()} to {array.max()}, beyond what {dtype.__name__} holds.")
    return array.astype(dtype)


@functools.cache
def _packer() -> Callable:
    # The layout is the same with and without the extension; only the time differs.
    try:
        from lape_fast._host import pack_documents as native
    except ImportError:
        return pack_documents
    return native
