"""Queries, keys and values as the tiles of a bf16 matrix unit: what `tvm_cpu_matrix` multiplies.

Keys and values are left operands, a row of a tile is a key, or a column of V; queries are right operands.
"""

from __future__ import annotations

from typing import Any

from ..shared import tir
from ..shared.tir import T
from .areas import MATRIX_PANEL
from .spec import KEY_BLOCK
from .tvm_cpu_prefill import QueryTile
from .tvm_math import Registers, transpose
from .tvm_problem import quotient, remainder, widen

TILE = 16
TILE_BYTES = 1024
_PAIRS = [i // 2 + (i % 2) * TILE for i in range(2 * TILE)]  # two vectors side by side, element by element


class LoadedTile(QueryTile):
    """A query tile that brings its operands to tiles in memory. `unit` is the matrix unit."""

    def take_areas(self, areas: list[Any]) -> None:
        """Name the areas: addresses of tiles, and fp32 views."""
        self.unit = self.p.isa.matrix
        self.depth = -(-self.spec.head_dim // (2 * TILE))
        self.columns = self.spec.v_head_dim // TILE
        self.q_at, self.out_at, m, rows, self.k_at, self.v_at, self.s_at, self.p_at, bounds = areas
        self.out, self.m, self.l = (tir.buffer_at(at, "float32") for at in (self.out_at, m, rows))
        self.scores = tir.buffer_at(self.s_at, "float32")
        self.bounds = tir.buffer_at(bounds, "int32")

    def _load_rows(self) -> None:
        super()._load_rows()
        self._turn(self.q_at, self.row_blocks * (2 * self.depth))

    def load_row(self, row: Any, b: Any, h: Any, t: Any) -> None:
        """Emit: q[b, h, t] times the factor to its row of bf16 tiles, which are turned when all are there."""
        spec, a = self.spec, self.a
        source = tir.let(self.p.row_at("q", b, h, t))
        to = tir.buffer_at(self.q_at, "uint16")
        first = tir.let(
            (quotient(row, T.int64(TILE)) * (self.depth * TILE) + remainder(row, T.int64(TILE))) * 32
        )
        for block in range(self.depth):
            halves = []
            for half in range(2):
                at = block * 32 + half * TILE
                zero = tir.f32(0.0, TILE)
                value = zero if at >= spec.head_dim else tir.to_f32(a.q, source + at, TILE)
                halves.append(tir.let(value * tir.splat(a.factor, TILE)))
            tir.store(to, first + block * (TILE * 32), self.unit.to_bf16(*halves))

    def _turn(self, at: Any, tiles: Any) -> None:
        """Transpose the words (pairs of bf16) of some tiles where they stand."""
        words = tir.buffer_at(at, "float32")
        with tir.loop(tiles) as tile:
            rows = Registers(TILE, TILE)
            for i in range(TILE):
                rows[i] = tir.load(words, tile * 256 + i * TILE, TILE)
            turned = transpose(rows, TILE)
            for i in range(TILE):
                tir.store(words, tile * 256 + i * TILE, turned[i])

    def load_keys(self, j0: Any, keys: Any) -> None:
        """Emit: keys to tiles [keys / 16][depth][16 keys][32 elements]."""
        blocks = tir.let(quotient(keys + (MATRIX_PANEL - 1), T.int64(MATRIX_PANEL)) * 2)
        with tir.loop(blocks) as block:
            first = tir.let(j0 + block * TILE)
            to = tir.buffer_at(tir.let(self.k_at + block * (self.depth * TILE_BYTES)), "uint16")
            if self.spec.layout == "blocked":
                self._keys_of_block(first, to)
            else:
                self._keys_of_rows(first, j0 + keys - 1, to)

    def _keys_of_block(self, first: Any, to: Any) -> None:
        spec, a = self.spec, self.a
        block = tir.let(quotient(T.min(first, a.tk - 1), T.int64(KEY_BLOCK)))  # not past the last block
        source = tir.let(
            self.p.row_at("k", self.b, self.kv_head, T.int64(0)) + block * (spec.head_dim * KEY_BLOCK)
        )
        scale = Registers(1, TILE)
        if spec.kv_dtype == "int8":
            scale[0] = tir.load(
                a.k_scale, self.p.scale_at("k", self.b, self.kv_head) + block * KEY_BLOCK, KEY_BLOCK
            )
        for part in range(self.depth):
            words = Registers(TILE, TILE)
            for i in range(TILE):
                pair = part * TILE + i
                if 2 * pair >= spec.head_dim:
                    words[i] = tir.f32(0.0, TILE)
                    continue
                at = source + pair * (2 * KEY_BLOCK)
                if spec.kv_dtype == "bfloat16":
                    both = tir.bits(tir.load(a.k, at, 2 * KEY_BLOCK), "uint16x32")
                else:
                    halves = [widen(a.k, at + half * KEY_BLOCK, KEY_BLOCK) for half in range(2)]
                    if spec.kv_dtype == "int8":
                        halves = [half * scale[0] for half in halves]
                    both = self.unit.to_bf16(*(tir.let(half) for half in halves))
                words[i] = tir.bits(side_by_side(both), "float32x16")
            turned = transpose(words, TILE)
            for i in range(TILE):
                tir.store(to, (part * TILE + i) * 32, tir.bits(turned[i], "uint16x32"))

    def _keys_of_rows(self, first: Any, last: Any, to: Any) -> None:
        """16 rows of keys; rows past the last repeat it."""
        spec, a = self.spec, self.a
        base = self.p.row_at("k", self.b, self.kv_head, T.int64(0))
        with tir.loop(TILE) as i:
            row = tir.let(T.min(first + i, last))
            at = tir.let(base + row * a.k_st)
            scale = Registers(1, 1)
            if spec.kv_dtype == "int8":
                scale[0] = tir.load(a.k_scale, self.p.scale_at("k", self.b, self.kv_head) + row)
            for part in range(self.depth):
                halves = []
                for half in range(2):
                    offset = part * 32 + half * TILE
                    inside = offset < spec.head_dim
                    value = widen(a.k, at + offset, TILE) if inside else tir.f32(0.0, TILE)
                    if spec.kv_dtype == "int8" and inside:
                        value = value * tir.splat(scale[0], TILE)
                    halves.append(tir.let(value))
                tir.store(to, (part * TILE + i) * 32, self.unit.to_bf16(*halves))

    def load_values(self, j0: Any, first: Any, keys: Any) -> Any:
        """Emit: V rows [first, keys), zeros around, to tiles [keys / 32][Dv / 16][16 columns][32 keys].

        Returns whether one of them is NaN or Inf.
        """
        spec, a = self.spec, self.a
        base = tir.let(self.p.row_at("v", self.b, self.kv_head, T.int64(0)))
        token = spec.v_head_dim if spec.layout == "blocked" else a.v_st
        to = tir.buffer_at(self.v_at, "uint16")
        largest = tir.Register("uint16", 32)
        largest.set(tir.splat(T.uint16(0), 32))
        panels = tir.let(quotient(keys + (MATRIX_PANEL - 1), T.int64(MATRIX_PANEL)))
        with tir.loop(panels * TILE) as pair:
            tile = tir.let(
                quotient(pair, T.int64(TILE)) * (self.columns * TILE) + remainder(pair, T.int64(TILE))
            )
            js = [tir.let(pair * 2 + i) for i in range(2)]
            inside = [T.And(j >= first, j < keys) for j in js]
            rows = [tir.let(base + (j0 + T.min(T.max(j, first), keys - 1)) * token) for j in js]
            scales = []
            if spec.kv_dtype == "int8":
                at = self.p.scale_at("v", self.b, self.kv_head) + j0
                scales = [tir.let(tir.load(a.v_scale, at + T.min(T.max(j, first), keys - 1))) for j in js]
            with tir.when(T.And(*inside)):
                self._pair_of_values(to, tile, rows, scales, [True, True], largest)
            with tir.when(T.And(inside[0], T.Not(inside[1]))):
                self._pair_of_values(to, tile, rows, scales, [True, False], largest)
            with tir.when(T.And(T.Not(inside[0]), inside[1])):
                self._pair_of_values(to, tile, rows, scales, [False, True], largest)
            with tir.when(T.Not(T.Or(*inside))), tir.loop(self.columns) as c:
                tir.store(to, (tile + c * TILE) * 32, tir.splat(T.uint16(0), 32))
        self._turn(self.v_at, panels * self.columns)
        held = tir.local("uint16", 32)
        tir.store(held, 0, largest.get())
        most = tir.Register("uint16", 1)
        most.set(T.uint16(0))
        with tir.loop(32) as i:
            most.set(T.max(most.get(), tir.load(held, i)))
        return most.get() >= T.uint16(0x7F80)

    def _pair_of_values(
        self, to: Any, tile: Any, rows: list[Any], scales: list[Any], inside: list[bool], largest: Any
    ) -> None:
        spec, a = self.spec, self.a
        with tir.loop(self.columns) as c:
            if spec.kv_dtype == "bfloat16":
                zero = tir.splat(T.uint16(0), TILE)
                halves = [
                    tir.let(tir.bits(tir.load(a.v, row + c * TILE, TILE), "uint16x16")) if there else zero
                    for row, there in zip(rows, inside)
                ]
                both = T.Shuffle(halves, [T.int32(i) for i in _PAIRS])
            else:
                halves = [
                    widen(a.v, row + c * TILE, TILE) if there else tir.f32(0.0, TILE)
                    for row, there in zip(rows, inside)
                ]
                if scales:
                    halves = [half * tir.splat(scale, TILE) for half, scale in zip(halves, scales)]
                both = side_by_side(self.unit.to_bf16(*(tir.let(half) for half in halves)))
            held = tir.Register("uint16", 32)
            held.set(both)
            magnitude = T.bitwise_and(held.get(), tir.splat(T.uint16(0x7FFF), 32))
            largest.set(T.max(largest.get(), magnitude))
            tir.store(to, (tile + c * TILE) * 32, held.get())


def side_by_side(both: Any) -> Any:
    """Bring two vectors of 16 bf16 values, one behind the other, element by element side by side."""
    held = tir.Register("uint16", 32)
    held.set(both)
    return T.Shuffle([held.get()], [T.int32(i) for i in _PAIRS])
