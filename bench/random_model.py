"""Write a Llama-shaped GGUF of random Q4_0 weights, for measuring sizes that no small package ships.

    python -m edgeformer.bench.random_model OUT.gguf --tokenizer-from SmolLM2-135M-Instruct.Q4_1.gguf

The default is 1.07 billion weights (606 MB): hidden 2048, 16 layers, heads 32/8 x 64, MLP 8192,
vocabulary 49152, every layer its own bytes, embedding and head tied. Needs the package gguf.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

BLOCK_WEIGHTS, BLOCK_BYTES = 32, 18  # Q4_0: an fp16 scale and 32 codes of 4 bits


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-shaped decoder."""

    hidden: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    mlp: int = 8192
    vocab: int = 49152
    context: int = 8192

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return every quantised tensor's name and [rows, columns]."""
        d, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {"token_embd.weight": (self.vocab, d)}
        for i in range(self.layers):
            b = f"blk.{i}."
            found |= {
                b + "attn_q.weight": (q, d), b + "attn_k.weight": (kv, d), b + "attn_v.weight": (kv, d),
                b + "attn_output.weight": (d, q), b + "ffn_gate.weight": (self.mlp, d),
                b + "ffn_up.weight": (self.mlp, d), b + "ffn_down.weight": (d, self.mlp),
            }  # fmt: skip
        return found


def random_q4_0(rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """Return random Q4_0 blocks [rows, bytes]; values have a standard deviation of about 1/sqrt(columns)."""
    blocks = random.integers(0, 256, (rows * columns // BLOCK_WEIGHTS, BLOCK_BYTES), dtype=np.uint8)
    scale = random.uniform(0.8, 1.2, len(blocks)) / (4.6 * columns**0.5)
    blocks[:, :2] = scale.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, tokenizer_from: Path, shape: Shape, seed: int = 0) -> None:
    """Write the file; the tokenizer is copied, so that every engine can load it."""
    try:
        import gguf
    except ImportError as error:
        raise typer.BadParameter("writing GGUF files needs the package gguf: pip install gguf") from error

    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random-{shape.hidden}x{shape.layers}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    _copy_tokenizer(gguf, writer, tokenizer_from, shape.vocab)
    q4_0, ones = gguf.GGMLQuantizationType.Q4_0, np.ones(shape.hidden, dtype=np.float32)
    for i in range(shape.layers):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    for name, (rows, columns) in shape.matrices().items():
        writer.add_tensor(name, random_q4_0(rows, columns, random), raw_dtype=q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(gguf: Any, writer: Any, source: Path, vocab: int) -> None:
    reader = gguf.GGUFReader(source)
    if len(reader.fields["tokenizer.ggml.tokens"].data) != vocab:
        raise typer.BadParameter(f"{source} has another vocabulary than {vocab} tokens")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kinds = field.types
            inner = kinds[1] if len(kinds) > 1 else None
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=inner)


def main(
    path: Annotated[Path, typer.Argument(help="the file to write")],
    tokenizer_from: Annotated[Path, typer.Option(help="a GGUF whose tokenizer is copied")],
    hidden: int = 2048,
    layers: int = 16,
    heads: int = 32,
    kv_heads: int = 8,
    mlp: int = 8192,
    vocab: int = 49152,
) -> None:
    """Write a Llama-shaped GGUF of random Q4_0 weights."""
    shape = Shape(hidden, layers, heads, kv_heads, hidden // heads, mlp, vocab)
    write(path, tokenizer_from, shape)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.0f} MB", err=True)


if __name__ == "__main__":
    typer.run(main)
