"""A tokenizer as EdgeFormer writes it: tokenizer.json, and vocabulary.json with what that leaves out."""

from __future__ import annotations

import json
from pathlib import Path

from .hf_tokenizer import read_backend
from .json_file import read_object
from .tokenizer import ModelTokenizer

BACKEND, VOCABULARY = "tokenizer.json", "vocabulary.json"


def write_saved(folder: Path, tokenizer: ModelTokenizer) -> None:
    """Write a tokenizer's two files."""
    (folder / BACKEND).write_text(tokenizer.backend.to_str(), encoding="utf-8")
    (folder / VOCABULARY).write_text(json.dumps(tokenizer.state()))


def read_saved(folder: Path) -> ModelTokenizer:
    """Read them. Raises FormatError."""
    state = read_object(folder / VOCABULARY)
    return ModelTokenizer.restore(state, read_backend(folder / BACKEND), folder)
