"""How much memory a model needs, before any of it is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..compiler.errors import CapacityError
from ..compiler.target import available_memory
from ..kernels.quant_matmul import WeightFormat
from ..kernels.quant_matmul.packing import BLOCK, Geometry
from ..runtime.kv_cache import KVCache
from .config import ModelConfig
from .requantise import joined_format, requested_format, values_apart

FLOAT = 4  # bytes: activations are float32
DEFAULT_CONTEXT = 8192  # tokens, where the model allows more and the caller names none
PREFILL_CHUNK = 512  # tokens of a prompt that pass through the layers at once


class WeightSource(Protocol):
    """What planning asks of a checkpoint."""

    config: ModelConfig

    def matrices(self) -> dict[str, tuple[int, int]]: ...

    def format(self, name: str) -> WeightFormat: ...


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a loaded model holds: packed weights, KV cache, and scratch space while it runs."""

    weights: int
    kv: int
    workspace: int
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.workspace

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name) / 1e6:.1f} MB" for name in ("weights", "kv", "workspace")
        )
        return f"{self.total / 1e6:.1f} MB ({parts}; context {self.context})"


def choose_context(config: ModelConfig, context: int | None) -> int:
    """The number of tokens to hold: what was asked for, else the model's own up to DEFAULT_CONTEXT.

    A LongRoPE model's own is the context that it was first trained for: beyond it, it takes other factors.

    Raises CapacityError beyond what the model was trained for.
    """
    if context is None:
        own = config.rope.original_context if config.rope.scaling == "longrope" else config.max_context
        return min(own, config.max_context, DEFAULT_CONTEXT)
    if not 0 < context <= config.max_context:
        raise CapacityError(f"context {context} is not between 1 and the model's {config.max_context}")
    return context


def plan_memory(
    checkpoint: WeightSource,
    *,
    context: int | None = None,
    kv: str = "bf16",
    quantize: str | None = None,
    batch: int = 1,
    chunk: int = PREFILL_CHUNK,
) -> MemoryPlan:
    """What loading ``checkpoint`` with these options needs; reads no weight."""
    config = checkpoint.config
    tokens = choose_context(config, context)
    cache = KVCache.bytes_needed(
        config.num_layers, batch, config.num_kv_heads, config.head_dim, tokens, kv
    )  # fmt: skip
    return MemoryPlan(
        weights=weight_bytes(checkpoint, quantize),
        kv=cache,
        workspace=workspace_bytes(config, batch, min(chunk, tokens), tokens),
        context=tokens,
    )


def plan_folder(config: ModelConfig, weights: int, context: int, kv: str) -> MemoryPlan:
    """What a compiled folder with so many bytes of weights needs."""
    tokens = choose_context(config, context)
    cache = KVCache.bytes_needed(config.num_layers, 1, config.num_kv_heads, config.head_dim, tokens, kv)
    return MemoryPlan(weights, cache, workspace_bytes(config, 1, min(PREFILL_CHUNK, tokens), tokens), tokens)


def weight_bytes(checkpoint: WeightSource, quantize: str | None) -> int:
    """Bytes of the packed weights, norms and biases, as the decoder fuses them."""
    config = checkpoint.config
    shapes = checkpoint.matrices()

    def matrix(*names: str, pair: bool = False) -> int:
        formats = [requested_format(checkpoint.format(name), quantize, name) for name in names]
        rows = [shapes[name][0] for name in names]
        return packed_bytes(joined_format(formats), rows if pair else [sum(rows)], shapes[names[0]][1])

    total = sum(matrix(name) for name in ("embed", "head") if name in shapes)
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        heads = [at + part for part in "qkv"]
        apart = values_apart([requested_format(checkpoint.format(name), quantize, name) for name in heads])
        total += matrix(*heads[:2]) + matrix(heads[2]) if apart else matrix(*heads)
        total += matrix(at + "o")
        total += matrix(at + "gate", at + "up", pair=True) + matrix(at + "down")
    return total + sum(config.vectors().values()) * FLOAT


def packed_bytes(fmt: WeightFormat, row_blocks: list[int], k: int) -> int:
    """Bytes of a packed weight whose parts of ``row_blocks`` rows are padded to whole blocks each."""
    return sum(-(-rows // BLOCK) for rows in row_blocks) * Geometry(fmt, k).block_bytes


def workspace_bytes(config: ModelConfig, batch: int, chunk: int, context: int) -> int:
    """Scratch while a chunk passes through: every intermediate of a layer (freed ones stay with the
    allocator), rope tables and one row of logits."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, rotated = config.num_heads, config.num_heads + config.num_kv_heads
    attention = config.qkv_size + (rotated + 2 * heads) * config.head_dim  # fused, rotated, output, its copy
    codes = (mlp + mlp // 8) // FLOAT  # int8 activations and their scales
    rows = batch * chunk * (5 * hidden + attention + mlp + codes) * FLOAT
    tables = len(config.ropes) * context * config.rotary * FLOAT
    return rows + tables + batch * config.vocab_size * FLOAT


def require_memory(plan: MemoryPlan, available: int | None = None) -> None:
    """Refuse a plan that this process's free memory (or its cgroup) cannot hold.

    Raises CapacityError with the numbers, and the context that would fit.
    """
    free = available_memory() if available is None else available
    if plan.total <= free:
        return
    fixed, per_token = plan.weights + plan.workspace, plan.kv / plan.context
    fits = int((free - fixed) / per_token) if free > fixed else 0
    advice = f"a context of {fits} would fit" if fits > 0 else "use a smaller model or quantize='int4'"
    raise CapacityError(f"the model needs {plan}, but only {free / 1e6:.1f} MB are free; {advice}")
