"""Packing: every token counted once and predicted once, in rows that do not disturb each other."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lape_fast.errors import ShapeError
from lape_fast.text import pack, tokenize
from lape_fast.text.packing import pack_documents

PAD = 0
SPECIAL = {PAD, 1}


def random_documents(seed, context_length, count=40, vocabulary=50):
    draw = random.Random(seed)
    edges = (0, 1, 2, context_length - 1, context_length, context_length + 1, 2 * context_length - 1)
    lengths = [draw.choice((*edges, draw.randint(1, 4 * context_length))) for _ in range(count)]
    documents = [[1] * (length > 0) + [draw.randrange(2, vocabulary) for _ in range(length - 1)] for length in lengths]
    return documents, [draw.randrange(3) for _ in documents]


def pieces_of(packed):
    """The pieces of every row: (row, column, tokens, languages), by restarting positions; padding is left out."""
    for row, positions in enumerate(packed.position_ids.tolist()):
        starts = [column for column, position in enumerate(positions) if position == 0] + [len(positions)]
        for start, end in zip(starts, starts[1:], strict=False):
            tokens = packed.input_ids[row, start:end].tolist()
            if tokens != [PAD]:
                yield row, start, tokens, packed.language_ids[row, start:end].tolist()


def first_fit(lengths, context_length):
    """First-fit-decreasing as its definition reads."""
    rows = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row in rows if sum(row) + length <= context_length), None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    return rows


@pytest.mark.parametrize("context_length", [2, 3, 7, 64, 257])
@pytest.mark.parametrize("one_document_per_row", [False, True])
def test_every_token_is_counted_once_and_predicted_once(context_length, one_document_per_row):
    documents, languages = random_documents(context_length, context_length)
    packed = pack(documents, languages, context_length, pad_id=PAD, special_ids=SPECIAL,
                  one_document_per_row=one_document_per_row)  # fmt: skip
    assert packed.input_ids.dtype == packed.position_ids.dtype == torch.int64
    assert packed.language_ids.dtype == torch.int32

    for language in range(3):
        counted = sorted(packed.input_ids[packed.language_ids == language].tolist())
        expected = [
            token
            for document, own in zip(documents, languages, strict=True)
            for token in document
            if own == language and token not in SPECIAL
        ]
        assert counted == sorted(expected)
    assert set(packed.input_ids[packed.language_ids == -1].tolist()) >= {1}

    predicted = sorted(packed.labels[packed.labels != -100].tolist())
    assert predicted == sorted(token for document in documents for token in document[1:])


def test_long_documents_overlap_by_one_uncounted_token():
    packed = pack([[1, 10, 11, 12, 13, 14, 15, 16]], [2], 4, pad_id=PAD, special_ids=SPECIAL)
    pieces = sorted((tokens, languages) for _, _, tokens, languages in pieces_of(packed))
    assert pieces == [
        ([1, 10, 11, 12], [-1, 2, 2, 2]),
        ([12, 13, 14, 15], [-1, 2, 2, 2]),
        ([15, 16], [-1, 2]),
    ]


def test_rows_are_filled_first_fit_decreasing():
    documents, languages = random_documents(3, 31, count=200)
    documents = [document[:31] for document in documents if document]
    packed = pack(documents, languages[: len(documents)], 31, pad_id=PAD, special_ids=SPECIAL)
    rows = [[] for _ in range(len(packed.input_ids))]
    for row, _, tokens, _ in pieces_of(packed):
        rows[row].append(len(tokens))
    # Which documents share a row is first-fit-decreasing; within it they stand by language.
    assert [sorted(row, reverse=True) for row in rows] == first_fit([len(document) for document in documents], 31)
    counted = [row[row >= 0] for row in packed.language_ids]
    assert all((row.diff() >= 0).all() for row in counted)
    assert any(len(row.unique()) > 1 for row in counted)


def test_batches_hold_every_row_and_no_needless_padding():
    documents, languages = random_documents(3, 20, count=50)
    for one_document_per_row in (False, True):
        packed = pack(
            documents, languages, 31, pad_id=PAD, special_ids=SPECIAL, one_document_per_row=one_document_per_row
        )
        batches = list(packed.batches(70))
        assert sum(int((batch.language_ids >= 0).sum()) for batch in batches) == int((packed.language_ids >= 0).sum())
        for batch in batches:
            assert batch.input_ids.numel() <= 70
            last = batch.position_ids[:, -1] + (batch.language_ids[:, -1] >= 0)
            assert last.any()
        # Rows are never split, and one that holds nothing to count or to see is left out.
        single = [len(batch.input_ids) for batch in packed.batches(1)]
        assert single == [1] * int(((packed.language_ids >= 0) | (packed.position_ids > 0)).any(1).sum())


def test_equally_long_documents_keep_their_order():
    packed = pack([[2, 3], [4, 5], [6, 7]], [0, 0, 0], 4, pad_id=PAD, special_ids=SPECIAL)
    assert packed.input_ids.tolist() == [[2, 3, 4, 5], [6, 7, PAD, PAD]]
    assert packed.position_ids.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert packed.labels.tolist() == [[-100, 3, -100, 5], [-100, 7, -100, -100]]
    assert packed.language_ids.tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]]


def test_one_document_per_row_is_no_wider_than_needed():
    packed = pack([[2], [3, 4, 5], [6, 7]], [0, 1, 2], 100, pad_id=PAD, special_ids=SPECIAL, one_document_per_row=True)
    assert packed.input_ids.tolist() == [[3, 4, 5], [6, 7, PAD], [2, PAD, PAD]]


def test_nothing_packs_into_no_rows():
    assert pack([], [], 8, pad_id=PAD, special_ids=SPECIAL).input_ids.shape == (0, 8)
    assert pack([[], []], [0, 1], 8, pad_id=PAD, special_ids=SPECIAL).labels.shape == (0, 8)


@pytest.mark.parametrize(
    ("documents", "languages", "context_length", "told"),
    [
        ([[2, 3]], [0], 1, "context_length is 1"),
        ([[2, 3]], [0, 1], 8, "1 lengths do not match 2 languages"),
        ([[2, -3]], [0], 8, "token ids must not be negative, but one is -3"),
        ([[2, 3]], [-2], 8, "-2"),
        ([[2**31]], [0], 8, "beyond what int32 holds"),
    ],
)
def test_senseless_arguments_are_refused(documents, languages, context_length, told):
    with pytest.raises(ShapeError, match=told):
        pack(documents, languages, context_length, pad_id=PAD, special_ids=SPECIAL)


@pytest.mark.parametrize("one_document_per_row", [False, True])
def test_extension_packs_exactly_as_python(one_document_per_row):
    host = pytest.importorskip("lape_fast._host", reason="the C++ extension is not built")
    for seed in range(60):
        context_length = random.Random(seed).choice((2, 3, 8, 63, 257))
        documents, languages = random_documents(seed, context_length, count=seed)
        arguments = (
            np.array([token for document in documents for token in document], dtype=np.int32),
            np.array([len(document) for document in documents], dtype=np.int64),
            np.array(languages, dtype=np.int32),
            context_length,
            PAD,
            np.array(sorted(SPECIAL), dtype=np.int32),
            one_document_per_row,
        )
        expected = pack_documents(*arguments)
        for ours, theirs in zip(host.pack_documents(*arguments), expected, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("context_length", [0, 8])
@pytest.mark.parametrize("wrong", ["lengths", "tokens", "languages", "special_ids"])
def test_extension_refuses_what_python_refuses(wrong, context_length):
    host = pytest.importorskip("lape_fast._host", reason="the C++ extension is not built")
    arguments = {
        "tokens": np.array([2, 3, 4], dtype=np.int32),
        "lengths": np.array([1, 2], dtype=np.int64),
        "languages": np.array([0, 1], dtype=np.int32),
        "special_ids": np.array([0], dtype=np.int32),
    }
    arguments[wrong] = arguments[wrong] - 5
    for packer in (host.pack_documents, pack_documents):
        with pytest.raises(ValueError):
            packer(**arguments, context_length=context_length, pad_id=0, one_document_per_row=False)


def test_a_hundred_thousand_tiny_documents_pack_tightly():
    draw = random.Random(0)
    documents = [[2] * draw.randint(1, 9) for _ in range(100_000)]
    packed = pack(documents, [0] * len(documents), 512, pad_id=PAD, special_ids=SPECIAL)
    tokens = sum(map(len, documents))
    assert (packed.language_ids == 0).sum() == tokens
    assert packed.input_ids.shape == (-(-tokens // 512), 512)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_hidden_states_of_separate_documents(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    decoder = LlamaForCausalLM(config).eval().model
    documents, languages = random_documents(5, 24, count=15)
    packed = pack(documents, languages, 24, pad_id=PAD, special_ids=SPECIAL)
    with torch.inference_mode():
        states = decoder(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False
        ).last_hidden_state
        compared = 0
        for row, column, tokens, _ in pieces_of(packed):
            alone = decoder(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(states[row, column : column + len(tokens)], alone, atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared > len(documents)


@pytest.fixture
def byte_tokenizer():
    def build(**special_tokens):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, vocab_size=0, show_progress=False
        )
        backend.train_from_iterator([], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4, **special_tokens)

    return build


@pytest.mark.parametrize(
    ("special_tokens", "prefix"),
    [({"bos_token": "<s>", "eos_token": "</s>"}, ["<s>"]), ({"eos_token": "</s>"}, ["</s>"]), ({}, [])],
)
def test_documents_start_with_one_token(byte_tokenizer, special_tokens, prefix):
    tokenizer = byte_tokenizer(**special_tokens)
    tokens = tokenize(tokenizer, ["abc", ""])
    assert [tokenizer.convert_ids_to_tokens(each) for each in tokens] == [[*prefix, "a", "b", "c"], prefix]
    assert tokenize(tokenizer, []) == []


def test_special_tokens_in_the_text_are_text(byte_tokenizer, caplog):
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    (tokens,) = tokenize(tokenizer, ["a</s>b"])
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<s>", "a", "<", "/", "s", ">", "b"]
    assert not caplog.records
