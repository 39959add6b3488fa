"""SmolLM2 on an OpenCL device: the CPU's greedy tokens, one read a step, weights in cl buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import edgeformer

PROMPT = "The capital of France is the city of"
NEAR = 0.05  # logits closer than this may change places


@pytest.fixture(scope="module")
def model(device: Any, smollm2: Path) -> Any:
    return edgeformer.load(smollm2, target="opencl", context=256)


@pytest.mark.real
def test_greedy_tokens_are_the_cpus(model: Any, smollm2: Path) -> None:
    ids = model.tokenizer.encode(PROMPT)
    ours = model.generate(ids, max_tokens=12)
    read_before = model.device_step.session.reads
    again = model.generate(ids, max_tokens=12)
    assert again == ours
    assert model.device_step.session.reads - read_before == 12  # one token each, nothing else
    rows = [row for row in model.report() if row["layer"].startswith("layers")]
    assert rows and {row["form"] for row in rows} == {"tvm_opencl"}
    cpu = edgeformer.load(smollm2, context=256, activation="float", kv="bf16", whole_step=False)
    logits = cpu.prefill(ids)
    for token in ours:
        top = logits[0].topk(2)
        if token != top.indices[0]:
            assert top.values[0] - logits[0, token] < NEAR  # a near tie ends the comparison
            break
        logits = cpu.decode(int(token))
    assert model.decoder.layers[0].qkv.weight.buffer.is_meta


@pytest.mark.real
def test_logits_of_a_ragged_batch(model: Any) -> None:
    rows = [model.tokenizer.encode(text) for text in (PROMPT, "Water is")]
    together = model.generate(rows, max_tokens=4)
    assert together == [model.generate(row, max_tokens=4) for row in rows]


@pytest.mark.real
def test_sampling_and_state(model: Any) -> None:
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}
    ids = model.tokenizer.encode(PROMPT)
    assert model.generate(ids, max_tokens=6, **options) == model.generate(ids, max_tokens=6, **options)
    model.reset()
    logits = model.prefill(ids)
    assert logits.shape == (1, model.config.vocab_size) and torch.isfinite(logits).all()
    weight = model.decoder.layers[0].o.weight.unpack()  # read back from the device
    assert weight.codes.shape == (576, 576)
