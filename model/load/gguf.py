"""A GGUF file as a checkpoint: its config, its weights one at a time and without loss, its tokenizer data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ...compiler.errors import FormatError, UnsupportedError
from ...kernels.quant_matmul import CanonicalWeight, WeightFormat
from ..config import DecoderConfig
from .container import Container, TensorInfo

GROUP = 32  # elements of a block of every quantised type here

FORMATS = {
    "F32": WeightFormat.float("float32"),
    "F16": WeightFormat.float("float16"),
    "BF16": WeightFormat.float("bfloat16"),
    "Q4_0": WeightFormat.int4(GROUP, zero="constant"),
    "Q4_1": WeightFormat.int4(GROUP, zero="minimum"),
    "Q8_0": WeightFormat.int8(GROUP),
}

# our names -> GGUF's; {i} is the layer
LAYER_WEIGHTS = {
    "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight", "o": "attn_output.weight",
    "gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight",
}  # fmt: skip
LAYER_VECTORS = {"attn_norm": "attn_norm.weight", "mlp_norm": "ffn_norm.weight"}
LAYER_BIASES = {"q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"}
GLOBAL = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
ROPE_FACTORS = "rope_freqs.weight"

# architectures with this decoder's arithmetic; True: q and k rows lie interleaved and are put half-split
ARCHITECTURES = {"llama": True, "qwen2": False}


def decode_blocks(raw: np.ndarray, info: TensorInfo) -> CanonicalWeight:
    """A matrix's bytes as a canonical weight, bit for bit.

    ``raw`` is uint8 and may be taken over. Blocks: https://github.com/ggml-org/ggml (ggml-common.h).
    """
    n, k = info.shape
    fmt = FORMATS[info.type]
    if fmt.is_float:
        return CanonicalWeight(fmt, torch.from_numpy(raw).view(fmt.torch_dtype).view(n, k))
    header = 4 if info.type == "Q4_1" else 2  # scale, and the minimum
    blocks = raw.reshape(n, k // GROUP, -1)
    scales = np.ascontiguousarray(blocks[:, :, :header]).view(np.float16)
    scale = torch.from_numpy(np.ascontiguousarray(scales[:, :, 0]))
    zero = torch.from_numpy(np.ascontiguousarray(scales[:, :, 1])) if header == 4 else None
    packed = blocks[:, :, header:]
    if info.type == "Q8_0":
        codes = np.ascontiguousarray(packed).view(np.int8)
    else:  # low nibbles are elements 0..15 of the block, high nibbles 16..31
        codes = np.empty((n, k // GROUP, GROUP), dtype=np.uint8)
        np.bitwise_and(packed, 15, out=codes[:, :, : GROUP // 2])
        np.right_shift(packed, 4, out=codes[:, :, GROUP // 2 :])
    return CanonicalWeight(fmt, torch.from_numpy(codes).view(n, k), scale, zero)


def half_split_rows(num_heads: int, head_dim: int, rotary: int) -> torch.Tensor:
    """Row order that turns interleaved rotary pairs (2i, 2i+1) into half-split ones (i, i + rotary/2)."""
    head = torch.cat(
        [torch.arange(rotary).view(rotary // 2, 2).t().reshape(-1), torch.arange(rotary, head_dim)]
    )
    return (torch.arange(num_heads)[:, None] * head_dim + head).reshape(-1)


class GGUFCheckpoint:
    """Weights of a Llama-family GGUF file under our names (``embed``, ``layers.3.q``, ``norm``, ...).

    Raises FormatError for a missing, damaged or inconsistent file, UnsupportedError for an
    architecture, option or tensor type that is not implemented.
    """

    def __init__(self, path: str | Path) -> None:
        self.container = Container(path)
        self.path = self.container.path
        self.metadata = self.container.metadata
        try:
            self.config = self._read_config()
        except (FormatError, UnsupportedError) as error:
            if str(self.path) in str(error):
                raise
            raise type(error)(f"{self.path}: {error}") from error
        self._check_tensors()

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"{self.path}: the key {key!r} is {value!r}, not a whole number")
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{self.path}: the key {key!r} is {value!r}, not a number")
        return float(value)

    def _read_config(self) -> DecoderConfig:
        arch = self.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise UnsupportedError(
                f"{self.path}: the architecture {arch!r} is not supported ({', '.join(ARCHITECTURES)} are)"
            )
        if self.metadata.get(f"{arch}.expert_count", 0):
            raise UnsupportedError(
                f"{self.path}: mixtures of experts ({arch}.expert_count) are not supported"
            )
        if self.metadata.get(f"{arch}.attention.sliding_window", 0):
            raise UnsupportedError(f"{self.path}: sliding-window attention is not supported")
        hidden = self._integer(f"{arch}.embedding_length")
        heads = self._integer(f"{arch}.attention.head_count")
        if heads < 1 or hidden < 1:
            raise FormatError(f"{self.path}: {heads} heads in a hidden size of {hidden}")
        head_dim = self._integer(f"{arch}.attention.key_length", hidden // heads)
        if self._integer(f"{arch}.attention.value_length", head_dim) != head_dim:
            raise UnsupportedError(f"{self.path}: values and keys of different head sizes are not supported")
        rotary = self._integer(f"{arch}.rope.dimension_count", head_dim)
        embed = self.container.info(GLOBAL["embed"])
        eos = [self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        bos = self.metadata.get("tokenizer.ggml.bos_token_id")
        return DecoderConfig(
            vocab_size=embed.shape[0],
            hidden_size=hidden,
            intermediate_size=self._integer(f"{arch}.feed_forward_length"),
            num_layers=self._integer(f"{arch}.block_count"),
            num_heads=heads,
            num_kv_heads=self._integer(f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_context=self._integer(f"{arch}.context_length"),
            rope_theta=self._float(f"{arch}.rope.freq_base", 10000.0),
            rotary_dim=None if rotary == head_dim else rotary,
            rope_scale=self._rope_scale(arch),
            rope_factors=self._rope_factors(),
            norm_eps=self._float(f"{arch}.attention.layer_norm_rms_epsilon"),
            tie_embeddings=GLOBAL["head"] not in self.container.tensors,
            attention_bias="blk.0.attn_q.bias" in self.container.tensors,
            bos_token_id=bos if isinstance(bos, int) else None,
            eos_token_ids=tuple(sorted({i for i in eos if isinstance(i, int)})),
            architecture=arch,
        )

    def _rope_scale(self, arch: str) -> float:
        kind = self.metadata.get(f"{arch}.rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise UnsupportedError(
                f"{self.path}: rope scaling {kind!r} is not supported (none and linear are)"
            )
        old = self._float(f"{arch}.rope.scale_linear", 1.0)
        return 1.0 if kind == "none" else self._float(f"{arch}.rope.scaling.factor", old) or 1.0

    def _rope_factors(self) -> tuple[float, ...] | None:
        if ROPE_FACTORS not in self.container.tensors:
            return None
        return tuple(self._vector(ROPE_FACTORS).tolist())

    def _file_name(self, name: str) -> str:
        if name in GLOBAL:
            return GLOBAL[name]
        _, layer, part = name.split(".")
        return f"blk.{layer}." + {**LAYER_WEIGHTS, **LAYER_VECTORS, **LAYER_BIASES}[part]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Our name -> (N, K) of every linear weight, in the order of the decoder."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        shapes = {"q": (q, c.hidden_size), "k": (kv, c.hidden_size), "v": (kv, c.hidden_size),
                  "o": (c.hidden_size, q), "gate": (c.intermediate_size, c.hidden_size),
                  "up": (c.intermediate_size, c.hidden_size),
                  "down": (c.hidden_size, c.intermediate_size)}  # fmt: skip
        table = {"embed": (c.vocab_size, c.hidden_size)}
        for layer in range(c.num_layers):
            table |= {f"layers.{layer}.{part}": shape for part, shape in shapes.items()}
        return table if c.tie_embeddings else {**table, "head": (c.vocab_size, c.hidden_size)}

    def _vectors(self) -> Iterator[tuple[str, int]]:
        c = self.config
        biases = {"q_bias": c.num_heads, "k_bias": c.num_kv_heads, "v_bias": c.num_kv_heads}
        for layer in range(c.num_layers):
            for part in LAYER_VECTORS:
                yield f"layers.{layer}.{part}", c.hidden_size
            for part, heads in biases.items() if c.attention_bias else ():
                yield f"layers.{layer}.{part}", heads * c.head_dim
        yield "norm", c.hidden_size

    def _check_tensors(self) -> None:
        """Every expected tensor is there in its shape, and no other: ignoring one would be silently wrong."""
        if self.config.num_layers > len(self.container.tensors):
            raise FormatError(f"{self.path}: {self.config.num_layers} layers, but too few tensors for them")
        expected = {self._file_name(name): shape for name, shape in self.matrices().items()}
        expected |= {self._file_name(name): (size,) for name, size in self._vectors()}
        for name, shape in expected.items():
            found = self.container.info(name).shape
            if found != shape:
                raise FormatError(f"{self.path}: the tensor {name!r} has the shape {found}, expected {shape}")
        extra = sorted(set(self.container.tensors) - set(expected) - {ROPE_FACTORS})
        if extra:
            names = ", ".join(extra[:3])
            raise UnsupportedError(
                f"{self.path}: {len(extra)} tensors have no place in this decoder: {names}"
            )

    def format(self, name: str) -> WeightFormat:
        """The format of a matrix, without reading it."""
        return FORMATS[self.container.info(self._file_name(name)).type]

    def weight(self, name: str) -> CanonicalWeight:
        """One matrix; queries and keys are put half-split by moving whole rows."""
        info = self.container.info(self._file_name(name))
        weight = decode_blocks(self.container.read(info.name), info)
        self._require_finite(info.name, weight.codes if weight.scale is None else weight.scale)
        if weight.zero is not None:
            self._require_finite(info.name, weight.zero)
        part = name.rsplit(".", 1)[-1]
        return weight.rows(self._rotary_rows(part)) if self._moves(part) else weight

    def vector(self, name: str) -> torch.Tensor:
        """One norm weight or bias, float32."""
        part = name.rsplit(".", 1)[-1]
        values = self._vector(self._file_name(name))
        return values[self._rotary_rows(part)] if self._moves(part) else values

    def _vector(self, file_name: str) -> torch.Tensor:
        info = self.container.info(file_name)
        fmt = FORMATS[info.type]
        if not fmt.is_float:
            raise UnsupportedError(
                f"{self.path}: the vector {file_name!r} has the type {info.type}, not a float"
            )
        values = torch.from_numpy(self.container.read(file_name)).view(fmt.torch_dtype).float()
        self._require_finite(file_name, values)
        return values

    def _moves(self, part: str) -> bool:
        return ARCHITECTURES[self.config.architecture] and part in ("q", "k", "q_bias", "k_bias")

    def _rotary_rows(self, part: str) -> torch.Tensor:
        c = self.config
        return half_split_rows(c.num_heads if part[0] == "q" else c.num_kv_heads, c.head_dim, c.rotary)

    def _require_finite(self, name: str, values: torch.Tensor) -> None:
        if not torch.isfinite(values).all():
            raise FormatError(f"{self.path}: the tensor {name!r} holds NaN or Inf; the file is damaged")
