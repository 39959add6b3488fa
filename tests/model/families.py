"""Tiny random models of every family, as transformers builds them, and their weights under our names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from edgeformer.model.load.hf_names import TensorCheckpoint, config_from_hf

SIZES = {
    "vocab_size": 200, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [1.5 + 0.5 * i for i in range(16)],
}  # fmt: skip
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": THETA,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model class of transformers and the options that make its config differ from SIZES."""

    name: str
    model: str  # transformers' prefix: "Llama" is LlamaConfig and LlamaForCausalLM
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


FAMILIES = [
    Family("llama", "Llama", {"rope_parameters": THETA}),
    Family("llama-biased", "Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    Family("llama3", "Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    Family("llama-linear", "Llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 3.0}}),
    Family("mistral", "Mistral", {"sliding_window": 7, "head_dim": 32}),
    Family("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    Family("qwen2-window", "Qwen2", {
        "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
    }),
    Family("qwen3", "Qwen3", {"head_dim": 32, "attention_bias": True}),
    Family("qwen3-yarn", "Qwen3", {"head_dim": 32, "rope_parameters": YARN, "tie_word_embeddings": True}),
    Family("gemma2", "Gemma2", {
        "head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 48, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    }),
    Family("gemma3", "Gemma3", {
        "head_dim": 32, "sliding_window": 5, "query_pre_attn_scalar": 40, "rope_parameters": GEMMA_ROPES,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    Family("phi3", "Phi3", {"sliding_window": 9}),
    Family("phi3-longrope", "Phi3", {
        "hidden_size": 128, "rope_parameters": LONGROPE, "original_max_position_embeddings": 40,
    }),
]  # fmt: skip


def hugging_face(family: Family, **more: Any) -> Any:
    """transformers' model with random weights, fp32; norms and biases are random too."""
    import transformers

    text = "Text" if family.model == "Gemma3" else ""
    config = getattr(transformers, f"{family.model}{text}Config")(
        **{**SIZES, **family.options, **more}, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.model}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.dim() == 1 else 1.5 / parameter.shape[1] ** 0.5
            if "embed_tokens" in name:
                scale = 0.5
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def checkpoint(model: Any) -> TensorCheckpoint:
    """The model's weights as a loader of its folder would give them."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return TensorCheckpoint(config_from_hf(model.config.to_dict()), state.__getitem__, state)
