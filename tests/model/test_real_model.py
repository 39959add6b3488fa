"""SmolLM2-135M as shipped (Q4_1, Q8_0 table), on this host's compiled kernels."""

from __future__ import annotations

import pydoc_data.topics
import re

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

import edgeformer
from edgeformer.model.generate import LanguageModel

pytestmark = pytest.mark.real

CONTEXT = 512
NEAR_TIE = 0.01  # of the logits' spread: where the two best are closer, either is right
PROMPTS = [  # with answers that the model is sure of, so that near ties come late
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "January, February, March, April, May, June, July, August, September, October, November, "
    "December, January,",
    "def f0(x):\n    return x + 0\n\ndef f1(x):\n    return x + 1\n\ndef f2(x):\n    return",
    "The first ten numbers are one, two, three,",
    "The alphabet: a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g",
]


@pytest.fixture(scope="module")
def exact(smollm2) -> LanguageModel:
    """Float activations and cache: nothing is rounded but sums."""
    return edgeformer.load(smollm2, context=CONTEXT, kv="fp32", activation="float")


@pytest.fixture(scope="module")
def fast(smollm2) -> LanguageModel:
    """The default: int8 activations, bf16 cache."""
    return edgeformer.load(smollm2, context=CONTEXT)


@pytest.fixture(scope="module")
def reference(smollm2):
    """transformers' Llama in fp32 with the values of the file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(smollm2)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    state = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        *layer, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            heads = 9 if part == "attn_q" else 3
            value = value.view(heads, 32, 2, 576).transpose(1, 2).reshape(value.shape)
        prefix = f"layers.{layer[1]}." if layer else ""
        state[f"model.{prefix}{names[part]}.weight"] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = model.model.rotary_emb.__class__(config)
    return model.eval()


def test_capital_of_france(exact):
    pieces: list[str] = []
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = exact.chat(question, max_tokens=24, stream=pieces.append)
    assert answer == "The capital of France is Paris." == "".join(pieces)
    assert exact.last_run is not None
    assert exact.last_run.stop_reasons == ("eos",)


@torch.no_grad()
def test_logits_and_greedy_tokens_equal_transformers(exact, reference):
    """Five greedy answers of 64 tokens, each read back by transformers in one pass."""
    compared = 0
    for prompt in PROMPTS:
        ids = exact.tokenizer.encode(prompt)
        new = exact.generate(ids, max_tokens=64, ignore_eos=True)
        logits = reference(torch.tensor([ids + new])).logits[0]
        best = logits[len(ids) - 1 : -1].topk(2).values
        spread = logits[len(ids) - 1 : -1].amax(-1) - logits[len(ids) - 1 : -1].amin(-1)
        ties = ((best[:, 0] - best[:, 1]) < NEAR_TIE * spread).tolist()
        steps = ties.index(True) if any(ties) else len(new)
        expected = logits[len(ids) - 1 : -1].argmax(-1).tolist()
        assert [a == b or tie for a, b, tie in zip(new, expected, ties)] == [True] * 64
        compared += steps
        exact.reset()
        got = exact.prefill(ids + new[:-1])
        error = ((got[0] - logits[-2]).norm() / logits[-2].norm()).item()
        print(f"{prompt!r}: first near tie at step {steps}, logits off by {error:.1e}")
        assert error < 1e-3
    print(f"{compared} of {64 * len(PROMPTS)} steps before a near tie")
    assert compared >= 200


def test_int8_activations_lose_little(fast):
    """On 2,000 tokens of the language's own English manual."""
    topics = pydoc_data.topics.topics
    text = " ".join(re.sub(r"\s+", " ", topics[name]) for name in ("objects", "naming", "lambda", "integers"))
    result = edgeformer.evaluate(fast, text, window=512, max_tokens=2048)
    print(result)
    assert result.tokens > 2000
    assert abs(result.perplexity_change) < 0.01
    assert result.mean_kl < 0.01
    assert result.top1_agreement > 0.95


def test_report_says_what_runs(fast):
    fast.generate("hello", max_tokens=2)
    rows = fast.report()
    layers = [row["layer"] for row in rows if row["layer"] != "all"]
    assert len(set(layers)) == 4 * 30 + 1
    assert len(layers) <= 2 * len(set(layers))  # one row an activation type
    assert {"form", "operator", "spec"} <= set(rows[0])
