"""The loader keeps every bit, and refuses what it cannot trust."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from edgeformer.compiler.errors import FormatError, UnsupportedError
from edgeformer.model.load.container import Container
from edgeformer.model.load.gguf import GGUFCheckpoint, decode_blocks, half_split_rows
from edgeformer.model.loading import open_checkpoint
from edgeformer.model.requantise import common_format, requantise

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]
MORE_TYPES = ["Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("type", [*TYPES, *MORE_TYPES])
def test_values_are_those_of_the_file(make_gguf, type):
    tiny = make_gguf(type, hidden=256, mlp=256, heads=4)
    checkpoint = GGUFCheckpoint(tiny.path)
    for part, name in {"o": "attn_output", "v": "attn_v", "gate": "ffn_gate", "down": "ffn_down"}.items():
        got = checkpoint.weight(f"layers.1.{part}").dequantize()
        assert torch.equal(got, tiny.values[f"blk.1.{name}.weight"]), part
    assert torch.equal(checkpoint.weight("embed").dequantize(), tiny.values["token_embd.weight"])
    assert torch.equal(checkpoint.vector("layers.0.mlp_norm"), tiny.values["blk.0.ffn_norm.weight"])


@pytest.mark.parametrize("type", TYPES)
def test_codes_and_scales_can_be_written_back(tmp_path, type):
    """The canonical form holds the block's every bit, so the file's bytes can be made from it again."""
    kind = gguf.GGMLQuantizationType[type]
    data = np.random.default_rng(1).standard_normal((6, 96), dtype=np.float32)
    stored = data if type == "F32" else quantize(data, kind)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    container = Container(tmp_path / "one.gguf")
    weight = decode_blocks(container.read("w"), container.info("w"))
    if weight.scale is None:
        assert weight.codes.view(torch.uint8).numpy().tobytes() == stored.tobytes()
        return
    codes = weight.codes.view(torch.uint8).view(6, 3, 32).numpy()
    body = codes if type == "Q8_0" else codes[:, :, :16] | codes[:, :, 16:] << 4
    head = [t.numpy()[:, :, None].view(np.uint8) for t in (weight.scale, weight.zero) if t is not None]
    assert np.concatenate([*head, body], axis=2).tobytes() == stored.tobytes()
    assert torch.equal(weight.dequantize(), torch.from_numpy(dequantize(stored, kind)))


def test_rotary_rows_become_half_split(make_gguf):
    tiny = make_gguf("Q4_1", heads=2, kv_heads=1)
    got = GGUFCheckpoint(tiny.path).weight("layers.0.q").dequantize()
    stored = tiny.values["blk.0.attn_q.weight"]
    for head in range(2):
        for i in range(32):  # the pair (2i, 2i + 1) of the file is the pair (i, i + 32) here
            assert torch.equal(got[head * 64 + i], stored[head * 64 + 2 * i])
            assert torch.equal(got[head * 64 + i + 32], stored[head * 64 + 2 * i + 1])
    assert half_split_rows(1, 6, 4).tolist() == [0, 2, 1, 3, 4, 5]


def test_mixed_types_share_a_format_without_loss(make_gguf):
    tiny = make_gguf("Q4_0", types={"blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_up.weight": "Q4_1"})
    checkpoint = GGUFCheckpoint(tiny.path)
    for names, bits in ((["layers.0.q", "layers.0.v"], 8), (["layers.1.gate", "layers.1.up"], 0)):
        weights = [checkpoint.weight(name) for name in names]
        for before, after in zip(weights, common_format(weights)):
            assert after.format.bits == bits
            assert torch.equal(before.dequantize(), after.dequantize())


def test_requantise_never_widens(make_gguf):
    checkpoint = GGUFCheckpoint(make_gguf("Q4_0").path)
    weight = checkpoint.weight("layers.0.o")
    assert requantise(weight, "int8", "layers.0.o") is weight
    wide = GGUFCheckpoint(make_gguf("F32").path).weight("layers.0.o")
    for choice, bound in (("int8", 0.01), ("int4", 0.1)):
        narrow = requantise(wide, choice, "layers.0.o")
        assert (narrow.dequantize() - wide.codes).norm() / wide.codes.norm() < bound
    assert requantise(wide, "int4", "embed").format.bits == 8
    with pytest.raises(UnsupportedError, match="int3"):
        requantise(wide, "int3", "embed")


def test_untied_head_and_options(make_gguf):
    tiny = make_gguf("F16", tied=False, metadata={"llama.rope.freq_base": 5e5})
    checkpoint = GGUFCheckpoint(tiny.path)
    assert not checkpoint.config.tie_embeddings
    assert checkpoint.config.rope.theta == 5e5
    assert torch.equal(checkpoint.weight("head").dequantize(), tiny.values["output.weight"])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"type": "MXFP4"}, UnsupportedError, "MXFP4"),
        ({"metadata": {"llama.expert_count": 4}}, UnsupportedError, "experts"),
        ({"metadata": {"llama.rope.scaling.type": "dynamic"}}, UnsupportedError, "none, linear, yarn"),
        ({"metadata": {"llama.attention.sliding_window": 0.5}}, FormatError, "sliding_window"),
        ({"metadata": {"llama.rope.dimension_count": 63}}, UnsupportedError, "rotary_dim"),
        ({"extra": {"blk.0.attn_q_norm.weight": np.ones(64, np.float32)}}, UnsupportedError, "attn_q_norm"),
        ({"drop": ("blk.1.ffn_up.weight",)}, FormatError, "ffn_up"),
        ({"drop": ("token_embd.weight",)}, FormatError, "token_embd"),
        ({"heads": 3, "kv_heads": 2}, FormatError, "3 query heads"),
    ],
)
def test_refusals_name_the_reason(make_gguf, options, error, text):
    with pytest.raises(error, match=text):
        GGUFCheckpoint(make_gguf(**options).path)


def test_other_architectures_and_files(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="mamba"):
        open_checkpoint(tmp_path / "x.gguf")
    with pytest.raises(FormatError, match="no file"):
        open_checkpoint(tmp_path / "missing.gguf")
    with pytest.raises(FormatError, match="folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("hello world")
    for name in ("empty", "text"):
        with pytest.raises(FormatError, match="not a GGUF file"):
            open_checkpoint(tmp_path / f"{name}.gguf")


def test_non_finite_weights_are_refused(make_gguf, tmp_path):
    tiny = make_gguf("Q8_0")
    info = Container(tiny.path).info("blk.0.ffn_down.weight")
    data = bytearray(tiny.path.read_bytes())
    data[info.offset : info.offset + 2] = struct.pack("<e", float("nan"))
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(FormatError, match="ffn_down"):
        GGUFCheckpoint(tmp_path / "nan.gguf").weight("layers.0.down")


def test_every_truncation_is_a_format_error(make_gguf, tmp_path):
    data = make_gguf("Q4_0").path.read_bytes()
    path = tmp_path / "cut.gguf"
    cuts = [*range(4, 64), *range(64, len(data) - 1, 997), len(data) - 33]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError):
            GGUFCheckpoint(path)


def test_damaged_headers_never_escape_as_other_errors(make_gguf, tmp_path):
    """Any flipped byte of the header loads as before or fails with a typed error, quickly."""
    good = make_gguf("Q4_0").path.read_bytes()
    header = good.index(b"blk.1.ffn_down.weight")
    random = np.random.default_rng(2)
    path = tmp_path / "bad.gguf"
    for position in [*range(4, 60), *random.integers(60, header, 400).tolist()]:
        data = bytearray(good)
        data[position] ^= int(random.integers(1, 256))
        path.write_bytes(data)
        try:
            GGUFCheckpoint(path)
        except (FormatError, UnsupportedError):
            pass


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [(8, 2**62, "is damaged"), (16, 2**62, "is damaged"), (4, 1, "version"), (4, 3 << 24, "big-endian")],
)
def test_huge_counts_and_versions(make_gguf, tmp_path, at, value, text):
    data = bytearray(make_gguf("F32").path.read_bytes())
    data[at : at + (4 if at == 4 else 8)] = value.to_bytes(4 if at == 4 else 8, "little")
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises((FormatError, UnsupportedError), match=text):
        GGUFCheckpoint(path)
