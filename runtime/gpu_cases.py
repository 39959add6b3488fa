"""Problems for the GPU kernels: inputs, the call, its truth in fp64, and what PyTorch offers for the same.

Used to check and time tiles (tuning) and to measure (bench). `small` sizes suit Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.norm.spec import NormSpec
from ..kernels.quant_matmul import CanonicalWeight, WeightFormat
from ..kernels.quant_matmul.triton_packing import GpuWeight, pack_gpu
from ..kernels.rope.spec import RopeSpec
from . import gpu

Call = Callable[[], Tensor]


@dataclass
class Case:
    """One problem: `run` is our call, `truth` the fp64 result of the `part` of it that is compared.

    `tile` names the kernel whose tile matters ("" where there is none), `operator` what it computes; `nbytes`
    and `operations` are what a call has to read and write, and its multiply-adds times two (0: not what
    limits it). Peers by name; one that says "without" computes less and is not held to the tolerance.
    """

    name: str
    operator: str
    tile: str
    run: Call
    truth: Call
    part: Callable[[Tensor], Tensor] = lambda y: y
    tolerance: float = 1e-2
    peers: dict[str, Call] = field(default_factory=dict)
    nbytes: float = 0.0
    operations: float = 0.0
    mark: str = ""

    def error(self, call: Call | None = None) -> float:
        """Return the relative error of our result, or of a peer's, to the truth; infinite with a NaN."""
        got, want = self.part((call or self.run)()).double(), self.truth().double()
        found = float((got - want).norm() / want.norm())
        return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Box:
    """Where inputs are made: a device, half precision, real or small sizes."""

    device: str
    dtype: torch.dtype
    small: bool = False

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers in the box's type on its device."""
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)


def cases(box: Box, operators: Collection[str] = (), tile: str = "") -> Iterator[Case]:
    """Yield the cases of some operators (none: of all), or of a kernel's tile; inputs are made on the way."""
    for made, tiles, maker in _MAKERS:
        if (not operators or made & set(operators)) and (not tile or tile in tiles):
            for case in maker(box):
                if (not operators or case.operator in operators) and tile in ("", case.tile):
                    yield case


def operators() -> set[str]:
    """Return the operators that have cases."""
    return set().union(*(made for made, _, _ in _MAKERS))


_sdpa = torch.nn.functional.scaled_dot_product_attention


def _backends(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> dict[str, Call]:
    """SDPA by each of its back ends that a GPU has; on a CPU the one it takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if q.device.type == "cpu":
        return {"sdpa": lambda: _sdpa(q, k, v, **options)}
    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)

    def call(kind: SDPBackend) -> Call:
        def run() -> Tensor:
            with sdpa_kernel(kind):
                return _sdpa(q, k, v, **options)

        return run

    return {f"sdpa {kind.name.split('_')[0].lower()}": call(kind) for kind in kinds}


def _prefill(box: Box) -> Iterator[Case]:
    sizes = [(1, 2, 2, 70, 64)] if box.small else [
        (2, 16, 16, 8192, 128), (1, 32, 8, 4096, 128), (2, 16, 16, 4096, 64), (1, 8, 4, 4096, 256)
    ]  # fmt: skip
    for batch, heads, kv, length, dim in sizes:
        q, k, v = (box.randn(batch, h, length, dim) for h in (heads, kv, kv))
        head = (q[:1, :1].double(), k[:1, :1].double(), v[:1, :1].double())
        yield Case(
            f"attention prefill causal {heads}/{kv} d{dim} {length}", "attention",
            "attention_forward_256" if dim > 128 else "attention_forward",
            lambda q=q, k=k, v=v: gpu.attention(q, k, v, mask="causal")[0],
            lambda head=head: _sdpa(*head, is_causal=True), lambda y: y[:1, :1],
            peers=_backends(q, k, v, is_causal=True, enable_gqa=heads != kv),
            operations=2.0 * batch * heads * length**2 * dim,
            mark=">= 0.85 of SDPA (goal 0.95)" if (dim, length) == (128, 8192) else "",
        )  # fmt: skip


def _gradient(box: Box) -> Iterator[Case]:
    batch, heads, length, dim = (1, 2, 37, 64) if box.small else (1, 16, 4096, 128)
    leaves = [box.randn(batch, heads, length, dim).requires_grad_() for _ in range(3)]
    grad = box.randn(batch, heads, length, dim)

    def flat(out: Tensor, inputs: list[Tensor], g: Tensor) -> Tensor:
        return torch.stack(torch.autograd.grad(out, inputs, g, retain_graph=True))

    q, k, v = leaves
    out = gpu.attention(q, k, v, mask="causal")[0]
    theirs = _sdpa(q, k, v, is_causal=True)

    def truth() -> Tensor:
        wide = [x.detach()[:1, :1].double().requires_grad_() for x in leaves]
        return flat(_sdpa(wide[0], wide[1], wide[2], is_causal=True), wide, grad[:1, :1].double())

    for tile in ("attention_grad_q", "attention_grad_kv"):
        yield Case(
            f"{tile.replace('_', ' ')} d{dim} {length}", "attention", tile,
            lambda: flat(out, leaves, grad), truth, lambda y: y[:, :1, :1], 1.5e-2,
            {"sdpa": lambda: flat(theirs, leaves, grad)}, operations=5.0 * batch * heads * length**2 * dim,
        )  # fmt: skip


def _decode(box: Box) -> Iterator[Case]:
    batch, kv, group, length, dim = (2, 1, 4, 70, 64) if box.small else (8, 8, 4, 32768, 128)
    q, k, v = box.randn(batch, kv * group, 1, dim), *(box.randn(batch, kv, length, dim) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32, device=box.device)
    one = (q[:1, :1].double(), k[:1, :1].double(), v[:1, :1].double())
    yield Case(
        f"attention decode {batch}x{length}", "attention", "attention_decode",
        lambda: gpu.decode(q, k, v, lengths)[0], lambda: _sdpa(*one), lambda y: y[:1, :1],
        peers=_backends(q, k, v, enable_gqa=True), nbytes=2.0 * k.nbytes, mark=">= 0.85 of the copy rate",
    )  # fmt: skip
    page = 16 if box.small else 64
    blocks = -(-length // page)
    codes = [torch.randint(-127, 128, (batch * blocks, kv, page, dim), dtype=torch.int8, device=box.device)
             for _ in range(2)]  # fmt: skip
    scales = [torch.rand(batch * blocks, kv, page, device=box.device) / 64 + 0.01 for _ in range(2)]
    pages = torch.randperm(batch * blocks, device=box.device).int().view(batch, blocks)

    def plain(which: int) -> Tensor:  # the first sequence and head, in order
        picked = pages[0].long()
        wide = codes[which][picked, :1].double() * scales[which][picked, :1, :, None].double()
        return wide.transpose(0, 1).reshape(1, 1, blocks * page, dim)[:, :, :length]

    yield Case(
        f"attention decode int8 pages of {page} {batch}x{length}", "attention", "attention_decode",
        lambda: gpu.decode(
            q, codes[0], codes[1], lengths, k_scale=scales[0], v_scale=scales[1], pages=pages
        )[0],
        lambda: _sdpa(one[0], plain(0), plain(1)), lambda y: y[:1, :1],
        nbytes=2.0 * (codes[0].nbytes + scales[0].nbytes), mark=">= 0.85 of the copy rate",
    )  # fmt: skip


def _latent(box: Box) -> Iterator[Case]:
    batch, heads, length, rank, rope = (1, 4, 60, 64, 16) if box.small else (32, 16, 4096, 512, 64)
    nope = 32 if box.small else 128
    cache, q = box.randn(batch, length, rank + rope), box.randn(batch, heads, 1, nope)
    turned = box.randn(batch, heads, 1, rope)
    w_uk, w_uv = (box.randn(heads, *shape, scale=0.05) for shape in ((nope, rank), (rank, nope)))

    def truth() -> Tensor:
        c = cache[:1].double()
        scores = torch.einsum("bhtd,hdr,bjr->bhtj", q[:1].double(), w_uk.double(), c[..., :rank])
        scores = scores + torch.einsum("bhtd,bjd->bhtj", turned[:1].double(), c[..., rank:])
        weights = (scores * (nope + rope) ** -0.5).softmax(3)
        return torch.einsum("bhtj,bjr,hrd->bhtd", weights, c[..., :rank], w_uv.double())

    def eager() -> Tensor:
        wide = torch.cat([q @ w_uk, turned], 3)
        return _sdpa(wide, cache[:, None], cache[:, None, :, :rank], scale=(nope + rope) ** -0.5,
                     enable_gqa=True) @ w_uv  # fmt: skip

    yield Case(
        f"mla decode {batch}x{length} h{heads}", "mla", "mla_decode",
        lambda: gpu.mla(q, turned, cache, w_uk, w_uv, tk=length, mask="causal", mode="absorbed")[0],
        truth, lambda y: y[:1], 2e-2, {"sdpa": eager}, nbytes=float(cache.nbytes),
        mark=">= 0.80 of the copy rate",
    )  # fmt: skip


def _weight(bits: int, group: int, n: int, k: int) -> CanonicalWeight:
    fmt = WeightFormat("int", bits, group, "float16", "none" if bits == 8 else "constant")
    return CanonicalWeight.from_float(torch.randn(n, k) / k**0.5, fmt)


def _products(box: Box) -> Iterator[Case]:
    n = 96 if box.small else 8192
    for bits, group in ((4, 128), (2, 64), (8, 128)):
        weight = _weight(bits, group, n, n)
        packed, dense = pack_gpu(weight).to(box.device), weight.dequantize().to(box.device)
        plain = dense.to(box.dtype)
        for m in (1, 16, 19 if box.small else 4096):
            x = box.randn(m, n)
            peers: dict[str, Call] = {"torch": lambda x=x, p=plain: x @ p.T}
            if bits == 4 and box.device != "cpu" and box.dtype == torch.bfloat16:
                peers["_weight_int4pack_mm"] = _int4pack(x, weight, box.device)
            yield Case(
                f"w{bits}a16 {n}x{n} M{m}", "quant_matmul",
                "matvec" if m <= 4 else "matmul_few" if m <= 16 else "matmul",
                lambda x=x, w=packed: gpu.quant_matmul(x, w), lambda x=x, d=dense: x.double() @ d.double().T,
                peers=peers, nbytes=float(packed.nbytes + x.nbytes + 2 * m * n) if m <= 16 else 0.0,
                operations=2.0 * m * n * n if m > 16 else 0.0,
                mark=">= 0.50 of copy, >= 2.5x torch" if (bits, m) == (4, 1) else "",
            )  # fmt: skip
        if bits == 4:
            yield _product_gradient(box, packed, dense)


def _product_gradient(box: Box, packed: GpuWeight, dense: Tensor) -> Case:
    dy, plain = box.randn(19 if box.small else 4096, packed.n), dense.to(box.dtype)
    x = box.randn(dy.shape[0], packed.k).requires_grad_()
    y = gpu.quant_matmul(x, packed)
    return Case(
        f"w4a16 gradient of x M{dy.shape[0]}", "quant_matmul", "matmul_grad_x",
        lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0], lambda: dy.double() @ dense.double(),
        peers={"torch": lambda: dy @ plain}, operations=2.0 * dy.numel() * packed.k,
    )  # fmt: skip


def _int4pack(x: Tensor, weight: CanonicalWeight, device: str) -> Call:
    """PyTorch's own INT4 product with the same codes and scales (groups along K, zero point 8)."""
    codes = weight.codes.to(torch.uint8)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(device)
    assert weight.scale is not None
    scale = weight.scale.T.contiguous().to(device=device, dtype=torch.bfloat16)  # [K / group, N]
    both = torch.stack([scale, torch.zeros_like(scale)], 2).contiguous()
    words: list[Tensor] = []

    def run() -> Tensor:
        if not words:
            words.append(torch.ops.aten._convert_weight_to_int4pack(pairs, 8))
        return torch.ops.aten._weight_int4pack_mm(x, words[0], weight.format.group_size, both)

    return run


def _int8(box: Box) -> Iterator[Case]:
    n, m = (96, 19) if box.small else (8192, 4096)
    weight = _weight(8, 128, n, n)
    packed, dense = pack_gpu(weight).to(box.device), weight.dequantize().to(box.device)
    x, plain = box.randn(m, n), dense.to(box.dtype)
    peers: dict[str, Call] = {"torch": lambda: x @ plain.T}
    if box.device != "cpu":
        codes, row = weight.codes.to(device=box.device, dtype=torch.int8), x.abs().amax(1, keepdim=True) / 127
        left = (x / row).round().to(torch.int8)
        peers["_int_mm without scales"] = lambda: torch.ops.aten._int_mm(left, codes.T)
    yield Case(
        f"w8a8 {n}x{n} M{m}", "quant_matmul", "matmul_w8a8",
        lambda: gpu.quant_matmul(x, packed, activation="int8"), lambda: x.double() @ dense.double().T,
        tolerance=2e-2, peers=peers, operations=2.0 * m * n * n, mark=">= 1.4x the bf16 matmul",
    )  # fmt: skip


def _sparse(box: Box) -> Iterator[Case]:
    from ..kernels.sparse_mlp.triton_kernel import pack_sparse

    k, f = (128, 256) if box.small else (4096, 14336)
    weights = [_weight(4, 128 if not box.small else 32, *shape) for shape in ((f, k), (f, k), (k, f))]
    packed = pack_sparse(*weights)
    packed = type(packed)(*(w.to(box.device) for w in (packed.gate, packed.up, packed.down)))
    gate, up, down = (w.dequantize().to(box.device) for w in weights)
    dense = [pack_gpu(w).to(box.device) for w in weights]
    x = box.randn(1, k)
    fires = (torch.arange(f // 32, device=box.device) % 10 == 0).int()[None]  # a tenth of the blocks
    kept = fires.repeat_interleave(32, 1).double()

    def truth() -> Tensor:
        hidden = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
        return (hidden * kept) @ down.double().T

    def whole() -> Tensor:
        hidden = gpu.gated_silu(gpu.quant_matmul(x, dense[0]), gpu.quant_matmul(x, dense[1]))
        return gpu.quant_matmul(hidden, dense[2])

    yield Case(
        f"sparse mlp {k}/{f}, a tenth fires", "sparse_mlp", "sparse_mlp",
        lambda: gpu.sparse_mlp(x, packed, block=32, fires=fires), truth,
        peers={"our int4 without skipping": whole},
        nbytes=packed.gate.nbytes + 0.1 * (packed.up.nbytes + packed.down.nbytes),
    )  # fmt: skip


def _rows(box: Box) -> Iterator[Case]:
    rows, dim = (5, 96) if box.small else (8192, 4096)
    x, other, weight = box.randn(rows, dim), box.randn(rows, dim), box.randn(dim)
    name = "float16" if box.dtype == torch.float16 else "bfloat16"
    spec = NormSpec("rms", dim, 1e-5, name, name)

    def normed(x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-5)).to(x.dtype) * weight

    yield Case(
        f"add and rms norm {rows}x{dim}", "norm", "", lambda: gpu.add_norm(spec, x, other, weight)[0],
        lambda: normed((x + other).double()), peers={"eager": lambda: normed(x + other)},
        nbytes=4.0 * x.nbytes, mark=">= 3x eager",
    )  # fmt: skip
    q = box.randn(1, *((2, 5, 64) if box.small else (32, 8192, 128)))
    angle = torch.randn(q.shape[2], q.shape[3] // 2, device=box.device)
    cos, sin = angle.cos(), angle.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 3)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 3)

    yield Case(
        f"rope {q.shape[1]}x{q.shape[2]}x{q.shape[3]}", "rope", "",
        lambda: gpu.rope(RopeSpec(q.shape[3], dtype=name), q, cos, sin), lambda: turned(q.double()),
        peers={"eager": lambda: turned(q.float()).to(q.dtype)}, nbytes=2.0 * q.nbytes, mark=">= 3x eager",
    )  # fmt: skip
    gate, up = box.randn(rows, dim), box.randn(rows, dim)
    silu = torch.nn.functional.silu
    yield Case(
        f"gated silu {rows}x{dim}", "gated_silu", "", lambda: gpu.gated_silu(gate, up),
        lambda: silu(gate.double()) * up.double(), peers={"eager": lambda: silu(gate) * up},
        nbytes=3.0 * gate.nbytes,
    )  # fmt: skip


def _step(box: Box) -> Iterator[Case]:
    """A layer's decode step; on a GPU captured once in a graph, which is replayed for other lengths."""
    heads, kv, dim, hidden, length = (4, 2, 32, 96, 45) if box.small else (32, 8, 128, 4096, 4096)
    shapes = ((heads * dim, hidden), (hidden, heads * dim))
    weights = [_weight(4, 32 if box.small else 128, *shape) for shape in shapes]
    to_q, to_out = (pack_gpu(w).to(box.device) for w in weights)
    dense_q, dense_out = (w.dequantize().to(box.device).double() for w in weights)
    x, k, v = box.randn(1, hidden), *(box.randn(1, kv, length, dim) for _ in range(2))
    scale = box.randn(hidden)
    lengths = torch.full((1,), length - 7, dtype=torch.int32, device=box.device)
    name = "float16" if box.dtype == torch.float16 else "bfloat16"
    spec = NormSpec("rms", hidden, 1e-5, name, name)

    def step() -> Tensor:
        q = gpu.quant_matmul(gpu.norm(spec, x, scale, None), to_q).view(1, heads, 1, dim)
        out = gpu.decode(q, k, v, lengths)[0].reshape(1, heads * dim)
        return gpu.quant_matmul(out, to_out, residual=x)

    def truth() -> Tensor:
        wide, seen = x.double(), int(lengths[0])
        q = (wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * scale.double()) @ dense_q.T
        keys, values = k[:, :, :seen].double(), v[:, :, :seen].double()
        out = _sdpa(q.view(1, heads, 1, dim), keys, values, enable_gqa=True)
        return out.reshape(1, heads * dim) @ dense_out.T + wide

    run = captured(step) if box.device.startswith("cuda") else step
    lengths.fill_(length)  # not what it was captured with
    yield Case(
        f"decode step of a layer {hidden}, in a graph", "step", "", run, truth, tolerance=2e-2,
        peers={"call by call": step}, nbytes=float(to_q.nbytes + to_out.nbytes + 2 * k.nbytes),
    )  # fmt: skip


def captured(step: Call) -> Call:
    """Return a call that replays a CUDA graph of `step`, which must not wait for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads what is to be captured
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = step()

    def run() -> Tensor:
        graph.replay()
        return out

    return run


_MAKERS: tuple[tuple[set[str], tuple[str, ...], Callable[[Box], Iterator[Case]]], ...] = (
    ({"attention"}, ("attention_forward", "attention_forward_256"), _prefill),
    ({"attention"}, ("attention_grad_q", "attention_grad_kv"), _gradient),
    ({"attention"}, ("attention_decode",), _decode),
    ({"mla"}, ("mla_decode",), _latent),
    ({"quant_matmul"}, ("matvec", "matmul_few", "matmul", "matmul_grad_x"), _products),
    ({"quant_matmul"}, ("matmul_w8a8",), _int8),
    ({"sparse_mlp"}, ("sparse_mlp",), _sparse),
    ({"norm", "rope", "gated_silu"}, (), _rows),
    ({"step"}, (), _step),
)
