"""The tokenizer of a model file: text to ids through `tokenizers`, and ids back to bytes.

The vocabulary, merges and special tokens come from the file (GGUF ``tokenizer.ggml.*``); the split into
words is the one that ``tokenizer.ggml.pre`` names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from ...compiler.errors import FormatError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF token types

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

# what llama.cpp does for a file that names no split of its own
DEFAULT_WORDS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

DEFAULT = ("default",)
GPT2 = ("gpt-2",)
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
QWEN2 = ("qwen2", "deepseek-r1-qwen")

# tokens that end an answer, even where the file names only one of them as eos
END_OF_TURN = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "</s>",
    "<end_of_turn>",
)
SPACE = "\u2581"  # SentencePiece's mark for a space


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_alphabet()


class ModelTokenizer:
    """Text to token ids and back, for one model file.

    Special tokens in a text are read as such. ``token_bytes`` gives the exact bytes of a token, so that
    a stream can join a character that is spread over several tokens.

    Args:
        metadata: the GGUF keys ``tokenizer.ggml.*`` (and ``tokenizer.chat_template``).
        source: what to name in errors.

    Raises:
        FormatError: the vocabulary is missing or inconsistent.
        UnsupportedError: another kind of tokenizer, or an unknown pre-tokenizer.
    """

    def __init__(self, metadata: dict[str, Any], source: str | Path = "tokenizer") -> None:
        self.source = source
        self.metadata = metadata
        self.tokens: list[str] = self._strings("tokens")
        self.types = self._list("token_type", int)[:] or [NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise FormatError(f"{source}: {len(self.types)} token types for {len(self.tokens)} tokens")
        for i, text in enumerate(self.tokens):  # as llama.cpp: some files mark their end tokens as normal
            if text in END_OF_TURN:
                self.types[i] = CONTROL
        self.kind = metadata.get("tokenizer.ggml.model")
        if self.kind == "gpt2":
            self.backend = self._byte_level()
        elif self.kind == "llama":
            self.backend = self._sentencepiece()
        else:
            raise UnsupportedError(
                f"{source}: the tokenizer {self.kind!r} is not supported (gpt2 and llama are)"
            )
        self._add_special_tokens()
        self.bos_id = self._token_id("bos")
        self.eos_id = self._token_id("eos")
        self.add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", self.kind == "llama"))
        named = {self.eos_id, self._token_id("eot"), self._token_id("eom")}
        ends = {i for i, text in enumerate(self.tokens) if text in END_OF_TURN}
        self.stop_ids = frozenset(i for i in named | ends if i is not None)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs beside the backend's own file, as JSON values."""
        return {
            "tokens": self.tokens, "types": self.types, "kind": self.kind, "bos_id": self.bos_id,
            "eos_id": self.eos_id, "add_bos": self.add_bos, "stop_ids": sorted(self.stop_ids),
        }  # fmt: skip

    @classmethod
    def restore(cls, state: dict[str, Any], backend: Tokenizer, source: str | Path) -> ModelTokenizer:
        """Make a tokenizer of what `state` returned and its backend. Raises FormatError."""
        own = cls.__new__(cls)
        own.source, own.metadata, own.backend = source, {}, backend
        try:
            own.tokens, own.types, own.kind = state["tokens"], state["types"], state["kind"]
            own.bos_id, own.eos_id, own.add_bos = state["bos_id"], state["eos_id"], state["add_bos"]
            own.stop_ids = frozenset(state["stop_ids"])
            if not all(isinstance(text, str) for text in own.tokens) or not all(
                type(t) is int for t in own.types
            ):
                raise TypeError
            size = len(own.tokens)
            numbers = [*own.stop_ids, *(i for i in (own.bos_id, own.eos_id) if i is not None)]
            good = all(0 <= i < size for i in numbers) and len(own.types) == size
        except (KeyError, TypeError) as error:
            raise FormatError(f"{source}: the tokenizer's data are damaged") from error
        if not good:
            raise FormatError(f"{source}: the tokenizer's data are damaged")
        return own

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """The ids of a text; a leading BOS is added once, if the file asks for it (or ``add_bos`` does)."""
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises plain Exception
            raise FormatError(f"{self.source}: the tokenizer fails: {str(error)[:200]}") from error
        wanted = self.add_bos if add_bos is None else add_bos
        if wanted and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; control tokens are empty unless ``special``."""
        if not 0 <= token < len(self.tokens):
            return b""  # a padded row of the embedding
        text, kind = self.tokens[token], self.types[token]
        if kind in (CONTROL, UNKNOWN, UNUSED):
            return text.encode() if special else b""
        if kind == USER_DEFINED:
            return text.encode()
        if self.kind == "llama":
            if kind == BYTE and len(text) == 6:
                return bytes([int(text[3:5], 16)])
            return text.replace(SPACE, " ").encode()
        try:
            return bytes(BYTES[c] for c in text)
        except KeyError:  # a plain-text token in a byte-level vocabulary
            return text.encode()

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i, special=special) for i in ids).decode("utf-8", errors="replace")

    def _byte_level(self) -> Tokenizer:
        pre = self.metadata.get("tokenizer.ggml.pre", "default")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in GPT2 + SINGLE_DIGITS)
        if pre in GPT2:
            split = byte_level
        elif pre in SINGLE_DIGITS:
            split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        elif pre in LLAMA3 + QWEN2 + DEFAULT:
            words = DEFAULT_WORDS if pre in DEFAULT else (LLAMA3_WORDS if pre in LLAMA3 else QWEN2_WORDS,)
            splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words]
            split = pre_tokenizers.Sequence([*splits, byte_level])
        else:
            known = ", ".join(GPT2 + SINGLE_DIGITS + LLAMA3 + QWEN2 + DEFAULT)
            raise UnsupportedError(
                f"{self.source}: the pre-tokenizer {pre!r} is not supported; supported: {known}"
            )
        merges = []
        for line in self._strings("merges"):
            left, gap, right = line.partition(" ")
            if not gap:
                raise FormatError(f"{self.source}: the merge {line!r} is not two tokens")
            merges.append((left, right))
        tokenizer = Tokenizer(self._model(merges, ignore_merges=pre in LLAMA3))
        tokenizer.pre_tokenizer = split
        if pre in QWEN2:
            tokenizer.normalizer = normalizers.NFC()
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise FormatError(f"{self.source}: {len(scores)} scores for {len(self.tokens)} tokens")
        unknown = next((i for i, kind in enumerate(self.types) if kind == UNKNOWN), None)
        tokenizer = Tokenizer(
            self._model(
                self._merges_by_score(scores),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
        if self.metadata.get("tokenizer.ggml.add_space_prefix", True):
            spaces.insert(0, normalizers.Prepend(SPACE))
        tokenizer.normalizer = normalizers.Sequence(spaces)
        return tokenizer

    def _merges_by_score(self, scores: list[float]) -> list[tuple[str, str]]:
        """Every split of every piece, best piece first: SentencePiece joins what scores best."""
        pieces = {t: scores[i] for i, t in enumerate(self.tokens) if self.types[i] in (NORMAL, USER_DEFINED)}
        merges = []
        for piece, score in pieces.items():
            for cut in range(1, len(piece)):
                if piece[:cut] in pieces and piece[cut:] in pieces:
                    merges.append((-score, cut, piece))
        return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(merges)]

    def _model(self, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
        vocabulary: dict[str, int] = {}
        for i, text in enumerate(self.tokens):
            vocabulary.setdefault(text, i)
        try:
            return models.BPE(vocabulary, merges, **options)
        except Exception as error:  # tokenizers raises plain Exception
            raise FormatError(f"{self.source}: the vocabulary and the merges do not fit: {error}") from error

    def _add_special_tokens(self) -> None:
        added = [
            AddedToken(text, special=self.types[i] == CONTROL, normalized=False)
            for i, text in enumerate(self.tokens)
            if self.types[i] in (CONTROL, USER_DEFINED) and text
        ]
        self.backend.add_tokens(added)

    def _token_id(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise FormatError(
                f"{self.source}: the {name} token is {value!r} in a vocabulary of {len(self.tokens)}"
            )
        return value

    def _list(self, name: str, kind: type) -> list:
        value = self.metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
            raise FormatError(f"{self.source}: tokenizer.ggml.{name} is not a list of {kind.__name__}")
        return value

    def _strings(self, name: str) -> list[str]:
        value = self._list(name, str)
        if not value:
            raise FormatError(
                f"{self.source}: tokenizer.ggml.{name} is missing; the file has no usable tokenizer"
            )
        return value
