"""Token ids equal llama.cpp's for the same file; bytes come back; bad vocabularies are typed errors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgeformer.compiler.errors import FormatError, UnsupportedError
from edgeformer.model.load.container import Container
from edgeformer.model.load.tokenizer import ModelTokenizer

TEXTS = [
    "Hello world",
    "What's up? I'M he'LL we'd DON'T 'twas",
    "x=1234567.89e-10\n\tfor i in range(10):\n        pass\r\n",
    "  leading and trailing   ",
    "",
    "\n\n\n",
    "日本語のテキスト、中文 한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈 é ü",
    "½ Ⅷ ١٢٣ ²",
    "a\u00a0b\u2003c\u200bd\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <|endoftext|> c",
    "“quotes” … 100% $5 #~^|<>",
    "\x01\x7f\x00",
]
POOL = "abcXYZ 012 '\n\t.,;!?-_()[]{}éßñ日本語한국Ωжש ع🙂👍½²\r\u00a0sSdDmMtTlLrReEvV"


def varied_texts() -> list[str]:
    source = random.Random(0)
    return TEXTS + ["".join(source.choices(POOL, k=source.randrange(1, 60))) for _ in range(200)]


def vocabulary_file(path: Path, model: str, lists: dict[str, list[Any]], pre: str | None = None) -> Path:
    """A GGUF file with a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{key}")(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(lists["tokens"]))
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for key, values in lists.items():
        writer.add_array(f"tokenizer.ggml.{key}", values)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def llama_cpp_ids(path: Path, texts: list[str]) -> list[list[int]]:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2", "default"])
def test_byte_level_ids_equal_llama_cpp(smollm2, tmp_path, pre):
    metadata = Container(smollm2).metadata
    lists = {key: metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges")}
    path = smollm2 if pre == "smollm" else vocabulary_file(tmp_path / "v.gguf", "gpt2", lists, pre)
    tokenizer = ModelTokenizer({**metadata, "tokenizer.ggml.pre": pre})
    texts = varied_texts()
    for text, expected in zip(texts, llama_cpp_ids(path, texts)):
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected, special=True) == text


def sentencepiece_lists() -> dict[str, list[Any]]:
    """A SentencePiece-like vocabulary: bytes, pieces by score, characters, special tokens."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    space = "\u2581"
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    lines = [line for line in Path(__file__).read_text(encoding="utf-8").split("\n") if "<|" not in line]
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=900, show_progress=False))
    order = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    special = ["<|user|>", "<|sys|>"]
    pieces = [p for p in order if len(p) > 1 and p not in special] + [p for p in order if len(p) == 1]
    return {
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *special],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4, 3],
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0, 0.0],
    }


def test_sentencepiece_ids_equal_llama_cpp(tmp_path):
    path = vocabulary_file(tmp_path / "spm.gguf", "llama", sentencepiece_lists())
    tokenizer = ModelTokenizer(Container(path).metadata)
    texts = [*varied_texts(), "<|user|> hello", "a<|sys|>b </s> c", " <|user|>  x"]
    for text, expected in zip(texts, llama_cpp_ids(path, texts)):
        assert tokenizer.encode(text, add_bos=False) == expected, text
        assert tokenizer.encode(text) == [1, *expected]
    assert tokenizer.decode(tokenizer.encode("héllo 🙂")) == " héllo 🙂"


def test_special_tokens_end_and_vanish(smollm2):
    tokenizer = ModelTokenizer(Container(smollm2).metadata)
    assert tokenizer.stop_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    ids = tokenizer.encode("hi<|im_end|>")
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.token_bytes(10**9) == b""
    assert tokenizer.encode("hi", add_bos=True)[0] == tokenizer.bos_id
    assert tokenizer.encode("<|im_start|>hi", add_bos=True).count(1) == 1


BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": "bert"}, UnsupportedError, "bert"),
        ({"pre": "tekken"}, UnsupportedError, "tekken"),
        ({"tokens": []}, FormatError, "tokens is missing"),
        ({"tokens": [1, 2]}, FormatError, "not a list of str"),
        ({"merges": ["ab"]}, FormatError, "two tokens"),
        ({"merges": ["a z"]}, FormatError, "do not fit"),
        ({"token_type": [1]}, FormatError, "1 token types for 3 tokens"),
        ({"eos_token_id": 7}, FormatError, "eos token is 7"),
        ({"model": "llama", "scores": [0.0]}, FormatError, "1 scores for 3 tokens"),
    ],
)
def test_bad_vocabularies(change, error, text):
    metadata = BYTE_LEVEL | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(error, match=text):
        ModelTokenizer(metadata)
