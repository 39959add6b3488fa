"""The definition of right for the gated SiLU, in plain PyTorch."""

from __future__ import annotations

import torch

from .spec import GatedSiluSpec


def gated_silu(spec: GatedSiluSpec, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up in gate's type."""
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)
