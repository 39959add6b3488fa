"""Adapters before and after optimize, and EdgeFormer's formats through transformers' own loading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import edgeformer
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.model.dropin.layers import Linear

from .conftest import CAUSAL, relative

peft = pytest.importorskip("peft")


def lora(model: Any) -> Any:
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))


def train(model: Any, ids: torch.Tensor, steps: int = 20) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("first", ["adapter", "optimize"])
@pytest.mark.parametrize("profile", ["exact", "balanced"])
def test_lora_trains_saves_loads_and_merges(
    first: str, profile: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    base = CAUSAL["llama"]()
    plain = lora(copy.deepcopy(base))
    if first == "adapter":
        model = lora(base)
        edgeformer.optimize(model, profile, policy="all", activation="float")
    else:
        edgeformer.optimize(base, profile, policy="all", activation="float")
        model = lora(base)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(layer.base_layer, Linear)
    wanted, losses = train(plain, ids), train(model, ids)
    assert losses[-1] < 0.8 * losses[0]
    if profile == "exact":
        assert abs(losses[-1] - wanted[-1]) < 0.02 * wanted[-1]
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
    model.save_pretrained(tmp_path)
    fresh = CAUSAL["llama"]()
    edgeformer.optimize(fresh, profile, policy="all", activation="float")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        if first == "optimize":
            assert relative(loaded(ids).logits, before) < 1e-5
        merged = model.merge_and_unload()
        assert relative(merged(ids).logits, before) < (1e-4 if profile == "exact" else 0.3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_a_quantised_model_goes_through_files(
    family: str, bits: int, ids: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = CAUSAL[family]()
    model.save_pretrained(tmp_path / "float")
    config = edgeformer.EdgeFormerQuantConfig(bits=bits)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    layer = made.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, Linear) and layer.weight.format.bits == bits
    with torch.no_grad():
        want, got = model(ids).logits, made(ids).logits
    assert 1e-4 < relative(got, want) < {4: 0.4, 8: 0.05}[bits]
    made.save_pretrained(tmp_path / "packed")
    stored = (tmp_path / "packed" / "config.json").read_text()
    assert '"quant_method": "edgeformer"' in stored and f'"bits": {bits}' in stored
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, got)
    assert isinstance(again.get_submodule("model.layers.1.mlp.down_proj"), Linear)


def test_formats_without_a_kernel_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="bits=3 is not supported"):
        edgeformer.EdgeFormerQuantConfig(bits=3)
    with pytest.raises(UnsupportedError, match="groups of 48"):
        edgeformer.EdgeFormerQuantConfig(group_size=48)
