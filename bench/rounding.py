"""What rounding costs where weights were never rounded: `python -m edgeformer.bench.rounding lm|bert FOLDER`.

`lm` trains a small byte-level language model on text of the Python that runs it (some minutes of CPU), writes
it as a Hugging Face folder, quantises that with every profile and evaluates each on text it has not seen.
`bert` rounds the linear weights of a BERT encoder (config.json, safetensors) and gives the cosine between the
embeddings of sentences before and after, mean-pooled as sentence-transformers does.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.quant_matmul import CanonicalWeight
from ..model.compress.quantize_folder import quantize_model
from ..model.compress.range_search import round_to
from ..model.load.json_file import read_object
from ..model.load.quantized import QuantizedCheckpoint
from ..model.load.tensors import TensorFolder
from ..model.requantise import INT4, INT8, PROFILES

HIDDEN, MLP, LAYERS, HEADS, HEAD, CONTEXT, VOCAB = 128, 384, 3, 4, 32, 128, 256
EPS, THETA = 1e-5, 10000.0


def training_text() -> str:
    """English about Python: the help topics that come with it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


class ByteModel(nn.Module):
    """A Llama over bytes, in plain PyTorch."""

    layers: Any
    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        nn.init.normal_(self.embed.weight, std=HIDDEN**-0.5)  # the head too: logits of about 1
        sizes = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN),
                 "o_proj": (HIDDEN, HIDDEN), "gate_proj": (HIDDEN, MLP), "up_proj": (HIDDEN, MLP),
                 "down_proj": (MLP, HIDDEN)}  # fmt: skip
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}
                          | {"first": nn.RMSNorm(HIDDEN, EPS), "second": nn.RMSNorm(HIDDEN, EPS)})
            for _ in range(LAYERS)
        )  # fmt: skip
        self.norm = nn.RMSNorm(HIDDEN, EPS)
        frequency = THETA ** (-torch.arange(0, HEAD, 2) / HEAD)
        angle = torch.arange(CONTEXT)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, 256] of bytes [B, T]."""
        x = self.embed(ids)
        for layer in self.layers:
            normed = layer["first"](x)
            q, k, v = (layer[f"{n}_proj"](normed).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for n in "qkv")
            out = F.scaled_dot_product_attention(self._turn(q), self._turn(k), v, is_causal=True)
            x = x + layer["o_proj"](out.transpose(1, 2).flatten(-2))
            normed = layer["second"](x)
            x = x + layer["down_proj"](F.silu(layer["gate_proj"](normed)) * layer["up_proj"](normed))
        return self.norm(x) @ self.embed.weight.T

    def _turn(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder with a tokenizer of bytes."""
        from safetensors.torch import save_file
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        folder.mkdir(parents=True, exist_ok=True)
        state = {"model.embed_tokens.weight": self.embed.weight, "model.norm.weight": self.norm.weight}
        places = {"first": "input_layernorm", "second": "post_attention_layernorm"}
        for i, layer in enumerate(self.layers):
            for name, module in layer.items():
                part = "self_attn" if name[0] in "qkvo" else "mlp"
                place = places.get(name) or f"{part}.{name}"
                state[f"model.layers.{i}.{place}.weight"] = module.weight
        save_file({name: t.detach().contiguous() for name, t in state.items()}, folder / "model.safetensors")
        config = {
            "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP, "rms_norm_eps": EPS,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
            "head_dim": HEAD, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rope_theta": THETA,
            "tie_word_embeddings": True,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        from ..model.load.tokenizer import BYTES

        tokenizer = Tokenizer(models.BPE(dict(BYTES), []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))


def train(seconds: float, seed: int = 0) -> tuple[ByteModel, str, float]:
    """Train for some seconds of CPU time; return the model, text that it has not seen, and the last loss."""
    torch.manual_seed(seed)
    text = training_text()
    cut = len(text) * 9 // 10
    data = torch.tensor(list(text[:cut].encode()), dtype=torch.int64)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    start, step, loss = time.process_time(), 0, math.inf
    while (done := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - done)
        at = torch.randint(0, len(data) - CONTEXT - 1, (16,))
        rows = torch.stack([data[i : i + CONTEXT + 1] for i in at])
        out = model(rows[:, :-1])
        found = F.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = float(found.detach())
        step, loss = step + 1, now if step == 0 else 0.98 * loss + 0.02 * now
    return model.eval(), text[cut:], loss


def rounded(model: ByteModel, folder: Path) -> ByteModel:
    """A copy of the model with the weights of a quantised folder."""
    checkpoint, copy_ = QuantizedCheckpoint(folder), copy.deepcopy(model)
    copy_.embed.weight.data = checkpoint.weight("embed").dequantize()
    for i, layer in enumerate(copy_.layers):
        for name, module in layer.items():
            if name.endswith("_proj"):
                ours = name.removesuffix("_proj")
                module.weight.data = checkpoint.weight(f"layers.{i}.{ours}").dequantize()
    return copy_


@torch.inference_mode()
def compare(model: ByteModel, other: ByteModel, text: str, tokens: int) -> dict[str, float]:
    """Bits a byte of both, mean KL(model || other) in nats and agreement of the likeliest byte on a text."""
    ids = torch.tensor(list(text.encode()[:tokens]), dtype=torch.int64)
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    log_p, log_q = (F.log_softmax(m(rows)[:, :-1], -1) for m in (model, other))
    following = rows[:, 1:, None]
    bits = [float(-log.gather(-1, following).mean() / math.log(2)) for log in (log_p, log_q)]
    return {
        "bits_a_byte": bits[1],
        "bits_before": bits[0],
        "perplexity_change": 2 ** (bits[1] - bits[0]) - 1,
        "mean_kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1_agreement": float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()),
    }


def language_model(folder: Path, seconds: float, tokens: int) -> list[dict[str, Any]]:
    """Train, quantise with every profile, compare in plain PyTorch; one row each."""
    model, unseen, loss = train(seconds)
    print(f"training loss {loss / math.log(2):.2f} bits a byte", file=sys.stderr)
    model.save(folder / "model")
    rows = []
    for profile in PROFILES:
        quantised = quantize_model(folder / "model", folder / profile, profile=profile)
        rows.append({"profile": profile} | compare(model, rounded(model, quantised), unseen, tokens))
    return rows


SENTENCES = (
    "The cat sits on the mat.", "A feline rests upon a rug.", "Stock prices fell sharply on Monday.",
    "How do I reset my password?", "I forgot my login credentials; what now?", "The train leaves at noon.",
    "Photosynthesis turns light into chemical energy.", "He plays the violin in an orchestra.",
    "Rain is expected in the north tomorrow.", "The recipe needs two eggs and a cup of flour.",
    "Quantum computers use qubits.", "She ran the marathon in under four hours.",
)  # fmt: skip


def embeddings(tensors: dict[str, Tensor], config: dict[str, Any], rows: list[list[int]]) -> Tensor:
    """Mean-pooled, normalised embeddings of a BERT encoder [len(rows), hidden] (arXiv:1810.04805)."""
    heads, eps = config["num_attention_heads"], config.get("layer_norm_eps", 1e-12)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    found = []
    for ids in rows:
        x = tensors["embeddings.word_embeddings.weight"][ids]
        x = x + tensors["embeddings.position_embeddings.weight"][: len(ids)]
        x = norm(x + tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for i in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{i}."
            q, k, v = (
                linear(x, f"{at}attention.self.{n}").unflatten(-1, (heads, -1)).transpose(0, 1)
                for n in ("query", "key", "value")
            )
            out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
            x = norm(x + linear(out, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
            inner = F.gelu(linear(x, f"{at}intermediate.dense"))
            x = norm(x + linear(inner, f"{at}output.dense"), f"{at}output.LayerNorm")
        found.append(F.normalize(x.mean(0), dim=0))
    return torch.stack(found)


@torch.inference_mode()
def encoder(folder: Path) -> list[dict[str, Any]]:
    """Round the linear weights of a BERT folder; one row a rounding with the cosines to the original."""
    from tokenizers import Tokenizer

    config, files = read_object(folder / "config.json"), TensorFolder(folder)
    names = {name: name.removeprefix("bert.") for name in files.shapes}
    original = {own: files.read(name).float() for name, own in names.items() if files.types[name] == "F32"}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [tokenizer.encode(text).ids for text in SENTENCES]
    want = embeddings(original, config, ids)
    linear = [n for n, t in original.items() if t.dim() == 2 and ".layer." in n]
    rows = []
    for label, fmt, search in (("int8", INT8, True), ("int4", INT4, True), ("int4, no search", INT4, False)):
        rounder = round_to if search else CanonicalWeight.from_float
        rounded = original | {n: rounder(original[n], fmt).dequantize() for n in linear}
        got = embeddings(rounded, config, ids)
        cosine = (got * want).sum(-1)
        pairs = (got @ got.T - want @ want.T).abs().max()
        facts = {"mean_cosine": cosine.mean(), "least_cosine": cosine.min(), "largest_change": pairs}
        rows.append({"rounding": label} | {name: float(value) for name, value in facts.items()})
    return rows


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("lm", "bert"))
    parser.add_argument("folder", type=Path, help="lm: where to write; bert: where the model lies")
    parser.add_argument("--seconds", type=float, default=180.0, help="CPU time of the training")
    parser.add_argument("--tokens", type=int, default=8192, help="bytes to evaluate on")
    options = parser.parse_args()
    if options.what == "lm":
        rows = language_model(options.folder, options.seconds, options.tokens)
    else:
        rows = encoder(options.folder)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
