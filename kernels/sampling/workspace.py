"""The scratch memory of sampling: what a row needs, and where in it."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 256  # logits whose maximum and sum are kept together
BINS = 512  # of the histogram of distances: 1/16 octave each
BIN_SHIFT = 11
LIVE_BINS = 31 * 16  # from this bin on every weight is zero
PAD = 16  # the lists are padded to whole vectors


@dataclass(frozen=True)
class Workspace:
    """Byte offsets of the parts of one row's scratch; each part starts on a 64-byte line."""

    vocab_size: int

    @property
    def blocks(self) -> int:
        """Blocks of logits, the last one may be short."""
        return -(-self.vocab_size // BLOCK)

    @property
    def parts(self) -> dict[str, tuple[int, str]]:
        """Return name -> (offset, dtype)."""
        sizes = {
            "sums": (8 * self.blocks, "int64"),
            "mass": (8 * BINS, "int64"),
            "count": (4 * BINS, "int32"),
            "maxima": (4 * self.blocks, "float32"),
            "ids": (4 * (self.vocab_size + PAD), "int32"),
            "keys": (4 * (self.vocab_size + PAD), "int32"),
            "weights": (4 * (self.vocab_size + PAD), "int32"),
        }
        found, offset = {}, 0
        for name, (size, dtype) in sizes.items():
            found[name] = (offset, dtype)
            offset += -(-size // 64) * 64
        found["end"] = (offset, "uint8")
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of one row's scratch."""
        return self.parts["end"][0]
