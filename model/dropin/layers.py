"""The modules that take the place of a model's own: linear, gated MLP, norm and embedding over our ops."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks as _hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _pre_hooks

from ...compiler.errors import UnsupportedError
from ...kernels.quant_matmul import CanonicalWeight, PackedWeight, pack, pack_float
from ...kernels.shared.scratch import local, scratch
from ...runtime import dispatch, rows, torch_ops
from ...runtime.torch_ops import _autocast, _grad, _is_compiling, _modes, _tracing, _transforms, direct
from ..layers import GATES, PackedModule

_empty_like, _threads = torch.empty_like, torch.get_num_threads
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


class LayerWeight(PackedWeight):
    """A packed weight that code written for `nn.Linear.weight` can ask for shape, dtype, device and data.

    `data` is dequantised; assigning to it rounds to the weight's format (that is how adapters are merged).
    """

    dtype: torch.dtype = torch.float32  # of the weight that was packed
    code: str = ""  # what torch_ops need to know of it

    @staticmethod
    def of(weight: PackedWeight, dtype: torch.dtype) -> LayerWeight:
        """Return the same buffer with the dtype that the weight had."""
        layer = LayerWeight(weight.buffer, weight.format, weight.n, weight.k, weight.layout)
        layer.dtype, layer.code = dtype, torch_ops.weight_code(weight)
        return layer

    def become(self, weight: PackedWeight) -> None:
        """Hold another weight of the same shape from now on, for every layer that shares this one."""
        self.buffer, self.format, self.layout = weight.buffer, weight.format, weight.layout
        self.__dict__.pop("bound_calls", None)

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return torch.Size((self.n, self.k))

    @property
    def device(self) -> torch.device:
        """Where the buffer lies."""
        return self.buffer.device

    def type(self, dtype: torch.dtype) -> Tensor:
        """The values [N, K] in another dtype, a copy."""
        return self.unpack().dequantize().to(dtype)

    @property
    def data(self) -> Tensor:
        """The values [N, K] in `dtype`, a copy."""
        return self.type(self.dtype)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise UnsupportedError(f"a weight of {tuple(self.shape)} cannot take {tuple(value.shape)}")
        packed = pack_float(value, self.format, dispatch.current_target(), self.pair)
        self.buffer.copy_(packed.buffer)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerWeight:
        return LayerWeight.of(super().__deepcopy__(memo), self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.unpack(), self.pair, self.dtype)


def _rebuild(weight: CanonicalWeight, pair: bool, dtype: torch.dtype) -> LayerWeight:
    return LayerWeight.of(pack(weight, dispatch.current_target(), pair), dtype)


def autocast(x: Tensor) -> Tensor:
    """Return x in autocast's dtype, where autocast is on, as torch's own linear layers do."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(kind))
    return x


class OneRow(nn.Module):
    """A layer that calls its kernel on bare addresses for one row [1, 1, K] with nobody watching.

    Decoding a token is some hundred such calls of a few microseconds; nn.Module's own call, the checks of
    the general path and its reshapes cost as much again. Hooks, gradients, autocast, tracing, tensor
    subclasses and a `forward` set on the instance go through nn.Module's call.
    """

    _one: tuple[int, int, int]
    _out: tuple[int, int, int]
    _then: str = ""  # the child that takes the kernel's result
    # (dtype of x, generation of the target, call or None, a tensor like the result, what the layer adds)
    _lean: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lean": None}

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if _is_compiling() or named or len(inputs) != 1:
            return super().__call__(*inputs, **named)
        x = inputs[0]
        if (
            x.__class__ is Tensor
            and not (_grad() or _modes() or _autocast())
            and _transforms() is _tracing() is None
            and x.shape == self._one
            and x.is_cpu
            and x.is_contiguous()
            and not (
                self._forward_hooks or self._forward_pre_hooks or _hooks or _pre_hooks
                or "forward" in self.__dict__ or self._compiled_call_impl is not None
            )
        ):  # fmt: skip
            lean = self._lean
            if lean is None or lean[0] is not x.dtype or lean[1] != dispatch._generation:
                lean = self._lean = self._bind_row(x.dtype)
            if lean[2] is not None:
                y = _empty_like(lean[3])
                if self._run_row(lean, x.data_ptr(), y.data_ptr()):
                    then: Any = self._then
                    return self._modules[then](y) if then else y  # pyright: ignore[reportOptionalCall]
                self._lean = None
        return super().__call__(x)

    def _bind_row(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return `_lean` for inputs of a dtype."""
        raise NotImplementedError

    def _bind_product(
        self, weight: LayerWeight, dtype: torch.dtype, bias: bool, epilogue: str, activation: str
    ) -> tuple[Any, ...]:
        """Return `_lean` of a product: weight's address and buffer, then what `gemv` takes on one scratch."""
        row = rows.matmul_row(weight, dtype, bias, epilogue, activation)
        lean = dtype, dispatch.generation(), row, self._like(dtype), weight.buffer.data_ptr(), weight.buffer
        if row is None:
            return *lean, *[None] * 8
        base = scratch(row.nbytes)
        return *lean, row.gemv, base, row.nbytes, *row.areas(base)

    def _run_row(self, lean: tuple[Any, ...], x: int, y: int) -> bool:
        """Compute the row at address x into y; False where a parameter is not what it was when bound."""
        raise NotImplementedError

    def _like(self, dtype: torch.dtype) -> Tensor:
        """An example of the result: `empty_like` takes half the time of an allocation by shape and type."""
        with torch.inference_mode(False):
            return torch.empty(self._out, dtype=dtype)


class Linear(OneRow, PackedModule, nn.Linear):
    """`nn.Linear` on a packed weight: x [..., in_features] -> [..., out_features] in x's dtype.

    `weight` is a `LayerWeight`; `activation` "int8", "float" or "auto" as in `runtime.ops.quant_matmul`.
    A subclass of `nn.Linear`, so that adapters (PEFT) attach to it.
    """

    weight: LayerWeight  # pyright: ignore

    def __init__(
        self, weight: LayerWeight, bias: Tensor | None, *, activation: str = "auto", saved: bool = True
    ) -> None:
        PackedModule.__init__(self, weight, saved=saved)
        self.in_features, self.out_features = weight.k, weight.n
        self.activation = activation
        self._one, self._out = (1, 1, weight.k), (1, 1, weight.n)
        if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
            bias = nn.Parameter(bias.detach().float().contiguous(), bias.requires_grad)
        elif bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    def _bind_row(self, dtype: torch.dtype) -> tuple[Any, ...]:
        bias = self.bias is not None
        return *self._bind_product(self.weight, dtype, bias, "none", self.activation), not bias

    def adopt(self, weight: PackedWeight) -> None:
        """Take another weight of the same shape."""
        self._lean = None
        self.weight.become(weight)

    def _run_row(self, lean: tuple[Any, ...], x: int, y: int) -> bool:
        _, _, row, _, weight, buffer, gemv, base, size, a, b, c, d, e, bare = lean
        bias = self._parameters["bias"]
        if self.weight.buffer is not buffer or (bias is None) is not bare:
            return False  # a shared weight changes with its owner
        if bias is not None and bias.dtype is not torch.float32:
            return False
        if torch_ops._recorders:
            torch_ops.note("linear", weight, 1)
        at = 0 if bias is None else bias.data_ptr()
        if local.address == base and local.size >= size:
            gemv(1, _threads(), 1, x, weight, at, 0, y, a, b, c, d, e)
        else:  # another thread
            row(x, weight, at, y)
        return True

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore
        x = autocast(x)
        if direct(x) and not (self.bias is not None and self.bias.requires_grad):
            return torch_ops.matmul(x, self.weight, self.bias, self.activation)
        weight = self.weight
        return torch.ops.edgeformer.linear(
            x, weight.buffer, self.bias, weight.n, weight.code, self.activation, "none"
        )

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, {self.weight.format.key()}"


class HalfWeight(LayerWeight):
    """The rows of a pair's gate or up projection, packed by themselves; assigned data reaches the pair."""

    whole: LayerWeight  # the pair
    start: int = 0

    @property
    def data(self) -> Tensor:
        """The values [N, K], a copy."""
        return self.unpack().dequantize().to(self.dtype)

    @data.setter
    def data(self, value: Tensor) -> None:
        LayerWeight.data.__set__(self, value)
        both = self.whole.unpack()
        other = both.slice_rows(self.n - self.start, 2 * self.n - self.start)
        parts = [other, self.unpack()] if self.start else [self.unpack(), other]
        joined = pack(CanonicalWeight.cat(parts), dispatch.current_target(), pair=True)
        self.whole.buffer.copy_(joined.buffer)


class Half(nn.Linear):
    """The gate or the up projection of a GatedMLP, by itself: for adapters and for whoever calls it alone.

    Its rows are packed once more when it is first called.
    """

    def __init__(self, pair: LayerWeight, first: bool, activation: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = pair.k, pair.n // 2
        self.first, self.activation = first, activation
        self.register_parameter("bias", None)
        self.pair = pair
        self._own: Linear | None = None

    @property
    def weight(self) -> Any:  # pyright: ignore
        """The half's weight, of which adapters ask the type and to which they add."""
        return self.alone.weight

    @property
    def alone(self) -> Linear:
        """This half as a linear layer of its own."""
        own = self.__dict__.get("_own")
        if own is None:
            half = self.out_features
            start = 0 if self.first else half
            packed = pack(self.pair.unpack().slice_rows(start, start + half), dispatch.current_target())
            weight = HalfWeight(packed.buffer, packed.format, packed.n, packed.k, packed.layout)
            weight.dtype, weight.code = self.pair.dtype, torch_ops.weight_code(packed)
            weight.whole, weight.start = self.pair, start
            own = Linear(weight, None, activation=self.activation, saved=False)
            self.__dict__["_own"] = own
        return own

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None}

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore
        return self.alone(x)


class GatedMLP(OneRow, PackedModule):
    """down(act(gate(x)) * up(x)) with gate and up in one product; `gate` is "silu" or "gelu_tanh".

    `gate_proj` and `up_proj` stay addressable; when something else stands in their place (an adapter), it
    is called and the products are separate.
    """

    weight: LayerWeight

    def __init__(self, pair: LayerWeight, down: nn.Module, activation: str, gate: str = "silu") -> None:
        super().__init__(pair)
        self.gate, self.epilogue, self._then = gate, GATES[gate], "down_proj"
        self._one, self._out = (1, 1, pair.k), (1, 1, pair.n // 2)
        self.activation = activation
        self.gate_proj: nn.Module = Half(pair, True, activation)
        self.up_proj: nn.Module = Half(pair, False, activation)
        self.down_proj = down

    def _bind_row(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return self._bind_product(self.weight, dtype, False, self.epilogue, self.activation)

    def _run_row(self, lean: tuple[Any, ...], x: int, y: int) -> bool:
        _, _, row, _, weight, buffer, gemv, base, size, a, b, c, d, e = lean
        halves = self._modules["gate_proj"].__class__, self._modules["up_proj"].__class__
        if self.weight.buffer is not buffer or halves != (Half, Half):
            return False
        if torch_ops._recorders:
            torch_ops.note("linear", weight, 1)
        if local.address == base and local.size >= size:
            gemv(1, _threads(), 1, x, weight, 0, 0, y, a, b, c, d, e)
        else:
            row(x, weight, 0, y)
        return True

    def adopt(self, weight: PackedWeight) -> None:
        """Take another weight of the same shape."""
        self._lean = None
        self.weight.become(weight)
        for half in (self.gate_proj, self.up_proj):
            if isinstance(half, Half):
                half.__dict__["_own"] = None

    def forward(self, x: Tensor) -> Tensor:
        if not (self.gate_proj.__class__ is Half and self.up_proj.__class__ is Half):
            return self.down_proj(ACTIVATIONS[self.gate](self.gate_proj(x)) * self.up_proj(x))
        x = autocast(x)
        if direct(x):
            return self.down_proj(torch_ops.matmul(x, self.weight, None, self.activation, self.epilogue))
        weight = self.weight
        hidden = torch.ops.edgeformer.linear(
            x, weight.buffer, None, weight.n, weight.code, self.activation, self.epilogue
        )
        return self.down_proj(hidden)


class Norm(OneRow):
    """RMSNorm or LayerNorm over the last dimension, in x's dtype; the sums are fp32, rounded once."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, kind: str, weight_offset: float
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.eps, self.kind, self.weight_offset = eps, kind, weight_offset
        self._one = self._out = (1, 1, weight.shape[0])

    def _bind_row(self, dtype: torch.dtype) -> tuple[Any, ...]:
        weight, biased = self.weight, self.bias is not None
        call = rows.norm_row(weight, dtype, biased, self.eps, self.kind, self.weight_offset)
        return dtype, dispatch.generation(), call, self._like(dtype), weight.dtype, not biased

    @property
    def variance_epsilon(self) -> float:
        """The name that transformers gives to eps."""
        return self.eps

    def _run_row(self, lean: tuple[Any, ...], x: int, y: int) -> bool:
        _, _, call, _, dtype, bare = lean
        parameters = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        if weight.dtype is not dtype or (bias is None) is not bare:
            return False
        if bias is not None and bias.dtype is not dtype:
            return False
        address = weight.data_ptr()
        if torch_ops._recorders:
            torch_ops.note("norm", address, 1)
        call(x, address, 0 if bias is None else bias.data_ptr(), y)
        return True

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer" and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # as torch does
        if direct(x) and not (torch.is_grad_enabled() and self.weight.requires_grad):
            return torch_ops.norm(x, self.weight, self.bias, self.eps, self.kind, self.weight_offset)
        return torch.ops.edgeformer.norm(x, self.weight, self.bias, self.eps, self.kind, self.weight_offset)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, {self.kind}, eps={self.eps}"


class Embedding(PackedModule):
    """Rows of a packed table times `factor`: ids [...] -> [..., K] in the dtype that the table had."""

    weight: LayerWeight

    def __init__(self, weight: LayerWeight, padding_idx: int | None = None, factor: float = 1.0) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.n, weight.k
        self.padding_idx, self.factor = padding_idx, factor

    def adopt(self, weight: PackedWeight) -> None:
        """Take another table of the same shape, also for the head that shares it."""
        self.weight.become(weight)

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.weight
        if direct(ids):
            return torch_ops.gather(ids, weight, weight.dtype, self.factor)
        return torch.ops.edgeformer.embedding(
            ids, weight.buffer, weight.n, weight.k, weight.code, weight.dtype, self.factor
        )
