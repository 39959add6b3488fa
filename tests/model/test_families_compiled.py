"""Every family as one native call a step or chunk: composed, self-checked, equal to the eager model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from edgeformer.compiler.target import detect
from edgeformer.model import compiled as compiled_module
from edgeformer.model.compiled import CompiledDecoder, compile_decoder, self_check, step_spec
from edgeformer.model.decoder import Decoder
from edgeformer.runtime.dispatch import use_target
from edgeformer.runtime.kv_cache import KVCache
from edgeformer.runtime.threads import set_threads

from .families import FAMILIES, checkpoint, hugging_face
from .test_families import error, tokens

# Which options of the step each stands for is in the names; phi3's are mistral's.
COMPOSED = ["llama-biased", "mistral", "qwen2", "qwen3-yarn", "gemma2", "gemma3"]


@pytest.fixture(autouse=True)
def _this_host() -> Iterator[None]:
    use_target(detect())
    set_threads(2)
    yield
    use_target(None)


def build(name: str, activation: str = "float", **options: Any) -> tuple[Decoder, object]:
    """A decoder of whole blocks of 32 columns, and transformers' model."""
    family = next(f for f in FAMILIES if f.name == name)
    model = hugging_face(family, hidden_size=128)
    return Decoder.from_checkpoint(checkpoint(model), activation=activation, **options), model


def new_cache(decoder: Decoder, batch: int = 1, kv: str = "fp32") -> KVCache:
    c = decoder.config
    return KVCache(c.num_layers, batch, c.num_kv_heads, c.head_dim, decoder.context, dtype=kv)


@torch.no_grad()
@pytest.mark.parametrize("name", COMPOSED)
def test_the_program_equals_the_eager_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, model = build(name)
    compiled, declined = compile_decoder(decoder, detect(), "fp32")
    assert declined == "" and compiled is not None
    calls = []
    run = compiled.program.run
    monkeypatch.setattr(compiled.program, "run", lambda *a, **k: calls.append(a[1]) or run(*a, **k))
    monkeypatch.setattr(decoder, "forward", None)  # nothing may go round the program
    ids = tokens(1, 61)
    expected = model(ids).logits  # pyright: ignore[reportCallIssue]
    cache, places = new_cache(decoder), [0, 39, 44, *range(45, 61)]
    for start, end in zip(places, [*places[1:], 61]):  # a chunk, five rows, then one by one
        got = compiled(ids[:, start:end], cache, start)
        assert error(got[:, 0], expected[:, end - 1]) < 1e-4, start
    assert calls == places
    lengths = torch.tensor([29, 3], dtype=torch.int32)
    padded, cache = tokens(2, 29, seed=5), new_cache(decoder, 2)
    got = [compiled(padded, cache, 0, lengths), compiled(ids[:, :2].T, cache, 29, lengths + 1)]
    for row, length in enumerate(lengths.tolist()):
        alone = model(torch.cat([padded[row, 29 - length :], ids[0, row : row + 1]])[None]).logits[0]  # pyright: ignore
        assert error(torch.cat([g[row] for g in got]), alone[-2:]) < 1e-4


def test_the_self_check_sees_each_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with one option left out is found out."""
    decoder, _ = build("gemma3")
    c = decoder.config
    assert c.local_rope is not None and c.qk_norm and c.post_norms and any(c.windows)
    compiled = CompiledDecoder(decoder, detect(), "fp32")
    assert self_check(compiled, decoder, "fp32") == ""
    for name, value in [("window", 0), ("rope", 0), ("q_norm", torch.ones(c.head_dim)),
                        ("attn_post_norm", torch.ones(c.hidden_size))]:  # fmt: skip
        layer = 0 if c.window(0) else 1
        kept = compiled.program._handles[layer][name]
        compiled.program.bind_handle(layer, name, value)
        assert f"layer {layer}" in self_check(compiled, decoder, "fp32"), name
        compiled.program.bind_handle(layer, name, kept)
    monkeypatch.setattr(compiled_module, "_TOLERANCE", 1e-9)
    assert "differs" in self_check(compiled, decoder, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "qwen3-yarn"])
def test_quantised_with_auto_activation(name: str) -> None:
    """int8 products, and a matrix unit's for chunks where this CPU has one."""
    decoder, _ = build(name, "auto", quantize="int8")
    compiled, declined = compile_decoder(decoder, detect(), "bf16")
    assert declined == "" and compiled is not None


def test_every_option_is_in_the_key() -> None:
    decoder, _ = build("qwen2")
    plain = step_spec(decoder, "fp32")
    options = {
        "gate": "gelu", "o_bias": True, "mlp_bias": True, "qk_norm": True, "post_norms": True, "window": True,
        "attention_scale": 0.5, "attention_softcap": 3.0, "logit_softcap": 4.0, "embedding_factor": 2.0,
    }  # fmt: skip
    keys = {dataclasses.replace(plain, **{name: value}).key() for name, value in options.items()}
    assert len(keys | {plain.key()}) == len(options) + 1
