"""Tokenizers of Hugging Face folders: tokenizer.json through `tokenizers`, special tokens beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...compiler.errors import FormatError, UnsupportedError
from .json_file import read_object, read_optional, read_text
from .tokenizer import BYTE, CONTROL, END_OF_TURN, NORMAL, USER_DEFINED, ModelTokenizer

MAX_TOKENIZER = 256 << 20  # bytes
NO_TOKEN = "\0unused"  # stands at ids that the vocabulary leaves out


def read_backend(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises FormatError."""
    text = read_text(path, MAX_TOKENIZER)
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # tokenizers raises plain Exception, and PanicException for its own bugs
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise FormatError(f"{path} is no tokenizer that can be read: {str(error)[:200]}") from error


def read_tokenizer(folder: Path, eos_token_ids: tuple[int, ...] = ()) -> ModelTokenizer:
    """The tokenizer of a Hugging Face folder; ``eos_token_ids`` are the configuration's.

    Raises FormatError for damaged files, UnsupportedError where there is no tokenizer.json or it stands for
    its text in another way than bytes or SentencePiece's pieces.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UnsupportedError(
            f"{folder} has no tokenizer.json; save it once with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    backend, data = read_backend(path), read_object(path, MAX_TOKENIZER)
    config = read_optional(folder / "tokenizer_config.json")
    try:
        state = _state(folder, backend, data, config, eos_token_ids)
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise FormatError(f"{path} is damaged: {str(error)[:200]}") from error
    return ModelTokenizer.restore(state, backend, path)


def _state(
    folder: Path, backend: Tokenizer, data: dict[str, Any], config: dict[str, Any],
    eos_token_ids: tuple[int, ...],
) -> dict[str, Any]:  # fmt: skip
    """Return what ModelTokenizer.restore takes."""
    path = folder / "tokenizer.json"
    vocabulary = backend.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    if size > 1 << 20:
        raise FormatError(f"{path}: token ids up to {size} are not believed")
    tokens = [NO_TOKEN] * size
    for text, i in vocabulary.items():
        tokens[i] = text
    kind = _kind(data, path)
    types = [NORMAL] * size
    if kind == "llama":
        for i, text in enumerate(tokens):
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                types[i] = BYTE
    for entry in data.get("added_tokens", ()):
        types[entry["id"]] = CONTROL if entry.get("special") else USER_DEFINED
    for i, text in enumerate(tokens):
        if text in (*END_OF_TURN, NO_TOKEN):
            types[i] = CONTROL
    bos, eos = (vocabulary.get(_text(config.get(name))) for name in ("bos_token", "eos_token"))
    ends = {eos, *eos_token_ids, *_more_ends(folder), *(vocabulary.get(text) for text in END_OF_TURN)}
    return {
        "tokens": tokens, "types": types, "kind": kind, "bos_id": bos, "eos_id": eos,
        "add_bos": _adds_bos(backend, config, bos),
        "stop_ids": sorted(i for i in ends if i is not None and 0 <= i < size),
    }  # fmt: skip


def _text(value: Any) -> str:
    """Return a special token's text, which a file gives as it is or as an object; "" for none."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _kind(data: dict[str, Any], path: Path) -> str:
    """Return how tokens stand for text: "gpt2" (byte by byte) or "llama" (SentencePiece)."""
    found = {part.get("type") for part in _parts(data.get("decoder"))}
    if "ByteLevel" in found:
        return "gpt2"
    if found & {"ByteFallback", "Metaspace", "Replace", "Fuse"}:
        return "llama"
    raise UnsupportedError(f"{path}: the decoder {json.dumps(data.get('decoder'))[:100]} is not supported")


def _parts(decoder: Any) -> Iterator[dict[str, Any]]:
    if isinstance(decoder, dict):
        yield decoder
        for part in decoder.get("decoders") or ():
            yield from _parts(part)


def _adds_bos(backend: Tokenizer, config: dict[str, Any], bos: int | None) -> bool:
    """Return whether a prompt begins with BOS: by the configuration, else by the post-processor."""
    stated = config.get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    try:
        return bos is not None and backend.encode("a", add_special_tokens=True).ids[:1] == [bos]
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"the post-processor fails: {error}") from error


def _more_ends(folder: Path) -> list[int]:
    value = read_optional(folder / "generation_config.json").get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def read_chat_template(folder: Path) -> str | None:
    """Return a folder's chat template: chat_template.jinja, else the one in a JSON file, else None."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_optional(folder / name).get("chat_template")
        if isinstance(found, list):  # several with names
            named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
