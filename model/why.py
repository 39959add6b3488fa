"""Why a model's kernels run with which configuration: records that fit, and what keeps others from use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..compiler.lookup import look_up
from ..compiler.operator import Form, Operator, Sizes
from ..compiler.records import RecordStore, policy
from ..compiler.target import Target
from ..kernels.decoder_step import TVM_CPU
from ..kernels.quant_matmul import OPERATOR as QUANT_MATMUL
from ..runtime import recorded
from ..runtime.program import OPERATOR as STEP
from ..runtime.program import TUNED_SIZES
from ..runtime.tuning import wanted
from .compiled import chunk_spec, step_spec
from .layers import QuantLinear
from .loading import load
from .tuning import layer_specs


def explain_model(path: Path, layer: str = "", kv: str = "bf16") -> list[dict[str, Any]]:
    """Return rows of what runs (a layer at M, or the whole step), configuration, where from, and reasons."""
    model = load(path, kv=kv)
    rows = []
    if not model.whole_step_declined and not layer:
        few = step_spec(model.decoder, model.kv)
        many = chunk_spec(model.decoder, model.kv, model.target) or few
        for name, spec, sizes in zip(("decode step", "prefill step"), (few, many), TUNED_SIZES):
            rows.append(_row(name, STEP, TVM_CPU, spec, sizes, model.target, model.threads))
    for name, module in model.decoder.named_modules():
        if isinstance(module, QuantLinear) and (name == layer or (not layer and model.whole_step_declined)):
            for spec, m in layer_specs(module, model.target):
                form = next(f for f in QUANT_MATMUL.forms if f.decide(spec, model.target) is None)
                rows.append(_row(name, QUANT_MATMUL, form, spec, {"m": m}, model.target, model.threads))
    return rows


def _row(
    name: str, operator: Operator, form: Form, spec: Any, sizes: Sizes, target: Target, threads: int
) -> dict[str, Any]:
    configuration, record = recorded.configuration(operator, form, spec, sizes, target)
    row: dict[str, Any] = {
        "layer": name,
        "spec": spec.key(),
        "sizes": " ".join(f"{k}={v}" for k, v in sizes.items()),
    }
    row |= {"runs with": record, "configuration": " ".join(f"{k}={v}" for k, v in configuration.items())}
    if policy() == "off":
        return row | {"why": "EDGEFORMER_TUNE=off: defaults only"}
    reasons = []
    for found, problem in recorded.explain(operator, form, spec, sizes, target, threads, check=False):
        reasons.append(f"{recorded.describe(found)}: {problem or 'fits'}")
    if not reasons:
        reasons.append(_miss(operator, form, spec, sizes, target, threads))
    return row | {"why": "; ".join(reasons)}


def _miss(operator: Operator, form: Form, spec: Any, sizes: Sizes, target: Target, threads: int) -> str:
    """Return why no record fits: what the nearest thing to one differs in."""
    about = wanted(operator, form, spec, sizes, target, threads)
    if about is None:
        return "this form has nothing to tune"
    want, same = about[0], [r for r, _ in RecordStore().all() if r.operator == operator.name]
    if not same:
        return "there are no records of this operator; `edgeformer tune` makes them"
    for field, text in (
        ("isa", "for this instruction set"), ("form", "of this form"), ("space", "of this tuning space"),
        ("family", "of these types and layout"), ("phase", "of this phase"),
    ):  # fmt: skip
        value = target.isa if field == "isa" else getattr(want, field)
        same = [r for r in same if getattr(r, field) == value]
        if not same:
            return f"records of this operator are there, but none {text} ({value})"
    assert not look_up(want, ((r, "yours") for r in same))
    return "all records are of sizes that are too far away"
