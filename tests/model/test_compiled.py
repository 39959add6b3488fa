"""The whole step against the eager decoder, and the contract of its segments."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import edgeformer
from edgeformer.compiler.errors import CapacityError, UnsupportedError
from edgeformer.compiler.target import detect
from edgeformer.kernels.quant_matmul import CanonicalWeight, pack
from edgeformer.model import compiled as compiled_module
from edgeformer.model.compiled import CompiledDecoder, self_check
from edgeformer.model.decoder import Block, Decoder
from edgeformer.runtime.kv_cache import KVCache
from edgeformer.runtime.program import CHUNK_ROWS, StepProgram


def load(tiny: Any, activation: str = "float", kv: str = "fp32") -> tuple[Decoder, CompiledDecoder]:
    model = edgeformer.load(tiny.path, activation=activation, kv=kv, whole_step=False, threads=2)
    return model.decoder, CompiledDecoder(model.decoder, model.target, kv)


def new_cache(decoder: Decoder, kv: str = "fp32", batch: int = 1) -> KVCache:
    c = decoder.config
    return KVCache(c.num_layers, batch, c.num_kv_heads, c.head_dim, decoder.context, dtype=kv)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def tokens(decoder: Decoder, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, decoder.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(make_gguf: Callable[..., Any]) -> tuple[Decoder, CompiledDecoder]:
    return load(make_gguf("Q4_1"))


def test_a_phase_may_take_fewer_threads(pair: tuple[Decoder, CompiledDecoder]) -> None:
    """Thread counts of steps and of chunks are parts of their configurations."""
    decoder, compiled = pair
    program = compiled.program
    one = {**program.configuration, "threads": 1}
    alone = CompiledDecoder(
        decoder, compiled.target, "fp32", configuration=one, chunk_configuration=program.chunk_configuration
    )
    assert alone.program.configuration["threads"] == 1 and program.configuration["threads"] == 0
    assert self_check(alone, decoder, "fp32") == ""
    both = CompiledDecoder(
        decoder, compiled.target, "fp32", configuration=one,
        chunk_configuration={**program.chunk_configuration, "threads": 1},
    )  # fmt: skip
    assert self_check(both, decoder, "fp32") == ""


# As llama.cpp mixes types: values and some layers' down in more bits, the table that the head shares too.
MIXED = {"blk.0.attn_v.weight": "Q6_K", "blk.1.ffn_down.weight": "Q6_K", "token_embd.weight": "Q6_K"}


def test_layers_and_values_in_formats_of_their_own(make_gguf: Callable[..., Any]) -> None:
    decoder, compiled = load(make_gguf("Q4_K", types=MIXED, hidden=256, mlp=256, heads=4), "auto", "bf16")
    first, second = compiled.program.spec.layers
    assert (first.qkv.bits, second.qkv.bits, first.down.bits, second.down.bits) == (4, 4, 4, 6)
    assert first.values is not None and first.values.bits == 6 and second.values is None
    assert self_check(compiled, decoder, "bf16") == ""


@pytest.mark.parametrize(
    ("kind", "kv"), [("F32", "fp32"), ("Q4_0", "bf16"), ("Q8_0", "int8"), ("Q4_1", "fp16")]
)
def test_every_layer_of_the_step_equals_the_eager_one(
    make_gguf: Callable[..., Any], kind: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, compiled = load(make_gguf(kind), "auto", kv)
    assert self_check(compiled, decoder, kv) == ""
    monkeypatch.setattr(compiled_module, "_TOLERANCE", 1e-9)  # the check is able to fail
    assert "differs" in self_check(compiled, decoder, kv)


def test_self_check_finds_a_wrong_weight(make_gguf: Callable[..., Any]) -> None:
    decoder, compiled = load(make_gguf("Q4_0"), "int8", "bf16")
    block = decoder.layers[1]
    assert isinstance(block, Block)
    wrong = block.o.weight.unpack()
    compiled.program.bind_handle(
        1, "o", pack(CanonicalWeight(wrong.format, wrong.codes.flip(0), wrong.scale))
    )
    assert "layer 1" in self_check(compiled, decoder, "bf16")


@pytest.mark.parametrize("lengths", [(1,), (5,), (8,), (2, 1, 1, 3, 1), (9,), (61,), (33, 1, 12, 5, 40)])
def test_steps_over_one_cache_equal_the_eager_model(
    pair: tuple[Decoder, CompiledDecoder], lengths: tuple[int, ...]
) -> None:
    decoder, compiled = pair
    ids = tokens(decoder, 1, sum(lengths))
    eager, ours = new_cache(decoder), new_cache(decoder)
    start = 0
    for length in lengths:
        chunk = ids[:, start : start + length]
        wanted = decoder(chunk, eager, start, last_only=False)
        assert error(compiled(chunk, ours, start, last_only=False), wanted) < 1e-4
        start += length


def test_ragged_batch(pair: tuple[Decoder, CompiledDecoder]) -> None:
    decoder, compiled = pair
    ids, lengths = tokens(decoder, 5, 13), torch.tensor([13, 9, 12, 1, 4], dtype=torch.int32)
    eager, ours = new_cache(decoder, batch=5), new_cache(decoder, batch=5)
    for cache in (eager, ours):
        decoder(ids, cache, 0, lengths)
    following = tokens(decoder, 5, 1, seed=1)
    wanted = decoder(following, eager, 13, lengths + 1)
    assert error(compiled(following, ours, 13, lengths + 1), wanted) < 1e-4


@pytest.mark.parametrize("most", [1024, 45])
def test_ragged_chunks(
    pair: tuple[Decoder, CompiledDecoder], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose rows pass in one chunk, or in several that cut the shorter rows' padding."""
    decoder, compiled = pair
    monkeypatch.setattr(compiled_module, "CHUNK_ROWS", most)
    ids, lengths = tokens(decoder, 3, 40), torch.tensor([40, 7, 29], dtype=torch.int32)
    eager, ours = new_cache(decoder, batch=3), new_cache(decoder, batch=3)
    wanted = decoder(ids, eager, 0, lengths, last_only=False)
    got = compiled(ids, ours, 0, lengths, last_only=False)
    for row, length in enumerate(lengths.tolist()):
        assert error(got[row, -length:], wanted[row, -length:]) < 1e-4
    following = tokens(decoder, 3, 1, seed=1)
    wanted = decoder(following, eager, 40, lengths + 1)
    assert error(compiled(following, ours, 40, lengths + 1), wanted) < 1e-4


def test_segments_of_a_chunk(pair: tuple[Decoder, CompiledDecoder]) -> None:
    """Embedding, then layer by layer: hidden states go in and out as in a step."""
    decoder, compiled = pair
    ids = tokens(decoder, 1, 30)
    cos, sin = decoder.rope_rows(0, 30, None)
    wanted = decoder(ids, new_cache(decoder), 0, last_only=False)
    run, cache = compiled.program.run, new_cache(decoder)
    x = run(cache, 0, cos, sin, ids=ids, count=0, head=False)
    for layer in range(compiled.program.layers):
        x = run(cache, 0, cos, sin, hidden=x, first=layer, count=1, head=False)
    assert error(decoder.head(decoder.norm(x)), wanted) < 1e-4
    embedded = decoder.embed(ids)
    assert error(compiled(embedded, new_cache(decoder), 0, last_only=False), wanted) < 1e-4


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "BF16"])
def test_chunks_on_a_matrix_unit(make_gguf: Callable[..., Any], kind: str) -> None:
    """On portable arithmetic where there is none: the chunk's bf16 program against fp32."""
    host = detect()
    target = host if host.isa == "amx" else host.with_isa("portable16")
    decoder, _ = load(make_gguf(kind))
    wanted = decoder(ids := tokens(decoder, 1, 50), new_cache(decoder), 0, last_only=False)
    layers = [
        {
            "attn_norm": block.attn_norm.weight, "qkv": block.qkv.weight, "qkv_bias": block.qkv.bias,
            "o": block.o.weight, "mlp_norm": block.mlp_norm.weight, "gate_up": block.gate_up.weight,
            "down": block.down.weight,
        }
        for block in decoder.layers
        if isinstance(block, Block)
    ]  # fmt: skip
    if target.isa != host.isa:  # 8-bit codes lie otherwise there
        move = lambda w: pack(w.unpack(), target, w.pair) if hasattr(w, "unpack") else w  # noqa: E731
        layers = [{name: move(w) for name, w in layer.items()} for layer in layers]
    table = pack(decoder.embed.weight.unpack(), target)
    spec = dataclasses.replace(compiled_module.step_spec(decoder, "bf16"), embed_layout=table.layout)
    rounded = dataclasses.replace(spec, activation="bfloat16", math="bfloat16")
    program = StepProgram(spec, target, layers, table, table, decoder.norm.weight, chunk_spec=rounded)
    cos, sin = decoder.rope_rows(0, 50, None)
    x = program.run(new_cache(decoder, "bf16"), 0, cos, sin, ids=ids, head=False)
    assert 1e-6 < error(decoder.head(decoder.norm(x)), wanted) < 0.02  # bf16 rounds to 2**-9


@pytest.mark.parametrize("repeats", [1, 3, 8])
def test_a_core_of_two_layers_runs_any_number_of_times(
    pair: tuple[Decoder, CompiledDecoder], repeats: int
) -> None:
    decoder, compiled = pair
    ids = tokens(decoder, 1, 4)
    cos, sin = decoder.rope_rows(0, 4, None)
    x = wanted = decoder.embed(ids)
    for turn in range(repeats):
        eager, ours = new_cache(decoder), new_cache(decoder)
        for i, layer in enumerate(decoder.layers):
            eager.length = 0
            wanted = layer(wanted, eager.layer(i), 0, cos, sin, None)
        x = compiled.program.run(ours, 0, cos, sin, hidden=x, first=0, count=2, head=False)
        assert error(x, wanted) < 1e-4, turn


def test_a_speculation_of_20_tokens_is_rolled_back(pair: tuple[Decoder, CompiledDecoder]) -> None:
    decoder, compiled = pair
    ids, guessed = tokens(decoder, 1, 30), tokens(decoder, 1, 20, seed=7)
    eager, ours = new_cache(decoder), new_cache(decoder)
    decoder(ids[:, :10], eager, 0)
    compiled(ids[:, :10], ours, 0)
    for start in range(0, 20, 5):
        compiled(guessed[:, start : start + 5], ours, 10 + start)
    assert ours.length == 30
    ours.rollback(20)
    for at in range(10, 30):
        wanted = decoder(ids[:, at : at + 1], eager, at)
        assert error(compiled(ids[:, at : at + 1], ours, at), wanted) < 1e-4


def test_an_adapter_is_swapped_without_compiling(pair: tuple[Decoder, CompiledDecoder]) -> None:
    decoder, compiled = pair
    block = decoder.layers[0]
    assert isinstance(block, Block)
    original = block.down.weight
    canonical = original.unpack()
    merged = canonical.dequantize() + 0.05 * torch.randn(canonical.n, 4) @ torch.randn(4, canonical.k)
    adapted = pack(CanonicalWeight.from_float(merged, canonical.format))
    ids = tokens(decoder, 1, 6)
    before = compiled(ids, new_cache(decoder), 0)
    try:
        block.down.weight = adapted
        compiled.program.bind_handle(0, "down", adapted)
        wanted = decoder(ids, new_cache(decoder), 0)
        assert error(compiled(ids, new_cache(decoder), 0), wanted) < 1e-4
        assert error(wanted, before) > 1e-3
    finally:
        block.down.weight = original
        compiled.program.bind_handle(0, "down", original)
    assert torch.equal(compiled(ids, new_cache(decoder), 0), before)


def test_a_loaded_state_dict_reaches_the_program(make_gguf: Callable[..., Any]) -> None:
    decoder, compiled = load(make_gguf("Q4_0"))
    other, _ = load(make_gguf("Q4_0", seed=1))
    ids = tokens(decoder, 1, 3)
    before = compiled(ids, new_cache(decoder), 0)
    decoder.load_state_dict(other.state_dict())
    wanted = other(ids, new_cache(other), 0)
    assert error(compiled(ids, new_cache(decoder), 0), wanted) < 1e-4
    assert error(before, wanted) > 1e-2


def test_strided_ids(pair: tuple[Decoder, CompiledDecoder]) -> None:
    decoder, compiled = pair
    ids = tokens(decoder, 1, 8)
    wanted = compiled(ids[:, ::2].contiguous(), new_cache(decoder), 0)
    assert torch.equal(compiled(ids[:, ::2], new_cache(decoder), 0), wanted)


def test_embeddings_as_input(pair: tuple[Decoder, CompiledDecoder]) -> None:
    decoder, compiled = pair
    hidden = torch.randn(1, 3, decoder.config.hidden_size)
    wanted = decoder(hidden, new_cache(decoder), 0, last_only=False)
    assert error(compiled(hidden, new_cache(decoder), 0, last_only=False), wanted) < 1e-4


def test_what_does_not_fit_is_refused(pair: tuple[Decoder, CompiledDecoder]) -> None:
    decoder, compiled = pair
    cos, sin = decoder.rope_rows(0, 9, None)
    with pytest.raises(CapacityError, match="with a head takes up to 8 rows"):
        compiled.program.run(new_cache(decoder), 0, cos, sin, ids=tokens(decoder, 1, 9))
    ids = tokens(decoder, CHUNK_ROWS + 1, 1)
    with pytest.raises(CapacityError, match=f"up to {CHUNK_ROWS} rows"):
        compiled.program.run(new_cache(decoder), 0, cos, sin, ids=ids, head=False)
    with pytest.raises(CapacityError, match="do not fit"):
        compiled.program.run(new_cache(decoder), decoder.context, cos, sin, ids=tokens(decoder, 1, 1))
    with pytest.raises(UnsupportedError, match="no handle"):
        compiled.program.bind_handle(0, "nothing", None)
    with pytest.raises(UnsupportedError, match="wants"):
        compiled.program.bind_handle(0, "o", decoder.layers[0].gate_up.weight)  # pyright: ignore


def test_head_sizes_without_whole_blocks_run_op_by_op(make_gguf: Callable[..., Any]) -> None:
    model = edgeformer.load(make_gguf("Q4_0", head_dim=48).path, threads=2)
    assert "whole blocks" in model.whole_step_declined
    assert model.generate([1, 2, 3], max_tokens=4, ignore_eos=True)


def test_fewer_threads_than_asked_for_do_not_hang(make_gguf: Callable[..., Any]) -> None:
    """A launch that gets one thread of two must not wait for the other at a barrier."""
    program = (
        "import sys, edgeformer\n"
        "model = edgeformer.load(sys.argv[1], threads=2)\n"
        "assert not model.whole_step_declined, model.whole_step_declined\n"
        "print(len(model.generate([1, 2, 3], max_tokens=4, ignore_eos=True)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(make_gguf("Q4_0").path)],
        env=os.environ | {"OMP_THREAD_LIMIT": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "4"
