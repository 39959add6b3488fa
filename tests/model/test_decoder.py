"""The decoder against transformers' Llama with the same weights, and its state dict."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from edgeformer.compiler.errors import CapacityError, UnsupportedError
from edgeformer.model.config import ModelConfig
from edgeformer.model.decoder import Decoder
from edgeformer.model.evaluate import reference_hidden
from edgeformer.model.load.gguf import GGUFCheckpoint
from edgeformer.model.rope import Rope
from edgeformer.runtime.dispatch import use_target
from edgeformer.runtime.kv_cache import KVCache

TOLERANCE = 1e-3  # relative error of logits, float activations


@pytest.fixture(autouse=True)
def _plain_forms(plain):
    use_target(plain)
    yield
    use_target(None)


def build(tiny, **options) -> Decoder:
    return Decoder.from_checkpoint(GGUFCheckpoint(tiny.path), **{"activation": "float", **options})


def new_cache(decoder: Decoder, batch: int = 1, dtype: str = "fp32") -> KVCache:
    c = decoder.config
    return KVCache(c.num_layers, batch, c.num_kv_heads, c.head_dim, decoder.context, dtype=dtype)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@torch.no_grad()
def expected_logits(tiny, ids: torch.Tensor) -> torch.Tensor:
    return tiny.hugging_face()(ids).logits


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_prefill_matches_transformers(make_gguf, type):
    tiny = make_gguf(type, heads=4, kv_heads=2)
    decoder = build(tiny)
    ids = torch.randint(0, tiny.vocab, (1, 37), generator=torch.Generator().manual_seed(0))
    got = decoder(ids, new_cache(decoder), 0, last_only=False)
    assert got.dtype == torch.float32
    assert error(got, expected_logits(tiny, ids)) < TOLERANCE


@pytest.mark.parametrize("type", ["Q4_K", "Q5_K", "Q3_K", "IQ4_NL"])
def test_values_in_a_format_of_their_own(make_gguf, type):
    types = {"blk.0.attn_v.weight": "Q6_K", "blk.1.ffn_down.weight": "Q6_K", "token_embd.weight": "Q6_K"}
    tiny = make_gguf(type, types=types, hidden=256, mlp=256, heads=4, kv_heads=2)
    decoder = build(tiny)
    assert [layer.values is None for layer in decoder.layers] == [False, True]
    ids = torch.randint(0, tiny.vocab, (1, 37), generator=torch.Generator().manual_seed(0))
    assert error(decoder(ids, new_cache(decoder), 0, last_only=False), expected_logits(tiny, ids)) < TOLERANCE
    reference = decoder.head(reference_hidden(decoder, [ids[0]])[0])
    assert error(reference, expected_logits(tiny, ids)[0]) < TOLERANCE


@pytest.mark.parametrize(
    "sizes", [{"heads": 1, "kv_heads": 1}, {"heads": 3, "kv_heads": 3, "hidden": 192}, {"tied": False}]
)
def test_shapes_of_the_family(make_gguf, sizes):
    tiny = make_gguf("Q8_0", **sizes)
    decoder = build(tiny)
    ids = torch.arange(20).view(1, 20)
    assert error(decoder(ids, new_cache(decoder), 0, last_only=False), expected_logits(tiny, ids)) < TOLERANCE


def test_chunks_and_single_steps_equal_one_pass(make_gguf):
    tiny = make_gguf("Q4_1")
    decoder = build(tiny)
    ids = torch.randint(0, tiny.vocab, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = expected_logits(tiny, ids)
    cache = new_cache(decoder)
    for start, end in [(0, 17), (17, 33), *((i, i + 1) for i in range(33, 40))]:
        got = decoder(ids[:, start:end], cache, start)
        assert got.shape == (1, 1, tiny.vocab)
        assert error(got[:, 0], expected[:, end - 1]) < TOLERANCE


@pytest.mark.parametrize("lengths", [[9], [9, 4], [3, 12, 1, 7, 12]])
def test_ragged_batches_equal_their_rows(make_gguf, lengths):
    tiny = make_gguf("Q4_0")
    decoder = build(tiny)
    rows = [
        torch.randint(0, tiny.vocab, (n + 4,), generator=torch.Generator().manual_seed(n)) for n in lengths
    ]
    longest = max(lengths)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    for b, n in enumerate(lengths):
        padded[b, longest - n :] = rows[b][:n]
    cache = new_cache(decoder, len(rows))
    valid = torch.tensor(lengths, dtype=torch.int32)
    got = [decoder(padded, cache, 0, lengths=valid)]
    for step in range(4):
        token = torch.stack([row[n + step] for row, n in zip(rows, lengths)])[:, None]
        got.append(decoder(token, cache, longest + step, lengths=valid + step + 1))
    for b, n in enumerate(lengths):
        expected = expected_logits(tiny, rows[b][None])[0, n - 1 :]
        assert error(torch.cat([g[b] for g in got]), expected) < TOLERANCE


def test_padding_that_fills_a_chunk(make_gguf):
    """A row may have no token yet in the first chunk."""
    decoder = build(make_gguf("F32"))
    row = torch.arange(5, 8)
    padded = torch.zeros(2, 12, dtype=torch.int64)
    padded[0], padded[1, 9:] = torch.arange(12), row
    cache = new_cache(decoder, 2)
    decoder(padded[:, :6], cache, 0, lengths=torch.tensor([6, 0], dtype=torch.int32))
    got = decoder(padded[:, 6:], cache, 6, lengths=torch.tensor([12, 3], dtype=torch.int32))
    alone = decoder(row[None], new_cache(decoder), 0)
    assert torch.isfinite(got).all()
    assert error(got[1], alone[0]) < TOLERANCE


def test_embeddings_as_input(make_gguf):
    decoder = build(make_gguf("Q8_0"))
    ids = torch.arange(6)[None]
    got = decoder(decoder.embed(ids), new_cache(decoder), 0)
    assert torch.equal(got, decoder(ids, new_cache(decoder), 0))


@pytest.mark.parametrize("kv", ["bf16", "fp16", "int8"])
def test_kv_types_stay_close(make_gguf, kv):
    decoder = build(make_gguf("F32"))
    ids = torch.arange(30)[None]
    exact = decoder(ids, new_cache(decoder), 0)
    assert error(decoder(ids, new_cache(decoder, dtype=kv), 0), exact) < 0.03


def test_int8_activations_stay_close(make_gguf):
    tiny = make_gguf("Q4_0")
    ids = torch.arange(30)[None]
    decoder = build(tiny, activation="int8")
    assert 0 < error(decoder(ids, new_cache(decoder), 0, last_only=False), expected_logits(tiny, ids)) < 0.05


def test_bias_partial_rotation_and_rope_factors():
    """Against the plain PyTorch reference of model.evaluate, where transformers' Llama has no such option."""
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=32, max_context=32, rotary_dim=16, attention_bias=True,
        rope=Rope(scaling="linear", factor=2.0, factors=(1.0,) * 4 + (4.0,) * 4),
    )  # fmt: skip
    decoder = Decoder.from_checkpoint(RandomCheckpoint(config), activation="float")
    ids = torch.arange(20)
    got = decoder(ids[None], new_cache(decoder), 0, last_only=False)[0]
    expected = reference_hidden(decoder, [ids])[0] @ decoder.head.weight.unpack().dequantize().T
    assert error(got, expected) < TOLERANCE
    cos, _ = config.rope.tables(config.rotary, 32)
    assert cos.shape == (32, 8)
    assert torch.allclose(cos[:, 7], torch.cos(torch.arange(32) / 2 / 4 / 10000 ** (14 / 16)), atol=1e-6)


class RandomCheckpoint:
    """Weights of any config, as a loader would give them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        c = config
        self.random = torch.Generator().manual_seed(3)
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.shapes = {"q": (q, c.hidden_size), "k": (kv, c.hidden_size), "v": (kv, c.hidden_size),
                       "o": (c.hidden_size, q), "gate": (c.intermediate_size, c.hidden_size),
                       "up": (c.intermediate_size, c.hidden_size),
                       "down": (c.hidden_size, c.intermediate_size),
                       "embed": (c.vocab_size, c.hidden_size)}  # fmt: skip
        self.sizes = {"q_bias": q, "k_bias": kv, "v_bias": kv}

    def weight(self, name):
        from edgeformer.kernels.quant_matmul import CanonicalWeight, WeightFormat

        n, k = self.shapes[name.split(".")[-1]]
        return CanonicalWeight(
            WeightFormat.float("float32"), torch.randn(n, k, generator=self.random) / k**0.5
        )

    def vector(self, name):
        return torch.randn(
            self.sizes.get(name.split(".")[-1], self.config.hidden_size), generator=self.random
        )


def test_state_dict_moves_between_decoders(make_gguf):
    first, second = build(make_gguf("Q4_1", seed=1)), build(make_gguf("Q4_0", seed=2))
    state = first.state_dict()
    assert not any(key.startswith("head.") for key in state)  # tied: stored once
    assert {"layers.0.qkv.codes", "layers.0.qkv.scale", "layers.0.qkv.zero", "norm.weight"} <= set(state)
    second.load_state_dict(state)
    assert second.head.weight is second.embed.weight
    ids = torch.arange(9)[None]
    assert torch.equal(first(ids, new_cache(first), 0), second(ids, new_cache(second), 0))
    with pytest.raises(RuntimeError, match=r"embed\.codes"):
        second.load_state_dict({k: v for k, v in state.items() if k != "embed.codes"})
    with pytest.raises(RuntimeError, match="unexpected|Unexpected"):
        second.load_state_dict({**state, "layers.0.qkv.more": torch.zeros(1)})


def test_copies_and_pickles(make_gguf):
    decoder = build(make_gguf("Q8_0"))
    ids = torch.arange(9)[None]
    expected = decoder(ids, new_cache(decoder), 0)
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert other.head.weight is other.embed.weight
        assert torch.equal(other(ids, new_cache(other), 0), expected)


def test_limits_are_typed(make_gguf):
    tiny = make_gguf("F32")
    decoder = build(tiny, context=16)
    with pytest.raises(CapacityError, match="17"):
        decoder(torch.zeros(1, 17, dtype=torch.int64), new_cache(decoder), 0)
    with pytest.raises(UnsupportedError, match="int16"):
        build(tiny, activation="int16")
