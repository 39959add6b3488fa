"""The decoder as a compiled program: decode steps in one native call, longer chunks op by op."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from ..compiler.errors import EdgeFormerError
from ..compiler.operator import Form
from ..compiler.target import Target
from ..kernels.attention.space import fastest_math
from ..kernels.decoder_step import LAYER_VECTORS, LAYER_WEIGHTS, TVM_CPU, DecoderStepSpec
from ..kernels.quant_matmul import OPERATOR as MATMUL
from ..kernels.quant_matmul import PackedWeight
from ..kernels.quant_matmul.space import fastest_activation
from ..runtime.kv_cache import KVCache
from ..runtime.prebuild import prebuild
from ..runtime.program import CHUNK_ROWS, MAX_ROWS, StepProgram, layer_formats
from .config import ModelConfig
from .decoder import Block, Decoder
from .layers import GATES, QuantLinear

_TOLERANCE = 0.01  # of what a layer adds: an int8 code may round the other way, a wrong kernel is far off
KV_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


def step_spec(decoder: Decoder, kv: str) -> DecoderStepSpec:
    """Return the whole step's problem: a kind of layer for each combination of formats that occurs."""
    c = decoder.config
    kinds = dict.fromkeys(layer_formats(layer_handles(x)) for x in decoder.layers if isinstance(x, Block))
    return DecoderStepSpec(
        hidden=c.hidden_size,
        intermediate=c.intermediate_size,
        vocab=c.vocab_size,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        eps=c.norm_eps,
        layers=tuple(kinds),
        embed=decoder.embed.weight.format,
        head=decoder.head.weight.format,
        embed_layout=decoder.embed.weight.layout,
        rotary_dim=c.rotary_dim or c.head_dim,
        rope_interleaved=c.rope_interleaved,
        qkv_bias=c.attention_bias,
        kv_dtype=KV_NAMES[kv],
        mask="causal_lengths",
        gate=GATES[c.activation].removesuffix("_pair"),
        o_bias=c.o_bias,
        mlp_bias=c.mlp_bias,
        qk_norm=c.qk_norm,
        post_norms=c.post_norms,
        window=any(c.windows),
        attention_scale=c.attention_scale or 0.0,
        attention_softcap=c.attention_softcap,
        logit_softcap=c.logit_softcap,
        embedding_factor=c.embedding_scale,
        activation="int8" if decoder.head.activation == "auto" else decoder.head.activation,
    )


def layer_handles(block: Block) -> dict[str, Tensor | PackedWeight | int | None]:
    """Return what a program binds of one layer: weights, norms, biases, its window and rotary table."""
    norms = {name: getattr(block, name) for name in LAYER_VECTORS if name.endswith("norm")}
    products = {name: getattr(block, name) for name in LAYER_WEIGHTS}
    return {
        **{name: product and product.weight for name, product in products.items()},
        **{f"{name}_bias": product and product.bias for name, product in products.items()},
        **{name: None if norm is None else norm.weight for name, norm in norms.items()},
        "window": block.window,
        "rope": block.rope_kind,
    }


class CompiledDecoder:
    """Calls like a Decoder: (ids, cache, position, lengths=None, last_only=True) -> logits."""

    def __init__(self, decoder: Decoder, target: Target, kv: str, **options: Any) -> None:
        self.decoder = decoder
        self._options = options  # of the program: configurations and libraries other than its own choice
        self.target, self.kv = target, kv
        self.program = self._bind()
        decoder.register_load_state_dict_post_hook(lambda *_: self._rebind())

    def _rebind(self) -> None:
        """Take up the weights that a state dict has brought: packed anew, they lie at other addresses."""
        self.program = self._bind()

    def _bind(self) -> StepProgram:
        """Return the program over the decoder's present weights."""
        decoder = self.decoder
        layers = [layer_handles(block) for block in decoder.layers if isinstance(block, Block)]
        return StepProgram(
            step_spec(decoder, self.kv),
            self.target,
            layers,
            decoder.embed.weight,
            decoder.head.weight,
            decoder.norm.weight,
            chunk_spec=chunk_spec(decoder, self.kv, self.target),
            **self._options,
        )

    @torch.inference_mode()
    def __call__(
        self,
        ids: Tensor,
        cache: KVCache,
        position: int,
        lengths: Tensor | None = None,
        last_only: bool = True,
    ) -> Tensor:
        """Logits fp32 [B, 1 or T, vocab] of tokens int64 [B, T] or embeddings fp32 [B, T, hidden]."""
        batch, tokens = ids.shape[:2]
        if position + tokens > self.decoder.context or batch > CHUNK_ROWS:
            return self.decoder(ids, cache, position, lengths, last_only)  # which says what does not fit
        if batch * tokens > MAX_ROWS:
            return self._chunks(ids, cache, position, lengths, last_only)
        logits = self._run(ids, cache, position, lengths, head=True)
        return logits[:, -1:] if last_only else logits

    def _chunks(
        self, ids: Tensor, cache: KVCache, position: int, lengths: Tensor | None, last_only: bool
    ) -> Tensor:
        decoder, found = self.decoder, []
        step, total = CHUNK_ROWS // ids.shape[0], ids.shape[1]
        for start in range(0, total, step):
            part = ids[:, start : start + step]
            behind = total - start - part.shape[1]  # slots of later parts
            valid = None if lengths is None else (lengths - behind).clamp_(min=0)
            found.append(self._run(part, cache, position + start, valid, head=False))
        x = found[-1][:, -1:] if last_only else torch.cat(found, dim=1)
        return decoder.head(decoder.norm(x))

    def _run(self, ids: Tensor, cache: KVCache, start: int, lengths: Tensor | None, head: bool) -> Tensor:
        """Logits [B, T, vocab], or the hidden states [B, T, hidden] behind the last layer."""
        cos, sin = self.decoder.rope_rows(start, start + ids.shape[1], lengths)
        embedded = ids.is_floating_point()
        return self.program.run(
            cache, start, cos, sin, ids=None if embedded else ids, hidden=ids if embedded else None,
            lengths=None if lengths is None else lengths.to(torch.int32).contiguous(), head=head,
        )  # fmt: skip


def chunk_spec(decoder: Decoder, kv: str, target: Target) -> DecoderStepSpec | None:
    """Return the problem of long chunks where it is another than the step's: "auto" on a matrix unit."""
    spec = step_spec(decoder, kv)
    fastest = {fastest_activation(MAX_ROWS + 1, f, target) for kind in spec.layers for f in kind.all()}
    if decoder.head.activation != "auto" or fastest != {"bfloat16"}:
        return None
    math = fastest_math(MAX_ROWS + 1, spec.kv_dtype, target)
    return dataclasses.replace(spec, activation="bfloat16", math=math)


def compile_decoder(
    decoder: Decoder, target: Target, kv: str, *, check: bool = True
) -> tuple[CompiledDecoder | None, str]:
    """Return (compiled decoder, "") after checking it against the eager one, or (None, the reason).

    `check` is False where the same kernels have passed the check on this CPU before.
    """
    try:
        compiled = CompiledDecoder(decoder, target, kv)
    except EdgeFormerError as error:
        return None, str(error)
    problem = self_check(compiled, decoder, kv) if check else ""
    if problem and "record" in compiled.program.record:
        warnings.warn(f"the default runs instead of {compiled.program.record}: {problem}", stacklevel=2)
        default = compiled.program.defaults()
        compiled = CompiledDecoder(
            decoder, target, kv, configuration=default[0], chunk_configuration=default[1]
        )
        problem = self_check(compiled, decoder, kv)
    return (None, problem) if problem else (compiled, "")


def plan_programs(decoder: Decoder, kv: str, target: Target) -> list[tuple[str, Form, DecoderStepSpec]]:
    """Return (operator, form, spec) of a CompiledDecoder's programs; [] where it declines."""
    try:
        specs = [step_spec(decoder, kv), chunk_spec(decoder, kv, target)]
    except EdgeFormerError:
        return []
    if any(spec is not None and TVM_CPU.decide(spec, target) is not None for spec in specs):
        return []
    return [("decoder_step", TVM_CPU, spec) for spec in specs if spec is not None]


def build_ahead(decoder: Decoder, kv: str, target: Target, *, whole_step: bool) -> int:
    """Build the programs and matrix products that a load will bind, several at once, where many are missing.

    Returns how many were built.
    """
    wanted = plan_programs(decoder, kv, target) if whole_step else []
    for module in decoder.modules():
        if isinstance(module, QuantLinear):
            wanted += [("quant_matmul", MATMUL.form("tvm_cpu"), spec) for spec in module.specs(target)]
    return prebuild([item for item in wanted if item[1].decide(item[2], target) is None], target)


def self_check(
    compiled: CompiledDecoder, decoder: Decoder, kv: str, lengths: tuple[int, ...] | None = None
) -> str:
    """Compare every segment with the eager model on the same inputs; return what differs, or "".

    Each layer is fed the eager hidden states, so that int8 codes that round the other way do not pile
    up: odd lengths, a chunk, several rows, then single tokens over the cache that the program has written.
    """
    c: ModelConfig = decoder.config
    lengths = lengths or ((17, 5, 1, 1, 3, 1) if decoder.context >= 28 else (5, 1, 1, 3, 1))
    room = sum(lengths)
    if decoder.context < room:
        return ""
    program = compiled.program
    ids = torch.randint(0, c.vocab_size, (1, room), generator=torch.Generator().manual_seed(0))
    eager, ours = (KVCache(c.num_layers, 1, c.num_kv_heads, c.head_dim, room, dtype=kv) for _ in range(2))
    with torch.inference_mode():
        start = 0
        for length in lengths:
            chunk, end = ids[:, start : start + length], start + length
            cos, sin = decoder.rope_rows(start, end, None)
            x = decoder.embed(chunk)
            for i, layer in enumerate(decoder.layers):
                eager.length = ours.length = start
                wanted = layer(x, eager.layer(i), start, cos, sin, None)
                got = program.run(ours, start, cos, sin, hidden=x, first=i, count=1, head=False)
                error = float((got - wanted).norm() / (wanted - x).norm().clamp_min(1e-6))
                if not error < _TOLERANCE:
                    return f"layer {i} of the compiled step differs by {error:.2%} at position {start}"
                x = wanted
            if length <= MAX_ROWS:
                logits = decoder.head(decoder.norm(x))
                got = program.run(ours, start, cos, sin, hidden=x, first=c.num_layers, count=0)
                error = float((got - logits).norm() / logits.norm())
                if not error < _TOLERANCE:
                    return f"the head of the compiled step differs by {error:.2%}"
            eager.length = ours.length = start = end
        cos, sin, first = *decoder.rope_rows(0, lengths[-1], None), ids[:, : lengths[-1]]
        embedded = program.run(ours, 0, cos, sin, ids=first, count=0, head=False)
        if not torch.allclose(embedded, decoder.embed(first), rtol=1e-5, atol=1e-6):
            return "the embedding of the compiled step differs from the eager one"
    return ""
