"""A compiled folder back to a LanguageModel: weights are mapped, kernels loaded, nothing is compiled."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

import torch

from ..compiler.errors import FormatError, TargetError, UnsupportedError
from ..compiler.target import Target, detect
from ..kernels.quant_matmul import PackedWeight
from ..runtime import launch
from ..runtime.dispatch import use_target
from ..runtime.threads import set_threads, use_launcher
from .compiled import compile_decoder
from .decoder import Decoder
from .generate import LanguageModel
from .layers import PackedModule
from .load import manifest
from .load.config_json import config_from_json
from .load.saved_tokenizer import VOCABULARY, read_saved
from .load.skeleton import SkeletonCheckpoint
from .plan import MemoryPlan, plan_folder, require_memory

KERNEL_SOURCES = ("kernels", "compiler/backends", "runtime/program.py", "runtime/launcher.c")


def load_folder(
    folder: manifest.CompiledFolder,
    *,
    target: str | Target = "auto",
    context: int | None = None,
    kv: str | None = None,
    threads: int | None = None,
    activation: str | None = None,
    whole_step: bool = True,
) -> LanguageModel:
    """Load a compiled folder (see ``manifest.open_folder``); weights are mapped, not copied.

    Raises:
        FormatError: the folder is damaged.
        TargetError: this CPU lacks what the kernels need.
        UnsupportedError: an option that the folder was not compiled for, or another build of EdgeFormer.
        CapacityError: the model does not fit the memory.
    """
    data = folder.data
    compiled = folder_target(folder)
    _require_options(folder, compiled, target, kv, activation)
    require_this_build(folder)
    launch.require_runnable(compiled)
    plan = plan_of(folder, context=context)
    require_memory(plan)
    config = config_from_json(data["config"], folder.path)
    use_target(compiled)
    _use_kernels(folder, compiled)
    count = set_threads(threads)
    skeleton = SkeletonCheckpoint(data["checkpoint"], config, folder.path)
    decoder = Decoder.from_checkpoint(
        skeleton, context=plan.context, target=compiled, activation=_option(folder, "activation")
    ).eval()
    fill(decoder, folder)
    model = LanguageModel(
        decoder, folder.path, {"tokenizer.chat_template": data.get("chat_template")}, plan,
        target=compiled, threads=count, kv=_option(folder, "kv"),
        tokenizer=(lambda: read_saved(folder.path)) if VOCABULARY in data["files"] else None,
    )  # fmt: skip
    checked = data["checked"].get("cpu") == cpu_identity()
    declined = data["checked"].get("declined") if checked else None
    if not whole_step or declined:
        model.whole_step_declined = declined or model.whole_step_declined
    else:
        step, model.whole_step_declined = compile_decoder(decoder, compiled, model.kv, check=not checked)
        model.step = step or model.step
    folder.verify()  # hashed while all this went on
    return model


def plan_of(
    folder: manifest.CompiledFolder, *, context: int | None = None, kv: str | None = None
) -> MemoryPlan:
    """Return the memory that a compiled folder needs."""
    if kv is not None:
        _require(folder, "kv", kv)
    config = config_from_json(folder.data["config"], folder.path)
    weights = folder.data["files"][manifest.WEIGHTS]["bytes"]
    return plan_folder(config, weights, context or _context(folder), _option(folder, "kv"))


def folder_target(folder: manifest.CompiledFolder) -> Target:
    """Return the target that a folder was compiled for. Raises FormatError."""
    data = dict(folder.data["target"])
    try:
        data["features"] = frozenset(data["features"])
        data["backends"] = tuple(data["backends"])
        target = Target(**data)
        texts = (target.name, target.arch, target.mcpu, target.isa, *target.features)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
    except (TypeError, KeyError) as error:
        raise FormatError(f"{folder.path}: the manifest's target is damaged") from error
    return target


def require_this_build(folder: manifest.CompiledFolder) -> None:
    """Refuse kernels of another build: how they are called may have changed. Raises UnsupportedError."""
    if folder.data["sources"] != launch.source_digest(KERNEL_SOURCES):
        version = folder.data["versions"].get("edgeformer")
        raise UnsupportedError(
            f"{folder.path} was compiled by another build of EdgeFormer ({version}); compile the model again"
        )


def cpu_identity() -> str:
    """Return what a passed self-check depends on: this CPU's features, and torch."""
    host = detect()
    features = hashlib.sha256(" ".join(sorted(host.features)).encode()).hexdigest()[:16]
    return f"{host.key()} {features} torch {torch.__version__}"


def _require_options(
    folder: manifest.CompiledFolder,
    compiled: Target,
    target: str | Target,
    kv: str | None,
    activation: str | None,
) -> None:
    if target not in ("auto", "host", compiled.name) and Target.parse(target).key() != compiled.key():
        raise TargetError(
            f"{folder.path} was compiled for {compiled.name}; compile it for {target} to run that"
        )
    for name, asked in (("kv", kv), ("activation", activation)):
        if asked is not None:
            _require(folder, name, asked)


def _require(folder: manifest.CompiledFolder, name: str, asked: str) -> None:
    if asked != (compiled := _option(folder, name)):
        raise UnsupportedError(
            f"{folder.path} was compiled with --{name} {compiled}; compile it again with --{name} {asked}"
        )


def _option(folder: manifest.CompiledFolder, name: str) -> str:
    value = folder.data["options"].get(name)
    if not isinstance(value, str):
        raise FormatError(f"{folder.path}: the manifest's option {name!r} is damaged")
    return value


def _context(folder: manifest.CompiledFolder) -> int:
    value = folder.data["options"].get("context")
    if type(value) is not int or value < 1:
        raise FormatError(f"{folder.path}: the manifest's context is damaged")
    return value


def _use_kernels(folder: manifest.CompiledFolder, target: Target) -> None:
    if not launch.emulated():
        use_launcher(folder.file("kernels/launcher.so"))
    launch.use_travelled(
        [
            launch.Used(k.operator, k.form, k.spec, k.configuration, folder.file(k.file), json.loads(k.sizes))
            for k in folder.kernels
        ],
        target,
    )


def fill(decoder: Decoder, folder: manifest.CompiledFolder) -> None:
    """Give a decoder on the meta device the weights of a folder, mapped from its file. Raises FormatError."""
    memory, places = _map(folder.file(manifest.WEIGHTS)), folder.data["weights"]
    shared: dict[tuple[int, str], PackedWeight] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, PackedModule):
            empty = module.weight
            at, nbytes, layout = _place(folder, places, "packed", name)
            if nbytes != empty.nbytes or layout != empty.layout:
                raise FormatError(
                    f"{folder.path}: the weight {name!r} is {nbytes} bytes in the layout {layout!r}"
                )
            if (at, layout) not in shared:
                buffer = _slice(folder, memory, name, at, nbytes)
                shared[at, layout] = PackedWeight(buffer, empty.format, empty.n, empty.k, layout)
            module.weight = shared[at, layout]
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is None or key in module._non_persistent_buffers_set:
                    continue
                full = f"{name}.{key}" if name else key
                at, dtype, shape = _place(folder, places, "tensors", full)
                if dtype != str(tensor.dtype).removeprefix("torch.") or tuple(shape) != tuple(tensor.shape):
                    raise FormatError(f"{folder.path}: the tensor {full!r} is {dtype} {shape}")
                raw = _slice(folder, memory, full, at, tensor.nbytes)
                value: Any = raw.view(tensor.dtype).view(tensor.shape)
                if isinstance(tensor, torch.nn.Parameter):
                    value = torch.nn.Parameter(value, requires_grad=False)
                kind[key] = value


def _place(folder: manifest.CompiledFolder, places: dict[str, Any], table: str, name: str) -> tuple[Any, ...]:
    try:
        first, second, third = places[table][name]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{folder.path}: the manifest does not say where {name!r} lies") from error
    return first, second, third


def _map(path: Path) -> torch.Tensor:
    """Map a file: pages come from the system's cache when they are read, private ones if they are written."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _slice(
    folder: manifest.CompiledFolder, memory: torch.Tensor, name: str, at: Any, nbytes: int
) -> torch.Tensor:
    if type(at) is not int or at < 0 or at % 64 or at + nbytes > memory.numel():
        raise FormatError(f"{folder.path}: {name!r} lies outside of {manifest.WEIGHTS} or off its alignment")
    return memory[at : at + nbytes]
