"""Cached attention as ONNX: GroupQueryAttention (com.microsoft), or plain operators where that falls short.

Keys and values [1, Hkv, capacity, D] are updated in place: a caller binds the same memory as past and as
present. DirectML's GroupQueryAttention takes queries, keys and values apart and already rotated, and reads
neither a window nor a softcap, so a layer that has one of these is written in plain operators. The CPU
provider's reads softcaps, and turns packed queries, keys and values itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.backends.onnx_graph import MICROSOFT, Graph

HIDDEN = {"float32": -1e30, "float16": -6e4}  # a score that no softmax sees


@dataclass(frozen=True)
class Heads:
    """What one layer's attention looks like; window 0 sees every key, softcap 0 has none."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0

    @property
    def attributes(self) -> dict[str, Any]:
        """GroupQueryAttention's, with those that the CPU provider alone obeys where they are set."""
        found = {"num_heads": self.num_heads, "kv_num_heads": self.num_kv_heads, "scale": self.scale}
        return found | ({"softcap": self.softcap} if self.softcap else {})

    @property
    def plain(self) -> str:
        """Why GroupQueryAttention does not do for DirectML; "" where it does."""
        reasons = [
            "a window" if self.window else "", "a softcap" if self.softcap else "",
            f"heads of {self.head_dim}" if self.head_dim % 8 else "",
        ]  # fmt: skip
        return " and ".join(filter(None, reasons))


@dataclass(frozen=True)
class CacheNames:
    """The inputs and outputs of one layer's cache, and the lengths that all layers share."""

    past_key: str
    past_value: str
    key: str
    value: str
    seqlens: str  # int32 [1]: tokens of the row, this chunk's included, less one
    total: str  # int32 [1]: tokens, this chunk's included
    positions: str  # int64 [1, T]
    capacity: int


def attention(graph: Graph, q: str, k: str, v: str, cache: CacheNames, heads: Heads) -> str:
    """q [1, T, H * D], k and v [1, T, Hkv * D], rotated -> [1, T, H * D]."""
    if heads.plain:
        return _plain(graph, q, k, v, cache, heads)
    return graph.nodes(
        "GroupQueryAttention", q, k, v, cache.past_key, cache.past_value, cache.seqlens, cache.total,
        domain=MICROSOFT, **heads.attributes,
        outputs=[f"{cache.key}/attention", cache.key, cache.value],
    )[0]  # fmt: skip


def cpu_attention(
    graph: Graph, qkv: Sequence[str], cache: CacheNames, heads: Heads,
    turns: Sequence[str] = (), interleaved: bool = False,
) -> str:  # fmt: skip
    """The same for the CPU provider, without a window (its releases count a window's keys differently).

    qkv is (q, k, v), rotated; or, with `turns` (cos, sin), one [1, T, (H + 2 Hkv) * D] that is turned here.
    """
    given: list[str] = list(qkv)
    more: dict[str, Any] = {}
    if turns:
        given, more = [*qkv, "", ""], {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
    return graph.nodes(
        "GroupQueryAttention", *given, cache.past_key, cache.past_value, cache.seqlens, cache.total, *turns,
        domain=MICROSOFT, **heads.attributes, **more,
        outputs=[f"{cache.key}/attention", cache.key, cache.value],
    )[0]  # fmt: skip


def _plain(graph: Graph, q: str, k: str, v: str, cache: CacheNames, heads: Heads) -> str:
    kv, dim, group = heads.num_kv_heads, heads.head_dim, heads.num_heads // heads.num_kv_heads
    stored = [
        _stored(graph, new, past, present, cache, kv, dim)
        for new, past, present in ((k, cache.past_key, cache.key), (v, cache.past_value, cache.value))
    ]
    keys, values = (graph.node("Unsqueeze", name, graph.constant([2])) for name in stored)
    q = graph.node("Reshape", q, graph.constant([0, 0, kv, group, dim]))
    q = graph.node("Transpose", q, perm=[0, 2, 3, 1, 4])  # [1, Hkv, G, T, D]
    q = graph.node("Mul", q, graph.constant(heads.scale, "float"))
    scores = graph.node("MatMul", q, graph.node("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    if heads.softcap:
        cap = graph.constant(heads.softcap, "float")
        scores = graph.node("Mul", graph.node("Tanh", graph.node("Div", scores, cap)), cap)
    scores = graph.node("Where", _seen(graph, cache, heads.window), scores,
                        graph.constant(HIDDEN[graph.float_type], "float"))  # fmt: skip
    out = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), values)
    out = graph.node("Transpose", out, perm=[0, 3, 1, 2, 4])
    return graph.node("Reshape", out, graph.constant([0, 0, heads.num_heads * dim]))


def _stored(
    graph: Graph, new: str, past: str, present: str, cache: CacheNames, kv: int, dim: int
) -> str:  # fmt: skip
    """Write new [1, T, Hkv * D] at its positions of the past: `present` [1, Hkv, capacity, D]."""
    cut = graph.node("Reshape", new, graph.constant([0, 0, kv, dim]))
    cut = graph.node("Transpose", cut, perm=[0, 2, 1, 3])
    places = graph.node("Reshape", cache.positions, graph.constant([1, 1, -1, 1]))
    places = graph.node("Expand", places, graph.node("Shape", cut))
    return graph.node("ScatterElements", past, places, cut, name=present, axis=2)


def _seen(graph: Graph, cache: CacheNames, window: int) -> str:
    """Whether a query sees a key: bool [T, capacity]."""
    own = graph.node("Reshape", cache.positions, graph.constant([-1, 1]))
    slots = graph.constant([range(cache.capacity)])
    seen = graph.node("LessOrEqual", slots, own)
    if not window:
        return seen
    first = graph.node("Sub", own, graph.constant(window))
    return graph.node("And", seen, graph.node("Greater", slots, first))
