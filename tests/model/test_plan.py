"""The plan made before loading equals what is then held, and refuses what cannot fit."""

from __future__ import annotations

import pytest

import edgeformer
from edgeformer.compiler.errors import CapacityError
from edgeformer.model.loading import open_checkpoint
from edgeformer.model.plan import choose_context, plan_memory, require_memory
from edgeformer.runtime.dispatch import use_target


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("type", "quantize"), [("F16", None), ("Q4_1", None), ("F32", "int4"), ("BF16", "int8")]
)
def test_plan_equals_what_is_held(make_gguf, plain, type, quantize, kv):
    tiny = make_gguf(type, tied=type != "F16")
    planned = edgeformer.plan(tiny.path, kv=kv, quantize=quantize)
    model = edgeformer.load(tiny.path, target=plain, kv=kv, quantize=quantize)
    model.generate([5, 6], max_tokens=2)
    held = model.memory()
    use_target(None)
    assert planned == model.plan
    assert held["weights"] == planned.weights
    assert held["kv"] == planned.kv


def test_mixed_types_are_planned_as_they_are_fused(make_gguf, plain):
    tiny = make_gguf("Q4_0", types={"blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_up.weight": "Q4_1"})
    held = edgeformer.load(tiny.path, target=plain).memory()
    use_target(None)
    assert held["weights"] == edgeformer.plan(tiny.path).weights


def test_values_apart_are_planned_so(make_gguf, plain):
    types = {"blk.0.attn_v.weight": "Q6_K", "blk.1.ffn_down.weight": "Q6_K"}
    tiny = make_gguf("Q4_K", types=types, hidden=256, mlp=256, heads=4)
    held = edgeformer.load(tiny.path, target=plain).memory()
    use_target(None)
    assert held["weights"] == edgeformer.plan(tiny.path).weights


def test_refusal_has_the_numbers(make_gguf):
    checkpoint = open_checkpoint(make_gguf("Q8_0").path)
    plan = plan_memory(checkpoint, context=96)
    require_memory(plan, plan.total)
    with pytest.raises(CapacityError, match=r"weights .* kv .* workspace .* context of \d+ would fit"):
        require_memory(plan, plan.total - 1)
    with pytest.raises(CapacityError, match="smaller model"):
        require_memory(plan, plan.weights)


def test_context(make_gguf):
    config = open_checkpoint(make_gguf("F32").path).config
    assert choose_context(config, None) == choose_context(config, 96) == 96
    for bad in (0, 97):
        with pytest.raises(CapacityError, match=str(bad)):
            choose_context(config, bad)
