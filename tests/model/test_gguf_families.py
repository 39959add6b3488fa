"""GGUF files of every architecture: keys, tensor names and row orders, against transformers and llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeformer.compiler.errors import FormatError, UnsupportedError
from edgeformer.model.decoder import Decoder
from edgeformer.model.load.gguf import GGUFCheckpoint
from edgeformer.model.load.gguf_config import ARCHITECTURES, config_from_gguf
from edgeformer.model.plan import choose_context
from edgeformer.runtime.dispatch import use_target

from .families import FAMILIES, checkpoint, hugging_face
from .gguf_families import write
from .test_families import TOLERANCE, error, new_cache, tokens

# What the file cannot say is as the architecture has it: Gemma 2 slides in every other layer, Gemma 3 in five
# of six, scores are scaled by the head size, and its local theta is 10000.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {}),
    "llama-linear": ("llama", {}),
    "mistral": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3-yarn": ("qwen3", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": None}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {}),
}


@pytest.fixture(autouse=True)
def _plain_forms(plain):
    use_target(plain)
    yield
    use_target(None)


def tiny(name: str, **more: Any) -> tuple[Any, str]:
    """transformers' model, and the architecture that its file has."""
    arch, options = CASES[name]
    family = next(f for f in FAMILIES if f.name == name)
    return hugging_face(family, **options, **more), arch


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_file_equals_transformers(name: str, tmp_path: Path) -> None:
    model, arch = tiny(name)
    read = GGUFCheckpoint(write(tmp_path / "model.gguf", model, arch))
    decoder = Decoder.from_checkpoint(read, activation="float")
    ids = tokens(1, 47)
    got = decoder(ids, new_cache(decoder), 0, last_only=False)
    assert error(got, model(ids).logits) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_both_makers_of_a_config_agree(name: str, tmp_path: Path) -> None:
    model, arch = tiny(name)
    ours = GGUFCheckpoint(write(tmp_path / "model.gguf", model, arch)).config
    theirs = checkpoint(model).config
    skipped = {"architecture", "bos_token_id", "eos_token_ids", "rope", "attention_scale"}
    for field in vars(theirs):
        if field not in skipped and not (field == "local_rope" and name == "gemma2"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field)), field
    assert ours.scale == pytest.approx(theirs.scale)
    for a, b in zip(ours.ropes, theirs.ropes, strict=True):
        for x, y in zip(a.tables(ours.rotary, 96), b.tables(ours.rotary, 96)):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


READER = """
import sys, numpy, llama_cpp
ids = list(map(int, sys.argv[2].split(",")))
model = llama_cpp.Llama(sys.argv[1], n_ctx=96, logits_all=True, verbose=False, n_threads=1, flash_attn=False)
model.eval(ids)
numpy.save(sys.argv[3], numpy.array(model.scores[: len(ids)]))
"""


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "name", [n for n in CASES if n not in ("mistral", "phi3")]
)  # it ignores their window
def test_llama_cpp_reads_the_same_model(name: str, tmp_path: Path) -> None:
    """The files of these tests are what llama.cpp understands them to be: keys, names and row orders."""
    pytest.importorskip("llama_cpp")
    model, arch = tiny(name, **({} if arch_has_head_dim(name) else {"hidden_size": 128}))
    path = write(tmp_path / "model.gguf", model, arch, tokens=True)
    decoder = Decoder.from_checkpoint(GGUFCheckpoint(path), activation="float")
    ids = tokens(1, 47)
    arguments = [str(path), ",".join(map(str, ids[0].tolist())), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-c", READER, *arguments], check=True, timeout=120)
    got = decoder(ids, new_cache(decoder), 0, last_only=False)
    assert error(got[0], torch.from_numpy(np.load(tmp_path / "logits.npy"))) < 5e-3  # its KV cache is fp16


def arch_has_head_dim(name: str) -> bool:
    return "head_dim" in next(f for f in FAMILIES if f.name == name).options


def test_longrope_keeps_its_first_context_unless_asked(tmp_path: Path) -> None:
    model, arch = tiny("phi3-longrope")
    config = GGUFCheckpoint(write(tmp_path / "model.gguf", model, arch)).config
    assert (choose_context(config, None), choose_context(config, 96)) == (40, 96)


def test_a_gemma_of_27b_scales_scores_by_its_hidden_size(tmp_path: Path) -> None:
    model, arch = tiny("gemma2")
    read = GGUFCheckpoint(write(tmp_path / "model.gguf", model, arch))
    keys = {**read.metadata, "gemma2.block_count": 46}
    config = config_from_gguf(keys, read.container.tensors, read._vector)
    assert config.scale == pytest.approx((96 // 4) ** -0.5)
    config = config_from_gguf({**keys, "gemma2.attention.scale": 0.5}, read.container.tensors, read._vector)
    assert config.scale == 0.5


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"general.architecture": "mamba"}, UnsupportedError, ", ".join(ARCHITECTURES)),
        ({"gemma3.rope.scaling.type": "dynamic"}, UnsupportedError, "none, linear, yarn and longrope"),
        ({"gemma3.embedding_length": None}, FormatError, "gemma3.embedding_length"),
        ({"gemma3.attention.layer_norm_rms_epsilon": None}, FormatError, "rms_epsilon"),
        ({"gemma3.block_count": 10**9}, FormatError, "1000000000 layers"),
        ({"gemma3.attention.sliding_window_pattern": [True]}, FormatError, "1 entries"),
        ({"gemma3.rope.freq_base": float("nan")}, FormatError, "freq_base"),
        ({"gemma3.rope.freq_base": -1.0}, FormatError, "theta"),
        ({"gemma3.rope.scaling.type": "longrope"}, FormatError, "short and long factors"),
        ({"gemma3.final_logit_softcapping": -2.0}, FormatError, "logit_softcap"),
        ({"gemma3.attention.value_length": 16}, UnsupportedError, "different head sizes"),
        ({"gemma3.attention.head_count_kv": [1, 2]}, FormatError, "not a whole number"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_known(tmp_path: Path, changes, kind, text) -> None:
    model, arch = tiny("gemma3")
    read = GGUFCheckpoint(write(tmp_path / "model.gguf", model, arch))
    keys = {key: value for key, value in {**read.metadata, **changes}.items() if value is not None}
    with pytest.raises(kind, match=text):
        config_from_gguf(keys, read.container.tensors, read._vector)


def test_a_fused_tensor_of_a_wrong_size_is_refused(tmp_path: Path) -> None:
    model, arch = tiny("phi3")
    layer = model.model.layers[1]
    layer.mlp.gate_up_proj.weight = torch.nn.Parameter(layer.mlp.gate_up_proj.weight[:-1].contiguous())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(FormatError, match=r"blk.1.ffn_up.weight.*319 rows, expected 320"):
        GGUFCheckpoint(write(tmp_path / "model.gguf", model, arch))
