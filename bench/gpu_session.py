"""One run on a GPU box: every kernel verified, then timed beside what PyTorch offers, into one JSON file.

`make gpu-session` takes at most 8 minutes. `--dry` runs the same steps at tiny sizes on Triton's CPU
interpreter: it shows that the session works, its times mean nothing and are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..compiler.errors import EdgeFormerError

SECONDS = 450.0


@dataclass
class Case:
    """A kernel's problem: what runs, its peers by name, fp64 truth, bytes and operations of one call."""

    name: str
    run: Callable[[], Any]
    truth: Callable[[], Any]
    tolerance: float
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    nbytes: float = 0.0
    operations: float = 0.0
    mark: str = ""


class Session:
    """The device, sizes and the report under construction."""

    def __init__(self, device: str, dry: bool) -> None:
        import torch

        self.torch, self.device, self.dry = torch, device, dry
        self.dtype = torch.float16 if dry else torch.bfloat16
        self.start = time.monotonic()
        self.report: dict[str, Any] = {
            "dry": dry,
            "device": "interpreter" if dry else self._name(),
            "cases": {},
        }
        self.report["versions"] = {"torch": torch.__version__, "triton": __import__("triton").__version__}

    def _name(self) -> str:
        return self.torch.cuda.get_device_name()

    def randn(self, *shape: int, scale: float = 1.0) -> Any:
        """Random numbers in the session's type on its device."""
        return (self.torch.randn(*shape, device=self.device) * scale).to(self.dtype)

    def limits(self) -> None:
        """Measure the copy and GEMM rates that fractions are taken of."""
        if self.dry:
            return
        torch = self.torch
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        a, b = self.randn(8192, 8192), self.randn(8192, 8192)
        copy, gemm = self.time({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}).values()
        self.report["copy_bytes_per_second"] = 2 * source.nbytes / copy
        self.report["gemm_flops"] = 2 * 8192**3 / gemm

    def time(self, calls: dict[str, Callable[[], Any]], repeats: int = 20) -> dict[str, float]:
        """Return each call's median seconds, taken in turn, with the L2 cache overwritten before each."""
        torch = self.torch
        flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 3):
            for name, call in calls.items():
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                if repeat >= 3:
                    times[name].append(begin.elapsed_time(end) / 1e3)
        return {name: statistics.median(values) for name, values in times.items()}

    def measure(self, case: Case) -> None:
        """Verify a case, then time it; what fails is written down and the session goes on."""
        row: dict[str, Any] = {"mark": case.mark}
        self.report["cases"][case.name] = row
        try:
            got, want = case.run().double(), case.truth().double()
            error = float((got - want).norm() / want.norm())
            row |= {"relative_error": error, "right": bool(error <= case.tolerance)}
            if self.dry or not row["right"] or time.monotonic() - self.start > SECONDS:
                return
            seconds = self.time({"ours": case.run, **case.peers})
            row["seconds"] = seconds
            row["speedup"] = {name: t / seconds["ours"] for name, t in seconds.items() if name != "ours"}
            if case.nbytes:
                row["of_copy"] = case.nbytes / seconds["ours"] / self.report["copy_bytes_per_second"]
            if case.operations:
                row["of_gemm"] = case.operations / seconds["ours"] / self.report["gemm_flops"]
        except (EdgeFormerError, RuntimeError) as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"


def cases(s: Session) -> Iterator[Case]:
    """Yield every case, the marked ones first."""
    yield from _attention(s)
    yield from _matmul(s)
    yield from _small(s)


def _attention(s: Session) -> Iterator[Case]:
    from ..runtime import gpu

    torch, sdpa = s.torch, s.torch.nn.functional.scaled_dot_product_attention
    batch, heads, length, dim = (1, 2, 70, 64) if s.dry else (2, 16, 8192, 128)
    q, k, v = (s.randn(batch, heads, length, dim) for _ in range(3))

    def dense(q: Any, k: Any, v: Any) -> Any:  # one head in fp64: 8,192 keys do not fit for all
        return sdpa(q[:1, :1].double(), k[:1, :1].double(), v[:1, :1].double(), is_causal=True)

    ours = lambda: gpu.attention(q, k, v, mask="causal")[0]  # noqa: E731
    yield Case(
        f"attention prefill causal d{dim} {length}", lambda: ours()[:1, :1], lambda: dense(q, k, v), 1e-2,
        {"sdpa": lambda: sdpa(q, k, v, is_causal=True)}, operations=2.0 * batch * heads * length**2 * dim,
        mark=">= 0.85 of SDPA (goal 0.95)",
    )  # fmt: skip
    batch, kv, group, length = (2, 1, 4, 70) if s.dry else (8, 8, 4, 32768)
    q1, k1, v1 = (
        s.randn(batch, kv * group, 1, dim),
        s.randn(batch, kv, length, dim),
        s.randn(batch, kv, length, dim),
    )
    lengths = torch.full((batch,), length, dtype=torch.int32, device=s.device)
    wide = lambda x: x[:1, :1].double()  # noqa: E731
    yield Case(
        f"attention decode {batch}x{length}", lambda: gpu.decode(q1, k1, v1, lengths)[0][:1, :1],
        lambda: sdpa(wide(q1), wide(k1), wide(v1)), 1e-2,
        {"sdpa": lambda: sdpa(q1, k1, v1, enable_gqa=True)},
        nbytes=2.0 * k1.nbytes, mark=">= 0.85 of the copy rate",
    )  # fmt: skip
    batch, heads, length, rank, rope = (1, 4, 60, 64, 16) if s.dry else (32, 16, 4096, 512, 64)
    cache, q2 = s.randn(batch, length, rank + rope), s.randn(batch, heads, 1, 32 if s.dry else 128)
    q3 = s.randn(batch, heads, 1, rope)
    w_uk, w_uv = (s.randn(heads, *shape, scale=0.05) for shape in ((q2.shape[3], rank), (rank, q2.shape[3])))

    def latent() -> Any:
        c = cache[:1].double()
        scores = torch.einsum("bhtd,hdr,bjr->bhtj", q2[:1].double(), w_uk.double(), c[..., :rank])
        scores = scores + torch.einsum("bhtd,bjd->bhtj", q3[:1].double(), c[..., rank:])
        weights = (scores * (q2.shape[3] + rope) ** -0.5).softmax(3)
        return torch.einsum("bhtj,bjr,hrd->bhtd", weights, c[..., :rank], w_uv.double())

    run = lambda: gpu.mla(q2, q3, cache, w_uk, w_uv, tk=length, mask="causal", mode="absorbed")[0]  # noqa: E731
    yield Case(f"mla decode {batch}x{length} h{heads}", lambda: run()[:1], latent, 2e-2, {},
               nbytes=float(cache.nbytes), mark=">= 0.80 of the copy rate")  # fmt: skip


def _matmul(s: Session) -> Iterator[Case]:
    from ..kernels.quant_matmul import CanonicalWeight, WeightFormat
    from ..kernels.quant_matmul.triton_packing import pack_gpu
    from ..runtime import gpu

    torch, n = s.torch, 96 if s.dry else 8192
    for bits, group in ((4, 128), (2, 64), (8, 128)):
        fmt = WeightFormat("int", bits, group, "float16", "none" if bits == 8 else "constant")
        weight = CanonicalWeight.from_float(torch.randn(n, n) / n**0.5, fmt)
        packed, dense = pack_gpu(weight).to(s.device), weight.dequantize().to(s.device)
        plain = dense.to(s.dtype)
        for m in (1, 16, 19 if s.dry else 4096):
            x = s.randn(m, n)
            mark = ">= 0.50 of copy, >= 2.5x torch" if (bits, m) == (4, 1) else ""
            yield Case(
                f"w{bits}a16 M{m}", lambda x=x, w=packed: gpu.quant_matmul(x, w),
                lambda x=x, d=dense: x.double() @ d.double().T, 1e-2, {"torch": lambda x=x, p=plain: x @ p.T},
                nbytes=float(packed.nbytes) if m == 1 else 0.0,
                    operations=2.0 * m * n * n if m > 16 else 0.0, mark=mark,
            )  # fmt: skip
        if bits == 8:
            yield Case(
                f"w8a8 M{x.shape[0]}", lambda x=x, w=packed: gpu.quant_matmul(x, w, activation="int8"),
                lambda x=x, d=dense: x.double() @ d.double().T, 2e-2, {"torch": lambda x=x, p=plain: x @ p.T},
                operations=2.0 * x.shape[0] * n * n, mark=">= 1.4x the bf16 matmul",
            )  # fmt: skip


def _small(s: Session) -> Iterator[Case]:
    from ..kernels.norm.spec import NormSpec
    from ..kernels.rope.spec import RopeSpec
    from ..runtime import gpu

    torch = s.torch
    rows, dim = (5, 96) if s.dry else (8192, 4096)
    x, other, weight = s.randn(rows, dim), s.randn(rows, dim), s.randn(dim)
    name = "float16" if s.dry else "bfloat16"
    spec = NormSpec("rms", dim, 1e-5, name, name)

    def eager(x: Any) -> Any:
        return (x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-5)).to(x.dtype) * weight

    yield Case("add and rms norm", lambda: gpu.add_norm(spec, x, other, weight)[0],
               lambda: eager((x + other).double()), 1e-2, {"eager": lambda: eager(x + other)},
               nbytes=4.0 * x.nbytes, mark=">= 3x eager")  # fmt: skip
    q = s.randn(1, 2 if s.dry else 32, 5 if s.dry else 8192, 64 if s.dry else 128)
    angle = torch.randn(q.shape[2], q.shape[3] // 2, device=s.device)
    cos, sin = angle.cos(), angle.sin()

    def turned(x: Any) -> Any:
        a, b = x.chunk(2, 3)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 3)

    yield Case("rope", lambda: gpu.rope(RopeSpec(q.shape[3], dtype=name), q, cos, sin),
               lambda: turned(q.double()), 1e-2, {"eager": lambda: turned(q.float()).to(q.dtype)},
               nbytes=2.0 * q.nbytes, mark=">= 3x eager")  # fmt: skip
    gate, up = s.randn(rows, dim), s.randn(rows, dim)
    silu = torch.nn.functional.silu
    yield Case("gated silu", lambda: gpu.gated_silu(gate, up), lambda: silu(gate.double()) * up.double(),
        1e-2,
               {"eager": lambda: silu(gate) * up}, nbytes=3.0 * gate.nbytes)  # fmt: skip


def main() -> None:
    """Run the session and write the report; exit code 1 when a kernel is wrong or did not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-session.json"))
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.dry and not torch.cuda.is_available():
        print("error: PyTorch sees no GPU; --dry shows the session on a CPU", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(0)
    session = Session("cpu" if options.dry else "cuda", options.dry)
    session.limits()
    for case in cases(session):
        session.measure(case)
        print(case.name, json.dumps(session.report["cases"][case.name]), flush=True)
    options.out.write_text(json.dumps(session.report, indent=1))
    sys.exit(not all(row.get("right") for row in session.report["cases"].values()))


if __name__ == "__main__":
    main()
