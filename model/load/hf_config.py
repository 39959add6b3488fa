"""A Hugging Face ``config.json`` as a ModelConfig, with transformers' defaults for each family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...compiler.errors import FormatError, UnsupportedError
from ..config import ModelConfig, check_layers
from ..rope import Rope, longrope_attention_factor, yarn_attention_factor

_COMMON: dict[str, Any] = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "sliding_window": None, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "layer_types": None,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_QWEN = {
    "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False,
    "max_window_layers": 28,
}  # fmt: skip
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "tie_word_embeddings": True, "use_bidirectional_attention": False,
}  # fmt: skip
# What a config.json may leave out, by its model_type; everything else must be there.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma2": _GEMMA | {
        "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA | {
        "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26,
    },
    "phi3": {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """What a ``config.json`` (as a dict) says about a decoder; of "gemma3" its text part.

    Raises:
        UnsupportedError: a model type, activation, rope scaling or option that no layer implements.
        FormatError: a number that is missing, or makes no sense.
    """
    kind = config.get("model_type")
    if kind == "gemma3":
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise FormatError("config.json of the type 'gemma3' has no text_config")
        config, kind = {**config, **text}, "gemma3_text"
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedError(f"the model type {kind!r} is not supported ({', '.join(FAMILIES)} are)")
    return _Reader(config, kind).model()


class _Reader:
    """Typed look-ups in one config.json, with the family's defaults."""

    def __init__(self, config: Mapping[str, Any], kind: str) -> None:
        self.given, self.kind = config, kind
        self.defaults = _COMMON | FAMILIES[kind]
        self.gemma = kind.startswith("gemma")

    def value(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        if name not in self.defaults:
            raise FormatError(f"config.json has no {name!r}, which the model type {self.kind!r} needs")
        return self.defaults[name]

    def integer(self, name: str) -> int:
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"config.json: {name!r} is {value!r}, not a whole number")
        return value

    def number(self, name: str) -> float:
        return _number(name, self.value(name))

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool | None):
            raise FormatError(f"config.json: {name!r} is {value!r}, not true or false")
        return bool(value)

    def model(self) -> ModelConfig:
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if hidden < 1 or heads < 1:
            raise FormatError(f"config.json: {heads} heads in a hidden size of {hidden}")
        layers = self.integer("num_hidden_layers")
        check_layers(layers)
        kv_heads = heads if self.value("num_key_value_heads") is None else self.integer("num_key_value_heads")
        head_dim = hidden // heads if self.value("head_dim") is None else self.integer("head_dim")
        biased = self.flag("attention_bias")
        rope, local, rotary = self._ropes(head_dim)
        eos = self.value("eos_token_id")
        bos = self.value("bos_token_id")
        return ModelConfig(
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_context=self.integer("max_position_embeddings"),
            rope=rope,
            local_rope=local,
            rotary_dim=None if rotary == head_dim else rotary,
            windows=self._windows(layers),
            norm_eps=self.number("rms_norm_eps"),
            qk_norm=self.kind in ("qwen3", "gemma3_text"),
            post_norms=self.gemma,
            activation=self._activation(),
            attention_scale=self._attention_scale(),
            attention_softcap=self._softcap("attn_logit_softcapping"),
            logit_softcap=self._softcap("final_logit_softcapping"),
            embedding_scale=math.sqrt(hidden) if self.gemma else 1.0,
            attention_bias=self.kind == "qwen2" or biased,
            o_bias=biased and self.kind != "qwen2",
            mlp_bias=self.kind == "llama" and self.flag("mlp_bias"),
            tie_embeddings=self.flag("tie_word_embeddings"),
            bos_token_id=bos if isinstance(bos, int) else None,
            eos_token_ids=_token_ids(eos),
            architecture=self.kind,
        )

    def _activation(self) -> str:
        name = self.value("hidden_activation" if self.gemma else "hidden_act")
        if self.gemma and name is None:
            name = "gelu_pytorch_tanh"
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise UnsupportedError(
                f"the activation {name!r} is not supported ({', '.join(_ACTIVATIONS)} are)"
            )
        return _ACTIVATIONS[name]

    def _attention_scale(self) -> float | None:
        if not self.gemma:
            return None
        scalar = self.number("query_pre_attn_scalar")
        if not scalar > 0:
            raise FormatError(f"config.json: 'query_pre_attn_scalar' is {scalar}, not positive")
        return scalar**-0.5

    def _softcap(self, name: str) -> float:
        value = self.value(name) if self.gemma else None
        if value is not None and name == "attn_logit_softcapping" and self.kind == "gemma3_text":
            raise UnsupportedError("Gemma 3 with attn_logit_softcapping: its reference does not apply it")
        return 0.0 if value is None else _number(name, value)

    def _windows(self, layers: int) -> tuple[int, ...]:
        if self.gemma and self.flag("use_bidirectional_attention"):
            raise UnsupportedError("bidirectional attention is not supported")
        if self.value("sliding_window") is None:
            return ()
        if self.kind.startswith("qwen") and not self.flag("use_sliding_window"):
            return ()
        if self.kind == "llama":  # has no window, whatever the file says
            return ()
        window = self.integer("sliding_window")
        if window < 1:
            raise FormatError(f"config.json: 'sliding_window' is {window}, not positive")
        found = tuple(window if slides else 0 for slides in self._sliding(layers))
        return found if any(found) else ()

    def _sliding(self, layers: int) -> list[bool]:
        """Which layers have the window."""
        if self.kind in ("mistral", "phi3"):
            return [True] * layers
        types = self.value("layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) != layers:
                raise FormatError(f"config.json: 'layer_types' does not name the type of {layers} layers")
            unknown = [t for t in types if t not in _LAYER_TYPES]
            if unknown:
                raise UnsupportedError(
                    f"the layer type {unknown[0]!r} is not supported ({', '.join(_LAYER_TYPES)} are)"
                )
            return [t == "sliding_attention" for t in types]
        if self.kind.startswith("qwen"):
            return [i >= self.integer("max_window_layers") for i in range(layers)]
        period = 2 if self.kind == "gemma2" else self.integer("sliding_window_pattern")
        if period < 1:
            raise FormatError(f"config.json: 'sliding_window_pattern' is {period}, not positive")
        return [(i + 1) % period != 0 for i in range(layers)]

    def _ropes(self, head_dim: int) -> tuple[Rope, Rope | None, int]:
        """The rotary positions of all layers, of those with a window where they differ, and their width."""
        given = self.given.get("rope_scaling") or self.given.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise FormatError(f"config.json: the rope parameters are {given!r}, not an object")
        full, sliding = given, given
        if any(name in given for name in _LAYER_TYPES):
            full, sliding = ({} if given.get(name) is None else given[name] for name in _LAYER_TYPES)
            if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
                raise FormatError("config.json: the rope parameters of a layer type are not an object")
        elif self.kind == "gemma3_text":
            sliding = {}
        rope = self._rope(full, self.number("rope_theta"))
        local_theta = "rope_local_base_freq" if self.kind == "gemma3_text" else "rope_theta"
        local = self._rope(sliding, self.number(local_theta))
        part = _number(
            "partial_rotary_factor", full.get("partial_rotary_factor", self.value("partial_rotary_factor"))
        )
        if not 0 < part <= 1:
            raise FormatError(f"config.json: 'partial_rotary_factor' is {part}, not between 0 and 1")
        return rope, None if local == rope else local, int(head_dim * part)

    def _rope(self, given: Mapping[str, Any], theta: float) -> Rope:
        name = given.get("rope_type", given.get("type", "default"))
        if self.kind == "phi3" and name in ("su", "yarn"):  # its older names
            name = "longrope"
        known = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn",
                 "longrope": "longrope"}  # fmt: skip
        if not isinstance(name, str) or name not in known:
            raise UnsupportedError(f"rope scaling {name!r} is not supported ({', '.join(known)} are)")

        def number(key: str, default: float | None = None) -> float:
            value = given.get(key)
            if value is None and default is None:
                raise FormatError(f"config.json: rope scaling {name!r} has no {key!r}")
            return _number(key, default if value is None else value)

        theta = number("rope_theta", theta)
        if name == "default":
            return Rope(theta)
        if name == "linear":
            return Rope(theta, "linear", number("factor"))
        original = self._original_context(given)
        if name == "llama3":
            return Rope(theta, "llama3", number("factor"), original, number("low_freq_factor"),
                        number("high_freq_factor"))  # fmt: skip
        ratio = self.integer("max_position_embeddings") / original
        factor = number("factor", ratio if name == "longrope" or "factor" in given else None)
        if name == "longrope":
            scale = number("attention_factor", longrope_attention_factor(factor, original))
            short, long = (_numbers(key, given.get(key)) for key in ("short_factor", "long_factor"))
            return Rope(theta, "longrope", factor, original, attention_factor=scale, factors=short,
                        long_factors=long)  # fmt: skip
        natural = yarn_attention_factor(factor, number("mscale", 0.0), number("mscale_all_dim", 0.0))
        return Rope(
            theta, "yarn", factor, original,
            beta_fast=number("beta_fast", 0.0) or 32.0, beta_slow=number("beta_slow", 0.0) or 1.0,
            truncate=bool(given.get("truncate", True)), attention_factor=number("attention_factor", natural),
        )  # fmt: skip

    def _original_context(self, given: Mapping[str, Any]) -> int:
        name = "original_max_position_embeddings"
        found = self.given.get(name, given.get(name))
        if found is None:
            found = self.defaults.get(name, self.value("max_position_embeddings"))
        if isinstance(found, bool) or not isinstance(found, int) or found < 2:
            raise FormatError(f"config.json: {name!r} is {found!r}, not a number of tokens")
        return found


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"config.json: {name!r} is {value!r}, not a number")
    return float(value)


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise FormatError(f"config.json: {name!r} is {value!r}, not a list of numbers")
    return tuple(_number(name, entry) for entry in value)


def _token_ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(sorted({v for v in values if isinstance(v, int) and not isinstance(v, bool)}))
