"""What `bench ops` measures: operators on shapes of real models, beside what a PyTorch user would call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from ..compiler.errors import UnsupportedError
from ..compiler.measure import EVICTING

Call = Callable[[], Any]
COMPARED_COLUMNS = 512  # of a product, with the reference
COMPARED_ROWS = 4


@dataclass
class Problem:
    """One case, ready to run. `bytes` and `operations` are of one call; `tokens` are its rows.

    `ours` and each of `peers` are calls that take turns over copies of the weight where those together do not
    fit the last-level cache; `cached` says that they do. `error` compares with the reference.
    """

    ours: Call
    peers: dict[str, Call]
    error: Callable[[], float]
    operations: int
    bytes: int
    tokens: int
    cached: bool
    limit: str  # "int8" or "float": which peak counts


@dataclass(frozen=True)
class Case:
    """A case by name; `build` allocates. `spec` and `operator` serve compile-only targets."""

    operator: str
    model: str
    part: str
    tokens: int
    context: int
    build: Callable[[], Problem] = field(compare=False)
    spec: Callable[[], Any] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """One line that names the case."""
        at = f" ctx{self.context}" if self.context else ""
        return f"{self.operator} {self.model} {self.part} m{self.tokens}{at}"


def shapes() -> dict[str, dict[str, Any]]:
    """Return the known models' sizes."""
    import yaml

    return yaml.safe_load((resources.files(__package__ or "") / "shapes.yaml").read_text())


def cases(
    operators: Sequence[str], models: Sequence[str], rows: Sequence[int], contexts: Sequence[int],
    formats: Sequence[str], form: str | None, l3_bytes: int,
) -> Iterator[Case]:  # fmt: skip
    """Return the cases of the operators and models, cheap ones first. Raises UnsupportedError for a name."""
    known = shapes()
    for name in operators:
        if name not in BUILDERS:
            raise UnsupportedError(f"bench ops knows no operator {name!r}; operators: {', '.join(BUILDERS)}")
    for model in models:
        if model not in known:
            raise UnsupportedError(f"no shapes of {model!r}; models: {', '.join(known)}")
    for name in operators:
        for model in models:
            shape = known[model]
            if ("mla" in shape) == (name == "mla"):
                yield from BUILDERS[name](model, shape, rows, contexts, formats, form, l3_bytes)


def _quant_matmul(
    model: str, s: dict[str, Any], rows: Sequence[int], contexts: Sequence[int], formats: Sequence[str],
    form: str | None, l3: int,
) -> Iterator[Case]:  # fmt: skip
    d, f, h = s["hidden"], s["intermediate"], s["head_dim"]
    parts = {
        "qkv": ((s["heads"] + 2 * s["kv_heads"]) * h, d), "o": (d, s["heads"] * h), "gate_up": (2 * f, d),
        "down": (d, f), "head": (s["vocab"], d),
    }  # fmt: skip
    for fmt in formats:
        elements = s["layers"] * sum(n * k for name, (n, k) in parts.items() if name != "head")
        cached = elements * _bits(fmt) / 8 <= l3
        for part, (n, k) in parts.items():
            weight = _Weight(n, k, fmt, part == "gate_up", cached, l3)
            for m in rows if part != "head" else [m for m in rows if m <= 8]:
                yield Case(
                    "quant_matmul", model, f"{part} {n}x{k} {fmt}", m, 0,
                    lambda w=weight, m=m: w.problem(m, form), lambda w=weight: w.spec(),
                )  # fmt: skip


def _bits(fmt: str) -> float:
    return {"int4": 4.5, "int8": 8.5}[fmt]


class _Weight:
    """A random weight, packed once for all its cases; dropped when another one's turn comes."""

    _current: _Weight | None = None

    def __init__(self, n: int, k: int, fmt: str, pair: bool, cached: bool, l3: int) -> None:
        self.n, self.k, self.fmt, self.pair, self.cached, self.l3 = n, k, fmt, pair, cached, l3
        self._made: Any = None

    def spec(self) -> Any:
        from ..kernels.quant_matmul import QuantMatmulSpec

        return QuantMatmulSpec(self.n, self.k, self._format(), epilogue="silu_pair" if self.pair else "none")

    def _format(self) -> Any:
        from ..kernels.quant_matmul import WeightFormat

        return WeightFormat.int4() if self.fmt == "int4" else WeightFormat.int8()

    def _make(self) -> Any:
        import torch

        from ..kernels.quant_matmul import CanonicalWeight, pack
        from ..runtime.dispatch import current_target

        if _Weight._current is not None and _Weight._current is not self:
            _Weight._current._made = None
        _Weight._current = self
        if self._made is None:
            fmt = self._format()
            low, high, kind = (0, 16, torch.uint8) if fmt.bits == 4 else (-127, 128, torch.int8)
            codes = torch.randint(low, high, (self.n, self.k), dtype=kind)
            scale = torch.rand(self.n, fmt.groups(self.k)).add_(0.5).div_(8 * self.k**0.5).half()
            canonical = CanonicalWeight(fmt, codes, scale)
            packed = pack(canonical, current_target(), self.pair)
            peers = self._peers(canonical)
            self._made = canonical, [packed, *self._copies(packed, packed.nbytes)], peers
        return self._made

    def _copies(self, one: Any, nbytes: int) -> list[Any]:
        import copy

        if self.cached:
            return []
        return [copy.deepcopy(one) for _ in range(math.ceil(EVICTING * self.l3 / nbytes) - 1)]

    def _peers(self, canonical: Any) -> dict[str, list[Any]]:
        """Return the weights of torch's bf16 linear, and of its int4 kernel where the shape fits it."""
        import torch

        blocks = [canonical.slice_rows(i, min(i + 4096, self.n)) for i in range(0, self.n, 4096)]
        dense = torch.cat([block.dequantize().bfloat16() for block in blocks])
        found = {"torch bf16": [dense, *self._copies(dense, dense.nbytes)]}
        if self.fmt == "int4" and self.n % 32 == 0 and self.k % 32 == 0:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(canonical.codes.int(), 1)
            scale = canonical.scale.float()
            # torch's values are (code - 8) * scale + zero; ours have no zero
            both = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().bfloat16()
            nbytes = packed.nbytes + both.nbytes
            found["torch int4"] = [(packed, both), *self._copies((packed, both), nbytes)]
        return found

    def problem(self, m: int, form: str | None) -> Problem:
        import itertools

        import torch
        from torch.nn import functional as F

        from ..runtime import ops

        canonical, weights, peer_weights = self._make()
        x = torch.randn(m, self.k)
        half = x.bfloat16()
        epilogue = "silu_pair" if self.pair else "none"
        turn = itertools.cycle(weights)
        ours = lambda: ops.quant_matmul(x, next(turn), epilogue=epilogue, activation="auto", form=form)  # noqa: E731

        def gated(y: Any) -> Any:
            if not self.pair:
                return y
            gate, up = y.chunk(2, -1)
            return F.silu(gate) * up

        calls: dict[str, Call] = {}
        dense = itertools.cycle(peer_weights["torch bf16"])
        calls["torch bf16"] = lambda: gated(F.linear(half, next(dense)))
        if "torch int4" in peer_weights:
            packed = itertools.cycle(peer_weights["torch int4"])
            calls["torch int4"] = lambda: gated(
                torch.ops.aten._weight_int4pack_mm_for_cpu(half, (w := next(packed))[0], 32, w[1])
            )
        moved = weights[0].nbytes + x.nbytes + 4 * m * self.n // (2 if self.pair else 1)
        error = lambda: self._error(canonical, x, ours())  # noqa: E731
        return Problem(ours, calls, error, 2 * m * self.n * self.k, moved, m, self.cached, "int8")

    def _error(self, canonical: Any, x: Any, got: Any) -> float:
        """Return the relative L2 error of some rows and columns against the operator's reference."""
        import torch

        from ..kernels.quant_matmul import QuantMatmulSpec
        from ..kernels.quant_matmul.reference import quant_matmul
        from ..kernels.quant_matmul.space import fastest_activation
        from ..runtime.dispatch import current_target

        columns = min(COMPARED_COLUMNS, self.n // 2)
        index = torch.arange(columns)
        if self.pair:
            index = torch.cat([index, index + self.n // 2])
        part = canonical.rows(index)
        activation = fastest_activation(len(x), canonical.format, current_target())
        epilogue = "silu_pair" if self.pair else "none"
        spec = QuantMatmulSpec(len(index), self.k, canonical.format, activation, epilogue=epilogue)
        wanted = quant_matmul(spec, x[-COMPARED_ROWS:], part, None, None)
        return relative_error(got[-COMPARED_ROWS:, :columns], wanted)


def relative_error(got: Any, wanted: Any) -> float:
    """Return the relative error in the L2 norm."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def _attention(
    model: str, s: dict[str, Any], rows: Sequence[int], contexts: Sequence[int], formats: Sequence[str],
    form: str | None, l3: int,
) -> Iterator[Case]:  # fmt: skip
    from .op_attention import attention_problem, attention_spec

    for context in contexts:
        for tokens in sorted({1, min(512, context)}):
            yield Case(
                "attention", model, f"{s['heads']}/{s['kv_heads']}x{s['head_dim']} bf16", tokens, context,
                lambda c=context, t=tokens: attention_problem(s, t, c, form, l3), lambda: attention_spec(s),
            )  # fmt: skip


def _mla(
    model: str, s: dict[str, Any], rows: Sequence[int], contexts: Sequence[int], formats: Sequence[str],
    form: str | None, l3: int,
) -> Iterator[Case]:  # fmt: skip
    from .op_attention import mla_problem

    for context in contexts:
        for tokens in sorted({1, min(512, context)}):
            yield Case(
                "mla", model, f"{s['mla']['heads']} heads bf16", tokens, context,
                lambda c=context, t=tokens: mla_problem(s["mla"], t, c, form, l3),
            )  # fmt: skip


def _small(name: str) -> Callable[..., Iterator[Case]]:
    def make(
        model: str, s: dict[str, Any], rows: Sequence[int], contexts: Sequence[int], formats: Sequence[str],
        form: str | None, l3: int,
    ) -> Iterator[Case]:  # fmt: skip
        from .op_small import PROBLEMS

        for m in [1] if name == "sampling" else rows:
            yield Case(name, model, "fp32", m, 0, lambda m=m: PROBLEMS[name](s, m, form))

    return make


BUILDERS: dict[str, Callable[..., Iterator[Case]]] = {
    "quant_matmul": _quant_matmul,
    "attention": _attention,
    "mla": _mla,
    "norm": _small("norm"),
    "rope": _small("rope"),
    "embedding": _small("embedding"),
    "sampling": _small("sampling"),
}
