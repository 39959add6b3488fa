"""transformers' tiny models written as GGUF files, with the keys and quirks of llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
GLOBAL = {"embed_tokens": "token_embd", "norm": "output_norm"}


def write(path: Path, model: Any, arch: str, *, drop: tuple[str, ...] = (), tokens: bool = False) -> Path:
    """Write `model` as a GGUF file of the architecture; `drop` leaves out keys."""
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters
    full = rope.get("full_attention", rope)
    keys: dict[str, Any] = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": float(full["rope_theta"]),
    }  # fmt: skip
    if arch != "phi3":
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in ("llama", "phi3"):
        keys["rope.dimension_count"] = head_dim
    if getattr(c, "sliding_window", None):
        keys["attention.sliding_window"] = c.sliding_window
    if arch == "gemma2":
        keys |= {
            "attn_logit_softcapping": c.attn_logit_softcapping,
            "final_logit_softcapping": c.final_logit_softcapping,
        }
    if full["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": float(full["factor"])}
    if full["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    if arch == "phi3":
        keys["rope.scaling.original_context_length"] = c.original_max_position_embeddings
    if tokens and full["rope_type"] == "longrope":  # as llama.cpp's converter does
        keys["rope.scaling.attn_factor"] = float(model.model.rotary_emb.attention_scaling)
    for key, value in keys.items():
        if key not in drop:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{arch}.{key}", value)
    if tokens:
        _add_tokens(writer, c.vocab_size)
    _add_tensors(writer, model, arch, head_dim, full)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(writer: gguf.GGUFWriter, model: Any, arch: str, head_dim: int, rope: dict[str, Any]) -> None:
    c = model.config
    gemma = arch.startswith("gemma")
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            if not c.tie_word_embeddings:
                writer.add_tensor("output.weight", value.numpy())
            continue
        path, kind = name.removeprefix("model.").rsplit(".", 1)
        if not path.startswith("layers."):
            ours = f"{GLOBAL[path]}.{kind}"
        else:
            _, layer, part = path.split(".", 2)
            ours = f"blk.{layer}.{(GEMMA_PARTS if gemma else PARTS)[part]}.{kind}"
        if gemma and "norm" in path:
            value = value + 1
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(ours.split(".")[-2])
        if arch == "llama" and heads:  # half-split pairs (i, i + D/2) become neighbours
            value = value.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(ours, value.contiguous().numpy())
    if rope["rope_type"] == "llama3":
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        writer.add_tensor("rope_freqs.weight", (frequencies / model.model.rotary_emb.inv_freq).numpy())
    if rope["rope_type"] == "longrope":
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", torch.tensor(rope[f"{name}_factor"]).numpy())


def _add_tokens(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A vocabulary that llama.cpp accepts: it refuses a file without one."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(vocab - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3, *[6] * (vocab - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
