"""What runs each layer: the form, its configuration, and why that one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime import ops
from .layers import QuantLinear

if TYPE_CHECKING:
    from .decoder import Decoder
    from .generate import LanguageModel


def report(model: LanguageModel) -> list[dict[str, Any]]:
    """One row a layer of a loaded model; call it after a run, since forms are chosen at the first call."""
    return model.report()


def layer_report(decoder: Decoder) -> list[dict[str, Any]]:
    """Rows of layer, weight, operator, spec, form, backend, configuration, record, declined.

    A layer that has not run yet has the form "not bound yet"; operators without a weight (attention,
    norm, ...) follow with the layer "all".
    """
    bound = {(row["operator"], row["spec"]): row for row in ops.describe_bound()}
    rows, named = [], set()
    for name, module in decoder.named_modules():
        if isinstance(module, QuantLinear):
            keys = [("quant_matmul", key) for key in module.spec_keys()]
            named.update(keys)
            found = [bound[key] for key in keys if key in bound]
            unbound = {"operator": "quant_matmul", "spec": keys[0][1], "form": "not bound yet"}
            for row in found or [unbound]:
                rows.append({"layer": name, "weight": repr(module.weight), **row})
    rows += [{"layer": "all", "weight": "", **row} for key, row in bound.items() if key not in named]
    return rows
