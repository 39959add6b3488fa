"""GGUF's tensor types as canonical weights: every bit of a block is kept.

Blocks: https://github.com/ggml-org/ggml (ggml-common.h). The K-quants' 6-bit scales and minima become
integers beside their block's fp16 factors: nothing is multiplied here, so nothing is rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ...kernels.quant_matmul import CanonicalWeight, WeightFormat
from ...kernels.quant_matmul.packing import BLOCK, Geometry
from .container import BLOCKS, TensorInfo

FORMATS = {
    "F32": WeightFormat.float("float32"),
    "F16": WeightFormat.float("float16"),
    "BF16": WeightFormat.float("bfloat16"),
    "Q4_0": WeightFormat.int4(32, zero="constant"),
    "Q4_1": WeightFormat.int4(32, zero="minimum"),
    "Q5_0": WeightFormat("int", 5, 32, zero="constant"),
    "Q5_1": WeightFormat("int", 5, 32, zero="minimum"),
    "Q8_0": WeightFormat.int8(32),
    "Q2_K": WeightFormat.blocked(2, 16),
    "Q3_K": WeightFormat.blocked(4, 16, zero="constant"),
    "Q4_K": WeightFormat.blocked(4, 32),
    "Q5_K": WeightFormat.blocked(5, 32),
    "Q6_K": WeightFormat.blocked(6, 16, zero="constant"),
    "IQ4_NL": WeightFormat.int8(32),
}
# Types whose codes have no kernel of their width: the values are the file's, the codes take more bits.
WIDENED = {"Q3_K": "3-bit codes take 4 bits", "IQ4_NL": "entries of its table take 8 bits"}
IQ4_NL_TABLE = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8
)

Parts = dict[str, np.ndarray]


def decode_blocks(raw: np.ndarray, info: TensorInfo) -> CanonicalWeight:
    """A matrix's bytes as a canonical weight, bit for bit. ``raw`` is uint8 and may be taken over."""
    n, k = info.shape
    fmt = FORMATS[info.type]
    if fmt.is_float:
        return CanonicalWeight(fmt, torch.from_numpy(raw).view(fmt.torch_dtype).view(n, k))
    _, size = BLOCKS[info.type]
    parts = _DECODERS[info.type](raw.reshape(-1, size))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)).view(n, -1) for name, part in parts.items()}
    return CanonicalWeight(fmt, **tensors)


def type_rows(tensors: Iterable[TensorInfo]) -> list[dict[str, Any]]:
    """One row for each type that a file's matrices have: how many, and bits a weight there and here."""
    counts = Counter(info.type for info in tensors if len(info.shape) > 1)
    rows = []
    for name, count in counts.most_common():
        fmt, (elements, size) = FORMATS[name], BLOCKS[name]
        here = Geometry(fmt, 256).block_bytes / (BLOCK * 256) * 8
        rows.append({
            "type": name, "tensors": count, "format": fmt.key(), "bits_in_file": 8 * size / elements,
            "bits": here, "values": f"the file's; {WIDENED[name]}" if name in WIDENED else "the file's",
        })  # fmt: skip
    return rows


def _halves(blocks: np.ndarray, at: int, count: int = 1) -> list[np.ndarray]:
    """`count` fp16 numbers of each block, from byte `at` on."""
    found = np.ascontiguousarray(blocks[:, at : at + 2 * count]).view(np.float16)
    return [found[:, i] for i in range(count)]


def _fields(packed: np.ndarray, bits: int, high: int = 0) -> np.ndarray:
    """Bytes [..., L] as [..., 8 / bits, L]: the bytes' fields of `bits` bits, lowest first, moved up."""
    count, mask = 8 // bits, (1 << bits) - 1
    out = np.empty((*packed.shape[:-1], count, packed.shape[-1]), dtype=np.uint8)
    for i in range(count):
        view = out[..., i, :]
        shift = i * bits - high
        np.right_shift(packed, shift, out=view) if shift >= 0 else np.left_shift(packed, -shift, out=view)
        np.bitwise_and(view, mask << high, out=view)
    return out


def _simple(blocks: np.ndarray, minimum: bool, bits: int) -> Parts:
    """Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum, high bits, then nibbles (elements 0-15 low, 16-31 high)."""
    scales = _halves(blocks, 0, 2 if minimum else 1)
    at = 2 * len(scales)
    codes = _fields(blocks[:, at + (4 if bits == 5 else 0) :], 4).reshape(-1, 32)
    if bits == 5:
        codes |= np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4
    return {"codes": codes, "scale": scales[0]} | ({"zero": scales[1]} if minimum else {})


def _q8_0(blocks: np.ndarray) -> Parts:
    return {"codes": blocks[:, 2:].view(np.int8), "scale": _halves(blocks, 0)[0]}


def _iq4_nl(blocks: np.ndarray) -> Parts:
    return {"codes": IQ4_NL_TABLE[_fields(blocks[:, 2:], 4)], "scale": _halves(blocks, 0)[0]}


def _six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima of 6 bits in the 12 bytes of Q4_K and Q5_K."""
    scale, minimum, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = [scale & 63, (rest & 15) | ((scale >> 2) & 48)]
    return np.concatenate(scales, 1), np.concatenate([minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)], 1)


def _q4_k(blocks: np.ndarray, bits: int = 4) -> Parts:
    """Q4_K and Q5_K: d, dmin, 12 bytes of scales, high bits [32] (bit g: group g), nibbles [4][32]."""
    d, dmin = _halves(blocks, 0, 2)
    scale, zero = _six_bit_scales(blocks[:, 4:16])
    at = 48 if bits == 5 else 16
    codes = _fields(blocks[:, at:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    if bits == 5:
        for group in range(8):
            codes[:, group] |= ((blocks[:, 16:48] >> group) & 1) << 4
    return {"codes": codes, "scale": scale, "zero": zero, "block_scale": d, "block_zero": -dmin}


def _q6_k(blocks: np.ndarray) -> Parts:
    """Nibbles [2][64], high 2 bits [2][32], int8 scales [16], d."""
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    codes = low | _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2, high=4)
    return {"codes": codes, "scale": blocks[:, 192:208].view(np.int8), "block_scale": _halves(blocks, 208)[0]}


def _q2_k(blocks: np.ndarray) -> Parts:
    """Scales and minima of 4 bits [16], 2-bit codes [2][32], d, dmin."""
    d, dmin = _halves(blocks, 80, 2)
    codes = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2)
    scales = blocks[:, :16]
    return {"codes": codes, "scale": scales & 15, "zero": scales >> 4, "block_scale": d, "block_zero": -dmin}


def _q3_k(blocks: np.ndarray) -> Parts:
    """High bits [32] (bit r: row r of 32), 2-bit codes [2][32], 16 scales of 6 bits in 12 bytes, d.

    A code is -4 .. 3: here 4 .. 11, with the zero point of 4-bit codes.
    """
    codes = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    for row in range(8):
        codes[:, row] |= ((blocks[:, :32] >> row) & 1) << 2
    codes += 4
    low = _fields(blocks[:, 96:104], 4).reshape(-1, 16)
    scale = (low | _fields(blocks[:, 104:108], 2, high=4).reshape(-1, 16)).view(np.int8) - np.int8(32)
    return {"codes": codes, "scale": scale, "block_scale": _halves(blocks, 108)[0]}


_DECODERS: dict[str, Callable[[np.ndarray], Parts]] = {
    "Q4_0": lambda blocks: _simple(blocks, minimum=False, bits=4),
    "Q4_1": lambda blocks: _simple(blocks, minimum=True, bits=4),
    "Q5_0": lambda blocks: _simple(blocks, minimum=False, bits=5),
    "Q5_1": lambda blocks: _simple(blocks, minimum=True, bits=5),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": lambda blocks: _q4_k(blocks, bits=5),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
}
