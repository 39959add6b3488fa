"""The definition of right for rope, in plain PyTorch."""

from __future__ import annotations

import torch

from .spec import RopeSpec


def rope(
    spec: RopeSpec, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate x [B, H, T, D] with fp32 tables [T, rotary_dim/2] or [B, T, rotary_dim/2]; `out` may be x."""
    cos, sin = (t if t.dim() == 2 else t.unsqueeze(1) for t in (cos, sin))
    rotary, rest = x[..., : spec.rotary_dim].float(), x[..., spec.rotary_dim :]
    if spec.interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotary.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    result = torch.cat([turned.to(x.dtype), rest], -1)
    return result if out is None else out.copy_(result)
