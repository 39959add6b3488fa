"""What optimize reports, refuses and restores; copies, pickles, state dicts and threads of its result."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import edgeformer
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.model.dropin import measure
from edgeformer.model.dropin.layers import GatedMLP, Linear, Norm

from .conftest import CAUSAL, VOCAB, relative


class Plain(nn.Module):
    """No transformers model: a norm, two linear layers and a gated MLP."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.first = nn.Linear(64, 96, dtype=dtype)
        self.second = nn.Linear(96, 64, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.norm(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("profile", ["exact", "balanced", "fast"])
def test_a_plain_module(profile: str, dtype: torch.dtype) -> None:
    model = Plain(dtype)
    x = torch.randn(2, 5, 64).to(dtype)
    with torch.no_grad():
        want = model(x)
        report = edgeformer.optimize(model, profile, policy="all")
        got = model(x)
        one = model(x[:1, :1])
    assert got.dtype == dtype and got.shape == want.shape
    close = {"exact": 2e-5 if dtype == torch.float32 else 2e-2}.get(profile, 0.2)
    assert relative(got, want) < close and relative(one, want[:1, :1]) < close
    assert [type(m) for m in (model.norm, model.first, model.second)] == [Norm, Linear, Linear]
    assert {row.bits for row in report.replaced if row.kind == "linear"} <= {4, 8, 16, 32}
    report.undo()
    with torch.no_grad():
        assert torch.equal(model(x), want)
    with pytest.raises(UnsupportedError, match="undo"):
        report.undo()


def test_the_report_says_what_was_done(ids: torch.Tensor) -> None:
    model = CAUSAL["llama"]()
    report = edgeformer.optimize(model, "balanced", policy="all")
    text = str(report)
    assert "replaced" in text and "originals kept for undo()" in text and report.kept_bytes > 0
    assert "2 x model.layers.*.self_attn.q_proj (linear): int" in text
    assert report.left[0].name == "model.embed_tokens" and "look-up" in report.left[0].reason
    quality = report.quality(torch.randint(3, VOCAB, (60,)), window=20)
    assert quality.tokens == 57 and quality.mean_kl > 0 and 0 <= quality.top1_agreement <= 1
    with torch.no_grad():
        assert isinstance(model.get_submodule("lm_head"), Linear)  # quality() put ours back
        model(ids)


def test_the_faster_policy_keeps_an_original_that_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def gains(old: Any, new: Any, columns: int, *rest: Any) -> tuple[float, float]:
        return (0.5, 0.9) if columns == 96 else (2.0, 3.0)

    monkeypatch.setattr("edgeformer.model.replace.gains", gains)
    model = Plain()
    report = edgeformer.optimize(model, "fast")
    rows = {row.name: row for row in report}
    assert type(model.second) is nn.Linear and "the original is faster: 0.50x" in rows["second"].reason
    assert rows["first"].gain == (2.0, 3.0) and "2.00x at 1 row" in str(rows["first"])
    assert measure.wins((1.2, 0.9)) and not measure.wins((0.9, 1.0))
    with pytest.raises(UnsupportedError, match="1 modules would be left alone: second: the original is fas"):
        edgeformer.optimize(Plain(), "fast", strict=True)


def test_without_the_originals_nothing_can_be_undone() -> None:
    model = Plain()
    report = edgeformer.optimize(model, "fast", policy="all", keep_original=False)
    assert report.kept_bytes == 0
    for call in (report.undo, lambda: report.quality(torch.arange(5))):
        with pytest.raises(UnsupportedError, match="keep_original"):
            call()


def test_strict_changes_nothing_when_it_raises() -> None:
    model = nn.Sequential(Plain(), nn.Conv1d(3, 3, 2))
    with pytest.raises(UnsupportedError, match="no operator covers Conv1d"):
        edgeformer.optimize(model, "fast", policy="all", strict=True)
    assert type(model.get_submodule("0.first")) is nn.Linear


def odd_layers() -> dict[str, tuple[nn.Module, str]]:
    """Layers that are left alone, and what the report says."""
    hooked = nn.Linear(64, 96)
    hooked.register_forward_hook(lambda *_: None)
    meta = nn.Linear(64, 96, device="meta")
    sparse = nn.Linear(64, 96)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse(), requires_grad=False)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(64, 96))

    class Mine(nn.Linear):
        pass

    return {
        "float64": (nn.Linear(64, 96, dtype=torch.float64), "torch.float64"),
        "hooks": (hooked, "it has hooks"),
        "meta": (meta, "meta device"),
        "sparse": (sparse, "sparse"),
        "parametrised": (parametrised, "no operator covers Parametriz"),
        "subclass": (Mine(64, 96), "no operator covers Mine"),
        "unknown": (nn.Bilinear(3, 4, 5), "no operator covers Bilinear"),
        "empty": (nn.Linear(0, 5), "is empty"),
    }


@pytest.mark.parametrize("case", odd_layers())
def test_odd_layers_are_left_alone_with_a_reason(case: str) -> None:
    layer, reason = odd_layers()[case]
    model = nn.Sequential(layer)
    report = edgeformer.optimize(model, "exact", policy="all")
    assert model[0] is layer and not report.replaced
    assert any(reason in row.reason for row in report.left), [str(r) for r in report.left]


def test_odd_strides_and_empty_batches() -> None:
    model = Plain()
    model.first.weight = nn.Parameter(torch.randn(64, 96).T)
    x = torch.randn(2, 64, 5).transpose(1, 2)
    with torch.no_grad():
        want = model(x)
        edgeformer.optimize(model, "exact", policy="all")
        assert relative(model(x), want) < 2e-5
        assert model(torch.empty(0, 5, 64)).shape == (0, 5, 64)


def test_a_mask_of_the_wrong_shape_names_the_module(ids: torch.Tensor) -> None:
    model = CAUSAL["llama"]()
    edgeformer.optimize(model, "exact", policy="all")
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=r"LlamaAttention \(layer 0\): the attention mask"),
    ):
        model(ids, attention_mask=torch.ones(2, 1, 13, 7, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"profile": "experimental"}, "declined"),
        ({"profile": "best"}, "profile 'best' is not one of"),
        ({"policy": "some"}, "policy 'some' is not one of"),
        ({"activation": "int2"}, "activation 'int2'"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        edgeformer.optimize(Plain(), **options)


def test_what_is_no_model() -> None:
    with pytest.raises(UnsupportedError, match="optimize takes a torch module, not dict"):
        edgeformer.optimize({})  # pyright: ignore
    with pytest.raises(UnsupportedError, match=r"wrap it in nn\.Sequential"):
        edgeformer.optimize(nn.Linear(64, 96), "exact", policy="all")


def test_twice_is_once() -> None:
    model = Plain()
    edgeformer.optimize(model, "exact", policy="all")
    first = model.first
    report = edgeformer.optimize(model, "fast", policy="all")
    assert model.first is first and not report.replaced


def test_calibration_measures_the_layers(ids: torch.Tensor) -> None:
    model = CAUSAL["llama"]()
    text = torch.randint(3, VOCAB, (40,))
    report = edgeformer.optimize(model, "balanced", policy="all", calibrate=text)
    assert {row.bits for row in report.replaced if row.kind in ("linear", "mlp")} == {4, 8}
    with pytest.raises(UnsupportedError, match="tokenizer"):
        edgeformer.optimize(CAUSAL["llama"](), "balanced", policy="all", calibrate="some text")


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = CAUSAL["qwen2"]()
    edgeformer.optimize(model, "balanced", policy="all", keep_original=False)
    return model


def test_copies_and_pickles_give_the_same(tiny: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        want = tiny(ids).logits
        tiny(ids[:1, :1])  # binds the bare calls, which no pickle can hold
        copied = copy.deepcopy(tiny)
        stream = io.BytesIO()
        torch.save(tiny, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        for other in (copied, loaded, pickle.loads(pickle.dumps(tiny))):
            assert torch.equal(other(ids).logits, want)
            assert other.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 16)
        copied.get_submodule("model.layers.0.self_attn.q_proj").weight.data *= 0
        assert torch.equal(tiny(ids).logits, want)


def test_a_state_dict_carries_the_weights(tiny: Any, ids: torch.Tensor) -> None:
    other = CAUSAL["qwen2"]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
        edgeformer.optimize(other, "balanced", policy="all", keep_original=False)
        assert relative(other(ids).logits, tiny(ids).logits) > 0.01
        missing = other.load_state_dict(tiny.state_dict(), strict=False)
        assert not missing.unexpected_keys
        assert relative(other(ids).logits, tiny(ids).logits) < 1e-5


def test_threads_at_once(tiny: Any, ids: torch.Tensor) -> None:
    def run(seed: int) -> torch.Tensor:
        with torch.inference_mode():
            return tiny.generate(ids[seed % 2 : seed % 2 + 1], max_new_tokens=4, do_sample=False)

    want = [run(0), run(1)]
    with ThreadPoolExecutor(3) as pool:
        for seed, got in enumerate(pool.map(run, range(6))):
            assert torch.equal(got, want[seed % 2])


def test_gated_mlps_stay_addressable() -> None:
    model = CAUSAL["llama"]()
    x = torch.randn(2, 3, 64)
    mlp = model.get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        edgeformer.optimize(model, "exact", policy="all")
        mlp = model.get_submodule("model.layers.0.mlp")
        assert isinstance(mlp, GatedMLP)
        assert relative(mlp.gate_proj(x), gate) < 1e-5 and relative(mlp.up_proj(x), up) < 1e-5
