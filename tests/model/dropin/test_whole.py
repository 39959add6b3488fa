"""edgeformer.compile on transformers models: the same text, from our loop and from transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import edgeformer
from edgeformer.compiler.errors import CapacityError, UnsupportedError

from .conftest import CAUSAL, SIZES, VOCAB, _build, relative, skip_in_transformers_5_0

WIDE = SIZES | {"hidden_size": 128, "head_dim": 32, "intermediate_size": 160, "num_key_value_heads": 1}


def wide(tied: bool = True) -> Any:
    """A Llama whose heads are whole blocks of 32, as the whole step wants them."""
    return _build("Llama", "LlamaForCausalLM", **(WIDE | {"tie_word_embeddings": tied}))


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model, and its compiled step with float weights, activations and cache."""
    model = wide()
    return model, edgeformer.compile(model, "exact", kv="fp32", activation="float")


def test_the_step_is_one_native_call(pair: Any, ids: torch.Tensor) -> None:
    model, compiled = pair
    assert compiled.whole_step_declined == "" and compiled.error < 1e-4
    with torch.no_grad():
        assert relative(compiled(ids).logits, model(ids).logits) < 1e-4


GREEDY = {"max_new_tokens": 7, "do_sample": False}


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, "own"),
        ({"repetition_penalty": 1.3}, "own"),
        ({"eos_token_id": [5, 9, 40, 41, 42, 43, 44, 45]}, "own"),
        ({"num_beams": 3}, "num_beams=3"),
        ({"num_beams": 2, "num_return_sequences": 2}, "num_beams=2"),
        ({"bad_words_ids": [[7]]}, "bad_words_ids"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup"),
        ({"return_dict_in_generate": False, "no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_generate(pair: Any, ids: torch.Tensor, options: dict[str, Any], loop: str, padded: bool) -> None:
    model, compiled = pair
    if "prompt_lookup_num_tokens" in options:
        skip_in_transformers_5_0("looks prompts up with an end token alone")
        ids = ids[:1]
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, :4] = 0
    common = GREEDY | {"pad_token_id": 0, "attention_mask": mask} | options
    want, got = model.generate(ids, **common), compiled.generate(ids, **common)
    assert torch.equal(got, want)
    assert loop in compiled.last_loop


def test_an_assistant(pair: Any, ids: torch.Tensor) -> None:
    model, compiled = pair
    want = model.generate(ids[:1], pad_token_id=0, **GREEDY)
    assert torch.equal(compiled.generate(ids[:1], assistant_model=model, pad_token_id=0, **GREEDY), want)
    assert "assistant_model" in compiled.last_loop


def test_sampling_streamers_and_stopping_criteria(pair: Any, ids: torch.Tensor) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Streamer:
        def __init__(self) -> None:
            self.pieces, self.ended = [], False

        def put(self, value: torch.Tensor) -> None:
            self.pieces += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 16)

    compiled, streamer = pair[1], Streamer()
    options = {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.9, "max_new_tokens": 9}
    torch.manual_seed(3)
    stop = StoppingCriteriaList([AfterThree()])
    got = compiled.generate(ids[:1], streamer=streamer, stopping_criteria=stop, pad_token_id=0, **options)
    assert compiled.last_loop == "own" and got.shape == (1, 16)
    assert streamer.ended and streamer.pieces == got[0].tolist()
    torch.manual_seed(3)
    assert torch.equal(compiled.generate(ids[:1], pad_token_id=0, **options)[:, :16], got)
    others = [compiled.generate(ids[:1], pad_token_id=0, **options) for _ in range(6)]
    assert any(not torch.equal(other, others[0]) for other in others)


def test_an_optimised_model_keeps_its_formats(ids: torch.Tensor) -> None:
    model = wide(tied=False)
    edgeformer.optimize(model, "fast", policy="all", activation="float")
    compiled = edgeformer.compile(model, kv="fp32", activation="float")
    assert compiled.whole_step_declined == "" and compiled.error < 1e-4
    with torch.no_grad():
        assert relative(compiled(ids).logits, model(ids).logits) < 1e-4


@pytest.mark.parametrize("profile", ["balanced", "fast"])
def test_profiles_round(profile: str) -> None:
    compiled = edgeformer.compile(wide(), profile)
    assert 1e-3 < compiled.error < 0.5 and compiled.whole_step_declined == ""


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_families_map_onto_the_decoder(family: str, ids: torch.Tensor) -> None:
    """Composed into one program or op by op, the decoder computes what the model does."""
    model = CAUSAL[family]()
    compiled = edgeformer.compile(model, "exact", kv="fp32", activation="float")
    assert compiled.decoder is not None, compiled.whole_step_declined
    assert compiled.error < 1e-3
    assert torch.equal(
        compiled.generate(ids, pad_token_id=0, **GREEDY), model.generate(ids, pad_token_id=0, **GREEDY)
    )


def test_what_cannot_be_mapped_runs_op_by_op(ids: torch.Tensor) -> None:
    model = CAUSAL["gpt2"]()
    want = model.generate(ids, pad_token_id=0, **GREEDY)
    compiled = edgeformer.compile(model, "exact")
    assert "'gpt2' is not supported" in compiled.whole_step_declined
    assert torch.equal(compiled.generate(ids, pad_token_id=0, **GREEDY), want)
    assert "op by op" in compiled.last_loop and "gpt2" in repr(compiled)


def test_wrong_input(pair: Any, ids: torch.Tensor) -> None:
    compiled = pair[1]
    with pytest.raises(UnsupportedError, match="between 0 and 95"):
        compiled.generate(ids + VOCAB, pad_token_id=0, **GREEDY)
    with pytest.raises(UnsupportedError, match="not padding on the left"):
        compiled(ids, attention_mask=torch.tensor([[1] * 12 + [0]] * 2))
    with pytest.raises(CapacityError, match="context of 64"):
        compiled(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="causal language model"):
        edgeformer.compile(nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match="declined"):
        edgeformer.compile(wide(), "experimental")
