"""Hugging Face folders and quantised ones: transformers' values, and refusals of what is unsafe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import edgeformer
from edgeformer.compiler.errors import EdgeFormerError, FormatError, UnsupportedError
from edgeformer.compiler.target import Target
from edgeformer.kernels.quant_matmul import CanonicalWeight, WeightFormat
from edgeformer.model.compress.range_search import round_to
from edgeformer.model.decoder import Decoder
from edgeformer.model.load.gguf import FORMATS
from edgeformer.model.load.hf_tokenizer import read_chat_template, read_tokenizer
from edgeformer.model.load.quantized import QuantizedCheckpoint, restored, stored
from edgeformer.model.loading import open_checkpoint
from edgeformer.runtime.dispatch import use_target
from edgeformer.runtime.kv_cache import KVCache

VOCAB = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a folder with bf16 weights in several shards and a tokenizer, transformers' own model in fp32)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=96, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    model.to(torch.bfloat16)
    path = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(path, max_shard_size="150KB")
    write_tokenizer(path)
    return path, model.float()


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer with a template, as tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<|im_end|>", *alphabet, "he", "ll"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("l", "l")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def logits(checkpoint: Any, target: Target, ids: torch.Tensor) -> torch.Tensor:
    use_target(target)
    try:
        decoder = Decoder.from_checkpoint(checkpoint, target=target, activation="float").eval()
        c = decoder.config
        cache = KVCache(c.num_layers, 1, c.num_kv_heads, c.head_dim, ids.shape[1], dtype="fp32")
        with torch.inference_mode():
            return decoder(ids, cache, 0, last_only=False)
    finally:
        use_target(None)


def test_shards_are_read_at_their_own_precision(folder: tuple[Path, Any], plain: Target):
    path, reference = folder
    assert len(list(path.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(path)
    assert checkpoint.format("layers.1.down") == WeightFormat.float("bfloat16")
    ids = torch.randint(0, VOCAB, (1, 19))
    with torch.inference_mode():
        want = reference(ids).logits
    got = logits(checkpoint, plain, ids)
    assert (got - want).abs().max() / want.abs().max() < 1e-4


def test_the_tokenizer_is_transformers_own(folder: tuple[Path, Any]):
    from transformers import AutoTokenizer

    own, theirs = read_tokenizer(folder[0]), AutoTokenizer.from_pretrained(folder[0])
    for text in ("hello world", "ünïcødé \U0001f600 你好", "  two  spaces\n\ttab", "<s>hi<|im_end|>", ""):
        ids = theirs.encode(text, add_special_tokens=True)
        assert own.encode(text) == ids
        assert own.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (own.bos_id, own.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert {1, 2} <= own.stop_ids


def test_where_the_chat_template_lies(folder: tuple[Path, Any], tmp_path: Path):
    assert "im_end" in (read_chat_template(folder[0]) or "")
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert read_chat_template(tmp_path) == "jinja"


@pytest.mark.parametrize("profile", ["int8", "int4", "balanced"])
def test_a_quantised_folder_holds_what_load_would_round_to(
    folder: tuple[Path, Any], tmp_path: Path, profile: str
):
    out = edgeformer.quantize(folder[0], tmp_path / "q", profile=profile)
    source, own = open_checkpoint(folder[0]), QuantizedCheckpoint(out)
    assert isinstance(open_checkpoint(out), QuantizedCheckpoint)
    for name in own.config.matrices():
        want, got = source.weight(name).dequantize(), own.weight(name).dequantize()
        limit = 0.01 if own.format(name).bits == 8 else 0.1
        assert (want - got).norm() / want.norm() < limit
    assert edgeformer.plan(out) == edgeformer.plan(folder[0], quantize=profile)
    assert own.tokenizer().encode("hello") == read_tokenizer(folder[0]).encode("hello")
    assert own.metadata["tokenizer.chat_template"] == read_chat_template(folder[0])
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_survives_the_file(name: str):
    weight = CanonicalWeight.from_float(torch.randn(5, 256), FORMATS[name])
    back = restored(weight.format, weight.k, stored(weight))
    assert all(torch.equal(back.tensors()[part], tensor) for part, tensor in weight.tensors().items())


@pytest.mark.parametrize(
    "fmt", [WeightFormat.int4(32, zero="minimum"), WeightFormat.int4(), WeightFormat.int8()]
)
def test_the_range_search_never_loses_to_plain_rounding(fmt: WeightFormat):
    weight = torch.randn(37, 100) * torch.rand(37, 1)
    weight[3, 5] = 30.0  # an outlier
    plain = (CanonicalWeight.from_float(weight, fmt).dequantize() - weight).square()
    found = (round_to(weight, fmt).dequantize() - weight).square()
    assert found.sum() <= plain.sum()
    if fmt.bits == 4:
        assert found[0].sum() < plain[0].sum()


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.config.matrices():
        checkpoint.weight(name)


def refused(path: Path, error: type[EdgeFormerError], match: str) -> None:
    with pytest.raises(error, match=match):
        read_all(path)


def test_pickles_are_refused(folder: tuple[Path, Any], tmp_path: Path):
    shutil.copy(folder[0] / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refused(tmp_path, UnsupportedError, "pickle")


def test_code_of_the_folder_is_never_run(folder: tuple[Path, Any], tmp_path: Path):
    copy = Path(shutil.copytree(folder[0], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "evil.py").write_text("raise SystemExit('it was run')")
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.warns(RuntimeWarning, match="not run"):
        open_checkpoint(copy)
    strange = config | {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "strange"}
    (copy / "config.json").write_text(json.dumps(strange))
    refused(copy, UnsupportedError, "never run")
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(copy, UnsupportedError, "gptq")


@pytest.mark.parametrize(
    ("file", "content", "error", "match"),
    [
        ("config.json", "{", FormatError, "damaged"),
        ("config.json", "[" * 100_000, FormatError, "damaged"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../../x.safetensors"}}',
            FormatError,
            "lies in",
        ),
        ("model.safetensors.index.json", "{}", FormatError, "weight_map"),
        ("model-00001-of-*.safetensors", "\x00" * 64, FormatError, "damaged"),
    ],
)
def test_damage_is_a_typed_error(
    folder: tuple[Path, Any],
    tmp_path: Path,
    file: str,
    content: str,
    error: type[EdgeFormerError],
    match: str,
):
    copy = Path(shutil.copytree(folder[0], tmp_path / "copy"))
    next(copy.glob(file)).write_text(content)
    refused(copy, error, match)


def test_a_missing_shard_and_a_folder_of_nothing(folder: tuple[Path, Any], tmp_path: Path):
    copy = Path(shutil.copytree(folder[0], tmp_path / "copy"))
    next(copy.glob("model-00002*")).unlink()
    refused(copy, FormatError, "cannot read")
    refused(tmp_path, FormatError, "no model")


def test_evaluation_against_another_model(make_gguf: Callable[..., Any]):
    from edgeformer.model.evaluate import evaluate, read_text

    name, words = read_text(None)
    assert "General Public License" in name and len(words) > 30_000
    path = make_gguf("F32").path
    model = edgeformer.load(
        path, context=64, quantize="int8", activation="float", kv="fp32", whole_step=False
    )
    reference = Decoder.from_checkpoint(open_checkpoint(path), context=64)
    found = evaluate(model, words[:200], window=64, max_tokens=128, reference=reference)
    same = evaluate(model, words[:200], window=64, max_tokens=128)
    assert abs(same.mean_kl) < 1e-6 < found.mean_kl < 0.1
