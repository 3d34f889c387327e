"""The native ops called past their public functions: what could reach other memory is refused, and threads agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.fuzz_ops import CALLS, outcome_of
from lape_fast.errors import ShapeError
from lape_fast.ops import gated_activation
from lape_fast.ops.backend import EXTENSION_LOADED
from tests.ops.oracles import counted, random

pytestmark = pytest.mark.skipif(not EXTENSION_LOADED, reason="the native extension is not built")
forward = torch.ops.lape_fast.gated_activation
backward = torch.ops.lape_fast.gated_activation_backward
update = torch.ops.lape_fast.indexed_adamw_


def emptied(values):
    """A tensor whose storage is gone, as sharding leaves one behind."""
    values = values.clone()
    values.untyped_storage().resize_(0)
    return values


def cut_off(values):
    values = values.clone()
    values.untyped_storage().resize_(values.untyped_storage().nbytes() - 1)
    return values


def misaligned(values):
    bytes_of = bytearray(values.nbytes + 1)
    return torch.frombuffer(bytes_of, dtype=values.dtype, offset=1).view(values.shape)


GATE = torch.ones(4, 6)
IDS = torch.zeros(4, dtype=torch.int32)
COUNTS = torch.zeros(2, 6, dtype=torch.int64)
SLOTS = torch.tensor([-1, 0, -1, 1, -1, -1], dtype=torch.int32)
SPOILS = [(emptied, "into a storage of 0"), (cut_off, "into a storage of"), (misaligned, "no multiple")]


@pytest.mark.parametrize(("spoil", "message"), SPOILS)
@pytest.mark.parametrize("place", [0, 1, 3, 4])
def test_counting_reaches_no_memory_but_its_operands(spoil, message, place):
    arguments = [GATE, GATE, 0, IDS, COUNTS]
    arguments[place] = spoil(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        forward(*arguments)


@pytest.mark.parametrize(("spoil", "message"), SPOILS)
@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_the_backward_reaches_no_memory_but_its_operands(spoil, message, place):
    arguments = [GATE, GATE.clone(), GATE.clone(), 0, SLOTS, 2]
    arguments[place] = spoil(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        backward(*arguments)


@pytest.mark.parametrize(("spoil", "message"), SPOILS)
@pytest.mark.parametrize("place", range(7))
def test_an_update_reaches_no_memory_but_its_operands(spoil, message, place):
    weight, neurons = torch.zeros(5, 3), torch.tensor([1, 4])
    operands = [weight, neurons, *(torch.zeros(2, 3) for _ in range(4)), torch.tensor(1.0)]
    operands[place] = spoil(operands[place])
    with pytest.raises(RuntimeError, match=message):
        update(*([each] for each in operands[:6]), operands[6], 1e-3, 0.9, 0.999, 1e-8, 0.0, 1)


@pytest.mark.parametrize("operand", ["gate", "up", "language_ids"])
def test_counts_that_are_an_operand_too_are_refused(operand):
    memory = torch.zeros(2, 6, dtype=torch.int64)
    shared = {
        "gate": memory.view(torch.float32).view(4, 6),
        "up": memory.view(torch.float32).view(4, 6),
        "language_ids": memory.view(torch.int32).view(-1)[:4],
    }
    arguments = {"gate": GATE, "up": GATE, "language_ids": IDS, operand: shared[operand]}
    with pytest.raises(RuntimeError, match="counts shares memory"):
        forward(arguments["gate"], arguments["up"], 0, arguments["language_ids"], memory)


@pytest.mark.parametrize("slots", [[0, 0, -1, -1, -1, -1], [2**31 - 1, 0, -1, -1, -1, -1], [-2, 0, 1, -1, -1, -1]])
def test_slots_out_of_range_or_twice_are_refused(slots):
    with pytest.raises(RuntimeError, match="may occur once"):
        backward(GATE, GATE.clone(), None, 0, torch.tensor(slots, dtype=torch.int32), 2)


@pytest.mark.parametrize("selected", [-1, 7, 2**62])
def test_numbers_of_slots_that_cannot_be_are_refused(selected):
    with pytest.raises(RuntimeError, match="selected is"):
        backward(GATE, GATE.clone(), None, 0, SLOTS, selected)


@pytest.mark.parametrize("neurons", [[-1, 0], [0, 5], [2**62, 2**62 + 1], [1, 1]])
def test_neurons_out_of_range_or_twice_are_refused(neurons):
    operands = [torch.zeros(5, 3), torch.tensor(neurons), *(torch.zeros(2, 3) for _ in range(4))]
    with pytest.raises(RuntimeError, match="increase strictly"):
        update(*([each] for each in operands), None, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(RuntimeError, match="float32, bfloat16"):
        forward(torch.zeros(4, 6).to(dtype), None, 0, None, None)


def test_operands_of_other_devices_are_refused():
    # torch itself would lead the op below to its fake kernel.
    with pytest.raises(ShapeError, match="meta"):
        gated_activation(GATE, GATE.to("meta"), "silu")


def test_outputs_whose_entries_are_one_are_refused():
    expanded = torch.ones(1, 6).expand(4, 6)
    with pytest.raises(RuntimeError, match="overlap"):
        backward(GATE, expanded, None, 0, None, 0)
    with pytest.raises(RuntimeError, match="contiguous"):
        forward(GATE, None, 0, IDS, torch.zeros(1, 6, dtype=torch.int64).expand(2, 6))


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0), (2**50, 0)])
def test_nothing_is_done_to_nothing(shape):
    gate = torch.empty(shape)
    # So many ids in one place of memory; to read all of them would take days.
    ids = torch.zeros(1, dtype=torch.int32).expand(shape[0])
    counts = torch.zeros(2, shape[1], dtype=torch.int64)
    assert forward(gate, gate, 0, ids, counts).shape == shape
    assert counts.sum() == 0


def test_rows_of_any_length_are_packed_without_an_overflow():
    from lape_fast import _host

    tokens = torch.arange(8, dtype=torch.int32).numpy()
    lengths, languages = torch.tensor([3, 5]).numpy(), torch.zeros(2, dtype=torch.int32).numpy()
    none = torch.zeros(0, dtype=torch.int32).numpy()
    ids, _, _ = _host.pack_documents(tokens, lengths, languages, 2**63 - 1, 0, none, True)
    assert ids.tolist() == [[3, 4, 5, 6, 7], [0, 1, 2, 0, 0]]


def test_the_stride_of_a_single_row_means_nothing():
    """torch lets it be anything, and a product with it would overflow."""
    single = [torch.ones(6).as_strided((1, 6), (2**62, 1)) for _ in range(3)]
    assert forward(single[0], single[1], 3, None, None).tolist() == [[1.0] * 6]
    hidden, grads = backward(*single, 3, SLOTS, 2)
    assert (hidden.tolist(), grads.tolist()) == ([[1.0] * 2], [[1.0] * 4])
    weight = torch.zeros(3).as_strided((1, 3), (2**62, 1))
    operands = [weight, torch.tensor([0]), *(torch.zeros(1, 3) for _ in range(4))]
    operands[3] += 2
    update(*([each] for each in operands), None, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    assert weight.tolist() == [[2.0] * 3]


def test_a_backward_without_slots_writes_no_columns():
    hidden, grads = backward(GATE, GATE.clone(), GATE.clone(), 0, None, 0)
    assert (hidden.shape, grads.shape) == ((4, 0), (4, 0))


def test_more_neurons_than_slots_can_number_are_refused():
    nothing, slots = torch.empty(0, 2**62), torch.tensor([-1], dtype=torch.int32).expand(2**62)
    with pytest.raises(RuntimeError, match="selected is"):
        backward(nothing, nothing, nothing, 0, slots, 2**62)
    # One number in memory, however many it stands for: it is not walked along.
    hidden, grads = backward(nothing, nothing, nothing, 0, slots, 2)
    assert (hidden.shape, grads.shape) == ((0, 2), (0, 4))


@pytest.mark.parametrize("weight", [torch.zeros(2**50, 0), torch.zeros(0)])
def test_one_neuron_that_stands_for_many_is_refused(weight):
    nothing = torch.empty(2**50, 0)
    operands = [weight, torch.tensor([0]).expand(2**50), nothing, nothing, nothing, nothing]
    with pytest.raises(RuntimeError, match="increase strictly"):
        update(*([each] for each in operands), None, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1)


# With 200 tokens, threads share the columns.
@pytest.mark.parametrize("tokens", [4, 200])
def test_counts_wrap_as_torchs_own_sums_do(tokens):
    gate, ids = torch.ones(tokens, 300), (torch.arange(tokens) < tokens // 2).int()
    counts = torch.full((2, 300), 2**63 - 1)
    forward(gate, None, 0, ids, counts)
    assert (counts == -(2**63) + tokens // 2 - 1).all()


def test_memory_that_there_is_not_is_told_in_a_sentence():
    with pytest.raises(RuntimeError, match=r"No memory could be had for h of shape \[1125899906842624, 6\]; pass"):
        forward(torch.ones(1, 6).expand(2**50, 6), None, 0, None, None)


@pytest.mark.parametrize("documents", [0, 2])
def test_rows_that_no_memory_holds_are_refused(documents):
    from lape_fast import _host

    zeros = np.zeros(documents, dtype=np.int32)
    with pytest.raises(ValueError, match="context_length is 9223372036854775807"):
        _host.pack_documents(zeros, zeros.astype(np.int64) + 1, zeros, 2**63 - 1, 0, zeros[:0], False)


@pytest.mark.parametrize("place", [0, 1, 2, 5])
def test_arrays_at_odd_addresses_are_refused(place):
    from lape_fast import _host

    arguments = [np.zeros(2, np.int32), np.ones(2, np.int64), np.zeros(2, np.int32), 4, 0, np.ones(2, np.int32), False]
    proper = arguments[place]
    arguments[place] = np.frombuffer(b"." + proper.tobytes(), dtype=proper.dtype, offset=1)
    with pytest.raises(ValueError, match="must not begin at an address"):
        _host.pack_documents(*arguments)


def test_random_calls_are_run_or_refused_in_a_sentence():
    outcomes = [outcome_of(seed=1, number=number) for number in range(3_000)]
    assert [message for _, outcome, message in outcomes if outcome == "FAILED"] == []
    found = {(name, outcome) for name, outcome, _ in outcomes}
    assert found >= {(name, outcome) for name in CALLS for outcome in ("run", "refused")}


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counting_is_no_race(threads, dtype):
    """Rows are shared out, so that all threads add to the same counts: nothing is lost in 200 repetitions."""
    before = torch.get_num_threads()
    gate, ids = random(600, 300, dtype=dtype), torch.arange(600).div(100, rounding_mode="floor").int()
    expected = counted(gate, ids, 6)
    counts = torch.zeros_like(expected)
    torch.set_num_threads(threads)
    try:
        for _ in range(200):
            forward(gate, None, 0, ids, counts)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(counts, 200 * expected)
