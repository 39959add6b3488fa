"""A GGUF file's metadata as a ModelConfig, and where each of our weights lies in it.

Keys and tensor names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's gguf-py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...compiler.errors import FormatError, UnsupportedError
from ..config import ModelConfig, check_layers
from ..rope import Rope, longrope_attention_factor, yarn_attention_factor
from .container import TensorInfo

EMBED, HEAD = "token_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
_PARTS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down", "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm",
}  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """What an architecture's name says, and no key does."""

    interleaved: bool = False  # its rows of q and k lie in rotary pairs (2i, 2i + 1); ours are half-split
    gemma: bool = False
    period: int = 0  # the last of so many layers sees everything, the others have the window; 0: all have it
    wide_layers: int = 0  # with so many layers, scores are scaled by hidden_size / num_heads (the 27B models)


ARCHITECTURES = {
    "llama": _Family(interleaved=True),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "gemma2": _Family(gemma=True, period=2, wide_layers=46),
    "gemma3": _Family(gemma=True, period=6, wide_layers=62),
    "phi3": _Family(),
}


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], vector: Callable[[str], Tensor]
) -> ModelConfig:
    """What a file's keys, tensor table and rope factors (read by ``vector``) say about a decoder.

    Raises UnsupportedError for an architecture or option that no layer implements, FormatError for a key
    that is missing or makes no sense.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UnsupportedError(f"the architecture {arch!r} is not supported ({', '.join(ARCHITECTURES)} are)")
    return _Reader(metadata, tensors, vector, arch).model()


def tensor_of(
    config: ModelConfig, name: str, tensors: Mapping[str, TensorInfo]
) -> tuple[str, tuple[int, int] | None]:
    """Return the name of the tensor that holds our weight ``name``, and its rows there (None: all)."""
    if name in ("embed", "norm", "head"):
        return {"embed": EMBED, "norm": "output_norm.weight", "head": HEAD}[name], None
    _, layer, part = name.split(".")
    at = f"blk.{layer}."
    q, kv, f = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.intermediate_size,
    )
    if part in ("q", "k", "v") and f"{at}attn_qkv.weight" in tensors:
        starts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        return f"{at}attn_qkv.weight", starts[part]
    if part in ("gate", "up") and config.architecture == "phi3":
        return f"{at}ffn_up.weight", (0, f) if part == "gate" else (f, 2 * f)
    if part.endswith("_bias"):
        return f"{at}{_PARTS[part.removesuffix('_bias')]}.bias", None
    return f"{at}{_PARTS[part]}.weight", None


class _Reader:
    """Typed look-ups of one file's keys."""

    def __init__(
        self, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo],
        vector: Callable[[str], Tensor], arch: str,
    ) -> None:  # fmt: skip
        self.metadata, self.tensors, self.vector, self.arch = metadata, tensors, vector, arch
        self.family = ARCHITECTURES[arch]

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"the key {self.arch + '.' + key!r} is {value!r}, not a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"the key {self.arch + '.' + key!r} is {value!r}, not a number")
        return float(value)

    def model(self) -> ModelConfig:
        if self.get("expert_count"):
            raise UnsupportedError(f"mixtures of experts ({self.arch}.expert_count) are not supported")
        hidden, heads = self.integer("embedding_length"), self.integer("attention.head_count")
        if heads < 1 or hidden < 1:
            raise FormatError(f"{heads} heads in a hidden size of {hidden}")
        layers = self.integer("block_count")
        check_layers(layers)
        head_dim = self.integer("attention.key_length", hidden // heads)
        if self.integer("attention.value_length", head_dim) != head_dim:
            raise UnsupportedError("values and keys of different head sizes are not supported")
        rotary = self.integer("rope.dimension_count", head_dim)
        if EMBED not in self.tensors:
            raise FormatError(f"the tensor {EMBED!r} is missing")
        windows = self._windows(layers)
        rope = self._rope()
        gemma = self.family.gemma
        bos = self.metadata.get("tokenizer.ggml.bos_token_id")
        eos = [self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        return ModelConfig(
            vocab_size=self.tensors[EMBED].shape[0],
            hidden_size=hidden,
            intermediate_size=self.integer("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_context=self.integer("context_length"),
            rope=rope,
            local_rope=self._local_rope(rope) if any(windows) else None,
            rotary_dim=None if rotary == head_dim else rotary,
            windows=windows,
            norm_eps=self.number("attention.layer_norm_rms_epsilon"),
            qk_norm=self.arch in ("qwen3", "gemma3"),
            post_norms=gemma,
            activation="gelu_tanh" if gemma else "silu",
            attention_scale=self._attention_scale(hidden, heads, layers),
            attention_softcap=self.number("attn_logit_softcapping", 50.0) if self.arch == "gemma2" else 0.0,
            logit_softcap=self._logit_softcap(),
            embedding_scale=math.sqrt(hidden) if gemma else 1.0,
            attention_bias=self._has("attn_q.bias"),
            o_bias=self._has("attn_output.bias"),
            mlp_bias=self._has("ffn_down.bias"),
            tie_embeddings=HEAD not in self.tensors,
            bos_token_id=bos if isinstance(bos, int) else None,
            eos_token_ids=tuple(sorted({i for i in eos if isinstance(i, int)})),
            architecture=self.arch,
        )

    def _has(self, part: str) -> bool:
        return f"blk.0.{part}" in self.tensors

    def _attention_scale(self, hidden: int, heads: int, layers: int) -> float | None:
        scale = self.number("attention.scale", 0.0)
        if scale < 0:
            raise FormatError(f"the key '{self.arch}.attention.scale' is {scale}, not positive")
        if not scale and self.family.gemma and layers == self.family.wide_layers:
            return (hidden // heads) ** -0.5
        return scale or None

    def _logit_softcap(self) -> float:
        defaults = {"gemma2": 30.0, "gemma3": 0.0}
        return self.number("final_logit_softcapping", defaults[self.arch]) if self.arch in defaults else 0.0

    def _windows(self, layers: int) -> tuple[int, ...]:
        window = self.integer("attention.sliding_window", 4096 if self.arch == "gemma2" else 0)
        if window < 0:
            raise FormatError(f"the key '{self.arch}.attention.sliding_window' is {window}, not positive")
        pattern = self.get("attention.sliding_window_pattern")
        if not window:
            return ()
        if pattern is None and self.arch.startswith("qwen"):
            raise UnsupportedError(
                f"{self.arch}.attention.sliding_window does not say which layers have the window"
            )
        if isinstance(pattern, list):
            if len(pattern) != layers:
                raise FormatError(f"a sliding_window_pattern of {len(pattern)} entries for {layers} layers")
            slides = [bool(entry) for entry in pattern]
        else:
            period = self.integer("attention.sliding_window_pattern", self.family.period)
            slides = [not period or i % period < period - 1 for i in range(layers)]
        return tuple(window if slide else 0 for slide in slides) if any(slides) else ()

    def _rope(self) -> Rope:
        theta = self.number("rope.freq_base", 10000.0)
        kind = self.get("rope.scaling.type")
        if kind not in (None, "none", "linear", "yarn", "longrope"):
            raise UnsupportedError(
                f"rope scaling {kind!r} is not supported (none, linear, yarn and longrope are)"
            )
        context = self.integer("context_length")
        original = self.integer("rope.scaling.original_context_length", context)
        extra = self.number("rope.scaling.attn_factor", 0.0)
        if LONG_FACTORS in self.tensors or SHORT_FACTORS in self.tensors or kind == "longrope":
            scale = extra or longrope_attention_factor(context / max(original, 2), max(original, 2))
            short, long = self._factors(SHORT_FACTORS), self._factors(LONG_FACTORS)
            return Rope(theta, "longrope", 1.0, original, attention_factor=scale, factors=short,
                        long_factors=long)  # fmt: skip
        factors = self._factors(ROPE_FACTORS)
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0)) or 1.0
        if kind == "yarn":
            return self._yarn(theta, factor, original, extra or 1.0, factors)
        if kind == "none" or factor == 1.0:
            return Rope(theta, factors=factors)
        return Rope(theta, "linear", factor, factors=factors)

    def _yarn(
        self, theta: float, factor: float, original: int, extra: float, factors: tuple[float, ...] | None
    ) -> Rope:
        if self.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
            raise UnsupportedError("rope scaling 'yarn' with an ext_factor other than 1 is not supported")
        if self.number("rope.scaling.yarn_log_multiplier", 0.0):
            raise UnsupportedError("rope scaling 'yarn' with a log multiplier is not supported")
        scale = extra * self.number("rope.scaling.yarn_attn_factor", 1.0) * yarn_attention_factor(factor)
        return Rope(
            theta, "yarn", factor, original, attention_factor=scale, factors=factors,
            beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
        )  # fmt: skip

    def _local_rope(self, rope: Rope) -> Rope | None:
        """Gemma 3's layers with a window turn by another base, and without scaling."""
        if self.arch == "gemma3":
            local = Rope(self.number("rope.freq_base_swa", 10000.0))
            return None if local == rope else local
        if self.get("rope.freq_base_swa") not in (None, rope.theta):
            raise UnsupportedError(f"{self.arch}.rope.freq_base_swa is supported for gemma3 only")
        return None

    def _factors(self, name: str) -> tuple[float, ...] | None:
        return tuple(self.vector(name).tolist()) if name in self.tensors else None
