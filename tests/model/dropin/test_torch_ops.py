"""The torch.library ops: opcheck, gradients against fp64 autograd, torch.compile, torch.export, autocast."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgeformer
from edgeformer.kernels.quant_matmul import CanonicalWeight, WeightFormat, pack
from edgeformer.model.dropin.layers import Linear
from edgeformer.runtime import torch_ops

from .conftest import CAUSAL, relative

OPS = torch.ops.edgeformer
N, K = 64, 64


def packed(fmt: WeightFormat, pair: bool = False) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(values, buffer, code) of a random weight."""
    canonical = CanonicalWeight.from_float(torch.randn(N, K) / 8, fmt)
    weight = pack(canonical, pair=pair)
    return canonical.dequantize(), weight.buffer, torch_ops.weight_code(weight)


EXACT = WeightFormat.float("float32")


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each op with arguments, tensors that want a gradient where it has one."""
    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(N, requires_grad=True)
    _, buffer, code = packed(EXACT)
    _, pair, pair_code = packed(EXACT, pair=True)
    q = torch.randn(2, 4, 5, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 5, 16, requires_grad=True) for _ in range(2))
    scale = torch.randn(K, requires_grad=True)
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.rand(2, 1, 5, 5) < 0.3, -torch.inf)
    return {
        "linear": (OPS.linear, (x, buffer, bias, N, code, "float", "none")),
        "silu_pair": (OPS.linear, (x, pair, None, N, pair_code, "float", "silu_pair")),
        "gelu_pair": (OPS.linear, (x, pair, None, N, pair_code, "float", "gelu_pair")),
        "embedding": (
            OPS.embedding,
            (torch.tensor([[3, 0], [N - 1, 3]]), buffer, N, K, code, torch.bfloat16),
        ),
        "rms": (OPS.norm, (x, scale, None, 1e-5, "rms", 1.0)),
        "layer": (OPS.norm, (x, scale, bias, 1e-5, "layer", 0.0)),
        "causal": (OPS.attention, (q, k, v, None, None, "causal", 0, 0.0, 0.25, 0)),
        "masked": (OPS.attention, (q, k, v, mask, None, "additive", 0, 5.0, 0.25, 0)),
    }


CASES = ("linear", "silu_pair", "gelu_pair", "embedding", "rms", "layer", "causal", "masked")


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    op, arguments = calls()[name]
    torch.library.opcheck(op.default, arguments, rtol=1e-3, atol=1e-4)


def reference(name: str, arguments: tuple[Any, ...], values: torch.Tensor) -> torch.Tensor:
    """The same in plain fp64 PyTorch."""
    a = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    if name in ("linear", "silu_pair", "gelu_pair"):
        y = F.linear(a[0], values.double(), a[2])
        if name == "linear":
            return y
        gate, up = y.chunk(2, -1)
        return (F.silu(gate) if name == "silu_pair" else F.gelu(gate, approximate="tanh")) * up
    if name == "rms":
        return F.rms_norm(a[0], (K,), a[1] + 1, 1e-5)
    if name == "layer":
        return F.layer_norm(a[0], (K,), a[1], a[2], 1e-5)
    q, k, v = a[0], *(t.repeat_interleave(2, 1) for t in a[1:3])
    scores = q @ k.mT * 0.25
    if name == "causal":
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    else:
        scores = 5 * torch.tanh(scores / 5) + a[3]
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("name", [c for c in CASES if c != "embedding"])
def test_gradients_are_those_of_fp64_autograd(name: str) -> None:
    op, arguments = calls()[name]
    values = torch.empty(0)
    if arguments[1].dtype == torch.uint8:
        weight = torch_ops._packed(arguments[1], N, K, arguments[4])
        values = weight.unpack().dequantize()
    inputs = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    got, want = op(*arguments), reference(name, arguments, values)
    assert relative(got, want) < 1e-5
    upstream = torch.randn_like(want)
    wanted = torch.autograd.grad(want, inputs, upstream)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, upstream.float()), wanted, strict=True):
        assert mine.shape == theirs.shape and relative(mine, theirs) < 2e-5


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """A Llama and its optimised copy."""
    import copy

    model = CAUSAL["llama-tied"]()
    ours = copy.deepcopy(model)
    edgeformer.optimize(ours, "balanced", policy="all", keep_original=False)
    return model, ours


def test_torch_compile_has_no_graph_break(tiny: tuple[Any, Any], ids: torch.Tensor) -> None:
    ours = tiny[1]
    with torch.no_grad():
        want = ours(ids, use_cache=False).logits
        compiled = torch.compile(lambda x: ours(x, use_cache=False).logits, fullgraph=True, backend="eager")
        assert relative(compiled(ids), want) < 1e-4


def test_torch_export(tiny: tuple[Any, Any], ids: torch.Tensor) -> None:
    class Logits(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    ours = Logits(tiny[1]).eval()
    with torch.no_grad():
        program = torch.export.export(ours, (ids,))
        assert relative(program.module()(ids), ours(ids)) < 1e-4
    called = {str(node.target) for node in program.graph.nodes}
    assert {"edgeformer.linear.default", "edgeformer.norm.default", "edgeformer.attention.default"} <= called


def test_autocast_gives_the_dtypes_of_torch(tiny: tuple[Any, Any]) -> None:
    model, ours = tiny
    x = torch.randn(2, 3, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp", "model.norm"):
            mine, theirs = (m.get_submodule(name)(x) for m in (ours, model))
            assert mine.dtype == theirs.dtype, name
        assert ours.get_submodule("lm_head")(torch.randn(1, 1, 64)).dtype == torch.bfloat16


def test_functorch_and_subclasses_take_the_dispatcher() -> None:
    values, buffer, code = packed(EXACT)
    layer = Linear(edgeformer_weight(values), None, activation="float")
    x = torch.randn(4, 1, 1, K)
    with torch.no_grad():
        want = layer(x)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = OPS.linear(mode.from_tensor(x), mode.from_tensor(buffer), None, N, code, "float", "none")
    assert fake.shape == want.shape and relative(want, x @ values.T) < 1e-5


def edgeformer_weight(values: torch.Tensor) -> Any:
    from edgeformer.model.dropin.layers import LayerWeight

    return LayerWeight.of(pack(CanonicalWeight.from_float(values, EXACT)), torch.float32)


def test_one_row_is_the_general_path() -> None:
    """The bare call of one row gives what the checked one does, with a bias and in every type."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = torch.randn(N)
        for fmt in (EXACT, WeightFormat.int4(zero="minimum"), WeightFormat.int8()):
            layer = Linear(edgeformer_weight(packed(fmt)[0]), bias)
            x = torch.randn(1, 1, K).to(dtype)
            with torch.inference_mode():
                assert torch.equal(layer(x), layer.forward(x))
            x = torch.randn(1, 1, 2 * K).to(dtype)[..., ::2]  # not contiguous
            with torch.inference_mode():
                assert torch.equal(layer(x), layer(x.contiguous()))


@torch.no_grad()
def test_whoever_watches_one_row_is_asked() -> None:
    """Hooks, a trace, a forward of its own, another bias, another thread, after the bare call was bound."""
    layer = Linear(edgeformer_weight(packed(EXACT)[0]), torch.randn(N), activation="float")
    x, other = torch.randn(1, 1, K), torch.randn(1, 1, K)
    want = layer(x)
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda m, i, o: seen.append(o) or o * 2),
               layer.register_forward_pre_hook(lambda m, i: seen.append(i[0]))]  # fmt: skip
    assert torch.equal(layer(x), want * 2) and len(seen) == 2
    for handle in handles:
        handle.remove()
    traced: Any = torch.jit.trace(layer, x)
    assert relative(traced(other), layer(other)) < 1e-6 and relative(layer(other), want) > 0.1
    layer.__dict__["forward"] = lambda x: x + 1
    assert torch.equal(layer(x), x + 1)
    del layer.__dict__["forward"]
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(layer, x).result(), want)
    bias: Any = layer.bias
    layer.bias = None  # pyright: ignore
    assert relative(layer(x) + bias, want) < 1e-5
    layer.bias = nn.Parameter(torch.zeros(N), requires_grad=False)
    assert relative(layer(x) + bias, want) < 1e-5
    assert torch.equal(layer(x=x), layer(x))  # by name, through nn.Module's call
