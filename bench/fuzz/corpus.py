"""The seeds of the fuzzer, made in code: a small GGUF file, Hugging Face and quantised folders, templates."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

HIDDEN, MLP, LAYERS, VOCAB, HEADS = 64, 64, 1, 300, 2
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 1, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2],
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.mlp.gate_proj.weight": (MLP, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (MLP, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, MLP),
}
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}
U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
TOKENS += [f"t{i}" for i in range(VOCAB - len(TOKENS))]


def text(value: bytes | str) -> bytes:
    """A GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: bytes | str, kind: int, value: Any) -> bytes:
    """A GGUF key with its value."""
    packed = {U32: "<I", F32: "<f", U64: "<Q"}
    body = text(value) if kind == STRING else struct.pack(packed[kind], value)
    return text(name) + struct.pack("<I", kind) + body


def array(name: str, kind: int, items: list[bytes], count: int | None = None) -> bytes:
    """A GGUF key with an array of packed items; `count` may lie."""
    length = len(items) if count is None else count
    return text(name) + struct.pack("<IIQ", ARRAY, kind, length) + b"".join(items)


def gguf_keys() -> list[bytes]:
    """The keys of a small Llama with a SentencePiece vocabulary."""
    return [
        key("general.architecture", STRING, "llama"),
        key("llama.block_count", U32, LAYERS),
        key("llama.context_length", U32, 64),
        key("llama.embedding_length", U32, HIDDEN),
        key("llama.feed_forward_length", U32, MLP),
        key("llama.attention.head_count", U32, HEADS),
        key("llama.attention.head_count_kv", U32, 1),
        key("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        key("llama.rope.dimension_count", U32, HIDDEN // HEADS),
        key("tokenizer.ggml.model", STRING, "llama"),
        array("tokenizer.ggml.tokens", STRING, [text(t) for t in TOKENS]),
        array("tokenizer.ggml.scores", F32, [struct.pack("<f", -i) for i in range(VOCAB)]),
        array("tokenizer.ggml.token_type", 5, [struct.pack("<i", token_type(i)) for i in range(VOCAB)]),
        key("tokenizer.ggml.bos_token_id", U32, 1),
        key("tokenizer.ggml.eos_token_id", U32, 2),
        key("tokenizer.chat_template", STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ]


def token_type(i: int) -> int:
    """GGUF's type of a token: unknown, control, byte, normal."""
    return 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1


def gguf_rows(kind: str = "Q4_0") -> tuple[list[list[Any]], int]:
    """Rows [name, dims, type, offset] of the tensor table, and the bytes of the data behind it."""
    rows, at = [], 0
    for name, shape in SHAPES.items():
        small = len(shape) == 1 or kind == "F32"
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        nbytes = count * 4 if small else count // 32 * 18
        rows.append([GGUF_NAMES[name], list(shape[::-1]), 0 if small else 2, at])
        at += -(-nbytes // 32) * 32
    return rows, at


def gguf_bytes(
    keys: list[bytes],
    rows: list[list[Any]],
    data: int,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """A GGUF file; `counts` (tensors, keys) may lie."""
    tensors, pairs = counts or (len(rows), len(keys))
    parts = [b"GGUF", struct.pack("<IQQ", version, tensors, pairs), *keys]
    for name, dims, kind, offset in rows:
        sizes = b"".join(struct.pack("<Q", d) for d in dims)
        parts += [text(name), struct.pack("<I", len(dims)), sizes, struct.pack("<IQ", kind, offset)]
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % 32) + b"\x11" * data


def safetensors_bytes(header: Any, data: int, *, length: int | None = None) -> bytes:
    """A safetensors file of a header (an object, or bytes as they are); `length` may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + b"\x11" * data


def safetensors_header(dtype: str = "BF16") -> tuple[dict[str, Any], int]:
    """The header of the small model, and the bytes of its data."""
    header, at = {}, 0
    for name, shape in SHAPES.items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    return header, at


def tokenizer_json() -> dict[str, Any]:
    """A small tokenizer of bytes."""
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    special = [{"id": i, "content": TOKENS[i], "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i in range(3)]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocabulary, "merges": []},
    }  # fmt: skip


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def hf_files() -> dict[str, bytes]:
    """The files of a small Hugging Face folder."""
    header, data = safetensors_header()
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": safetensors_bytes(header, data),
        "tokenizer.json": json.dumps(tokenizer_json()).encode(),
        "tokenizer_config.json": json.dumps(
            {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
        ).encode(),
    }


TEMPLATES = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% set x = 'a' %}{% for i in range(99) %}{% set x = x ~ x %}{% endfor %}{{ x }}",
    "{{ 'a' * 1000000000 }}{{ 'a'.center(1000000000) }}{{ '%1000000000d' % 1 }}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ cycler.__init__.__globals__ }}{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ messages.append(1) }}{{ messages | map('replace', 'a', 'b' * 9999) | list }}",
    "{% set ns = namespace(x='abc') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ ('a' * 1000) | replace('a', 'b' * 1000) | replace('b', 'c' * 1000) }}{{ 2 ** 99999 }}",
    "{{ '{:>1000000000}'.format(1) }}{{ 'x' | indent(1000000000) }}{{ [1] * 100000000 }}",
)
WORDS = (
    "messages", "range(99999)", "'a' * 4096", "x ~ x", "|list", "|join(',')", "|tojson", "namespace(y=1)",
    "* 65536",
    "** 9999", "[::-1]", ".__class__", "|attr('__globals__')", "|map('upper')", "|replace('a','aaaaaaaa')",
    "|center(100000)", "|indent(5000)", "loop.index", "{% for i in messages %}", "{% endfor %}", "{% if x %}",
    "{% endif %}", "{{", "}}", "{% set x = ", "%}", "'" , "\u0000", "1e309", "-1", "99999999999999999999",
)  # fmt: skip


def template(rng: random.Random) -> str:
    """A template from the seeds and words, spliced."""
    base = rng.choice(TEMPLATES)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(base) + 1)
        base = base[:at] + rng.choice(WORDS) + base[at + rng.randrange(6) :]
    return base
