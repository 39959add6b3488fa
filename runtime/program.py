"""A compiled decoder: segments (embedding, layers i to j, head) over one arena, one native call a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.errors import CapacityError, DeclinedError, UnsupportedError
from ..compiler.operator import Operator
from ..compiler.target import Target
from ..kernels.attention.areas import decode_area, decode_chunk, partial_bytes, prefill_area
from ..kernels.decoder_step import (
    LAYER_CACHES,
    LAYER_NUMBERS,
    LAYER_SLOTS,
    LAYER_WEIGHTS,
    STEP_ROWS,
    TVM_CPU,
    DecoderStepSpec,
    LayerFormats,
)  # fmt: skip
from ..kernels.decoder_step.workspace import BARRIER_BYTES, chunk_area, thread_area
from ..kernels.embedding.spec import check_ids
from ..kernels.quant_matmul import PackedWeight
from ..kernels.shared.memory import aligned_empty, large_page_empty
from . import launch, recorded
from .kv_cache import KVCache
from .threads import team_size

MAX_ROWS = STEP_ROWS  # of a step; more are a chunk
TUNED_SIZES = (
    {"m": 1, "tk": 512},
    {"m": 512, "tk": 512},
)  # of steps and of chunks: what records are looked up for
CHUNK_ROWS = 1024
_NO_WINDOW = 1 << 40
_TILE_ROWS = 96  # a multiple of every register tile's rows


OPERATOR = Operator("decoder_step", DecoderStepSpec, reference=lambda: None, forms=(TVM_CPU,))


def choose_configurations(
    spec: DecoderStepSpec, chunk_spec: DecoderStepSpec | None, target: Target
) -> tuple[tuple[dict[str, Any], str], tuple[dict[str, Any], str]]:
    """Return (configuration, where it comes from) of steps and of chunks; one program has one of both."""
    few, many = (
        recorded.configuration(OPERATOR, TVM_CPU, problem, sizes, target)
        for problem, sizes in zip((spec, chunk_spec or spec), TUNED_SIZES)
    )
    if chunk_spec is not None:
        return few, many
    default = TVM_CPU.space(spec, target)[0]
    joined = few[0] | {name: value for name, value in many[0].items() if value != default[name]}
    threads = ({"threads": found[0].get("threads", 0)} for found in (few, many))  # each phase has its own
    return (joined | next(threads), few[1]), (joined | next(threads), many[1])


class StepProgram:
    """Runs segments of a decoder whose weights are bound by handle.

    `layers` holds for each layer its handles and numbers by slot name (see LAYER_SLOTS; caches are bound at
    run time; a window of 0 sees everything). Hidden states are fp32 [batch, tokens, hidden]. Up to MAX_ROWS
    rows (batch x tokens) are a step; more, up to CHUNK_ROWS, are a chunk, which `chunk_spec` may give to a
    matrix unit.
    Not safe for two threads at once. Raises DeclinedError or BuildError when the step cannot be compiled.
    """

    def __init__(
        self,
        spec: DecoderStepSpec,
        target: Target,
        layers: Sequence[dict[str, Tensor | PackedWeight | int | None]],
        embed: PackedWeight,
        head: PackedWeight,
        head_norm: Tensor,
        configuration: dict[str, Any] | None = None,
        chunk_spec: DecoderStepSpec | None = None,
        chunk_configuration: dict[str, Any] | None = None,
        libraries: tuple[Any, Any] | None = None,
    ) -> None:
        declined = TVM_CPU.decide(spec, target)
        if declined is not None:
            raise DeclinedError(f"the whole step: {declined.reason}")
        self.spec, self.target = spec, target
        self.chunk_spec = chunk_spec or spec
        chosen = choose_configurations(spec, chunk_spec, target)
        self.configuration = configuration or chosen[0][0]
        self.chunk_configuration = chunk_configuration or chosen[1][0]
        self.record = "" if configuration or chunk_configuration else f"{chosen[0][1]}; {chosen[1][1]}"
        step, chunk = libraries or self._libraries(chunk_spec)
        self._step_1, self._step_n = step.function("step_1"), step.function("step_n")
        self._chunk = chunk.function("chunk")
        self._chunk_arena: torch.Tensor | None = None
        self._chunk_key = (0, 0)
        self._rows = int(self.configuration["small_rows"])
        self.layers = len(layers)
        self.head_norm = head_norm.float().contiguous()
        self.embed, self.head = embed, head
        self._handles = [dict(layer) for layer in layers]
        self._table = torch.zeros(self.layers, len(LAYER_SLOTS), dtype=torch.int64)
        self._table[:, LAYER_SLOTS.index("window")] = _NO_WINDOW
        self.kinds = [spec.layers.index(layer_formats(handles)) for handles in self._handles]
        for row, handles in enumerate(self._handles):
            self.bind_handle(row, "kind", self.kinds[row])
            for name, value in list(handles.items()):
                self.bind_handle(row, name, value)
        self._cache: KVCache | None = None
        self._threads = self._asked = 0
        self._keys = 0

    def defaults(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the untuned configurations of steps and of chunks."""
        few, many = (TVM_CPU.space(spec, self.target)[0] for spec in (self.spec, self.chunk_spec))
        return few, many

    def _libraries(self, chunk_spec: DecoderStepSpec | None) -> tuple[Any, Any]:
        """Return the loaded libraries of steps and of chunks: one, unless chunks are another problem."""
        load = lambda spec, c: launch.load_or_build("decoder_step", TVM_CPU, spec, c, self.target)  # noqa: E731
        step = load(self.spec, self.configuration)
        if step.handle is None:
            raise DeclinedError("the whole step: without a linker kernels run on TVM's own thread pool")
        return step, step if chunk_spec is None else load(chunk_spec, self.chunk_configuration)

    def bind_handle(self, layer: int, name: str, value: Tensor | PackedWeight | int | None) -> None:
        """Bind a packed weight, an fp32 vector or a number of one layer. The code does not change."""
        if name not in LAYER_SLOTS:
            raise UnsupportedError(f"a layer has no handle {name!r}; handles: {', '.join(LAYER_SLOTS)}")
        if isinstance(value, PackedWeight):
            problem = self.spec.matmul(name, self.kinds[layer])
            if (value.n, value.k, value.format) != (problem.n, problem.k, problem.weight):
                raise UnsupportedError(
                    f"{name} of layer {layer} is {value!r}, the program wants {problem.key()}"
                )
            address = value.buffer.data_ptr()
        elif value is None:
            address = 0
        elif isinstance(value, int):
            if name not in LAYER_NUMBERS:
                raise UnsupportedError(f"{name} of layer {layer} is a weight, not the number {value}")
            address = value or (_NO_WINDOW if name == "window" else 0)
        else:
            value = value.float().contiguous()
            address = value.data_ptr()
        self._handles[layer][name] = value
        self._table[layer, LAYER_SLOTS.index(name)] = address

    def bind_cache(self, cache: KVCache) -> None:
        """Bind the KV cache of the next calls."""
        for i in range(self.layers):
            kv = cache.layer(i)
            for name in LAYER_CACHES:
                tensor = getattr(kv, name)
                self._table[i, LAYER_SLOTS.index(name)] = 0 if tensor is None else tensor.data_ptr()
        self._cache = cache

    def run(
        self,
        cache: KVCache,
        position: int,
        cos: Tensor,
        sin: Tensor,
        *,
        ids: Tensor | None = None,
        hidden: Tensor | None = None,
        lengths: Tensor | None = None,
        first: int = 0,
        count: int | None = None,
        head: bool = True,
    ) -> Tensor:
        """Run [embedding], layers first .. first + count, [head] for tokens at `position`.

        Either ids int64 [B, T] or hidden fp32 [B, T, hidden]. cos and sin are fp32 [kinds, T, rotary/2] or
        [kinds, B, T, rotary/2]; lengths int32 [B] are the valid slots of left-padded rows. Returns logits
        [B, T, vocab], or the hidden states when `head` is False. Keys and values go into the cache.
        """
        source = ids if ids is not None else hidden
        assert source is not None
        batch, tq = source.shape[:2]
        m, spec = batch * tq, self.spec
        count = self.layers - first if count is None else count
        if m > CHUNK_ROWS:
            raise CapacityError(f"a chunk takes up to {CHUNK_ROWS} rows, not {m}")
        if m > MAX_ROWS and head:
            raise CapacityError(f"a step with a head takes up to {MAX_ROWS} rows, not {m}")
        if position + tq > cache.capacity:
            raise CapacityError(f"{position + tq} tokens do not fit a KV cache of {cache.capacity}")
        if cache is not self._cache:
            self.bind_cache(cache)
        tk = position + tq
        if torch.get_num_threads() != self._asked or tk > self._keys:
            self._asked = torch.get_num_threads()
            self._allocate(team_size(), cache.capacity)
        threads = self._threads
        if m > MAX_ROWS:
            addresses, areas = self._chunk_memory(m)
        else:
            addresses, areas = self._addresses, (self._work, self._attention, self._barrier)
        kv = cache.layer(min(first, self.layers - 1))
        if ids is not None:
            check_ids(ids, spec.vocab)
            ids = ids.contiguous()  # held here: the kernel gets the bare address
        x = self._x if m <= MAX_ROWS else self._chunk_x
        if hidden is not None:
            x[: m * spec.hidden] = hidden.reshape(-1)
        logits = torch.empty(batch, tq, spec.vocab) if head else None
        if lengths is None:
            lengths = self._full_lengths(batch, tk)
        chunk = decode_chunk(tk, int(self.configuration["chunk"]))
        ks = kv.k_scale.stride()[:2] if kv.k_scale is not None else (0, 0)
        function = self._chunk if m > MAX_ROWS else (self._step_1 if m == 1 else self._step_n)
        wanted = (self.chunk_configuration if m > MAX_ROWS else self.configuration).get("threads", 0)
        function(
            min(threads, int(wanted)) or threads, 1, batch, tq, position,
            count, self._table.data_ptr() + first * len(LAYER_SLOTS) * 8,
            0 if ids is None else ids.data_ptr(),
            0 if ids is None else self.embed.buffer.data_ptr(),
            self.head.buffer.data_ptr() if head else 0,
            self.head_norm.data_ptr(),
            *addresses,
            0 if logits is None else logits.data_ptr(),
            *areas,
            cos.data_ptr(), sin.data_ptr(), cos.stride(0), cos.stride(1) if cos.dim() == 4 else 0,
            lengths.data_ptr(),
            *kv.k.stride()[:2], *kv.v.stride()[:2], *ks,
            chunk,
        )  # fmt: skip
        if first + count == self.layers:
            cache.length = tk
        if logits is not None:
            return logits
        return x[: m * spec.hidden].clone().view(batch, tq, spec.hidden)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the arena."""
        chunk = 0 if self._chunk_arena is None else self._chunk_arena.numel()
        return chunk + (self._arena.numel() if self._threads else 0)

    def _full_lengths(self, batch: int, tokens: int) -> Tensor:
        if self._lengths.numel() < batch:
            self._lengths = torch.empty(batch, dtype=torch.int32)
        self._lengths.fill_(tokens)
        return self._lengths

    def _chunk_memory(self, rows: int) -> tuple[list[int], tuple[int, int, int]]:
        """Return the addresses of a chunk's arena; it grows to the largest chunk."""
        spec, configuration, threads = self.chunk_spec, self.chunk_configuration, self._threads
        padded = -(-rows // _TILE_ROWS) * _TILE_ROWS
        if self._chunk_arena is None or padded > self._chunk_key[0] or threads != self._chunk_key[1]:
            isa = str(configuration.get("isa") or self.target.isa)
            blocks = int(configuration["block_q"]), int(configuration["block_k"])
            sizes = [
                4 * padded * spec.hidden,
                4 * padded * spec.qkv_columns,
                4 * padded * spec.attention_columns,
                4 * padded * spec.intermediate,
                4 * padded * spec.hidden * spec.post_norms,
                chunk_area(spec, isa).nbytes(padded, threads),
                threads * prefill_area(spec.attention(), isa, *blocks),
                BARRIER_BYTES,
            ]
            self._chunk_offsets = _offsets(sizes)
            self._chunk_arena = None  # free the old one first
            with torch.inference_mode(False):
                self._chunk_arena = large_page_empty(self._chunk_offsets[-1])
                self._chunk_arena[-BARRIER_BYTES:] = 0
                self._chunk_x = self._chunk_arena[: sizes[0]].view(torch.float32)
            self._chunk_key = (padded, threads)
        base = self._chunk_arena.data_ptr()
        at = [base + offset for offset in self._chunk_offsets]
        return at[:5], (at[5], at[6], at[7])

    def _allocate(self, threads: int, keys: int) -> None:
        """Lay the arena out for a number of threads and a context length."""
        spec, attention = self.spec, self.spec.attention()
        area = thread_area(spec, self._rows)
        padded = -(-MAX_ROWS // self._rows) * self._rows
        chunk = int(self.configuration["chunk"])
        chunks = max(-(-n // decode_chunk(n, chunk)) for n in {min(keys, 512), min(keys, 2048), keys})
        rows = MAX_ROWS * spec.num_heads
        sizes = [
            4 * MAX_ROWS * spec.hidden,
            4 * MAX_ROWS * spec.qkv_columns,
            4 * MAX_ROWS * spec.attention_columns,
            4 * MAX_ROWS * spec.intermediate,
            4 * MAX_ROWS * spec.hidden * spec.post_norms,
            threads * (padded * area.row_bytes + area.fixed_bytes),
            threads * decode_area(attention, chunk) + partial_bytes(attention, rows, chunks + 1),
            BARRIER_BYTES,
            4 * MAX_ROWS,
        ]
        offsets = _offsets(sizes)
        with torch.inference_mode(False):  # the arena is written inside and outside of inference mode
            self._arena = aligned_empty(offsets[-1]).zero_()
            self._x = self._arena[: sizes[0]].view(torch.float32)
            self._lengths = self._arena[offsets[8] : offsets[8] + sizes[8]].view(torch.int32)
        base = self._arena.data_ptr()
        self._addresses = [base + o for o in offsets[:5]]
        self._work, self._attention, self._barrier = (base + o for o in offsets[5:8])
        self._threads, self._keys = threads, keys


def layer_formats(handles: dict[str, Any]) -> LayerFormats:
    """Return the formats of a layer's weights."""
    formats = {name: handles[name].format for name in LAYER_WEIGHTS if handles.get(name) is not None}
    return LayerFormats(**formats)


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Return where areas of these sizes start, each on a line of its own, and the total."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // 64) * 64)
    return offsets
