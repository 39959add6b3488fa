"""config.json and tensor names of Hugging Face: what is read, what is left out, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeformer.compiler.errors import FormatError, UnsupportedError
from edgeformer.model.load.hf_config import FAMILIES as KNOWN
from edgeformer.model.load.hf_names import (
    TensorCheckpoint,
    config_from_hf,
    sources_from_hf,
    tensors_from_hf,
)

from .families import FAMILIES, hugging_face

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
GEMMA3: dict[str, Any] = {  # as google/gemma-3-4b-it's config.json has it
    "model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {"hidden_size": 1152},
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip


def test_defaults_of_a_family() -> None:
    config = config_from_hf(
        LLAMA | {"eos_token_id": [2, 0], "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    )
    assert (config.head_dim, config.num_kv_heads, config.max_context) == (64, 3, 2048)
    assert config.eos_token_ids == (0, 2) and config.tie_embeddings and config.windows == ()
    assert config_from_hf(LLAMA | {"model_type": "mistral"}).windows == (4096,) * 30
    assert config_from_hf(LLAMA | {"model_type": "mistral", "sliding_window": None}).windows == ()
    assert config_from_hf(LLAMA | {"model_type": "qwen2"}).attention_bias


def test_gemma_3_with_its_defaults_left_out() -> None:
    config = config_from_hf(GEMMA3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.windows[:7] == (1024,) * 5 + (0, 1024) and config.tie_embeddings
    assert (config.rope.theta, config.rope.scaling, config.rope.factor) == (1e6, "linear", 8.0)
    assert config.local_rope is not None and config.local_rope.theta == 1e4
    assert config.rope_kind(5) == 0 and config.rope_kind(4) == 1
    assert config.embedding_scale == 2560**0.5 and config.eos_token_ids == (1, 106)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "phi3-longrope", "qwen3-yarn"])
def test_old_and_new_spelling_of_rope(name: str) -> None:
    """`rope_theta` with `rope_scaling` says what `rope_parameters` does."""
    new = hugging_face(next(f for f in FAMILIES if f.name == name)).config.to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    parameters = dict(new["rope_parameters"])
    if name == "gemma3":
        old |= {"rope_local_base_freq": parameters["sliding_attention"]["rope_theta"]}
        parameters = dict(parameters["full_attention"])
    old["rope_theta"] = parameters.pop("rope_theta")
    old["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    assert config_from_hf(old) == config_from_hf(new)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"model_type": "mamba"}, UnsupportedError, ", ".join(KNOWN)),
        ({"model_type": ["llama"]}, UnsupportedError, "not supported"),
        ({"hidden_size": None}, FormatError, "'hidden_size' is None"),
        ({"vocab_size": "many"}, FormatError, "'vocab_size' is 'many'"),
        ({"num_attention_heads": 0}, FormatError, "0 heads"),
        ({"num_hidden_layers": 10**9}, FormatError, "1000000000 layers"),
        ({"num_key_value_heads": 2}, FormatError, "do not divide"),
        ({"hidden_act": "relu"}, UnsupportedError, "'relu' is not supported"),
        ({"attention_bias": "yes"}, FormatError, "not true or false"),
        ({"rms_norm_eps": float("nan")}, FormatError, "rms_norm_eps"),
        ({"rope_theta": 0.0}, FormatError, "theta"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedError, "'dynamic'.*llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, FormatError, "no 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, FormatError, "low_freq_factor"),
        ({"rope_scaling": [1]}, FormatError, "not an object"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0]}},
         FormatError, "1 rope factors for 32"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": ["x"]}}, FormatError,
         "long_factor"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 30},
         UnsupportedError, "full_attention, sliding_attention"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, FormatError,
         "30 layers"),
        ({"model_type": "mistral", "sliding_window": 0}, FormatError, "sliding_window"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, UnsupportedError, "bidirectional"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, FormatError, "query_pre_attn_scalar"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, UnsupportedError, "Gemma 3"),
        ({"model_type": "gemma3"}, FormatError, "text_config"),
    ],
)  # fmt: skip
def test_refusals_of_a_config(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        config_from_hf({**LLAMA, **changes})


def test_a_missing_number_is_named() -> None:
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        with pytest.raises(FormatError, match=f"no '{key}'"):
            config_from_hf({k: v for k, v in LLAMA.items() if k != key})


def tiny(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = hugging_face(next(f for f in FAMILIES if f.name == name))
    return config_from_hf(model.config.to_dict()), dict(model.state_dict())


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_every_tensor_has_one_place(name: str) -> None:
    config, state = tiny(name)
    found = dict(tensors_from_hf(config, state.__getitem__, state))
    assert set(found) == set(config.matrices()) | set(config.vectors())
    own = [t for n, t in state.items() if not (config.tie_embeddings and "lm_head" in n)]
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in own)


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model.", "model.language_model."])
def test_prefixes_and_other_parts(prefix: str) -> None:
    """Text towers of larger models, and tensors that are computed or belong to pictures."""
    config, state = tiny("gemma3")
    named = {prefix + name.removeprefix("model."): t for name, t in state.items() if name != "lm_head.weight"}
    outer = prefix.removesuffix("language_model.").removesuffix("language_model.model.")
    named |= {
        f"{outer}vision_tower.vision_model.x.weight": torch.zeros(1),
        f"{outer}multi_modal_projector.y.weight": torch.zeros(1),
        f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
    }
    sources = sources_from_hf(config, named)
    assert sources["layers.0.q"].name == f"{prefix}layers.0.self_attn.q_proj.weight"
    assert sources["norm"].offset == 1.0 and "head" not in sources


def test_refusals_of_tensors() -> None:
    config, state = tiny("phi3")
    without = {name: t for name, t in state.items() if "layers.1.mlp.down_proj" not in name}
    with pytest.raises(FormatError, match="layers.1.mlp.down_proj.weight"):
        sources_from_hf(config, without)
    with pytest.raises(UnsupportedError, match="1 tensors have no place in this decoder: score.weight"):
        sources_from_hf(config, {**state, "score.weight": torch.zeros(1)})
    with pytest.raises(FormatError, match="0 tensors 'embed_tokens.weight'"):
        sources_from_hf(config, {})

    def read(name: str, change: Any) -> Any:
        key = "model.layers.0.self_attn.qkv_proj.weight"
        changed = {**state, key: change(state[key])}
        return TensorCheckpoint(config, changed.__getitem__, changed).weight(name)

    with pytest.raises(FormatError, match="expected 192 rows"):
        read("layers.0.q", lambda t: t[:-1])
    with pytest.raises(FormatError, match="expected"):
        read("layers.0.v", lambda t: t[:, :-1])
    with pytest.raises(UnsupportedError, match="float64"):
        read("layers.0.k", lambda t: t.double())
    with pytest.raises(FormatError, match="NaN or Inf"):
        read("layers.0.q", lambda t: t * torch.inf)
    assert torch.equal(
        read("layers.0.k", lambda t: t.bfloat16()).dequantize(),
        state["model.layers.0.self_attn.qkv_proj.weight"][96:144].bfloat16().float(),
    )
