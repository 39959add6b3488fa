"""Small GGUF files written by the tests, and the same model in transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from edgeformer.compiler.target import Target, detect
from edgeformer.model.load.tokenizer import BYTES

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "o r", "\u0120w or", "\u0120wor l", "\u0120worl d"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Tiny:
    """A random Llama: sizes, the file, and its tensors' values as stored (rows interleaved as in GGUF)."""

    path: Path
    type: str
    hidden: int = 128
    mlp: int = 160
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    vocab: int = 320
    context: int = 96
    tied: bool = True
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def hugging_face(self) -> Any:
        """transformers' own Llama with the same weights, fp32."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.mlp,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=self.context, rms_norm_eps=1e-5,
            tie_word_embeddings=self.tied, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        names = {
            "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }  # fmt: skip
        state = {
            "model.embed_tokens.weight": self.values["token_embd.weight"],
            "model.norm.weight": self.values["output_norm.weight"],
            "lm_head.weight": self.values["token_embd.weight" if self.tied else "output.weight"],
        }
        for name, value in self.values.items():
            if name.startswith("blk."):
                _, layer, part, _ = name.split(".")
                heads = {"attn_q": self.heads, "attn_k": self.kv_heads}.get(part)
                if heads:  # undo the interleaving that GGUF's converter applies
                    value = value.view(heads, -1, 2, value.shape[-1]).transpose(1, 2).reshape(value.shape)
                state[f"model.layers.{layer}.{names[part]}.weight"] = value
        model = LlamaForCausalLM(config).float().eval()
        model.load_state_dict(state)
        return model


def write_gguf(
    path: Path,
    type: str = "F32",
    *,
    types: dict[str, str] | None = None,
    metadata: dict[str, int | float | str] | None = None,
    tokenizer: bool = True,
    extra: dict[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
    seed: int = 0,
    **sizes: Any,
) -> Tiny:
    """Write a random Llama of ``type`` (``types`` overrides it by a tensor's name) and return it."""
    tiny = Tiny(path, type, **sizes)
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(tiny.layers)
    writer.add_context_length(tiny.context)
    writer.add_embedding_length(tiny.hidden)
    writer.add_feed_forward_length(tiny.mlp)
    writer.add_head_count(tiny.heads)
    writer.add_head_count_kv(tiny.kv_heads)
    writer.add_key_length(tiny.head_dim)
    writer.add_value_length(tiny.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[value.__class__]
        add(key, value)
    if tokenizer:
        add_tokenizer(writer, tiny.vocab)
    q, kv = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (tiny.vocab, tiny.hidden),
        "output_norm.weight": (tiny.hidden,),
    }
    if not tiny.tied:
        shapes["output.weight"] = (tiny.vocab, tiny.hidden)
    for i in range(tiny.layers):
        b = f"blk.{i}."
        shapes |= {
            b + "attn_norm.weight": (tiny.hidden,), b + "ffn_norm.weight": (tiny.hidden,),
            b + "attn_q.weight": (q, tiny.hidden), b + "attn_k.weight": (kv, tiny.hidden),
            b + "attn_v.weight": (kv, tiny.hidden), b + "attn_output.weight": (tiny.hidden, q),
            b + "ffn_gate.weight": (tiny.mlp, tiny.hidden), b + "ffn_up.weight": (tiny.mlp, tiny.hidden),
            b + "ffn_down.weight": (tiny.hidden, tiny.mlp),
        }  # fmt: skip
    for name, shape in shapes.items():
        if name in drop:
            continue
        norm = len(shape) == 1
        data = random.standard_normal(shape, dtype=np.float32)
        data = (
            1 + 0.1 * data
            if norm
            else data * (1.0 if name == "token_embd.weight" else 1.5 / shape[-1] ** 0.5)
        )
        kind = gguf.GGMLQuantizationType["F32" if norm else (types or {}).get(name, type)]
        stored = store(data, kind, random)
        writer.add_tensor(name, stored, raw_dtype=kind)
        tiny.values[name] = torch.from_numpy(np.array(dequantize(stored, kind), dtype=np.float32)).view(shape)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tiny


# Where fp16 scales stand in a block.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
# Factors of scales and minima that give random blocks a standard deviation of about 1 and next to no mean.
FACTORS = {
    "IQ4_NL": (1 / 70,), "Q2_K": (1 / 8, 1.5 / 8), "Q3_K": (1 / 41,), "Q4_K": (1 / 143, 7.5 / 143),
    "Q5_K": (1 / 280, 15.5 / 280), "Q6_K": (1 / 1369,),
}  # fmt: skip


def random_blocks(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Bytes [rows, blocks, size] of any blocks whose scales are finite."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = random.integers(0, 256, (*shape[:-1], shape[-1] // elements, size), dtype=np.uint8)
    for at in SCALES[name]:
        values = (random.standard_normal(raw.shape[:-1]) * 10.0 ** random.integers(-8, 4)).astype(np.float16)
        values.flat[0] = 0
        raw[..., at : at + 2] = values[..., None].view(np.uint8)
    return raw


def store(data: np.ndarray, kind: gguf.GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    """`data` as stored; of a type that the gguf package cannot write, random blocks of about its size."""
    if kind == gguf.GGMLQuantizationType.F32:
        return data
    try:
        return quantize(data, kind)
    except NotImplementedError:
        raw = random_blocks(kind.name, data.shape, random)
        for at, factor in zip(SCALES[kind.name], FACTORS[kind.name]):
            values = np.full(raw.shape[:-1], factor * data.std(), np.float16)
            raw[..., at : at + 2] = values[..., None].view(np.uint8)
        return raw.reshape(*data.shape[:-1], -1)


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A byte-level vocabulary: special tokens, the 256 bytes, a few merges, then unused rows."""
    tokens = [*SPECIAL, *BYTES, *(m.replace(" ", "") for m in MERGES)]
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    unused = vocab - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *(f"[unused{i}]" for i in range(unused))])
    writer.add_token_types([*types, *[5] * unused])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


@pytest.fixture(scope="session")
def make_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """A function that writes a small random model file; arguments as ``write_gguf``."""
    folder = tmp_path_factory.mktemp("gguf")

    def make(type: str = "F32", **options: Any) -> Tiny:
        return write_gguf(folder / f"{len(list(folder.iterdir()))}.gguf", type, **options)

    return make


@pytest.fixture(scope="session")
def plain() -> Target:
    """This host without any tool chain: every operator runs its PyTorch form, and nothing is compiled."""
    return replace(detect(), name="plain", backends=("torch",))
