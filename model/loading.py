"""From a model file to a LanguageModel: check that it fits, then pack one weight at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..compiler.errors import FormatError, UnsupportedError
from ..compiler.records import policy
from ..compiler.target import Target
from ..runtime import ops
from ..runtime.dispatch import use_target
from ..runtime.threads import set_threads
from .compiled import build_ahead, compile_decoder
from .decoder import Decoder
from .generate import LanguageModel
from .load.gguf import GGUFCheckpoint
from .load.huggingface import HFCheckpoint
from .load.json_file import read_object
from .load.manifest import NAME as MANIFEST
from .load.manifest import ONNX, CompiledFolder, is_compiled, open_folder
from .load.quantized import CONFIG, MODEL_TYPE, QuantizedCheckpoint
from .plan import MemoryPlan, plan_memory, require_memory
from .requantise import QuantisedCheckpoint

ModelFile = GGUFCheckpoint | HFCheckpoint | QuantizedCheckpoint
KV_TYPES = ("bf16", "fp16", "fp32", "int8")


def open_checkpoint(path: str | Path) -> ModelFile:
    """Read a model's header: config, tensor table, tokenizer data; no weights.

    A GGUF file, a Hugging Face folder (config.json and safetensors), or one of `edgeformer quantize`.

    Raises FormatError for a missing or damaged file, UnsupportedError for one that is not implemented.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FormatError(f"there is no file {path}")
    return GGUFCheckpoint(path)


def _open_folder(path: Path) -> ModelFile:
    if is_compiled(path):
        raise UnsupportedError(f"{path} is compiled: its weights are packed; take the model it came from")
    if not (path / CONFIG).exists():
        if next(path.glob("*.onnx"), None):
            raise FormatError(
                f"{path} holds an ONNX model of another tool; take the model that it was made from, and "
                "`edgeformer compile --target directml` it"
            )
        raise FormatError(f"{path} is no model: a folder needs {CONFIG} or {MANIFEST}; else give a GGUF file")
    if read_object(path / CONFIG).get("model_type") == MODEL_TYPE:
        return QuantizedCheckpoint(path)
    return HFCheckpoint(path)


def plan(
    path: str | Path,
    context: int | None = None,
    kv: str | None = None,
    quantize: str | None = None,
    batch: int = 1,
    *,
    trust: bool = False,
) -> MemoryPlan:
    """The memory that ``load`` with these options needs; reads the header only, allocates nothing."""
    if is_compiled(path):
        folder = open_folder(path, trust=trust)
        if folder.kind == ONNX:
            from .onnx_plan import plan_onnx_folder

            return plan_onnx_folder(folder, context, kv)
        from .run_folder import plan_of

        return plan_of(folder, context=context, kv=kv)
    kv = kv or "bf16"
    require_kv(kv)
    return plan_memory(open_checkpoint(path), context=context, kv=kv, quantize=quantize, batch=batch)


def load(
    path: str | Path | CompiledFolder,
    target: str | Target = "auto",
    context: int | None = None,
    kv: str | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    activation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    whole_step: bool = True,
    trust: bool = False,
) -> LanguageModel:
    """Load a model for this host: a GGUF file, a Hugging Face folder, or one of `quantize` or `compile`.

    With EDGEFORMER_TUNE=on, what has no tuning record is tuned first.

    Args:
        path: the file or folder.
        target: "auto" (this host), "opencl" (an OpenCL device) or a name of ``edgeformer targets``.
        context: tokens to hold; default: the model's own, at most 8192.
        kv: type of the KV cache: "bf16" (the default), "fp16", "fp32" or "int8".
        threads: default: the physical cores that this process may use.
        quantize: None keeps the file's precision; "int8", "int4" or "balanced" rounds wider weights.
        activation: "int8" quantises activations on the fly, "float" keeps them; "auto" is int8, and bf16 for
            prompts where this CPU has a matrix unit; default "auto". A compiled folder has its own.
        progress: called with (layers done, layers in all).
        whole_step: decode in one native call a step, where the model can be compiled so; False runs op by op.
        trust: run native code of a compiled folder that somebody else can write.

    Raises:
        FormatError: the file is missing or damaged.
        UnsupportedError: an architecture, type or option that is not implemented.
        TargetError: this host cannot run the target.
        DeviceError: there is no OpenCL device, or its driver computes wrong results.
        TrustError: a compiled folder that somebody else can write, without ``trust``.
        CapacityError: the model does not fit the memory; the text has the numbers.
    """
    options: dict[str, Any] = {
        "target": target, "context": context, "kv": kv, "threads": threads, "quantize": quantize,
        "activation": activation,
    }  # fmt: skip
    make = functools.partial(
        load_as_it_is, path, **options, progress=progress, whole_step=whole_step, trust=trust
    )
    if policy() != "on" or isinstance(path, CompiledFolder) or is_compiled(path):
        return make()
    from .tuning import tune_loaded

    chosen = {"target": Target.parse(target), "kv": kv or "bf16", "activation": activation or "auto"}
    return tune_loaded(make, options | chosen | {"path": str(Path(path).resolve())})


def load_as_it_is(
    path: str | Path | CompiledFolder,
    target: str | Target = "auto",
    context: int | None = None,
    kv: str | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    activation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    whole_step: bool = True,
    trust: bool = False,
) -> LanguageModel:
    """Load a model as ``load`` does, without tuning."""
    if isinstance(path, CompiledFolder) or is_compiled(path):
        from .run_folder import load_folder

        if quantize is not None:
            raise UnsupportedError(
                f"{path} is compiled: its weights are packed; quantize the model it came from"
            )
        folder = path if isinstance(path, CompiledFolder) else open_folder(path, trust=trust)
        if folder.kind == ONNX:
            from .onnx_folder import load_onnx

            return load_onnx(
                folder, target=target, context=context, kv=kv, threads=threads, activation=activation
            )
        return load_folder(
            folder, target=target, context=context, kv=kv, threads=threads, activation=activation,
            whole_step=whole_step,
        )  # fmt: skip
    kv, activation = kv or "bf16", activation or "auto"
    require_kv(kv)
    resolved = Target.parse(target)
    checkpoint = QuantisedCheckpoint(open_checkpoint(path), quantize)
    return load_checkpoint(
        checkpoint, resolved, context=context, kv=kv, threads=threads, activation=activation,
        progress=progress, whole_step=whole_step,
    )  # fmt: skip


def load_checkpoint(
    checkpoint: Any, target: Target, *, context: int | None, kv: str, threads: int | None, activation: str,
    progress: Callable[[int, int], None] | None, whole_step: bool,
) -> LanguageModel:  # fmt: skip
    """Load an opened checkpoint for this host; options as in ``load``."""
    if "tvm_opencl" in target.backends:
        from .opencl import load_opencl

        return load_opencl(
            checkpoint, target, context=context, kv=kv, activation=activation, progress=progress
        )
    use_target(target)
    needed = plan_memory(checkpoint, context=context, kv=kv)
    require_memory(needed)
    count = set_threads(threads)
    decoder = Decoder.from_checkpoint(
        checkpoint, context=needed.context, target=target, activation=activation, progress=progress
    ).eval()
    model = LanguageModel(
        decoder, checkpoint.path, checkpoint.metadata, needed, target=target, threads=count, kv=kv,
        tokenizer=getattr(checkpoint, "tokenizer", None),
    )  # fmt: skip
    model.types = getattr(checkpoint, "types", list)()
    build_ahead(decoder, kv, target, whole_step=whole_step)
    if whole_step:
        compiled, model.whole_step_declined = compile_decoder(decoder, target, kv)
        if compiled is not None:
            model.step = compiled
        ops.sample(torch.zeros(1, decoder.config.vocab_size))  # built now, not between two tokens
    return model


def require_kv(kv: str) -> None:
    """Raise UnsupportedError for an unknown type of the KV cache."""
    if kv not in KV_TYPES:
        raise UnsupportedError(f"kv={kv!r} is not supported; use one of {', '.join(KV_TYPES)}")
