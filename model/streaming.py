"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Joins the bytes of tokens into characters, and holds back what may become a stop string.

    Args:
        token_bytes: the bytes of a token.
        stop: strings that end the text; they are not part of it.
        write: called with each piece of text that is certain.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: Sequence[str] = (),
        write: Callable[[str], None] | None = None,
    ) -> None:
        self._token_bytes = token_bytes
        self._stop = [text for text in stop if text]
        self._write = write
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._pieces: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """What has been written so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> bool:
        """Take a token; True once a stop string has come (later tokens are ignored)."""
        if not self.stopped:
            self._take(self._decoder.decode(self._token_bytes(token)))
        return self.stopped

    def close(self) -> str:
        """Write what was held back (an unfinished character as U+FFFD) and return the whole text."""
        if not self.stopped:
            self._take(self._decoder.decode(b"", final=True))
            self._emit(self._held)
            self._held = ""
        return self.text

    def _take(self, fresh: str) -> None:
        self._held += fresh
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._emit(self._held[: min(found)])
            self._held = ""
            return
        keep = max((self._overlap(text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        self._emit(self._held[:cut])
        self._held = self._held[cut:]

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _emit(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._write is not None:
                self._write(piece)
