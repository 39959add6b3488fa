"""The KV cache on an OpenCL device, in the `vectors` layout of attention."""

from __future__ import annotations

from typing import Any

from ..compiler.errors import CapacityError
from ..kernels.attention.vectors import slots_of, torch_dtype
from .opencl import DeviceTensor, Session

KV_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


class DeviceKVCache:
    """Keys and values of `layers` layers for `batch` sequences of up to `capacity` tokens, as cl buffers.

    `layers[i]` is (k, v, k_scale, v_scale); the scales are None but for int8. `length` is the tokens held.
    Raises CapacityError when the device has no room.
    """

    def __init__(
        self,
        session: Session,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: str,
    ) -> None:
        self.capacity, self.length, self.batch = capacity, 0, batch
        self.slots = slots_of(capacity)
        self.layers: list[tuple[DeviceTensor | None, ...]] = []
        kind = torch_dtype(KV_NAMES[dtype])
        shape = (batch, kv_heads, self.slots)
        for _ in range(layers):
            k, v = (session.empty(*shape, head_dim, dtype=kind) for _ in range(2))
            scales = [session.empty(*shape) if dtype == "int8" else None for _ in range(2)]
            self.layers.append((k, v, *scales))

    def buffers(self, layer: int) -> list[Any]:
        """Return the four cl buffers of a layer (None where it has no scales)."""
        return [None if t is None else t.buffer for t in self.layers[layer]]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(t.nbytes for layer in self.layers for t in layer if t is not None)

    def require_room(self, position: int, tokens: int) -> None:
        """Raise CapacityError when tokens at `position` run past the capacity or would leave a gap."""
        if position + tokens > self.capacity:
            raise CapacityError(
                f"{position + tokens} tokens do not fit a KV cache of {self.capacity}; "
                "shorten the prompt or make the cache larger (context=...)"
            )
        if not 0 <= position <= self.length:
            raise CapacityError(f"position {position} leaves a gap: the cache holds {self.length} tokens")

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens. Raises CapacityError when there are fewer."""
        if not 0 <= length <= self.length:
            raise CapacityError(f"cannot keep {length} tokens of a cache that holds {self.length}")
        self.length = length
