"""`edgeformer.compile`: a transformers decoder whose step is one native call, behind the same `generate`."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.errors import CapacityError, EdgeFormerError, UnsupportedError
from ...compiler.target import Target
from ...kernels.quant_matmul import CanonicalWeight, WeightFormat
from ...runtime import dispatch
from ...runtime.kv_cache import KVCache
from ..compiled import compile_decoder
from ..config import ModelConfig
from ..decoder import Decoder
from ..load.hf_names import TensorCheckpoint, config_from_hf
from .find import transformers_model
from .generate import own_generate
from .layers import Embedding, GatedMLP, Linear
from .profiles import Candidate, check_profile, choose_formats

PREFILL_CHUNK = 512
# Relative error of logits against the eager model that a compile accepts: rounding, but no wrong mapping.
_EXACT, _INT8, _INT4 = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}, 0.15, 0.5


class ModelCheckpoint(TensorCheckpoint):
    """The weights of a transformers model in memory, optimised or not, under the decoder's names."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        self.packed: dict[str, Any] = {}
        plain: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        for path, module in model.named_modules():
            if isinstance(module, Linear | Embedding):
                self.packed[f"{path}.weight"] = (module.weight, None)
            elif isinstance(module, GatedMLP):
                half = module.weight.n // 2
                self.packed[f"{path}.gate_proj.weight"] = (module.weight, (0, half))
                self.packed[f"{path}.up_proj.weight"] = (module.weight, (half, 2 * half))
                if config.architecture == "phi3":
                    self.packed[f"{path}.gate_up_proj.weight"] = (module.weight, None)
        if config.architecture == "phi3":
            self.packed = {
                n: w for n, w in self.packed.items() if ".gate_proj." not in n and ".up_proj." not in n
            }
        plain = {name: p for name, p in plain.items() if name not in self.packed}
        self.formats: dict[str, WeightFormat] = {}
        super().__init__(config, lambda name: plain[name].detach(), [*plain, *self.packed])

    def weight(self, name: str) -> CanonicalWeight:
        """One matrix in its own format, or rounded to the one that `formats` names."""
        canonical = self._own(name)
        wanted = self.formats.get(name)
        if wanted is None or not canonical.format.is_float or wanted == canonical.format:
            return canonical
        return CanonicalWeight.from_float(canonical.codes, wanted)

    def _own(self, name: str) -> CanonicalWeight:
        source = self.sources[name]
        if source.name not in self.packed:
            return super().weight(name)
        weight, rows = self.packed[source.name]
        canonical = weight.unpack()
        for part in (rows, source.rows[:2] if source.rows else None):
            if part is not None:
                canonical = canonical.slice_rows(*part)
        return canonical

    def round_to(self, profile: str) -> None:
        """Choose a format for every float matrix."""
        tables = ("embed", "head")
        candidates = [
            Candidate(name, self.tensor(name), table=name in tables)
            for name in self.config.matrices()
            if self.sources[name].name not in self.packed
        ]
        if profile != "exact":
            self.formats = choose_formats(candidates, profile)


class CompiledModel:
    """What `edgeformer.compile` returns: `generate` and a call, as the transformers model has them.

    `whole_step_declined` is "" where a decode step is one native call, else the reason why it is not;
    `error` is the relative error of the logits against the eager model, measured at compile.
    """

    def __init__(
        self, model: Any, decoder: Decoder | None, step: Any, reason: str, kv: str, error: float
    ) -> None:
        self.model, self.decoder, self.step = model, decoder, step
        self.whole_step_declined, self.kv, self.error = reason, kv, error
        self.config, self.generation_config = model.config, model.generation_config
        self.last_loop = ""  # which loop ran the last generate, and why
        self._bridge = None if decoder is None else self._make_bridge()

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    def __repr__(self) -> str:
        how = self.whole_step_declined or "a decode step is one native call"
        return f"CompiledModel({type(self.model).__name__}: {how})"

    def generate(self, inputs: Any = None, **options: Any) -> Any:
        """Generate as `model.generate` does, with its arguments and its result.

        Greedy search and plain sampling (temperature, top_k, top_p, min_p, repetition_penalty; a batch padded
        on the left; eos, max lengths, streamers and stopping criteria) run in a loop of our own; everything
        else in transformers' loop over the same step. `last_loop` says which one ran, and why.
        """
        if self._bridge is None:
            self.last_loop = f"transformers, op by op: {self.whole_step_declined}"
            return self.model.generate(inputs, **options)
        result, reason = own_generate(self, inputs, dict(options))
        if reason:
            self.last_loop = f"transformers over the same step: {reason}"
            return self._bridge.generate(inputs, **options)
        self.last_loop = "own"
        return result

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        """Return a CausalLMOutputWithPast, as the model does."""
        return (self._bridge or self.model)(input_ids, **options)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Return an empty cache for the step."""
        assert self.decoder is not None
        c = self.decoder.config
        if capacity > self.decoder.context:
            raise CapacityError(f"{capacity} tokens do not fit the context of {self.decoder.context}")
        return KVCache(c.num_layers, rows, c.num_kv_heads, c.head_dim, capacity, dtype=self.kv)

    @torch.inference_mode()
    def feed(self, ids: Tensor, cache: KVCache, position: int, lengths: Tensor | None, keep: int) -> Tensor:
        """Run ids [B, T] in chunks; logits [B, keep, V] of the last `keep` tokens (0: of all)."""
        total, found = ids.shape[1], []
        for start in range(0, total, PREFILL_CHUNK):
            part = ids[:, start : start + PREFILL_CHUNK]
            behind = total - start - part.shape[1]
            valid = None if lengths is None else (lengths - behind).clamp_(min=0)
            last = keep == 1
            logits = self.step(part, cache, position + start, valid, last)
            found = [logits] if last else [*found, logits]
        joined = torch.cat(found, 1) if len(found) > 1 else found[0]
        return joined[:, -keep:] if keep > 1 else joined

    def _make_bridge(self) -> Any:
        """The transformers model with its forward replaced by our step: for transformers' own loops."""
        bridge = copy.copy(self.model)
        bridge.__dict__["forward"] = functools.partial(_forward, self)
        bridge.__dict__["_prepare_cache_for_generation"] = functools.partial(_step_cache, self)
        return bridge


def _step_cache(compiled: CompiledModel, *arguments: Any, **named: Any) -> None:
    from .step_cache import StepCache

    for made in (*arguments, *named.values()):
        if isinstance(made, dict) and made.get("past_key_values") is None:
            made["past_key_values"] = StepCache(compiled)


def _forward(
    compiled: CompiledModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    logits_to_keep: int | Tensor = 0,
    **unused: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from .step_cache import StepCache

    if input_ids is None or unused.get("inputs_embeds") is not None or unused.get("labels") is not None:
        raise UnsupportedError("a compiled model takes input_ids; use the original model for anything else")
    cache = past_key_values if past_key_values is not None else StepCache(compiled)
    if not isinstance(cache, StepCache):
        raise UnsupportedError(
            f"a compiled model has a cache of its own, not a {type(cache).__name__}: "
            "leave past_key_values out"
        )
    lengths, problem = left_padding(attention_mask, cache.get_seq_length() + input_ids.shape[1])
    if problem:
        raise UnsupportedError(problem)
    keep = int(logits_to_keep) if not isinstance(logits_to_keep, Tensor) else 0
    logits = cache.run(input_ids, lengths, keep)
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # pyright: ignore


def left_padding(mask: Tensor | None, total: int) -> tuple[Tensor | None, str]:
    """Return (int32 [B] tokens of each row, or None where all slots are), and what is wrong with the mask."""
    if mask is None:
        return None, ""
    if mask.dim() != 2 or mask.shape[1] != total:
        return None, f"the attention mask is {tuple(mask.shape)}; the compiled step takes [B, {total}]"
    valid = mask.bool()
    if bool(valid.all()):
        return None, ""
    lengths = valid.sum(1)
    expected = torch.arange(total)[None] >= (total - lengths)[:, None]
    if not torch.equal(valid, expected):
        return None, "the attention mask is not padding on the left, which is what the compiled step takes"
    return lengths.to(torch.int32), ""


def compile_module(
    model: nn.Module,
    profile: str | None = None,
    target: str | Target = "auto",
    *,
    context: int | None = None,
    kv: str = "bf16",
    activation: str = "auto",
) -> CompiledModel:
    """Compile the decode step of a transformers causal language model into one native call.

    Args:
        model: a decoder of the families that EdgeFormer knows (Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3).
        profile: None keeps each weight as it is (those of an optimised model in their format); else "exact",
            "balanced" or "fast" as in `optimize`.
        context: tokens to hold; default: the model's own, at most 8192.
        kv: type of the KV cache: "bf16", "fp16", "fp32" or "int8".

    The step is checked against the eager decoder, and its logits against the model's. Where the model cannot
    be mapped, the object runs the model's own `generate`, optimised in place op by op if it was not yet, and
    `whole_step_declined` says why.

    Raises UnsupportedError for something that is no causal language model of transformers.
    """
    check_profile(profile or "exact")
    inner = transformers_model(model)
    if inner is None or not hasattr(inner, "generate") or not hasattr(inner, "generation_config"):
        raise UnsupportedError(
            f"compile takes a causal language model of transformers, not {type(model).__name__}; "
            "optimize(model) replaces the layers of any module"
        )
    resolved = Target.parse(target)
    dispatch.use_target(resolved)
    try:
        config = config_from_hf(inner.config.to_dict())
        checkpoint = ModelCheckpoint(inner, config)
        if profile is not None:
            checkpoint.round_to(profile)
        tokens = min(context or min(config.max_context, 8192), config.max_context)
        decoder = Decoder.from_checkpoint(checkpoint, context=tokens, target=resolved, activation=activation)
    except EdgeFormerError as error:
        return _op_by_op(model, inner, profile, target, str(error), kv)
    decoder.eval()
    step, reason = compile_decoder(decoder, resolved, kv)
    compiled = CompiledModel(inner, decoder, step or decoder, reason, kv, 0.0)
    compiled.error = _compare(compiled, inner)
    allowed = _allowed(checkpoint, next(inner.parameters()).dtype)
    if not compiled.error < allowed:
        text = f"the compiled step's logits differ by {compiled.error:.1%} from the eager model's"
        return _op_by_op(model, inner, profile, target, text, kv)
    return compiled


def _op_by_op(
    model: nn.Module, inner: Any, profile: str | None, target: Any, reason: str, kv: str
) -> CompiledModel:
    if not any(isinstance(m, Linear | GatedMLP) for m in inner.modules()):
        from ..replace import optimize

        optimize(model, profile or "exact", target)
    return CompiledModel(inner, None, None, reason, kv, 0.0)


def _allowed(checkpoint: ModelCheckpoint, dtype: torch.dtype) -> float:
    """The relative error of the logits that rounding explains: a wrong mapping is far above it."""
    widths = {fmt.bits for fmt in checkpoint.formats.values()}
    widths |= {weight.format.bits for weight, _ in checkpoint.packed.values()}
    if widths - {0, 8}:
        return _INT4
    return _INT8 if 8 in widths else _EXACT.get(dtype, 2e-2)


@torch.inference_mode()
def _compare(compiled: CompiledModel, model: Any) -> float:
    assert compiled.decoder is not None
    vocab = compiled.decoder.config.vocab_size
    length = min(24, compiled.decoder.context)
    ids = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(0))
    want = model(ids, use_cache=False).logits[0].float()
    cache = compiled.new_cache(1, length)
    first = max(1, length - 3)
    got = [compiled.feed(ids[:, :first], cache, 0, None, 0)]
    got += [compiled.feed(ids[:, i : i + 1], cache, i, None, 1) for i in range(first, length)]
    error = (torch.cat(got, 1)[0] - want).norm() / want.norm()
    return float(error)
