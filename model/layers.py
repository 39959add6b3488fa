"""The layers that hold weights: a quantised linear, an embedding and an RMSNorm, over the runtime's ops.

Only the packed buffer of a weight is in memory. ``state_dict()`` holds the canonical form (``codes``,
``scale``, ``zero``, ... and ``format``), so that a checkpoint moves between machines with other layouts.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.errors import FormatError
from ..kernels.quant_matmul import CanonicalWeight, PackedWeight, QuantMatmulSpec, WeightFormat, pack
from ..kernels.quant_matmul.space import fastest_activation
from ..kernels.quant_matmul.weight_format import TENSORS
from ..runtime import ops

GATES = {"silu": "silu_pair", "gelu_tanh": "gelu_pair"}  # a gate's activation -> the epilogue of its pair


class PackedModule(nn.Module):
    """Base of the layers that hold one PackedWeight: its canonical form in and out of the state dict."""

    def __init__(self, weight: PackedWeight, *, target: Any = None, saved: bool = True) -> None:
        nn.Module.__init__(self)  # a subclass may have a second base with a constructor of its own
        self.weight = weight
        self.target = target
        self.saved = saved  # False: another layer owns this weight and saves it

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.saved:
            return
        weight = self.weight.unpack()
        destination.update({prefix + name: tensor for name, tensor in weight.tensors().items()})
        text = json.dumps(dataclasses.asdict(weight.format))
        destination[prefix + "format"] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = {name: state_dict.get(prefix + name) for name in (*TENSORS, "format")}
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in own}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.saved:
            return
        codes, layout = own["codes"], own["format"]
        if codes is None or layout is None:
            missing_keys.append(prefix + "codes")
            return
        if codes.shape != (self.weight.n, self.weight.k):
            error_msgs.append(
                f"{prefix}codes is {tuple(codes.shape)}, expected {(self.weight.n, self.weight.k)}"
            )
            return
        try:
            fmt = WeightFormat(**json.loads(bytes(layout.tolist())))
        except (TypeError, ValueError) as error:
            raise FormatError(f"{prefix}format does not describe a weight format: {error}") from error
        rest = [own[name] for name in TENSORS[1:]]
        self.adopt(pack(CanonicalWeight(fmt, codes, *rest), self.target, pair=self.weight.pair))

    def adopt(self, weight: PackedWeight) -> None:
        """Take another weight of the same shape."""
        self.weight = weight

    def extra_repr(self) -> str:
        return f"n={self.weight.n}, k={self.weight.k}, format={self.weight.format}"


class QuantLinear(PackedModule):
    """``x @ weight.T`` on a packed weight, with bias, residual, a pair's gate and a softcap fused.

    Shapes: x [..., K] -> [..., N], or [..., N / 2] for a pair. ``activation`` is "int8" (quantised on
    the fly, see the operator's spec), "float", or "auto": int8, and bf16 for many rows on a matrix unit.
    ``gate`` is a pair's activation, "silu" or "gelu_tanh".
    """

    def __init__(
        self,
        weight: PackedWeight,
        *,
        bias: Tensor | None = None,
        activation: str = "auto",
        residual: bool = False,
        gate: str = "silu",
        softcap: float = 0.0,
        target: Any = None,
        saved: bool = True,
    ) -> None:
        super().__init__(weight, target=target, saved=saved)
        self.softcap = softcap
        self.residual = residual  # whether forward adds one
        self.activation = activation
        self.epilogue = GATES[gate] if weight.pair else "none"
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def specs(self, target: Any = None) -> list[QuantMatmulSpec]:
        """The problems that this layer may be; with a target, those of few and of many rows there."""
        own = "float" if self.weight.format.is_float else "int8"
        if self.activation != "auto":
            types = ["float" if self.weight.format.is_float else self.activation]
        elif target is None:
            types = [own, "bfloat16"]
        else:
            types = list(dict.fromkeys(fastest_activation(m, self.weight.format, target) for m in (1, 512)))
        return [
            QuantMatmulSpec(
                self.weight.n, self.weight.k, self.weight.format, activation, "float32", self.epilogue,
                self.bias is not None, self.residual, self.softcap,
            )
            for activation in types
        ]  # fmt: skip

    def spec_keys(self) -> list[str]:
        """The names that this layer's problem may have in the runtime's report."""
        return [spec.key() for spec in self.specs()]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.quant_matmul(
            x,
            self.weight,
            bias=self.bias,
            residual=residual,
            epilogue=self.epilogue,
            activation=self.activation,
            softcap=self.softcap,
        )


class Embedding(PackedModule):
    """Rows of a packed table times ``factor``: ids [...] -> float32 [..., K]."""

    def __init__(self, weight: PackedWeight, factor: float = 1.0, *, target: Any = None) -> None:
        super().__init__(weight, target=target)
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight, factor=self.factor)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, plus a residual where one is given."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.norm(x, self.weight, residual=residual, eps=self.eps, kind="rms")
