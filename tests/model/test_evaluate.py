"""The loss against fp32 PyTorch: none for exact options, small for int8 activations, typed for bad text."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import edgeformer
from edgeformer.compiler.errors import FormatError, UnsupportedError
from edgeformer.model.evaluate import evaluate, evaluate_file
from edgeformer.runtime.dispatch import use_target

TEXT = "hello world, this is a text of some length. " * 4


@pytest.fixture(scope="module")
def tiny(make_gguf):
    return make_gguf("Q4_0", heads=4, kv_heads=2)


def load(tiny, plain, **options):
    model = edgeformer.load(tiny.path, target=plain, **options)
    use_target(plain)
    return model


@pytest.fixture(autouse=True)
def _host_again():
    yield
    use_target(None)


def test_exact_options_lose_nothing(tiny, plain):
    result = evaluate(load(tiny, plain, activation="float", kv="fp32"), TEXT, window=48)
    assert result.mean_kl < 1e-6
    assert abs(result.perplexity_change) < 1e-4
    assert result.top1_agreement > 0.99


def test_reference_is_transformers(tiny, plain):
    model = load(tiny, plain, activation="int8")
    ids = torch.tensor([model.tokenizer.encode(TEXT)])[:, :64]
    with torch.no_grad():
        loss = F.cross_entropy(tiny.hugging_face()(ids).logits[0, :-1], ids[0, 1:])
    result = evaluate(model, TEXT, window=64, max_tokens=64)
    assert result.tokens == 63
    assert result.reference_perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert 0 < result.mean_kl < 0.05


def test_bad_texts(tiny, plain, tmp_path):
    model = load(tiny, plain)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(FormatError, match="UTF-8"):
        evaluate_file(model, tmp_path / "latin.txt")
    with pytest.raises(FormatError, match="cannot read"):
        evaluate_file(model, tmp_path / "none.txt")
    with pytest.raises(UnsupportedError, match="two tokens"):
        evaluate(model, "a", window=8)
    with pytest.raises(UnsupportedError, match="window"):
        evaluate(model, TEXT, window=10_000)
