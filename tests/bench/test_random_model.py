"""The random model file loads, in the sizes asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf.quants import dequantize

from edgeformer.bench.random_model import Shape, random_q4_0, write
from edgeformer.model.loading import open_checkpoint

Q4_0 = 2


def test_random_weights_have_the_spread_of_a_trained_layer() -> None:
    import gguf

    blocks = random_q4_0(64, 256, np.random.default_rng(0))
    values = dequantize(blocks, gguf.GGMLQuantizationType(Q4_0))
    assert values.shape == (64, 256)
    assert 0.5 / 16 < values.std() < 2 / 16


@pytest.mark.real
def test_the_file_is_a_llama_with_a_tokenizer(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    write(path, smollm2, Shape(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=96))
    config = open_checkpoint(path).config
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (64, 2, 49152)
    assert config.tie_embeddings
