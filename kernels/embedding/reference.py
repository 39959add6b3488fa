"""The definition of right for embedding, in plain PyTorch."""

from __future__ import annotations

import torch

from ..quant_matmul.packing import PackedWeight
from .spec import EmbeddingSpec, check_ids


def embedding(spec: EmbeddingSpec, ids: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return rows ids [...] of the table as [..., k]. Raises EdgeFormerError for an id out of range."""
    check_ids(ids, spec.n)
    rows = weight.unpack().rows(ids.reshape(-1)).dequantize()
    rows = rows.float() * torch.tensor(spec.factor)
    return rows.to(getattr(torch, spec.out_dtype)).view(*ids.shape, spec.k)
