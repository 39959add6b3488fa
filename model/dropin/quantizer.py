"""EdgeFormer's formats as a quantisation method of transformers: from_pretrained and save_pretrained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...compiler.errors import UnsupportedError
from ...kernels.quant_matmul import CanonicalWeight, WeightFormat, pack, pack_float
from ...runtime import dispatch
from . import attention
from .layers import LayerWeight, Linear

METHOD = "edgeformer"


class EdgeFormerQuantConfig(QuantizationConfigMixin):
    """What `from_pretrained(quantization_config=...)` takes.

    `bits` 4 (codes with a minimum) or 8 (signed codes), `group_size` 32, 64 or 128 values along K; names in
    `skip` (parts of module names) stay as they are: by default the vocabulary's head. `activation` as in
    `optimize`.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        skip: tuple[str, ...] | list[str] = ("lm_head",),
        activation: str = "auto",
        **unused: Any,
    ) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.bits, self.group_size, self.skip = bits, group_size, list(skip)
        self.activation = activation
        self.format()

    def format(self) -> WeightFormat:
        """Return the weights' format. Raises UnsupportedError for one without a kernel."""
        if self.bits == 4:
            return WeightFormat.int4(self.group_size, zero="minimum")
        if self.bits == 8:
            return WeightFormat.int8(self.group_size)
        raise UnsupportedError(f"bits={self.bits} is not supported; use 4 or 8")


register_quantization_config(METHOD)(EdgeFormerQuantConfig)


class Canonical(nn.Linear):
    """A linear layer as a checkpoint holds it: codes, scales and minima; replaced once it is loaded."""

    def __init__(self, fmt: WeightFormat, n: int, k: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.fmt, self.dtype = k, n, fmt, dtype
        groups = fmt.groups(k)
        codes = torch.int8 if fmt.zero == "none" else torch.uint8
        self.register_buffer("codes", torch.empty(n, k, dtype=codes, device="meta"))
        self.register_buffer("scale", torch.empty(n, groups, dtype=fmt.torch_scale_dtype, device="meta"))
        if fmt.zero == "minimum":
            self.register_buffer("zero", torch.empty(n, groups, dtype=fmt.torch_scale_dtype, device="meta"))
        length = len(format_bytes(fmt))
        self.register_buffer("format", torch.empty(length, dtype=torch.uint8, device="meta"))
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(torch.empty(n, dtype=torch.float32, device="meta"))

    def packed(self, activation: str) -> Linear:
        """Return the layer on the packed weight."""
        kind = self.fmt.torch_scale_dtype
        scale, zero = self.get_buffer("scale").to(kind), getattr(self, "zero", None)
        zero = None if zero is None else zero.to(kind)
        weight = CanonicalWeight(self.fmt, self.get_buffer("codes"), scale, zero)
        packed = LayerWeight.of(pack(weight, dispatch.current_target()), self.dtype)
        return Linear(packed, self.bias, activation=activation)


def format_bytes(fmt: WeightFormat) -> bytes:
    """Return what a state dict holds under "format"."""
    import dataclasses
    import json

    return json.dumps(dataclasses.asdict(fmt)).encode()


@register_quantizer(METHOD)
class EdgeFormerHfQuantizer(HfQuantizer):
    """Swaps linear layers in while transformers loads a model, and packs them when it has."""

    requires_calibration = False
    requires_parameters_quantization = False

    @property
    def _options(self) -> EdgeFormerQuantConfig:
        config: Any = self.quantization_config
        return config

    def is_serializable(self, *_: Any, **__: Any) -> bool:  # pyright: ignore
        """A quantised model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore
        """Adapters train on it."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        attention.register()
        if not self.pre_quantized:
            return model
        fmt, dtype = self._options.format(), model.config.dtype or torch.float32
        for name, module in list(model.named_modules()):
            if self._wanted(name, module):
                bias = module.bias
                new = Canonical(fmt, module.out_features, module.in_features, bias, dtype)
                _set(model, name, new)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self._options
        for name, module in list(model.named_modules()):
            if isinstance(module, Canonical):
                _set(model, name, module.packed(config.activation).train(module.training))
            elif not self.pre_quantized and self._wanted(name, module):
                weight = module.weight.detach()
                packed = pack_float(weight, config.format(), dispatch.current_target())
                packed = LayerWeight.of(packed, weight.dtype)
                _set(model, name, Linear(packed, module.bias, activation=config.activation))
        return model

    def _wanted(self, name: str, module: nn.Module) -> bool:
        skipped = any(part in name for part in self._options.skip)
        return type(module) is nn.Linear and not skipped and bool(name)


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = new
