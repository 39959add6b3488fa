"""The kernels of one token through a decoder layer, bound to the modules that hold its weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.shared.scratch import scratch
from ...runtime import dispatch, rows, torch_ops
from .layers import GatedMLP, Half, Linear, Norm

_threads = torch.get_num_threads
_add = torch.add


def make_step(layer: nn.Module, dtype: torch.dtype) -> Step | None:
    """Return the step of a layer whose norms and MLP are ours (a plain product may be PyTorch's), or None."""
    parts = _parts(layer)
    if parts is None:
        return None
    step = Step(layer, parts, dtype)
    return step if step.ready else None


def _parts(layer: nn.Module) -> dict[str, nn.Module] | None:
    """Return the modules by their role, or None where one of them is not ours."""
    attn, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    if attn is None or mlp.__class__ is not GatedMLP:
        return None
    assert isinstance(mlp, GatedMLP)
    if mlp.gate_proj.__class__ is not Half or mlp.up_proj.__class__ is not Half:
        return None
    own, mine = layer._modules, attn._modules
    qkv = ("qkv_proj",) if "qkv_proj" in mine else ("q_proj", "k_proj", "v_proj")
    found = {name: mine.get(name) for name in (*qkv, "o_proj")} | {"down_proj": mlp._modules["down_proj"]}
    if any(module.__class__ is not Linear and not _plain(module) for module in found.values()):
        return None
    sandwich = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    norms = {name: own.get(name) for name in ("input_layernorm", "post_attention_layernorm")}
    norms |= {name: own[name] for name in sandwich if name in own}
    norms |= {name: mine[name] for name in ("q_norm", "k_norm") if mine.get(name) is not None}
    if any(module.__class__ is not Norm for module in norms.values()) or len(norms) % 2:
        return None
    return found | norms | {"mlp": mlp, "self_attn": attn}  # pyright: ignore[reportReturnType]


def _plain(module: Any) -> bool:
    """Whether a product that was left alone is PyTorch's own."""
    return module.__class__ is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_cpu


def _lines(elements: int, dtype: torch.dtype) -> int:
    """Return the bytes of whole cache lines."""
    return -(-elements * dtype.itemsize // 64) * 64


def _torch_product(module: nn.Linear, bias: Tensor | None, x: Tensor, y: Tensor) -> tuple[Any, tuple[()]]:
    weight = module.weight.detach().t()
    if bias is None:
        return functools.partial(torch.mm, x, weight, out=y), ()
    return functools.partial(torch.addmm, bias.detach(), x, weight, out=y), ()


class Step:
    """One token: norm, products, rope, append, attention, product, residual, norm, MLP, residual."""

    ready = False

    def __init__(self, layer: nn.Module, parts: dict[str, nn.Module], dtype: torch.dtype) -> None:
        attn, self.dtype, self.generation = parts["self_attn"], dtype, dispatch.generation()
        self.parts, self.attn = parts, attn
        self.index, self.scale = int(attn.layer_idx), float(attn.scaling)  # pyright: ignore
        self.softcap = float(getattr(attn, "attn_logit_softcapping", None) or 0.0)
        self.d = int(attn.head_dim)  # pyright: ignore
        self.qkv: list[Any] = [parts[n] for n in ("q_proj", "k_proj", "v_proj", "qkv_proj") if n in parts]
        self.hidden = self.qkv[0].in_features
        self.shape = (1, 1, self.hidden)
        self.heads = int(parts["o_proj"].in_features) // self.d  # pyright: ignore
        total = sum(p.out_features for p in self.qkv)
        self.kv_heads = (total // self.d - self.heads) // 2
        if total != (self.heads + 2 * self.kv_heads) * self.d or self.d % 16 or attn.training:
            return
        self._pin(layer)
        self._bind()
        self._lay_out()

    def _pin(self, layer: nn.Module) -> None:
        """Remember what the bound calls rely on: modules, weights and addresses, and nobody's hooks."""
        parts, holders = self.parts, (layer, self.attn, self.parts["mlp"])
        self.places: list[tuple[dict[str, Any], str, Any]] = []
        for holder in holders:
            self.places += [
                (holder._modules, n, m) for n, m in holder._modules.items() if m in parts.values()
            ]
        mlp = parts["mlp"]
        self.places += [(mlp._modules, n, mlp._modules[n]) for n in ("gate_proj", "up_proj")]
        self.pins: list[tuple[Tensor, int]] = []
        for module in parts.values():
            if isinstance(module, Linear | GatedMLP):
                weight = module.weight
                self.places += [
                    (module.__dict__, "weight", weight),
                    (weight.__dict__, "buffer", weight.buffer),
                ]
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.places.append((module._parameters, name, parameter))  # pyright: ignore
                    self.pins.append((parameter, parameter.data_ptr()))
        self.hooks = [h for m in parts.values() for h in (m._forward_hooks, m._forward_pre_hooks)]

    def current(self, dtype: torch.dtype) -> bool:
        """Whether nothing that the calls are bound to has changed."""
        if dtype is not self.dtype or self.generation != dispatch.generation():
            return False
        for held, name, item in self.places:
            if held.get(name) is not item:
                return False
        return all(tensor.data_ptr() == address for tensor, address in self.pins)

    def watched(self) -> bool:
        """Whether a module inside has hooks, or trains."""
        for hooks in self.hooks:
            if hooks:
                return True
        return self.attn.training

    def _norm(self, name: str, residual: bool = False) -> Any:
        norm = self.parts.get(name)
        if norm is None:
            return None
        assert isinstance(norm, Norm)
        biased = norm.bias is not None
        call = rows.norm_row(
            norm.weight, self.dtype, biased, norm.eps, norm.kind, norm.weight_offset, residual
        )
        if call is None:
            raise LookupError(name)
        return call, norm.weight.data_ptr(), norm.bias.data_ptr() if biased else 0  # pyright: ignore

    def _product(self, module: Any, epilogue: str = "none") -> Any:
        bias: Tensor | None = module._parameters.get("bias")
        if module.__class__ is nn.Linear:
            if any(p is not None and p.dtype is not self.dtype for p in (module.weight, bias)):
                raise LookupError("dtype")
            return None, module, bias
        if bias is not None and bias.dtype is not torch.float32:
            raise LookupError("bias")
        call = rows.matmul_row(module.weight, self.dtype, bias is not None, epilogue, module.activation)
        if call is None:
            raise LookupError("product")
        return call, module.weight.buffer.data_ptr(), 0 if bias is None else bias.data_ptr()

    def _bind(self) -> None:
        sandwich = "pre_feedforward_layernorm" in self.parts
        mlp: Any = self.parts["mlp"]
        try:
            self.first = self._norm("input_layernorm")
            second = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
            self.second = self._norm(second)
            self.after = self._norm("post_attention_layernorm", True) if sandwich else None
            self.last = self._norm("post_feedforward_layernorm", True) if sandwich else None
            self.q_norm, self.k_norm = self._norm("q_norm"), self._norm("k_norm")
            self.products = [self._product(p) for p in self.qkv]
            self.o = self._product(self.parts["o_proj"])
            self.gated = self._product(mlp, mlp.epilogue)
            self.down = self._product(self.parts["down_proj"])
        except LookupError:
            return
        products = (*self.products, self.o, self.gated, self.down)
        self.nbytes = max(p[0].nbytes for p in products if p[0] is not None)
        self.ropes: dict[int, Any] = {}
        self.plan: Any = None
        self.ready = True

    def _lay_out(self) -> None:
        """Where activations lie in the workspace, in bytes."""
        mlp: Any = self.parts["mlp"]
        sizes = {
            "normed": self.hidden,
            "qkv": (self.heads + 2 * self.kv_heads) * self.d,
            "rotated": (self.heads + self.kv_heads) * self.d,
            "attended": self.heads * self.d,
            "out": self.hidden,
            "gated": mlp.weight.n // 2,
        }
        self.areas: dict[str, int] = {}
        at = 0
        for name, elements in sizes.items():
            self.areas[name] = at
            at += _lines(elements, self.dtype)
        self.workspace_bytes = at

    def _plan(self, key: tuple[int, int, int], memory: Tensor) -> Any:
        """Everything that stays for as long as scratch, workspace and threads do."""
        base, start, threads = key
        at = {name: start + offset for name, offset in self.areas.items()}
        element = self.dtype.itemsize

        def view(place: int, elements: int) -> Tensor:
            begin = place - start
            return memory[begin : begin + elements * element].view(self.dtype).view(1, elements)

        def fixed(product: Any, x: int, y: int) -> tuple[Any, tuple[int, ...]]:
            call, weight, bias = product
            if call is None:
                return _torch_product(weight, bias, view(x, weight.in_features), view(y, weight.out_features))
            return call.gemv, (1, threads, 1, x, weight, bias, 0, y, *call.areas(base))

        products, y = [], at["qkv"]
        for module, product in zip(self.qkv, self.products):
            products.append(fixed(product, at["normed"], y))
            y += module.out_features * element
        k = at["qkv"] + self.heads * self.d * element
        v = k + self.kv_heads * self.d * element
        out = view(at["out"], self.hidden).view(self.shape)
        rest = (
            fixed(self.o, at["attended"], at["out"]),
            fixed(self.gated, at["normed"], at["gated"]),
            fixed(self.down, at["gated"], at["out"]),
        )
        return key, products, (at["normed"], at["qkv"], k, v, at["rotated"], at["attended"]), rest, out

    def run(self, x: Tensor, cache: Any, tables: tuple[Tensor, Tensor]) -> Tensor | None:
        """Return the layer's output [1, 1, H] for x, its token appended to `cache`; None: not this way."""
        held = cache.layers[self.index]
        ready = held.one_row(self.heads, self.kv_heads, self.d, self.dtype, self.softcap)
        table = cache.tables(*tables)
        if ready is None or table is None:
            return None
        append, attend, addresses = ready
        cos, sin, rotary = table
        rope = self.ropes.get(rotary)
        if rope is None:
            rope = self.ropes[rotary] = rows.rope_row(self.d, rotary, self.dtype)
            if rope is None:
                return None
        if torch_ops._recorders:
            self._note()
        plan, threads = self._planned()
        _, products, (normed, q, k, v, rotated, attended), _, _ = plan
        call, weight, bias = self.first
        call(x.data_ptr(), weight, bias, normed)
        for function, arguments in products:
            function(*arguments)
        if self.q_norm is not None:
            q, k = self._norm_heads(q, k, rotated)
        rope(q, cos, sin, q, self.heads + self.kv_heads)
        position = held.length
        append(k, v, addresses, self.kv_heads, position)
        attend(threads, position + 1, q, addresses, attended, self.scale, self.softcap)
        held.advance()
        return self._behind(x, normed)

    def _planned(self) -> tuple[Any, int]:
        threads, memory = _threads(), rows.workspace(self.workspace_bytes)
        key = (scratch(self.nbytes), memory.data_ptr(), threads)
        plan = self.plan
        if plan is None or plan[0] != key:
            plan = self.plan = self._plan(key, memory)
        return plan, threads

    def _norm_heads(self, q: int, k: int, rotated: int) -> tuple[int, int]:
        call, weight, bias = self.q_norm
        call(q, weight, bias, rotated, 0, self.heads)
        call, weight, bias = self.k_norm
        beside = rotated + self.heads * self.d * self.dtype.itemsize
        call(k, weight, bias, beside, 0, self.kv_heads)
        return rotated, beside

    def _behind(self, x: Tensor, normed: int) -> Tensor:
        """Everything behind attention, whose scratch may have moved that of the products."""
        _, _, _, (o, gated, down), out = self._planned()[0]
        o[0](*o[1])
        if self.after is None:
            hidden = _add(x, out)
        else:
            hidden = torch.empty_like(x)
            call, weight, bias = self.after
            call(out.data_ptr(), weight, bias, hidden.data_ptr(), x.data_ptr())
        call, weight, bias = self.second
        call(hidden.data_ptr(), weight, bias, normed)
        gated[0](*gated[1])
        down[0](*down[1])
        if self.last is None:
            return _add(hidden, out)
        result = torch.empty_like(x)
        call, weight, bias = self.last
        call(out.data_ptr(), weight, bias, result.data_ptr(), hidden.data_ptr())
        return result

    def _note(self) -> None:
        """Tell the recorders what the modules would have told them."""
        for name, module in self.parts.items():
            if isinstance(module, Norm):
                count = {"q_norm": self.heads, "k_norm": self.kv_heads}.get(name, 1)
                torch_ops.note("norm", module.weight.data_ptr(), count)
            elif isinstance(module, Linear | GatedMLP):  # no product of PyTorch's
                torch_ops.note("linear", module.weight.buffer.data_ptr(), 1)
        torch_ops.note("attention layer", id(self.attn), 1)
