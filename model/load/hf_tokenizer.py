"""Tokenizers of Hugging Face folders: tokenizer.json through `tokenizers`, and special tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ...compiler.errors import FormatError

MAX_TOKENIZER = 256 << 20  # bytes


def read_backend(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises FormatError."""
    try:
        if path.stat().st_size > MAX_TOKENIZER:
            raise FormatError(f"{path} is larger than {MAX_TOKENIZER} bytes")
        return Tokenizer.from_buffer(path.read_bytes())
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except FormatError:
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and PanicException for its own bugs
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise FormatError(f"{path} is no tokenizer that can be read: {str(error)[:200]}") from error
