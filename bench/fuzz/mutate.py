"""Mutations: of bytes, of numbers in a header, and of what a header says."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from . import corpus

NUMBERS = (
    0, 1, 2, 3, 7, 31, 33, 255, 65535, 65536, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62,
    2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.5, "", "x" * 5000, "\ud800", [], [[]], {},
    {"a": {}}, [1] * 5000, "NaN", "../../etc/passwd",
)  # fmt: skip


def bytes_of(data: bytes, rng: random.Random, head: int) -> bytes:
    """A file with some bytes changed, moved, doubled or cut; mostly within its first `head` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(max(1, min(head, len(out))))
        how = rng.randrange(7)
        if how == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            out[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
        elif how == 2:
            out[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
        elif how == 3:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif how == 4:
            out[at:at] = out[at : at + rng.choice((1, 8, 64))]
        elif how == 5:
            out[at:at] = rng.choice((b"\xff\xfe", b"\xc3", b"\0" * 8, b"[" * 2000, b'{"a":' * 2000))
        else:
            del out[at:]
    return bytes(out)


def gguf(rng: random.Random) -> bytes:
    """A GGUF file whose header lies in one way, or whose bytes are damaged."""
    keys = corpus.gguf_keys()
    rows, data = corpus.gguf_rows(rng.choice(("Q4_0", "F32")))
    if rng.random() < 0.4:
        whole = corpus.gguf_bytes(keys, rows, data)
        return bytes_of(whole, rng, len(whole) - data if rng.random() < 0.9 else len(whole))
    number, row = rng.choice(NUMBERS), rng.choice(rows)
    counts = None

    def dims() -> None:
        if row[1]:  # another change may have taken them all
            row[1][rng.randrange(len(row[1]))] = number % 2**64

    def more_dims() -> None:
        row[1] = [number % 2**64] * rng.choice((0, 3, 4, 5, 200))

    def offset() -> None:
        row[3] = number % 2**64

    def overlap() -> None:
        row[3] = rng.choice(rows)[3]

    def kind() -> None:
        row[2] = rng.choice((0, 1, 2, 3, 8, 12, 14, 20, 30, 39, 99, 2**31))

    def name() -> None:
        row[0] = rng.choice(("", "x" * 70000, "blk.4294967296.attn_q.weight", rng.choice(rows)[0]))

    def block_count() -> None:
        keys[1] = corpus.key("llama.block_count", corpus.U32, 10**9)

    def some_key() -> None:
        at = rng.randrange(1, 9)
        first = keys[at][: 8 + struct.unpack("<Q", keys[at][:8])[0]]
        kind = rng.choice((0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 77))
        keys[at] = first + struct.pack("<I", kind) + struct.pack("<Q", number % 2**64)

    def bad_array() -> None:
        at = rng.choice((10, 11, 12))
        plain = "tokenizer.ggml." + ("tokens", "scores", "token_type")[at - 10]
        keys[at] = rng.choice(
            (corpus.array(plain, 9, [b"\0" * 12]), corpus.array(plain, 8, [], number % 2**64),
             corpus.array(plain, 6, [], number % 2**64), corpus.array(plain, 10, [b"\0" * 8] * 300),
             corpus.array(plain, 8, [corpus.text(b"\xff\xfe")] * 300), corpus.array(plain, 8, []))
        )  # fmt: skip

    def alignment() -> None:
        keys.append(corpus.key("general.alignment", corpus.U32, number % 2**32))

    def many_keys() -> None:
        keys.extend(corpus.key(f"k{i}", corpus.U32, i) for i in range(100_000))

    def many_tensors() -> None:
        rows.extend([f"t{i}", [32], 0, 0] for i in range(100_000))

    def lying_counts() -> None:
        nonlocal counts
        counts = (number % 2**64, len(keys)) if rng.random() < 0.5 else (len(rows), number % 2**64)

    def not_utf8() -> None:
        keys[0] = corpus.key(b"general.\xff\xfe", corpus.STRING, b"\xc0\xaf")

    ways: list[Callable[[], None]] = [
        dims, more_dims, offset, overlap, kind, name, block_count, some_key, bad_array, alignment,
        lying_counts, not_utf8,
    ]  # fmt: skip
    rng.choice(ways if rng.random() < 0.97 else [many_keys, many_tensors])()
    if rng.random() < 0.3:
        rng.choice(ways)()
    return corpus.gguf_bytes(keys, rows, data, counts=counts, version=rng.choice((3, 3, 3, 3, 2, 1, 99)))


def json_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one or more of its places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, at = rng.choice(places)
        how = rng.randrange(4)
        if how == 0 and isinstance(holder, dict):
            del holder[at]
        elif how == 1 and isinstance(holder, dict):
            name = rng.choice(("auto_map", "", "model_type", "x" * 300, at + "_"))
            holder[name] = copy.deepcopy(rng.choice(VALUES))
        elif how == 2 and isinstance(holder[at], int):
            holder[at] = rng.choice(NUMBERS)
        else:
            holder[at] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Return every (holder, key or index) of JSON, in any depth and outermost first; 50 items of a list."""
    rest = [value]
    while rest:
        holder = rest.pop()
        items = holder.items() if isinstance(holder, dict) else ()
        for at, item in enumerate(holder[:50]) if isinstance(holder, list) else items:
            yield holder, at
            rest.append(item)


def deep(rng: random.Random) -> bytes:
    """JSON of many levels, or none at all."""
    return rng.choice(
        (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b"", b"null", b"\xff" * 40, b"1e99999",
         b'{"a":1' + b"0" * 5000 + b"}")
    )  # fmt: skip


def encode(value: Any) -> bytes:
    """JSON text; lone surrogates stay escaped."""
    return json.dumps(value).encode()


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """A JSON file that is damaged in its values, its bytes or its depth."""
    draw = rng.random()
    if draw < 0.7:
        return encode(json_value(value, rng))
    return bytes_of(encode(value), rng, 10**6) if draw < 0.95 else deep(rng)


def safetensors(rng: random.Random) -> bytes:
    """A safetensors file whose header lies, or whose bytes are damaged."""
    header, data = corpus.safetensors_header()
    draw = rng.random()
    if draw < 0.3:
        return bytes_of(corpus.safetensors_bytes(header, data), rng, 1500)
    if draw < 0.4:
        return corpus.safetensors_bytes(deep(rng), data, length=rng.choice((None, *NUMBERS)))
    if draw < 0.43:
        entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
        return corpus.safetensors_bytes(entries, 0)
    if draw < 0.6:
        entry = header[rng.choice(list(header))]
        start, stop = entry["data_offsets"]
        number = rng.choice(NUMBERS)
        changes: list[dict[str, Any]] = [
            {"data_offsets": [number, number]}, {"data_offsets": [start, number]},
            {"data_offsets": [stop, start]}, {"data_offsets": [0, stop - start]}, {"shape": [number]},
            {"shape": [number, number]}, {"shape": []}, {"shape": [0, 64]},
            {"dtype": rng.choice(("F64", "I64", "BOOL", "F8_E4M3", "U8", "X", ""))},
        ]  # fmt: skip
        entry.update(rng.choice(changes))
        return corpus.safetensors_bytes(header, data)
    return corpus.safetensors_bytes(json_value(header, rng), data)
