"""Tiny random models of every family; sizes are shared, so that they share compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def is_transformers_5_0() -> bool:
    """Whether the oldest transformers that is claimed is installed."""
    import transformers

    return transformers.__version__.startswith("5.0.")


def skip_in_transformers_5_0(why: str) -> None:
    """Skip a test of what the oldest transformers that is claimed cannot do by itself."""
    if is_transformers_5_0():
        pytest.skip(f"transformers 5.0 {why}")


def _build(name: str, model: str, **options: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(0)
    made = getattr(transformers, model)(config).float().eval()
    with torch.no_grad():  # norms other than one, biases other than zero
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3.0)
    return made


def _decoder(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: _build(name, f"{name}ForCausalLM", **(SIZES | options))


_SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip

CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": _decoder("Llama", tie_word_embeddings=False),
    "llama-tied": _decoder("Llama", tie_word_embeddings=True),
    "mistral": _decoder("Mistral", sliding_window=8),
    "qwen2": _decoder("Qwen2", tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3", tie_word_embeddings=True),
    "gemma2": _decoder("Gemma2", sliding_window=8, tie_word_embeddings=True, query_pre_attn_scalar=16),
    "gemma3": lambda: _build(
        "Gemma3Text", "Gemma3ForCausalLM", **(SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 16})
    ),
    "phi3": _decoder("Phi3", sliding_window=None),
    "deepseek-v2": _decoder("DeepseekV2", **_MLA),
    "deepseek-v3": _decoder("DeepseekV3", **_MLA),
    "gpt2": lambda: _build(
        "GPT2", "GPT2LMHeadModel", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    ),
    "opt": lambda: _build(
        "OPT", "OPTForCausalLM", **_SMALL, ffn_dim=96, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, word_embed_proj_dim=64,
    ),
    "neox": lambda: _build(
        "GPTNeoX", "GPTNeoXForCausalLM", **_SMALL, intermediate_size=96, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=None,
    ),
}  # fmt: skip

ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: _build("Bert", "BertModel", **(_SMALL | {"intermediate_size": 96})),
    "vit": lambda: _build(
        "ViT", "ViTModel", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        image_size=32, patch_size=8,
    ),
}  # fmt: skip


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [2, 13]."""
    return torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(5))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Error in the L2 norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())
