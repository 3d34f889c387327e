"""Random calls of the native code past its public functions: each is run, or refused in a sentence.

    python -m benchmarks.fuzz_ops --calls 20000 --seed 0

A call begins as a proper one, and then some of its arguments are spoiled. `make sanitize` runs this on a build whose
first access out of bounds, or other undefined behaviour, ends the process. Call number i of a seed is always the same;
``--first`` and ``--calls`` run a range, and the file ``--at`` holds the number of the call that is running.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lape_fast.ops  # noqa: F401

# Seconds of one call.
SECONDS = 20

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OTHER_DTYPES = [torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8]
SIZES = [0, 1, 2, 3, 5, 17, 64, 130]
# Of rows that long none can be allocated, and shorter ones only take their time.
NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 4, 2**50, 2**62, 2**63 - 1]
# What the errors of torch itself say, which checks arguments before an op sees them, and runs the fake kernel instead
# where one of them is of no device.
OF_TORCH = (
    "DefaultCPUAllocator",
    "negative dimension",
    "lape_fast::",
    "MathBitsFallback",
    "SymIntArrayRef",
    "Storage size calculation overflowed",
)


class Hostile:
    """Draws arguments, and spoils them."""

    def __init__(self, draw: Random):
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw.getrandbits(32))

    def values(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).mul_(3).to(dtype)

    def integers(self, size: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, (size,), generator=self.generator).to(dtype)

    def spoiled(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Something in the place of a tensor that may not fit there; ``values`` itself where the way is none."""
        way = self.draw.choice(WAYS)
        try:
            return way(self, values, others)
        # What torch itself refuses to make, as negative strides, no op can meet.
        except (RuntimeError, IndexError, ValueError):
            return values

    def other_dtype(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        return values.to(self.draw.choice(DTYPES + OTHER_DTYPES))

    def other_layout(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        return self.draw.choice(
            [
                lambda: values.transpose(0, 1),
                lambda: values.transpose(0, 1).contiguous().transpose(0, 1),
                lambda: values[::2],
            ]
        )()

    def other_shape(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        ways = [
            lambda: values[:0],
            lambda: values[..., :0],
            lambda: values[1:],
            lambda: values[..., 1:],
            lambda: values[None],
            lambda: values.flatten(),
            lambda: values.sum(),
            lambda: values.new_empty((2**50, 0)),
            lambda: values.new_empty((0, 2**62)),
        ]
        return self.draw.choice(ways)()

    def other_strides(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        strides = [self.draw.choice([-1, 0, 1, 2, 7, *values.stride()]) for _ in values.shape]
        return torch.cat([values.flatten()] * 8).as_strided(values.shape, strides, self.draw.randrange(3))

    def strides_of_nothing(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        """The stride of a dimension of one entry is never used, so it may be anything."""
        first = values[:1]
        return first.as_strided(first.shape, [2**62, *first.stride()[1:]])

    def expanded(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        size = self.draw.choice([values.shape[0], values.shape[0], 2**50, 2**60, 2**62])
        return values[:1].expand(size, *values.shape[1:])

    def emptied(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        values = values.clone()
        values.untyped_storage().resize_(max(0, values.untyped_storage().nbytes() - self.draw.choice([1, 8, 10**9])))
        return values

    def misaligned(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        memory = bytearray(values.nbytes + 1)
        return torch.frombuffer(memory, dtype=values.dtype, offset=1).view(values.shape)

    def alias(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        return self.draw.choice(others)

    def beside(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        """A view of another argument's memory, some entries further."""
        other = self.draw.choice(others).view(values.dtype)
        return other.as_strided(values.shape, values.stride(), self.draw.randrange(4))

    def other_kind(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        return self.draw.choice([values.to("meta"), values.to_sparse(), torch._neg_view(values)])

    def other_values(self, values: Tensor, others: Sequence[Tensor]) -> Tensor:
        if values.is_floating_point():
            return values.clone().fill_(self.draw.choice([float("nan"), float("inf"), -float("inf"), 0.0, 1e38]))
        values = values.clone()
        limits = torch.iinfo(values.dtype)
        values[self.draw.randrange(len(values))] = self.draw.choice([limits.min, -2, -1, 0, 5, limits.max])
        return values

    def spoil(self, arguments: list[Any]) -> list[Any]:
        """The arguments of a call, none, one or some of them spoiled."""
        arguments = [list(each) if isinstance(each, list) else each for each in arguments]
        flat = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
        tensors = [each for each in flat if isinstance(each, Tensor)]
        # Each place once: torch would itself read what a tensor lost that is spoiled already.
        for place in self.draw.sample(range(len(arguments)), self.draw.choice([0, 1, 1, 1, 2, 3])):
            found = arguments[place]
            if isinstance(found, Tensor):
                arguments[place] = self.spoiled(found, tensors)
            elif isinstance(found, list) and found:
                entry = self.draw.randrange(len(found))
                found[entry] = self.spoiled(found[entry], tensors)
                arguments[place] = found if self.draw.random() < 0.95 else found[1:]
            elif isinstance(found, int):
                arguments[place] = self.draw.choice(NUMBERS)
            elif found is None:
                arguments[place] = self.values(3, 5)
        return arguments


WAYS = [
    Hostile.other_dtype,
    Hostile.other_layout,
    Hostile.other_shape,
    Hostile.other_strides,
    Hostile.strides_of_nothing,
    Hostile.expanded,
    Hostile.emptied,
    Hostile.misaligned,
    Hostile.alias,
    Hostile.beside,
    Hostile.other_kind,
    Hostile.other_values,
]


def call_forward(hostile: Hostile) -> tuple[Callable, list[Any]]:
    draw = hostile.draw
    tokens, neurons, languages, dtype = draw.choice(SIZES), draw.choice(SIZES), draw.choice(SIZES), draw.choice(DTYPES)
    gate, up = (hostile.values(tokens, neurons, dtype=dtype) for _ in range(2))
    counts = torch.zeros(languages, neurons, dtype=torch.int64)
    # Ids beyond the languages are not counted.
    counting = draw.choice([(None, None), (hostile.integers(tokens, -1, languages + 2, torch.int32), counts)])
    return torch.ops.lape_fast.gated_activation, [gate, draw.choice([up, None]), draw.randrange(4), *counting]


def call_backward(hostile: Hostile) -> tuple[Callable, list[Any]]:
    draw = hostile.draw
    tokens, neurons, dtype = draw.choice(SIZES), draw.choice(SIZES), draw.choice(DTYPES)
    grad_h, gate, up = (hostile.values(tokens, neurons, dtype=dtype) for _ in range(3))
    slots = torch.full((neurons,), -1, dtype=torch.int32)
    chosen = torch.randperm(neurons, generator=hostile.generator)[: draw.randint(0, neurons)]
    slots[chosen] = torch.arange(len(chosen), dtype=torch.int32)
    selection = draw.choice([(None, 0), (slots, len(chosen)), (slots, len(chosen))])
    arguments = [grad_h, gate, draw.choice([up, None]), draw.randrange(4), *selection]
    return torch.ops.lape_fast.gated_activation_backward, arguments


def call_update(hostile: Hostile) -> tuple[Callable, list[Any]]:
    draw = hostile.draw
    lists: list[list[Tensor]] = [[], [], [], [], [], []]
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        height, width, dtype = draw.choice(SIZES), draw.choice(SIZES), draw.choice(DTYPES)
        neurons = torch.randperm(height, generator=hostile.generator)[: draw.randint(0, height)].sort().values
        rows = hostile.values(height, width, dtype=dtype)
        weight = draw.choice([rows, rows.mT.contiguous().mT, rows.new_empty(0)])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        masters = [hostile.values(len(neurons), width, dtype=wide).abs() for _ in range(4)]
        for values, each in zip(lists, (weight, neurons, *masters), strict=True):
            values.append(each)
    clip = draw.choice([None, torch.tensor(0.5), torch.tensor(2.0, dtype=torch.float64)])
    numbers = [1e-3, 0.9, 0.999, 1e-8, draw.choice([0.0, 0.1, 1e300]), draw.choice([1, 2, 10**6])]
    return torch.ops.lape_fast.indexed_adamw_, [*lists, clip, *numbers]


def call_packer(hostile: Hostile) -> tuple[Callable, list[Any]]:
    from lape_fast import _host

    draw = hostile.draw
    lengths = hostile.integers(draw.choice(SIZES), 0, 40, torch.int64)
    tokens = hostile.integers(int(lengths.sum()), 0, 50, torch.int32)
    languages = hostile.integers(len(lengths), -1, 5, torch.int32)
    special = hostile.integers(draw.choice([0, 1, 3]), 0, 50, torch.int32)
    arguments = [tokens, lengths, languages, draw.choice([2, 3, 8, 63]), 0, special, draw.random() < 0.5]

    def pack(*arguments: Any) -> None:
        _host.pack_documents(*(_as_array(hostile, each) if isinstance(each, Tensor) else each for each in arguments))

    return pack, arguments


def _as_array(hostile: Hostile, values: Tensor) -> np.ndarray:
    if values.is_meta or values.is_sparse or values.is_neg() or values.dtype not in (torch.int32, torch.int64):
        return np.zeros(3)
    # numpy would read a storage that was shrunk without a look at its size: that is not ours to refuse.
    last = values.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True)
    )
    if values.numel() and (last + 1) * values.itemsize > values.untyped_storage().nbytes():
        return np.zeros(3)
    array = values.numpy()
    return array[::-1] if hostile.draw.random() < 0.05 else array


CALLS = {"forward": call_forward, "backward": call_backward, "update": call_update, "packer": call_packer}


def outcome_of(seed: int, number: int) -> tuple[str, str, str]:
    """Makes one call.

    Returns:
        The name of what was called; ``run``, ``refused``, ``refused by torch`` or ``FAILED``; and the error's message.
    """
    draw = Random(f"{seed} {number}")
    name = draw.choice(list(CALLS))
    hostile = Hostile(draw)
    function, arguments = CALLS[name](hostile)
    try:
        function(*hostile.spoil(arguments))
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        message = str(error).splitlines()[0]
        if any(part in str(error) for part in OF_TORCH) or isinstance(error, TypeError):
            return name, "refused by torch", message
        # The packer's errors are the rest of a sentence that pack() begins.
        sound = message.isprintable() and len(message) < 600 and (name == "packer" or message.endswith("."))
        return name, "refused" if sound else "FAILED", f"{type(error).__name__}: {message}"
    return name, "run", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--at", default=os.devnull, metavar="FILE", help="where the number of the running call stands")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    at = os.open(options.at, os.O_WRONLY | os.O_CREAT, 0o644)
    outcomes: collections.Counter = collections.Counter()
    for number in range(options.first, options.first + options.calls):
        os.pwrite(at, f"{number}\n".encode(), 0)
        # A call that hangs ends the process.
        signal.alarm(SECONDS)
        name, outcome, message = outcome_of(options.seed, number)
        outcomes[f"{name} {outcome}"] += 1
        if outcome == "FAILED":
            sys.stderr.write(f"Call {number} of {name}: {message}\n")
    signal.alarm(0)
    for name, count in sorted(outcomes.items()):
        sys.stdout.write(f"{name}: {count:,}\n")
    raise SystemExit(any("FAILED" in name for name in outcomes))


if __name__ == "__main__":
    main()
