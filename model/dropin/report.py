"""What `optimize` did: a row a module, how to take it back, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...compiler.errors import UnsupportedError


def gains_text(gain: tuple[float, float], rows: tuple[int, int]) -> str:
    """Return "1.50x at 1 row, 2.00x at 128"."""
    unit = "row" if rows[0] == 1 else "rows"
    return f"{gain[0]:.2f}x at {rows[0]} {unit}, {gain[1]:.2f}x at {rows[1]}"


@dataclass
class Row:
    """One module: what runs it now, or why it was left.

    `gain` is how many times faster the replacement was than the original at both numbers of `rows`, as
    measured on this machine for a layer of this shape; None where nothing was measured.
    """

    name: str
    kind: str
    replaced: bool
    form: str = ""
    backend: str = ""
    format: str = ""
    bits: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    gain: tuple[float, float] | None = None
    rows: tuple[int, int] = (1, 128)
    reason: str = ""
    covers: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.replaced:
            return f"{self.name} ({self.kind}): left, {self.reason}"
        gain = "" if self.gain is None else f", {gains_text(self.gain, self.rows)}"
        what = f" {self.format}" if self.format else ""
        return f"{self.name} ({self.kind}):{what} {self.form} ({self.backend}){gain}"


@dataclass
class Report:
    """The rows of an optimised model, and the way back."""

    model: nn.Module
    profile: str
    rows: list[Row] = field(default_factory=list)
    kept_bytes: int = 0
    seconds: float = 0.0
    ways: dict[str, int] = field(default_factory=dict)  # shorter ways through modules: how many of each
    _undo: list[Any] | None = field(default=None, repr=False)
    _redo: list[Any] = field(default_factory=list, repr=False)
    _tokenizer: Any = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def replaced(self) -> list[Row]:
        """Rows of what runs on our kernels."""
        return [row for row in self.rows if row.replaced]

    @property
    def left(self) -> list[Row]:
        """Rows of what was left alone."""
        return [row for row in self.rows if not row.replaced]

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Run the model as it was inside the block. Raises UnsupportedError when the originals are gone."""
        if self._undo is None:
            raise UnsupportedError("the originals were not kept (keep_original=False)")
        for step in reversed(self._undo):
            step()
        try:
            yield
        finally:
            for step in self._redo:
                step()

    def undo(self) -> None:
        """Put every original module back. Raises UnsupportedError when they were not kept."""
        if self._undo is None:
            raise UnsupportedError(
                "the originals were not kept (keep_original=False), or undo() was called before"
            )
        for restore in reversed(self._undo):
            restore()
        self._undo, self._redo, self.rows, self.ways, self.kept_bytes = None, [], [], {}, 0

    def quality(self, text: Any = None, *, tokenizer: Any = None, window: int = 256) -> Any:
        """Compare with the original weights on a text (default: English that Python brings).

        Returns Quality: perplexity change, mean KL divergence, top-1 agreement. Needs a causal language
        model, its tokenizer (or a tensor of ids as `text`) and the originals (keep_original=True).
        """
        from .quality import measure_quality

        return measure_quality(self, text, tokenizer=tokenizer or self._tokenizer, window=window)

    def __str__(self) -> str:
        lines = [f"profile {self.profile}: {len(self.replaced)} modules replaced, {len(self.left)} left"]
        before, after = (sum(getattr(r, n) for r in self.replaced) for n in ("bytes_before", "bytes_after"))
        lines.append(f"weights of replaced modules: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now")
        if self._undo is not None:
            lines.append(f"originals kept for undo(): {self.kept_bytes / 1e6:.1f} MB")
        lines += [f"{what}: {count}" for what, count in self.ways.items()]
        lines += [f"  {count} x {text}" if count > 1 else f"  {text}" for text, count in self._grouped()]
        return "\n".join(lines)

    def _grouped(self) -> list[tuple[str, int]]:
        """Rows that differ in their layer's number only, once, with their count."""
        counts: dict[str, int] = {}
        for row in self.rows:
            parts = ["*" if part.isdigit() else part for part in row.name.split(".")]
            text = str(row).replace(row.name, ".".join(parts), 1)
            counts[text] = counts.get(text, 0) + 1
        return list(counts.items())
