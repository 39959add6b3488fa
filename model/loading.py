"""From a model file to a LanguageModel: check that it fits, then pack one weight at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..compiler.errors import FormatError, UnsupportedError
from ..compiler.target import Target
from ..runtime import ops
from ..runtime.dispatch import use_target
from ..runtime.threads import set_threads
from .compiled import compile_decoder
from .decoder import Decoder
from .generate import LanguageModel
from .load.gguf import GGUFCheckpoint
from .plan import MemoryPlan, plan_memory, require_memory

KV_TYPES = ("bf16", "fp16", "fp32", "int8")


def open_checkpoint(path: str | Path) -> GGUFCheckpoint:
    """Read a model's header: config, tensor table, tokenizer data; no weights.

    Raises FormatError for a missing or damaged file, UnsupportedError for one that is not implemented.
    """
    path = Path(path)
    if path.is_dir():
        raise UnsupportedError(f"{path} is a folder; give the path of a GGUF file")
    if not path.exists():
        raise FormatError(f"there is no file {path}")
    return GGUFCheckpoint(path)


def plan(
    path: str | Path,
    context: int | None = None,
    kv: str = "bf16",
    quantize: str | None = None,
    batch: int = 1,
) -> MemoryPlan:
    """The memory that ``load`` with these options needs; reads the header only, allocates nothing."""
    _check_kv(kv)
    return plan_memory(open_checkpoint(path), context=context, kv=kv, quantize=quantize, batch=batch)


def load(
    path: str | Path,
    target: str | Target = "auto",
    context: int | None = None,
    kv: str = "bf16",
    threads: int | None = None,
    quantize: str | None = None,
    activation: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    whole_step: bool = True,
) -> LanguageModel:
    """Load a GGUF file of the Llama family for this host.

    Args:
        path: the file.
        target: "auto" (this host) or a name of ``edgeformer targets``.
        context: tokens to hold; default: the model's own, at most 8192.
        kv: type of the KV cache: "bf16", "fp16", "fp32" or "int8".
        threads: default: the physical cores that this process may use.
        quantize: None keeps the file's precision; "int8" or "int4" rounds wider weights to it.
        activation: "int8" quantises activations on the fly, "float" keeps them; "auto" is int8, and bf16 for
            prompts where this CPU has a matrix unit.
        progress: called with (layers done, layers in all).
        whole_step: decode in one native call a step, where the model can be compiled so; False runs op by op.

    Raises:
        FormatError: the file is missing or damaged.
        UnsupportedError: an architecture, type or option that is not implemented.
        TargetError: this host cannot run the target.
        CapacityError: the model does not fit the memory; the text has the numbers.
    """
    _check_kv(kv)
    resolved = Target.parse(target)
    use_target(resolved)
    checkpoint = open_checkpoint(path)
    needed = plan_memory(checkpoint, context=context, kv=kv, quantize=quantize)
    require_memory(needed)
    count = set_threads(threads)
    decoder = Decoder.from_checkpoint(
        checkpoint,
        context=needed.context,
        target=resolved,
        quantize=quantize,
        activation=activation,
        progress=progress,
    )
    model = LanguageModel(
        decoder.eval(), checkpoint.path, checkpoint.metadata, needed, target=resolved, threads=count, kv=kv
    )
    if whole_step:
        compiled, model.whole_step_declined = compile_decoder(decoder, resolved, kv)
        if compiled is not None:
            model.step = compiled
        ops.sample(torch.zeros(1, decoder.config.vocab_size))  # built now, not between two tokens
    return model


def _check_kv(kv: str) -> None:
    if kv not in KV_TYPES:
        raise UnsupportedError(f"kv={kv!r} is not supported; use one of {', '.join(KV_TYPES)}")
