"""Drop-in replacement: one call that puts our kernels into somebody else's PyTorch or transformers model."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..compiler.errors import UnsupportedError
from ..compiler.operator import Declined
from ..compiler.records import policy as tuning_policy
from ..compiler.target import Target
from ..kernels.norm import OPERATOR as NORM
from ..kernels.norm.spec import NormSpec
from ..kernels.quant_matmul import OPERATOR as QUANT_MATMUL
from ..kernels.quant_matmul import QuantMatmulSpec, WeightFormat, pack_float
from ..kernels.shared.memory import Arena
from ..runtime import dispatch
from ..runtime.memory import give_back
from ..runtime.ops import dtype_name
from .dropin import find as finding
from .dropin.find import Found
from .dropin.layers import Embedding, GatedMLP, LayerWeight, Linear, Norm
from .dropin.measure import DECODING, ENCODING, gains, wins
from .dropin.profiles import Candidate, bits, check_profile, choose_formats
from .dropin.report import Report, Row, gains_text
from .layers import GATES

_GIVE_BACK = 8 << 20
POLICIES = ("faster", "all")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def optimize(
    model: nn.Module,
    profile: str = "balanced",
    target: str | Target = "auto",
    policy: str = "faster",
    keep_original: bool = True,
    strict: bool = False,
    *,
    calibrate: str | torch.Tensor | None = None,
    tokenizer: Any = None,
    activation: str = "auto",
    progress: bool | Callable[[int, int], None] = False,
) -> Report:
    """Replace, in place, the layers of a model that our kernels cover; return what was done.

    Args:
        model: any module; of a transformers model also the attention (by its registries) and the cache that
            ``generate`` makes.
        profile: "exact" keeps the weights' values and type, "fast" is INT4 (tables INT8), "balanced" a mix
            of both; "experimental" is declined.
        target: "auto" (this host) or a name of ``edgeformer targets``.
        policy: "faster" times each kind of layer at 1 and 128 rows and keeps the original where it wins;
            "all" replaces whatever is covered.
        keep_original: keep the replaced modules, so that ``report.undo()`` can put them back.
        strict: raise instead of leaving anything alone.
        calibrate: a text, or token ids [T], on which "balanced" measures each layer's sensitivity.
        tokenizer: of a text given to ``calibrate`` or to ``report.quality()``.
        activation: "auto" and "int8" quantise activations of integer weights, "float" keeps them.
        progress: True shows a bar; a function is called with (done, total) layers.

    Raises:
        UnsupportedError: an unknown option, or with ``strict`` a module that would be left.
        TargetError: this host cannot run the target.
    """
    check_profile(profile)
    if policy not in POLICIES:
        raise UnsupportedError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    if activation not in ("auto", "int8", "float"):
        raise UnsupportedError(f"activation {activation!r} is not one of auto, int8, float")
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"optimize takes a torch module, not {type(model).__name__}")
    started = time.perf_counter()
    resolved = Target.parse(target)
    resolved.require_cpu("layers of a PyTorch model for")
    dispatch.use_target(resolved)
    found = finding.find(model)
    if strict:
        _require_nothing_left([e for e in finding.leaves(found) if not _harmless(e)])
    job = _Job(model, resolved, profile, policy, keep_original, activation)
    job.report._tokenizer = tokenizer
    measured = _sensitivity(model, calibrate, tokenizer, progress, job, found)
    formats = choose_formats(_candidates(found), profile, _decodes(model), measured)
    try:
        job.run(found, formats, progress)
        if strict:
            _require_nothing_left([r for r in job.report.left if not _harmless(r)])
    except BaseException:
        if keep_original:
            job.report.undo()
        raise
    if tuning_policy() == "on":
        from .tuning import tune_replaced

        if tune_replaced(model, resolved, _dtype(model)):
            dispatch.forget()
    job.report.seconds = time.perf_counter() - started
    return job.report


def _dtype(model: nn.Module) -> str:
    """Return the type of the activations that a model's layers pass on: that of its first float parameter."""
    found = next((p.dtype for p in model.parameters() if p.dtype in _FLOATS), torch.float32)
    return str(found).removeprefix("torch.")


def _decodes(model: nn.Module) -> bool:
    """Whether the model makes tokens one by one (what is no transformers model may)."""
    inner = finding.transformers_model(model)
    return inner is None or bool(inner.can_generate())


def _require_nothing_left(left: list[Any]) -> None:
    if left:
        names = "; ".join(f"{e.name}: {e.reason}" for e in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise UnsupportedError(f"strict=True, and {len(left)} modules would be left alone: {names}{more}")


def _harmless(entry: Any) -> bool:
    """Whether a module that is left runs no product: a table of rows of its own."""
    return entry.kind in ("embedding", "ours")


def _candidates(found: list[Found]) -> list[Candidate]:
    """The weights that a format is chosen for; a gated pair is one."""
    tied = {e.options["head"] for e in found if e.kind == "embedding" and "head" in e.options}
    out = []
    for entry in found:
        if entry.reason:
            continue
        if entry.kind == "linear":
            head = entry.name in tied or entry.name.split(".")[-1] in ("lm_head", "embed_out")
            out.append(Candidate(entry.name, finding.matrix(entry.module), table=head))
        elif entry.kind == "mlp":
            first = entry.module.get_submodule(entry.parts[0].rpartition(".")[2])
            out.append(Candidate(entry.name, finding.matrix(first)))
    return out


def _sensitivity(
    model: nn.Module, calibrate: Any, tokenizer: Any, progress: Any, job: _Job, found: list[Found]
) -> Any:
    if calibrate is None:
        return None
    from .dropin.quality import sensitivities

    by_name = {e.name: e for e in found}

    def swap(name: str, fmt: WeightFormat) -> Callable[[], None]:
        return job.trial(by_name[name], fmt)

    return functools.partial(sensitivities, model, calibrate, tokenizer, swap, bool(progress))


class _Job:
    """One run of `optimize`: packs, compares, swaps, and writes the rows down."""

    def __init__(
        self, model: nn.Module, target: Target, profile: str, policy: str, keep: bool, activation: str
    ) -> None:
        self.model, self.target, self.policy, self.keep = model, target, policy, keep
        self.activation = "float" if profile == "exact" and target.isa != "amx" else activation
        self.report = Report(model, profile, _undo=[] if keep else None)
        self.arena = Arena()
        self.sizes = DECODING if _decodes(model) else ENCODING
        self.measured: dict[Any, tuple[float, float]] = {}
        self.kept: dict[int, int] = {}
        self.freed = 0  # bytes since memory was given back

    def run(self, found: list[Found], formats: dict[str, WeightFormat], progress: Any) -> None:
        tick = _ticker(progress, len(found))
        for done, entry in enumerate(found):
            if entry.kind == "ours":
                continue
            if entry.reason:
                self._left(entry, entry.reason)
            elif entry.kind in ("linear", "mlp", "norm"):
                getattr(self, f"_{entry.kind}")(entry, formats.get(entry.name))
            tick(done + 1)
        for entry in found:  # behind their heads, whose weight they share
            if entry.kind == "embedding" and not entry.reason:
                self._embedding(entry)
        self._attention([e for e in found if e.kind == "attention"])

    def trial(self, entry: Found, fmt: WeightFormat) -> Callable[[], None]:
        """Put a layer in, for calibration; return what takes it out again."""
        new = self._made(entry, fmt)
        return self._swap(entry.name, new)

    def _made(self, entry: Found, fmt: WeightFormat) -> nn.Module:
        if entry.kind == "linear":
            return self._new_linear(entry.module, fmt)
        return self._new_mlp(entry, fmt)

    def _new_linear(self, module: nn.Module, fmt: WeightFormat) -> Linear:
        weight = finding.matrix(module)
        packed = self._packed(weight, fmt)
        bias = module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        if bias is not None and bias.dtype == torch.float64:
            raise UnsupportedError("a float64 bias")
        return Linear(packed, bias, activation=self._activation(fmt)).train(module.training)

    def _new_mlp(self, entry: Found, fmt: WeightFormat) -> GatedMLP:
        module = entry.module
        parts = [module.get_submodule(part.rpartition(".")[2]) for part in entry.parts]
        weights = [finding.matrix(part).detach() for part in parts]
        both = torch.cat(weights) if len(weights) > 1 else weights[0]
        pair = self._packed(both, fmt, pair=True)
        down = module.get_submodule("down_proj")
        gated = GatedMLP(pair, down, self._activation(fmt), entry.options["gate"])
        return gated.train(module.training)

    def _packed(self, weight: torch.Tensor, fmt: WeightFormat, pair: bool = False) -> LayerWeight:
        large = not self.keep and weight.nbytes >= _GIVE_BACK
        if large:
            give_back()  # a head beside its copy is the peak: with nothing else that is free
        packed = pack_float(weight.detach(), fmt, self.target, pair, self.arena)
        if large:
            give_back()
        return LayerWeight.of(packed, weight.dtype)

    def _activation(self, fmt: WeightFormat) -> str:
        return "float" if fmt.is_float and self.activation != "auto" else self.activation

    def _linear(self, entry: Found, fmt: WeightFormat | None) -> None:
        assert fmt is not None
        weight = finding.matrix(entry.module)
        n, k = weight.shape
        spec = QuantMatmulSpec(
            n, k, fmt, "float" if fmt.is_float else "int8", dtype_name(weight, "weight"), "none",
            entry.module.bias is not None,
        )  # fmt: skip
        form = self._form(entry, QUANT_MATMUL, spec)
        if form is None:
            return
        new = self._new_linear(entry.module, fmt)
        key = (*weight.shape, weight.dtype, fmt, entry.module.bias is None, finding.is_conv1d(entry.module))
        self._settle(entry, new, key, weight.shape[1], weight.dtype, form, fmt, weight.nbytes)

    def _mlp(self, entry: Found, fmt: WeightFormat | None) -> None:
        assert fmt is not None
        module = entry.module
        first = module.get_submodule(entry.parts[0].rpartition(".")[2])
        weight = finding.matrix(first)
        rows = weight.shape[0] * (2 if len(entry.parts) == 2 else 1)
        activation = "float" if fmt.is_float else "int8"
        spec = QuantMatmulSpec(
            rows, weight.shape[1], fmt, activation, dtype_name(weight, "weight"), GATES[entry.options["gate"]]
        )
        form = self._form(entry, QUANT_MATMUL, spec)
        if form is None:
            return
        new = self._new_mlp(entry, fmt)
        key = ("mlp", rows, weight.shape[1], weight.dtype, fmt, entry.options["gate"])
        before = sum(finding.matrix(module.get_submodule(p.rpartition(".")[2])).nbytes for p in entry.parts)
        self._settle(entry, new, key, weight.shape[1], weight.dtype, form, fmt, before)

    def _norm(self, entry: Found, _: Any) -> None:
        module, options = entry.module, entry.options
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, nn.Parameter)
        name = dtype_name(weight, "weight")
        spec = NormSpec(
            options["kind"], weight.shape[0], options["eps"], name, name, "", options["weight_offset"],
            bias is not None,
        )  # fmt: skip
        form = self._form(entry, NORM, spec)
        if form is None:
            return
        new = Norm(weight, bias, options["eps"], options["kind"], options["weight_offset"])
        new.train(module.training)
        key = ("norm", type(module), weight.shape, weight.dtype, bias is None)
        self._settle(entry, new, key, weight.shape[0], weight.dtype, form, None, 0)

    def _embedding(self, entry: Found) -> None:
        table = entry.module
        assert isinstance(table, nn.Embedding)
        head = self.model.get_submodule(entry.options["head"])
        if not isinstance(head, Linear):
            self._left(entry, "the head that shares it was left")
            return
        new = Embedding(head.weight, table.padding_idx, entry.options["factor"]).train(table.training)
        head.saved = False  # one copy in the state dict
        self._replace(entry, new)
        self.report.rows.append(
            Row(entry.name, "embedding", True, "tvm_cpu", "tvm_llvm", head.weight.format.key(),
                bits(head.weight.format))
        )  # fmt: skip

    def _attention(self, entries: list[Found]) -> None:
        model = finding.transformers_model(self.model)
        if model is None or not entries:
            return
        from .dropin.attach import attach

        for entry, reason in attach(model, entries, self.report):
            if reason:
                self._left(entry, reason)
            else:
                self.report.rows.append(Row(entry.name, "attention", True, "tvm_cpu", "tvm_llvm"))

    def _form(self, entry: Found, operator: Any, spec: Any) -> Any:
        """The form that would run, or None when only the reference takes the problem: then it is left."""
        form, choice = dispatch.choose(operator, spec, self.target)
        if form.name != "reference":
            return form
        self._left(entry, "; ".join(f"{n}: {r}" for n, r in choice.declined) or Declined("no kernel").reason)
        return None

    def _settle(
        self, entry: Found, new: nn.Module, key: Any, columns: int, dtype: torch.dtype, form: Any,
        fmt: WeightFormat | None, before: int,
    ) -> None:  # fmt: skip
        """Compare a layer of this shape once, if the policy asks for it, and swap it in where it wins."""
        gain = None
        if self.policy == "faster":
            if key not in self.measured:
                self.measured[key] = gains(entry.module, new, columns, dtype, self.sizes)
            gain = self.measured[key]
            if not wins(gain, self.sizes):
                self._left(entry, f"the original is faster: {gains_text(gain, self.sizes)}", gain)
                return
        self._replace(entry, new)
        after = new.weight.nbytes if isinstance(new, Linear | GatedMLP) else before
        row = Row(
            entry.name, entry.kind, True, form.name, form.backend, fmt.key() if fmt else "",
            bits(fmt) if fmt else 0, before, after, gain, self.sizes, covers=entry.parts,
        )  # fmt: skip
        self.report.rows.append(row)

    def _left(self, entry: Found, reason: str, gain: tuple[float, float] | None = None) -> None:
        self.report.rows.append(Row(entry.name, entry.kind, False, reason=reason, gain=gain))

    def _replace(self, entry: Found, new: nn.Module) -> None:
        restore = self._swap(entry.name, new)
        if self.keep:
            assert self.report._undo is not None
            self.report._undo.append(restore)
            self.report._redo.append(lambda: self._swap(entry.name, new))
            self.kept |= {id(p): p.nbytes for p in self._held(entry)}
            self.report.kept_bytes = sum(self.kept.values())
        else:
            self.freed += sum(p.nbytes for p in self._held(entry))
            entry.module = new  # frees the original
            if self.freed >= _GIVE_BACK:
                self.freed = 0
                give_back()

    @staticmethod
    def _held(entry: Found) -> list[torch.Tensor]:
        """The matrices that only the original holds."""
        parts = [entry.module.get_submodule(p.rpartition(".")[2]) for p in entry.parts] or [entry.module]
        return [p for part in parts for p in part.parameters() if p.dim() > 1]

    def _swap(self, name: str, new: nn.Module) -> Callable[[], None]:
        """Put `new` at `name`; return what puts the old module back."""
        parent_name, _, child = name.rpartition(".")
        if not name:
            raise UnsupportedError(
                f"the model itself is a {type(self.model).__name__}: optimize replaces layers inside a "
                "module; wrap it in nn.Sequential"
            )
        parent = self.model.get_submodule(parent_name)
        old = parent._modules[child]
        parent._modules[child] = new

        def restore() -> None:
            parent._modules[child] = old

        return restore


def _ticker(progress: Any, total: int) -> Callable[[int], Any]:
    if callable(progress):
        return lambda done: progress(done, total)  # pyright: ignore
    if not progress:
        return lambda done: None
    from rich.progress import Progress

    bar = Progress(transient=True)
    bar.start()
    task = bar.add_task("packing layers", total=total)

    def tick(done: int) -> None:
        bar.update(task, completed=done)
        if done == total:
            bar.stop()

    return tick
