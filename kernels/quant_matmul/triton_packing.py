"""Weight layout for GPUs: planes of 16-bit words, K contiguous in a row,
    rows padded against channel aliasing.

A run of 32 words holds 32 * P codes of one row, P = 16 / bits: word i keeps code p * 32 + i in its bits
[p * bits, (p + 1) * bits). So every plane is 32 neighbouring k, with one scale where groups are 32 or more,
and 16 lanes' worth of codes become fp16 by AND, OR and one subtraction. 8-bit codes are plain bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.errors import UnsupportedError
from .weight_format import CanonicalWeight, WeightFormat

RUN = 32  # words of a run
_ALIASED = 1024  # bytes: rows a multiple of it apart share memory channels on RDNA
_PAD = 128
ZERO_MODES = {"none": 0, "constant": 0, "integer": 1, "minimum": 2}


@dataclass(frozen=True)
class GpuWeight:
    """A packed weight [N, K]: `words` int16 (8 bits: int8) [N, stride], `scale` and `zero` [groups, N]."""

    format: WeightFormat
    n: int
    k: int
    words: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def k_run(self) -> int:
        """Values of K of a run."""
        return RUN * (16 // self.format.bits) if self.format.bits < 8 else 2 * RUN

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(t.nbytes for t in (self.words, self.scale, self.zero) if t is not None)

    def to(self, device: torch.device | str) -> GpuWeight:
        """Return the weight on a device."""
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        return GpuWeight(
            self.format, self.n, self.k, self.words.to(device), self.scale.to(device), move(self.zero)
        )


def pack_gpu(weight: CanonicalWeight) -> GpuWeight:
    """Lay a canonical weight out for the Triton kernels. Raises UnsupportedError for float formats."""
    fmt, n, k = weight.format, weight.n, weight.k
    if fmt.is_float or weight.scale is None:
        raise UnsupportedError(
            f"{fmt.key()} weights have no packed GPU layout; torch multiplies them as they are"
        )
    if fmt.bits == 8 and fmt.zero != "none":
        raise UnsupportedError("8-bit weights with a zero have no GPU kernel")
    if fmt.block_size or len(fmt.plane_bits) > 1:
        raise UnsupportedError(f"{fmt.key()} weights have no GPU kernel")
    if fmt.bits == 8:
        words = torch.zeros(n, -(-k // 128) * 128, dtype=torch.int8)
        words[:, :k] = weight.codes
    else:
        planes = 16 // fmt.bits
        runs = -(-k // (RUN * planes))
        codes = torch.full((n, runs * RUN * planes), fmt.zero_point, dtype=torch.int32)
        codes[:, :k] = weight.codes.int()
        codes = codes.view(n, runs, planes, RUN)
        shifts = (torch.arange(planes, dtype=torch.int32) * fmt.bits).view(1, 1, planes, 1)
        words = (codes << shifts).sum(2, dtype=torch.int32)
        words = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16).view(n, -1)
    return GpuWeight(fmt, n, k, _padded(words), _by_group(weight.scale), _by_group(weight.zero))


def _by_group(values: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    return (values.to(torch.float16) if values.dtype == torch.uint8 else values).T.contiguous()


def _padded(words: Tensor) -> Tensor:
    row = words.shape[1] * words.element_size()
    if row % _ALIASED:
        return words.contiguous()
    out = torch.zeros(words.shape[0], words.shape[1] + _PAD // words.element_size(), dtype=words.dtype)
    out[:, : words.shape[1]] = words
    return out


def unpack_gpu(weight: GpuWeight) -> CanonicalWeight:
    """Return the canonical form, bit for bit."""
    fmt, words = weight.format, weight.words.cpu()
    if fmt.bits == 8:
        codes = words[:, : weight.k].contiguous()
    else:
        planes = 16 // fmt.bits
        used = -(-weight.k // (RUN * planes)) * RUN
        runs = words[:, :used].int().view(weight.n, -1, 1, RUN)
        shifts = (torch.arange(planes, dtype=torch.int32) * fmt.bits).view(1, 1, planes, 1)
        codes = (
            ((runs >> shifts) & ((1 << fmt.bits) - 1)).reshape(weight.n, -1)[:, : weight.k].to(torch.uint8)
        )
    zero = None if weight.zero is None else weight.zero.cpu().T.contiguous()
    if zero is not None and fmt.zero == "integer":
        zero = zero.to(torch.uint8)
    return CanonicalWeight(fmt, codes, weight.scale.cpu().T.contiguous(), zero)
