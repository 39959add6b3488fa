"""Every family against its own unpatched output, and proof that our forms really ran."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import edgeformer
from edgeformer.model.dropin.layers import GatedMLP, Linear
from edgeformer.runtime.torch_ops import record_calls

from .conftest import CAUSAL, ENCODERS, VOCAB, is_transformers_5_0, relative

CLOSE = 2e-4  # exact weights, fp32: only the order of additions differs


def weight_of(module: Any) -> int:
    """The address by which a layer's calls are recorded."""
    weight = module.weight
    return weight.buffer.data_ptr() if hasattr(weight, "buffer") else weight.data_ptr()


def require_all_ran(model: Any, report: Any, calls: list[Any], rows: int, queries: int) -> None:
    """Every linear, norm, MLP and attention that the report names was called with that many rows."""
    for row in report.replaced:
        module = model.get_submodule(row.name)
        if row.kind == "attention":
            wanted = ("attention layer", id(module), queries)
        else:
            wanted = ({"mlp": "linear"}.get(row.kind, row.kind), weight_of(module), None)
        found = [c for c in calls if c[:2] == wanted[:2] and (wanted[2] is None or c[2] == wanted[2])]
        if "experts" in row.name:  # the router may send no token there
            continue
        if row.name.endswith("mlp.gate") and is_transformers_5_0():  # whose router reads its gate's weight
            continue
        assert found, f"{row.name} ({row.kind}) did not run our form"
        fixed = row.name != "lm_head" and "embed_out" not in row.name
        if row.kind == "linear" and fixed and "kv_b_proj" not in row.name:  # that one expands all latents
            assert any(c[2] == rows for c in found), (row.name, found, rows)


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_decoder_gives_its_own_output(family: str, ids: torch.Tensor) -> None:
    model = CAUSAL[family]()
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    with torch.no_grad():
        want = model(ids).logits
        padded = model(ids, attention_mask=padding).logits
        first = model(ids[:, :12], use_cache=True)
        step = model(ids[:, 12:], past_key_values=first.past_key_values).logits
        text, batch = generate(model, ids), generate(model, ids, attention_mask=padding)
    report = edgeformer.optimize(model, "exact", policy="all")
    kinds = {row.kind for row in report.replaced}
    assert {"linear", "norm", "attention"} <= kinds, report
    with torch.no_grad():
        with record_calls() as prefill:
            got = model(ids).logits
        first = model(ids[:, :12], use_cache=True)
        with record_calls() as decode:
            again = model(ids[:, 12:], past_key_values=first.past_key_values).logits
        masked = model(ids, attention_mask=padding).logits
    assert relative(got, want) < CLOSE
    assert relative(again, step) < CLOSE
    assert relative(masked[padding.bool()], padded[padding.bool()]) < CLOSE
    require_all_ran(model, report, prefill, ids.numel(), 13)
    require_all_ran(model, report, decode, 2, 1)
    assert torch.equal(generate(model, ids), text)
    assert torch.equal(generate(model, ids, attention_mask=padding), batch)
    assert torch.equal(generate(model, ids[:1]), text[:1])  # one row: the bare calls
    report.undo()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_perturbed_weight_moves_the_output(family: str, ids: torch.Tensor) -> None:
    model = CAUSAL[family]()
    report = edgeformer.optimize(model, "exact", policy="all")
    with torch.no_grad():
        before = model(ids).logits
        for row in report.replaced:
            if row.kind not in ("linear", "mlp", "norm") or "experts" in row.name:
                continue
            module = model.get_submodule(row.name)
            if isinstance(module, Linear | GatedMLP):
                kept = module.weight.data
                module.weight.data = kept + 0.5 * torch.randn_like(kept) * kept.abs().mean()
                moved = model(ids).logits
                module.weight.data = kept
            else:
                module.weight.mul_(1.5)
                moved = model(ids).logits
                module.weight.div_(1.5)
            assert relative(moved, before) > 1e-6, row.name
        assert relative(model(ids).logits, before) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_a_training_step_has_the_gradients_of_the_original(family: str, ids: torch.Tensor) -> None:
    """Biases and norms get gradients, also those in front of packed weights."""
    model = CAUSAL[family]()
    ours = copy.deepcopy(model)
    edgeformer.optimize(ours, "exact", policy="all")
    for each in (model, ours):
        each(ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None and name in wanted:
            assert relative(parameter.grad, wanted[name]) < 5e-3, name
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_gives_its_own_output(family: str, ids: torch.Tensor) -> None:
    model = ENCODERS[family]()
    inputs: dict[str, torch.Tensor]
    if family == "vit":
        inputs, rows, queries = {"pixel_values": torch.randn(2, 3, 32, 32)}, 34, 17
    else:
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        inputs, rows, queries = {"input_ids": ids, "attention_mask": mask}, 22, 22  # without the padding
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        report = edgeformer.optimize(model, "exact", policy="all")
        with record_calls() as calls:
            got = model(**inputs).last_hidden_state
    seen = inputs.get("attention_mask", torch.ones(got.shape[:2])).bool()
    assert relative(got[seen], want[seen]) < CLOSE
    report.rows = [row for row in report.rows if "pooler" not in row.name]
    require_all_ran(model, report, calls, rows, queries)
    left = {row.name.rpartition(".")[2]: row.reason for row in report.left}
    assert all(reason for reason in left.values())


def test_tokens_out_of_the_vocabulary_are_an_error(ids: torch.Tensor) -> None:
    model = CAUSAL["llama-tied"]()
    edgeformer.optimize(model, "exact", policy="all")
    with pytest.raises(edgeformer.EdgeFormerError, match="outside this table"):
        model(ids + VOCAB)
