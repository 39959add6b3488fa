"""GGUF's tensor types: random valid blocks dequantise to what the gguf package makes of them, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from edgeformer.compiler.target import detect
from edgeformer.kernels.quant_matmul import pack
from edgeformer.kernels.quant_matmul.packing import Geometry
from edgeformer.model.load.blocks import FORMATS, WIDENED, decode_blocks
from edgeformer.model.load.container import BLOCKS, TensorInfo
from edgeformer.model.load.gguf import GGUFCheckpoint
from edgeformer.model.loading import open_checkpoint

from .conftest import random_blocks

QUANTISED = [name for name, fmt in FORMATS.items() if not fmt.is_float]


def test_block_sizes_are_those_of_ggml() -> None:
    assert BLOCKS.keys() == FORMATS.keys()
    for name, sizes in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == sizes, name


@pytest.mark.parametrize("name", QUANTISED)
def test_every_bit_of_a_block_counts(name: str) -> None:
    """Any bytes with finite scales: zero, subnormal, negative and large ones too."""
    elements, _ = BLOCKS[name]
    n, k = 70, 3 * elements
    random = np.random.default_rng(len(name))
    raw = random_blocks(name, (n, k), random)
    want = torch.from_numpy(dequantize(raw.reshape(n, -1), gguf.GGMLQuantizationType[name]))
    weight = decode_blocks(raw.reshape(-1).copy(), TensorInfo("w", name, (n, k), 0, raw.size))
    assert torch.equal(weight.dequantize(), want)
    for pair in (False, True):
        packed = pack(weight, detect(), pair=pair)
        assert torch.equal(packed.unpack().dequantize(), want)


@pytest.mark.parametrize("name", QUANTISED)
def test_bits_in_memory_are_those_of_the_file_or_said(name: str) -> None:
    """Scales of 6 bits take a byte here; nothing else takes more room, except what is widened by name."""
    elements, size = BLOCKS[name]
    here = Geometry(FORMATS[name], 2048).block_bytes * 8 / (32 * 2048)
    there = size * 8 / elements
    if name in WIDENED:
        assert here > there
    elif FORMATS[name].zero == "minimum" and FORMATS[name].block_size:
        assert here - there == pytest.approx({"Q2_K": 0.5}.get(name, 0.125))
    else:
        assert here == there


def test_the_report_names_every_type(make_gguf) -> None:
    types = {"blk.0.attn_v.weight": "IQ4_NL", "token_embd.weight": "Q6_K"}
    checkpoint = open_checkpoint(make_gguf("Q4_K", types=types, hidden=256, mlp=256, heads=4).path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    rows = checkpoint.types()
    assert {row["type"]: row["tensors"] for row in rows} == {"Q4_K": 13, "IQ4_NL": 1, "Q6_K": 1}
    assert {row["type"]: (row["bits_in_file"], row["bits"]) for row in rows} == {
        "Q4_K": (4.5, 4.625), "IQ4_NL": (4.5, 8.5), "Q6_K": (6.5625, 6.5625),
    }  # fmt: skip
    assert all(("8 bits" in row["values"]) == (row["type"] == "IQ4_NL") for row in rows)
