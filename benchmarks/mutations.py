"""Broken and hostile versions of files, the same ones for the same generator of random numbers.

Bytes are cut, flipped, repeated and spliced. Where a file has a format, what is inside is changed and packed again, so
that the reader gets past the length, the checksum or the compression in front of it.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pyarrow

# Code that a pickle or a YAML file would run: it leaves this file in the working directory.
CANARY = "lape-fast-canary"

# What readers trip over, as bytes.
FRAGMENTS = [
    b"",
    b"\0",
    b"\n" * 50,
    b"\r\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xf8\x88\x80\x80\x80",
    "\u2028\u202e\x85\x0c\x1b[31m".encode(),
    b"[" * 20_000,
    b'{"a":' * 5_000,
    b"9" * 5_000,
    b"NaN",
    b"-Infinity",
    b'{"text": "\\ud800"}\n',
    b'{"text": 1}\n',
    b"null\n",
    b"PK\x03\x04",
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"PAR1",
    b"<bos><eos>",
    b"a: &a [x, x]\nb: [*a, *a]\n",
    f'!!python/object/apply:os.mkdir ["{CANARY}"]\n'.encode(),
    f"rule: !!python/object/apply:os.mkdir [{CANARY}]\n".encode(),
    f"cposix\nmkdir\n(X\x0f\0\0\0{CANARY}tR.".encode(),
    f"\x80\x02cposix\nmkdir\nq\0X\x10\0\0\0{CANARY}q\x01\x85q\x02Rq\x03.".encode(),
    b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x40\x85R.",
    b"ctorch\nLongTensor\nJ\xff\xff\xff\x7f\x85R",
    b"r\xff\xff\xff\x7f",
    (2**62).to_bytes(8, "little"),
    (2**31 - 1).to_bytes(4, "little"),
    bytes(8),
    b"\xff" * 8,
]

# What stands where JSON is expected to hold something else.
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2**24,
    2**31,
    2**40,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "mlt_Latn",
    "\ud800",
    "\0",
    "\x1b[2J\r\n",
    "x" * 5_000,
    "9" * 5_000,
    "../../../../etc/passwd",
    "/etc/passwd",
    "neurons/../../secret",
    "I64",
    "F8_E4M3",
    "BOOL",
    "U64",
    [],
    {},
    [[]],
    [0, 1],
    [-1],
    {"a": 1},
    ["mlt_Latn", "mt"],
    list(range(300)),
]

Change = Callable[[bytes, Sequence[bytes], Random], bytes]


def change_bytes(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """One change of bytes that knows no format; ``others`` is what may be spliced in."""
    start = random.randrange(len(data) + 1)
    end = min(len(data), start + random.choice([1, 2, 4, 8, 64, 512]))
    kind = random.randrange(8)
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[start:]
    if kind == 2:
        return data[:start] + random.choice(FRAGMENTS) + data[start:]
    if kind == 3:
        return data[:start] + random.choice(FRAGMENTS) + data[end:]
    if kind == 4:
        return data[:end] + data[start:]
    if kind == 5:
        other = random.choice(others)
        return data[:start] + other[random.randrange(len(other) + 1) :]
    if kind == 6:
        return data[:start] + random.randbytes(end - start) + data[end:]
    flipped = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 3, 10]) if data else 0):
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
    return bytes(flipped)


def change_json(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Other values, other names and missing ones in a JSON document; now and then a name that stands twice."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, others, random)
    text = json.dumps(change_value(value, random))
    if random.random() < 0.05:
        text = text.replace("{", '{"language": 1, "language": 2, ', 1)
    return text.encode()


def change_value(value: Any, random: Random) -> Any:
    """The value with one place in it changed."""
    places = list(_places(value))
    if not places:
        return random.choice(VALUES)
    holder, name = random.choice(places)
    kind = random.randrange(6)
    if kind == 0:
        del holder[name]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(["", "kind", "mlt_Latn", "\ud800", "x" * 3_000])] = holder.pop(name)
    elif kind == 1:
        holder.insert(name, holder[name])
    elif kind == 2:
        other, place = random.choice(places)
        holder[name] = json.loads(json.dumps(other[place]))
    elif kind == 3 and type(holder[name]) is int:
        holder[name] += random.choice([-1, 1, 2**16, -(2**33)])
    else:
        holder[name] = random.choice(VALUES)
    return value


def _places(value: Any):
    names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield value, name
        yield from _places(value[name])


def change_safetensors(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Another header in front of the same values: shapes, dtypes, offsets, and JSON within the metadata."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        if random.random() < 0.6:
            name = random.choice(list(metadata))
            metadata[name] = change_json(metadata[name].encode(), [b"{}"], random).decode("utf-8", "replace")
        else:
            header = change_value(header, random)
        text = json.dumps(header).encode()
    except (ValueError, RecursionError, KeyError, IndexError, AttributeError, TypeError):
        return change_bytes(data, others, random)
    if random.random() < 0.05:
        text = change_bytes(text, others, random)
    stated = len(text) if random.random() < 0.97 else random.choice([0, 2**26 + 1, 2**32, 2**63])
    return stated.to_bytes(8, "little") + text + data[8 + length :]


def change_zip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Other members of a zip file under right checksums, or the same ones compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(each.filename, archive.read(each)) for each in archive.infolist()]
    except (ValueError, OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return change_bytes(data, others, random)
    # The pickle, more often than what it names.
    chosen = random.choice([*range(len(members)), 0, 0, 0])
    name, content = members[chosen]
    members[chosen] = (name, change_bytes(content, [each for _, each in members], random))
    if random.random() < 0.05:
        members.append(random.choice(members))
    target = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if random.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return target.getvalue()


def change_gzip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Other text in a gzip file."""
    try:
        content = gzip.decompress(data)
    except (OSError, EOFError, ValueError, zlib.error):
        return change_bytes(data, others, random)
    return gzip.compress(change_bytes(content, [content], random), compresslevel=1)


def change_zstd(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Other text in a zstd file."""
    try:
        content = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    except OSError:
        return change_bytes(data, others, random)
    return pyarrow.compress(change_bytes(content, [content], random), "zstd", asbytes=True)


CHANGES: dict[str, Change] = {
    "bytes": change_bytes,
    "json": change_json,
    "safetensors": change_safetensors,
    "zip": change_zip,
    "gzip": change_gzip,
    "zstd": change_zstd,
}


def mutate(seeds: Sequence[bytes], structure: str, random: Random) -> bytes:
    """One of the seeds after one or several changes.

    Args:
        seeds: whole files.
        structure: their format, a name of ``CHANGES``.
        random: decides everything.
    """
    data = random.choice(seeds)
    for _ in range(random.choice([1, 1, 1, 2, 3, 6])):
        change = CHANGES[structure] if random.random() < 0.7 else change_bytes
        data = change(data, seeds, random)
    return data
