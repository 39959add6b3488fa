"""A language model on an OpenCL device: its weights, cache and a step's results are buffers there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.errors import CapacityError, UnsupportedError
from ..compiler.target import Target
from ..kernels.sampling import OPERATOR as SAMPLING
from ..kernels.sampling.spec import SamplingOptions, SamplingSpec
from ..runtime.dispatch import bound, use_target
from ..runtime.kv_cache import KVCache
from ..runtime.opencl import DeviceTensor, session
from ..runtime.opencl_kv import DeviceKVCache
from .batch import Sampling
from .decoder import Decoder
from .generate import LanguageModel
from .opencl_step import FORM, DeviceStep, DeviceWeight
from .plan import plan_memory


class OpenCLModel(LanguageModel):
    """A LanguageModel whose chunks run on an OpenCL device; a step reads one token a row, at its end."""

    def __init__(self, decoder: Decoder, device_step: DeviceStep, *args: Any, **options: Any) -> None:
        super().__init__(decoder, *args, **options)
        self.device_step = device_step
        self.step = self._step_to_host
        self.whole_step_declined = "an OpenCL device takes kernel after kernel; nothing is read within a step"
        self._sample = bound(SAMPLING, SamplingSpec(decoder.config.vocab_size), FORM)

    def prefill(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Run tokens [T] or [B, T] after what the cache holds, in chunks; logits [B, V] of the last one."""
        return super().prefill(ids).read()  # pyright: ignore[reportAttributeAccessIssue]

    def decode(self, token: int | Tensor) -> Tensor:
        """Run one token a row after what the cache holds; its logits [B, V]."""
        return super().decode(token).read()  # pyright: ignore[reportAttributeAccessIssue]

    def _step_to_host(
        self, ids: Tensor, cache: Any, position: int, lengths: Tensor | None = None, last_only: bool = True
    ) -> Tensor:
        """Logits [B, 1 or T, V] on the host, of rows without padding: for evaluating."""
        if lengths is not None:
            raise UnsupportedError("padded rows run by generate(), not by step()")
        logits = self.device_step(ids, cache, position, None, last_only).read()
        return logits.view(ids.shape[0], -1, logits.shape[-1])

    def _feed(self, tokens: Tensor, cache: Any) -> Any:
        """Run tokens [B, T] in chunks; logits [B, V] of the last, on the device."""
        logits: DeviceTensor | None = None
        for part in tokens.split(self.chunk, dim=1):
            end = self.position + part.shape[1]
            if end > self.context:
                raise CapacityError(f"{end} tokens do not fit the context of {self.context}")
            logits = self.device_step(part, cache, self.position, self._padding)
            self.position = end
        assert logits is not None
        if tokens.shape[1] > 1:
            logits.session.finish()  # so that a prompt's time is its own
        return logits

    def _draw(
        self, sampling: Sampling, logits: DeviceTensor, history: Tensor, seed: int, step: int
    ) -> Tensor:
        options = SamplingOptions(
            sampling.repetition_penalty, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        )
        rows, buffer = logits.shape[0], self.device_step.buffer
        token, draws = buffer("token", rows, dtype=torch.int32), buffer("draws", rows, 2, dtype=torch.int32)
        held = adjusted = None
        if sampling.repetition_penalty != 1.0:
            held = buffer("history", *history.shape, dtype=torch.int32)
            held.session.write(held, history.int())
            adjusted = buffer("adjusted", *logits.shape)
        self._sample(logits, token, draws, rows, options, seed, step, held, adjusted)
        return token.read().long()

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        """An empty cache of so many rows and tokens, on the device."""
        c = self.config
        return DeviceKVCache(  # pyright: ignore[reportReturnType]  holds, trims and counts as a KVCache does
            self.device_step.session, c.num_layers, rows, c.num_kv_heads, c.head_dim, tokens, self.kv
        )


def load_opencl(
    checkpoint: Any, target: Target, *, context: int | None, kv: str, activation: str,
    progress: Callable[[int, int], None] | None,
) -> OpenCLModel:  # fmt: skip
    """Load an opened checkpoint onto an OpenCL device. Raises EdgeFormerError's children."""
    if activation not in ("auto", "float"):
        raise UnsupportedError(
            f"OpenCL kernels keep activations in float; activation {activation!r} has none"
        )
    used = session(target.name)
    needed = plan_memory(checkpoint, context=context, kv=kv)
    if needed.total > used.limits.memory_bytes:
        raise CapacityError(
            f"the model needs {needed}; {used.limits.name} has {used.limits.memory_bytes / 1e6:.0f} MB. "
            "Take a smaller context, or --kv int8"
        )
    use_target(target)
    decoder = Decoder.from_checkpoint(
        checkpoint, context=needed.context, target=target, activation="float", progress=progress,
        place=lambda weight: DeviceWeight(weight, used),
    ).eval()  # fmt: skip
    model = OpenCLModel(
        decoder, DeviceStep(decoder, used, kv), checkpoint.path, checkpoint.metadata, needed, target=target,
        threads=used.limits.compute_units, kv=kv, tokenizer=getattr(checkpoint, "tokenizer", None),
    )  # fmt: skip
    model.types = getattr(checkpoint, "types", list)()
    return model
