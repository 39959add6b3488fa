"""What is fuzzed: a target writes a mutated input and gives the call that must end well or typed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...model.compress.quantize_folder import quantize_model
from ...model.load import manifest
from ...model.load.chat import render_chat
from ...model.load.config_json import config_from_json
from ...model.load.gguf import GGUFCheckpoint
from ...model.load.skeleton import SkeletonCheckpoint
from ...model.load.tokenizer import ModelTokenizer
from ...model.loading import open_checkpoint
from ...model.run_folder import folder_target
from . import corpus, mutate

Case = tuple[int, Callable[[], Any]]  # bytes of the input, and the call
MESSAGES = [{"role": "user", "content": "What is it? " * 20}, {"role": "assistant", "content": "a"}]


def _read_all(checkpoint: Any) -> None:
    for name in checkpoint.config.matrices():
        checkpoint.weight(name)
    for name in checkpoint.config.vectors():
        checkpoint.vector(name)
    make = getattr(checkpoint, "tokenizer", None)
    if make is not None:
        make().encode("hello")


def gguf(folder: Path, rng: random.Random) -> Case:
    """A GGUF file: header, weights, tokenizer."""
    path = folder / "model.gguf"
    path.write_bytes(mutate.gguf(rng))

    def call() -> None:
        checkpoint = GGUFCheckpoint(path)
        _read_all(checkpoint)
        ModelTokenizer(checkpoint.metadata, path).encode("hello")

    return path.stat().st_size, call


def hugging_face(folder: Path, rng: random.Random) -> Case:
    """A Hugging Face folder: config, safetensors (single or shards), tokenizer, template."""
    files = corpus.hf_files()
    name = rng.choice(list(files))
    if rng.random() < 0.3:
        files["model-00001.safetensors"] = files.pop("model.safetensors")
        table = dict.fromkeys(corpus.SHAPES, "model-00001.safetensors")
        index = {"metadata": {}, "weight_map": table}
        files["model.safetensors.index.json"] = mutate.json_bytes(index, rng)
    elif name == "model.safetensors":
        files[name] = mutate.safetensors(rng)
    else:
        files[name] = mutate.json_bytes(json.loads(files[name]), rng)
    corpus.write_folder(folder, files)

    def call() -> None:
        _read_all(open_checkpoint(folder))

    return sum(map(len, files.values())), call


_quantised: dict[str, bytes] = {}


def quantised(folder: Path, rng: random.Random) -> Case:
    """A folder of `edgeformer quantize`."""
    if not _quantised:
        corpus.write_folder(folder / "source", corpus.hf_files())
        quantize_model(folder / "source", folder / "quantised")
        _quantised.update({p.name: p.read_bytes() for p in (folder / "quantised").iterdir()})
    files = dict(_quantised)
    name = rng.choice(list(files))
    if name.endswith(".json"):
        files[name] = mutate.json_bytes(json.loads(files[name]), rng)
    else:
        files[name] = mutate.bytes_of(files[name], rng, 3000)
    target = folder / "case"
    corpus.write_folder(target, files)

    def call() -> None:
        _read_all(open_checkpoint(target))

    return sum(map(len, files.values())), call


def compiled(folder: Path, rng: random.Random) -> Case:
    """A compiled folder's manifest."""
    weights, kernel = b"\0" * 4096, b"\x7fELF"
    corpus.write_folder(folder / "case" / "kernels", {"0.so": kernel})
    corpus.write_folder(folder / "case", {manifest.WEIGHTS: weights})
    files = {n: manifest.file_entry(folder / "case" / n) for n in (manifest.WEIGHTS, "kernels/0.so")}
    fmt = {"dtype": "int", "bits": 4, "group_size": 32, "scale_dtype": "float16", "zero": "constant"}
    data = {
        "kind": "compiled", "schema": manifest.SCHEMA, "versions": {"edgeformer": "1"}, "sources": "0",
        "target": {"name": "x", "arch": "x86_64", "mcpu": "x", "isa": "portable", "features": ["a"],
                   "cores": 1, "backends": ["tvm_llvm"]},
        "options": {"context": 64, "kv": "bf16", "activation": "auto"}, "checked": {},
        "config": {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_layers": 1,
                   "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "max_context": 64},
        "checkpoint": {"formats": [fmt], "weights": {"embed": [0, 300, 64]}, "vectors": {"norm": [64]}},
        "weights": {"packed": {"embed": [0, 64, "n32.unsigned"]}, "tensors": {"norm": [0, "float32", [64]]}},
        "kernels": [{"operator": "norm", "form": "tvm_cpu", "spec": "s", "configuration": "{}",
                     "file": "kernels/0.so"}],
        "files": files,
    }  # fmt: skip
    raw = mutate.json_bytes(data, rng)
    (folder / "case" / manifest.NAME).write_bytes(raw)

    def call() -> None:
        opened = manifest.open_folder(folder / "case", trust=True)
        opened.verify()
        folder_target(opened)
        config = config_from_json(opened.data["config"], folder)
        skeleton = SkeletonCheckpoint(opened.data["checkpoint"], config, folder)
        skeleton.weight("embed")
        skeleton.vector("norm")

    return len(raw) + len(weights), call


def templates(folder: Path, rng: random.Random) -> Case:
    """A chat template that does what it must not."""
    source = corpus.template(rng)
    return 16 << 20, lambda: render_chat(source, MESSAGES, bos_token="<s>", eos_token="</s>")


TARGETS: dict[str, Callable[[Path, random.Random], Case]] = {
    "gguf": gguf, "hugging_face": hugging_face, "quantised": quantised, "compiled": compiled,
    "templates": templates,
}  # fmt: skip
