"""What a measurement computes and reads, and what part of the machine's limits it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .probes import Limits


@dataclass(frozen=True)
class Test:
    """One thing to time, named as llama-bench does: pp512 reads a prompt, tg128 generates one by one.

    `depth` tokens are in the cache before; `batch` sequences run side by side (decode only).
    """

    __test__ = False  # not a pytest class

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        depth = f"@d{self.depth}" if self.depth else ""
        batch = f"@b{self.batch}" if self.batch > 1 else ""
        return f"{self.kind}{self.tokens}{depth}{batch}"

    @property
    def length(self) -> int:
        """Tokens of one sequence at the end."""
        return self.depth + self.tokens


@dataclass(frozen=True)
class Work:
    """A model's cost, the same for every engine that runs it.

    `weight_bytes` are read once a decode step (as this engine stores them); `kv_bytes` are one token's
    keys and values; `linear_weights` are the elements of the layers' matrices (the head apart, since
    prefill needs it for one token only); `head_weights` those of the head.
    """

    weight_bytes: int
    kv_bytes: int
    linear_weights: int
    head_weights: int
    num_layers: int
    attention_width: int  # num_heads * head_dim

    def linear_operations(self, test: Test) -> int:
        """Operations (two a multiply-add) of the matrices of a prefill test."""
        return 2 * (self.linear_weights * test.tokens + self.head_weights)

    def attention_operations(self, test: Test) -> int:
        """Operations of scores and weighted values of a causal prefill test."""
        keys = test.tokens * test.depth + test.tokens * (test.tokens + 1) // 2
        return 4 * self.num_layers * self.attention_width * keys

    def operations(self, test: Test) -> int:
        """Operations of a prefill test, or of one decode step: matrices and attention."""
        if test.kind == "pp":
            return self.linear_operations(test) + self.attention_operations(test)
        keys = test.depth + (test.tokens + 1) // 2
        attention = 4 * self.num_layers * self.attention_width * keys
        return test.batch * (2 * (self.linear_weights + self.head_weights) + attention)

    def step_bytes(self, test: Test) -> float:
        """Bytes that one decode step reads, at the middle of the test."""
        return self.weight_bytes + test.batch * self.kv_bytes * (test.depth + (test.tokens + 1) / 2)


def work_of_file(path: Path, kv_element_bytes: int) -> Work:
    """Return what a GGUF model costs an engine that keeps the file's bytes."""
    from ..model.load.gguf import GGUFCheckpoint

    checkpoint = GGUFCheckpoint(path)
    c = checkpoint.config
    tensors = checkpoint.container.tensors
    read = sum(info.nbytes for info in tensors.values())
    if "output.weight" in tensors:  # else one table serves embedding and head
        read -= tensors["token_embd.weight"].nbytes
    kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * kv_element_bytes
    return Work(read, kv, *_matrix_sizes(c))


def work_of_model(model: Any) -> Work:
    """Return what a loaded LanguageModel costs, by the bytes that it holds."""
    from ..runtime.kv_cache import KVCache

    c = model.config
    read = model.memory()["weights"]
    if model.decoder.head.weight is not model.decoder.embed.weight:
        read -= model.decoder.embed.weight.nbytes  # a decode step reads one row of this table
    tokens = 1024  # capacities are rounded up to whole blocks
    kv = KVCache.bytes_needed(c.num_layers, 1, c.num_kv_heads, c.head_dim, tokens, model.kv) // tokens
    return Work(read, kv, *_matrix_sizes(c))


def _matrix_sizes(config: Any) -> tuple[int, int, int, int]:
    c, heads = config, config.num_heads * config.head_dim
    layer = c.hidden_size * (c.qkv_size + heads + 3 * c.intermediate_size)
    return layer * c.num_layers, c.vocab_size * c.hidden_size, c.num_layers, heads


@dataclass(frozen=True)
class Fractions:
    """Speed over limit. `limit` is None where the limit is not known; `why` says so or what it is."""

    limit: float | None
    with_attention: float | None
    why: str


def fractions(test: Test, tokens_per_second: float, work: Work, limits: Limits, l3_bytes: int) -> Fractions:
    """Return what part of the machine's limit a speed is.

    Decode: bytes read a second over the read bandwidth. Prefill: operations of the matrices a second
    over the peak of integer dot products, or of a bf16 matrix unit where that is higher; `with_attention`
    adds the attention's operations at the float peak (or the matrix unit's) to the least time.
    """
    seconds = test.tokens * test.batch / tokens_per_second
    if test.kind == "tg":
        if work.weight_bytes <= l3_bytes:
            return Fractions(None, None, "the weights fit the last-level cache, memory is no limit")
        least = test.tokens * work.step_bytes(test) / limits.read_bandwidth
        return Fractions(least / seconds, None, "weights and KV over read bandwidth")
    if limits.int8_peak is None:
        return Fractions(None, None, "no integer dot loop measures this machine's peak yet")
    matrix = limits.matrix_peak or 0.0
    linear = work.linear_operations(test) / max(limits.int8_peak, matrix)
    both = None
    if limits.float_peak is not None:
        both = (linear + work.attention_operations(test) / max(limits.float_peak, matrix)) / seconds
    name = "bf16 matrix peak" if matrix > limits.int8_peak else "int8 dot peak"
    return Fractions(linear / seconds, both, f"matrix operations over the {name}")
