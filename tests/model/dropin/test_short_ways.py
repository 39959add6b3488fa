"""One token through a decoder layer by kernels alone, and a batch through an encoder without its padding."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import edgeformer
from edgeformer.model.dropin.decoder_layer import FAMILIES
from edgeformer.model.dropin.decoder_step import Step
from edgeformer.runtime.torch_ops import record_calls

from .conftest import CAUSAL, ENCODERS, VOCAB, relative
from .test_families import CLOSE, weight_of

DECODERS = [name for name in CAUSAL if name.split("-")[0] in FAMILIES]


def shorts(model: Any) -> list[Any]:
    return [m.__dict__["_edgeformer"] for m in model.modules() if "_edgeformer" in m.__dict__]


@torch.no_grad()
def step(model: Any, ids: torch.Tensor, dtype: str | None = None) -> torch.Tensor:
    """Logits [5, V] of the last five tokens of one sequence, fed one by one over a cache."""
    cache = edgeformer.EdgeFormerCache(model.config, dtype=dtype)
    model(ids[:1, :8], past_key_values=cache)
    found = [model(ids[:1, i : i + 1], past_key_values=cache).logits[0] for i in range(8, 13)]
    assert cache.get_seq_length() == 13
    return torch.cat(found)


@pytest.fixture
def llama() -> Any:
    model = CAUSAL["llama-tied"]()
    edgeformer.optimize(model, "exact", policy="all")
    step(model, torch.randint(3, VOCAB, (1, 13)))  # the first token goes both ways
    return model


@pytest.mark.parametrize("family", DECODERS)
def test_one_token_goes_the_short_way(family: str, ids: torch.Tensor) -> None:
    model = CAUSAL[family]()
    ids = ids[:, :7] if "mistral" in family or "gemma" in family else ids  # inside of the window: no mask
    with torch.no_grad():
        want = model(ids[:1]).logits[0]
    report = edgeformer.optimize(model, "exact", policy="all")
    assert "decoder layers that one token passes by kernels alone: 2" in str(report)
    cache, calls = edgeformer.EdgeFormerCache(model.config), []
    with torch.no_grad():
        got = [model(ids[:1, :3], past_key_values=cache).logits[0]]
        for i in range(3, ids.shape[1]):
            with record_calls() as calls:
                got.append(model(ids[:1, i : i + 1], past_key_values=cache).logits[0])
    assert relative(torch.cat(got), want) < CLOSE
    assert all(short.checked and not short.reason for short in shorts(model))
    for row in report.replaced:
        module = model.get_submodule(row.name)
        wanted = ("attention layer", id(module)) if row.kind == "attention" else None
        wanted = wanted or ({"mlp": "linear"}.get(row.kind, row.kind), weight_of(module))
        assert [c for c in calls if c[:2] == wanted], row.name
    assert len(calls) == len([c for c in calls if c[2] <= 4]) <= 2 * 13 + 3
    report.undo()
    assert not shorts(model)
    with torch.no_grad():
        assert torch.equal(model(ids[:1]).logits[0], want)


def test_what_changes_inside_is_seen(llama: Any, ids: torch.Tensor) -> None:
    before = step(llama, ids)
    assert torch.equal(step(llama, ids), before)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp", "mlp.down_proj"):
        module = llama.get_submodule(f"model.layers.1.{name}")
        kept = module.weight.data
        module.weight.data = kept * 1.5
        assert relative(step(llama, ids), before) > 1e-4, name
        module.weight.data = kept
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = llama.get_submodule(f"model.layers.1.{name}")
        kept = norm.weight.data
        norm.weight.data = kept * 1.5  # other memory
        assert relative(step(llama, ids), before) > 1e-4, name
        norm.weight.data = kept
    assert relative(step(llama, ids), before) < 1e-5


def test_a_hook_or_another_module_is_called(llama: Any, ids: torch.Tensor) -> None:
    before, seen = step(llama, ids), []
    attention = llama.get_submodule("model.layers.0.self_attn")
    handle = attention.k_proj.register_forward_hook(lambda *_: seen.append(1))
    assert relative(step(llama, ids), before) < CLOSE and len(seen) == 6
    handle.remove()
    own = attention.q_proj
    attention.q_proj = torch.nn.Sequential(own)  # as an adapter's wrapper
    assert relative(step(llama, ids), before) < CLOSE
    attention.q_proj = own
    outputs = llama(ids[:1], output_hidden_states=True)
    assert len(outputs.hidden_states) == 3


def test_products_that_were_left_are_pytorchs(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def gains(old: Any, new: Any, columns: int, *rest: Any) -> tuple[float, float]:
        return (0.5, 0.5) if type(old) is torch.nn.Linear else (2.0, 2.0)

    monkeypatch.setattr("edgeformer.model.replace.gains", gains)
    model = CAUSAL["qwen2"]()  # with biases
    with torch.no_grad():
        want = model(ids[:1]).logits[0]
    report = edgeformer.optimize(model, "exact")
    assert any(row.name.endswith("q_proj") for row in report.left)
    step(model, ids)
    assert all(short.checked for short in shorts(model))
    assert relative(step(model, ids), want[8:]) < CLOSE


def test_copies_of_models_and_caches(llama: Any, ids: torch.Tensor) -> None:
    want = step(llama, ids)
    stream = io.BytesIO()
    torch.save(llama, stream)
    stream.seek(0)
    for other in (copy.deepcopy(llama), torch.load(stream, weights_only=False)):
        assert relative(step(other, ids), want) < CLOSE  # its first token goes both ways
        assert torch.equal(step(other, ids), want)
        other.get_submodule("model.layers.0.self_attn.q_proj").weight.data *= 0
    with torch.no_grad():
        cache = edgeformer.EdgeFormerCache(llama.config)
        llama(ids[:1, :9], past_key_values=cache)
        llama(ids[:1, 9:10], past_key_values=cache)
        other = copy.deepcopy(cache)
        llama(ids[1:, 10:11], past_key_values=other)
        got = [llama(ids[:1, i : i + 1], past_key_values=cache).logits[0] for i in range(10, 13)]
    assert relative(torch.cat(got), want[2:]) < 1e-5


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_narrower_caches(llama: Any, ids: torch.Tensor, dtype: str) -> None:
    got, want = step(llama, ids, dtype), step(llama, ids)
    assert 0 < relative(got, want) < 0.05


def test_a_step_that_computes_something_else_is_never_taken(
    llama: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda *a: torch.mul(run(*a), 1.5))  # pyright: ignore
    for short in shorts(llama):
        short.checked = False
    got = step(llama, ids)
    assert all("differs by" in short.reason for short in shorts(llama))
    monkeypatch.undo()
    assert torch.equal(step(llama, ids), got)
    assert relative(step(copy.deepcopy(llama), ids), got) < CLOSE


@torch.no_grad()
def test_an_encoder_leaves_padding_out(ids: torch.Tensor) -> None:
    model = ENCODERS["bert"]()
    mask = torch.ones(3, 13, dtype=torch.int64)
    ids = torch.cat([ids, ids[:1]])
    mask[0, 4:], mask[1, :5], mask[2, 3:6] = 0, 0, 0  # on the right, on the left, in between
    want = model(ids, attention_mask=mask).last_hidden_state
    report = edgeformer.optimize(model, "exact", policy="all")
    assert "encoders that leave a batch's padding out: 1" in str(report)
    with record_calls() as calls:
        got = model(ids, attention_mask=mask).last_hidden_state
    seen, valid = mask.bool(), int(mask.sum())
    assert relative(got[seen], want[seen]) < CLOSE and not got[~seen].any()
    layers = [m for n, m in model.named_modules() if n.endswith("attention.self")]
    for layer in layers:
        assert ("attention layer", id(layer), valid) in calls
        assert ("linear", weight_of(layer.query), valid) in calls
    states = model(ids, attention_mask=mask, output_hidden_states=True)
    assert all(s.shape == (3, 13, 64) for s in states.hidden_states)
    assert relative(states.last_hidden_state[seen], want[seen]) < CLOSE
    odd = torch.ones(3, 1, 13, 13, dtype=torch.bool).tril()  # not padding
    assert torch.isfinite(model(ids, attention_mask=odd).last_hidden_state).all()
    report.undo()
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, want)


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_one_token_attends_over_latents(family: str, profile: str, ids: torch.Tensor) -> None:
    model = CAUSAL[family]()
    report = edgeformer.optimize(model, profile, policy="all")
    if not report.ways:
        pytest.skip("this transformers caches expanded keys")
    assert "over the latents themselves, for one token: 2" in str(report)
    modules = [m for n, m in model.named_modules() if n.endswith("self_attn")]

    @torch.no_grad()
    def last(short: bool) -> torch.Tensor:
        cache = model(ids[:, :12], use_cache=True).past_key_values
        held = [m.__dict__.pop("expand_kv") for m in modules] if not short else []
        try:
            with record_calls() as calls:
                logits = model(ids[:, 12:], past_key_values=cache).logits
        finally:
            for module, own in zip(modules, held):
                module.expand_kv = own
        rows = {c[2] for c in calls if c[1] in {weight_of(m.kv_b_proj) for m in modules}}
        assert rows == ({2} if short else {26})  # one token a sequence, or all latents
        return logits

    want = last(False)
    close = CLOSE if profile == "exact" else 0.1
    assert relative(last(True), want) < close
    weight = modules[1].kv_b_proj.weight
    kept = weight.data
    weight.data = kept * 1.5
    assert relative(last(True), want) > 2 * CLOSE
    weight.data = kept
    assert relative(last(True), want) < close
    assert relative(copy.deepcopy(model)(ids).logits, model(ids).logits) < 1e-6
