"""Mutations of valid files, by bytes and by structure. A random.Random decides all of them."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from random import Random
from typing import Any

import torch

# JSON that json.dumps does not write. A string of this form is replaced by the text within.
RAW = (
    "1e999",
    "NaN",
    "-Infinity",
    "1" * 400,
    "-" + "9" * 5000,
    "[" * 2000 + "]" * 2000,
    '{"a":' * 100_000,
    "1.0e-400",
    "01",
    "",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1.0, 0.5, -0.5, 1e308, 5e-324, 2**31, 2**63, 2**64, 10**12, -(10**30), "", "x", "0"),
    *(
        "linear",
        "epsilon",
        "\ud800",
        "\0",
        "../x",
        "x" * 5000,
        [],
        {},
        [[]],
        [None],
        {"": {}},
        [1] * 1000,
        [0.1, 0.2],
        ["x", "x"],
    ),
    *(f"raw:{text}" for text in RAW),
)


def bytes_of(random: Random, content: bytes) -> bytes:
    """Return the content with a few bytes changed, removed, repeated or inserted, or cut off."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(changed) + 1)
        piece = changed[at : at + random.choice((1, 1, 2, 8, 64))]
        flipped = bytes(byte ^ 1 << random.randrange(8) for byte in piece[:1]) + piece[1:]
        special = random.choice((b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b'"', b"{", b"[", b"9", b"-")) + piece[1:]
        repeated, inserted = piece * random.choice((2, 3, 51)), random.randbytes(len(piece)) + piece
        changed[at : at + len(piece)] = random.choice((flipped, special, b"", repeated, inserted))
        if random.random() < 0.03:
            del changed[at:]
    return bytes(changed)


def json_of(random: Random, value: Any) -> str:
    """Return a JSON document with a few values replaced, removed, repeated, added or moved."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = random.choice(places)
        kind = random.randrange(6)
        if kind <= 3:
            other, from_key = random.choice(places)
            holder[key] = copy.deepcopy(other[from_key] if kind == 3 else random.choice(VALUES))
        elif kind == 4:
            del holder[key]
        elif isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * random.choice((1, 2, 20))
        else:
            holder[random.choice(("unknown", "", "_x", key + "\0"))] = copy.deepcopy(holder[key])
    text = json.dumps(value)
    for raw in RAW:
        text = text.replace(f'"raw:{raw}"', raw)
    if isinstance(value, dict) and value and random.random() < 0.05:  # a name twice
        text = text[:-1] + f", {json.dumps(random.choice(list(value)))}: {json.dumps(random.choice(VALUES[:20]))}}}"
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every list or dict inside, with every index or key of it."""
    if isinstance(value, (list, dict)):
        for key in range(len(value)) if isinstance(value, list) else list(value):
            yield value, key
            yield from _places(value[key])


def safetensors_of(random: Random, content: bytes) -> bytes:
    """Return a safetensors file with a mutated header of the right length, or with mutated bytes."""
    if random.random() < 0.5:
        return bytes_of(random, content)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    if random.random() < 0.3:
        data = bytes_of(random, data)
    text = (
        bytes_of(random, header) if random.random() < 0.2 else json_of(random, _header(random, header)).encode(errors="replace")
    )
    length = len(text) if random.random() < 0.9 else random.choice((0, 1, len(text) - 1, len(content), 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + text + data


def _header(random: Random, header: bytes) -> dict[str, Any]:
    """Return the header, often with one tensor that claims something else about itself."""
    entries: dict[str, Any] = json.loads(header)
    entry = entries[random.choice([name for name in entries if name != "__metadata__"])]
    shape = entry["shape"]
    dtypes = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 F6_E3M2 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64 X"
    for key, values in (
        ("dtype", dtypes.split()),
        ("shape", ([], [0], [1], [2**62, 2**62], [-1], shape[::-1], [*shape, 1])),
        ("data_offsets", ([0, 0], [4, 0], [0, 2**63], [0], [-4, 0])),
    ):
        if random.random() < 0.3:
            entry[key] = random.choice(values)
    return entries


def torch_of(random: Random, content: bytes) -> bytes:
    """Return a file of torch.save with other values in its dict, a mutated pickle, or mutated bytes."""
    kind = random.randrange(3)
    if kind == 0:
        return bytes_of(random, content)
    saved = io.BytesIO()
    if kind == 1:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(saved, "w") as new:
            for name in old.namelist():
                part = old.read(name)
                new.writestr(name, bytes_of(random, part) if name.endswith("data.pkl") or random.random() < 0.02 else part)
        return saved.getvalue()
    value: Any = torch.load(io.BytesIO(content), weights_only=True)
    name = random.choice(list(value))
    tensor = value[name]
    value[name] = random.choice(
        (
            *(None, 1, "x", [], {}, tensor.tolist(), tensor.double(), tensor.half(), tensor.long(), tensor.bool()),
            *(tensor * float("nan"), tensor * 1e38, tensor.to_sparse(), tensor.to("meta"), tensor.to(torch.complex64)),
            *(
                tensor[None],
                tensor.flatten(),
                tensor[..., :0],
                torch.nn.Parameter(tensor),
                tensor.new_zeros(()).expand_as(tensor),
            ),
        )
    )
    if random.random() < 0.2:
        value[random.choice((1, None, (), "", "unknown", f"{name}.x"))] = value.pop(name)
    if random.random() < 0.2:
        value = random.choice((None, [], [value], {}, tensor, 3, "x", {"state_dict": value}, list(value.values())))
    torch.save(value, saved, _use_new_zipfile_serialization=random.random() < 0.7)
    return saved.getvalue()
