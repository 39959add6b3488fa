"""`edgeformer compile`: a model's packed weights, tokenizer and kernels as one folder that starts at once."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..compiler.backends import tvm_llvm
from ..compiler.errors import BuildError
from ..compiler.records import policy
from ..compiler.target import Target, detect
from ..kernels.quant_matmul import PackedWeight
from ..runtime import dispatch, launch, ops
from ..runtime.kv_cache import KVCache
from ..runtime.threads import launcher_file
from .compiled import plan_programs
from .decoder import Decoder
from .generate import LanguageModel
from .layers import PackedModule
from .load import manifest
from .load.config_json import config_to_json
from .load.folders import new_folder, require_replaceable
from .load.saved_tokenizer import write_saved
from .load.skeleton import RecordingCheckpoint
from .loading import load, load_checkpoint, open_checkpoint, require_kv
from .plan import plan_memory, require_memory
from .requantise import QuantisedCheckpoint
from .run_folder import KERNEL_SOURCES, cpu_identity

ALIGNMENT = 64  # bytes: a weight starts on a cache line


def compile_model(
    path: str | Path,
    output: str | Path,
    *,
    target: str | Target = "auto",
    context: int | None = None,
    kv: str | None = None,
    quantize: str | None = None,
    activation: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a model's packed weights, tokenizer, configuration and kernels to the folder `output`.

    ``edgeformer.load(output)`` and ``edgeformer run output`` then map the weights and compile nothing. For
    this host the kernels are those that a load, its self-check and some steps used; for another target
    they are planned by running the reference forms, and the device checks itself when it loads them.
    For "directml" it holds an ONNX model instead (see ``onnx_folder``). Options as in ``load``; ``kv`` is
    "bf16" by default, for directml "fp32". The folder is built aside and renamed: an unfinished one is
    never seen.

    Raises:
        FormatError: `output` exists and is something else than a compiled folder.
        BuildError: no tool chain for the target; other errors as ``load``.
    """
    source, output = Path(path), Path(output)
    if target == "directml":
        from .onnx_folder import compile_onnx

        compile_onnx(
            open_checkpoint(source), output, context=context, kv=kv, quantize=quantize, activation=activation,
            progress=progress,
        )  # fmt: skip
        return output
    kv = kv or "bf16"
    require_kv(kv)
    require_replaceable(output, manifest.is_compiled)
    resolved = Target.parse(target)
    resolved.require_cpu("a folder for")
    if tvm_llvm.linker(resolved) is None:
        raise BuildError(tvm_llvm.no_linker(resolved))
    if policy() == "on" and not resolved.missing_on(detect()):  # which tunes; the records travel
        load(source, resolved, context, kv, quantize=quantize, activation=activation)
    checkpoint = QuantisedCheckpoint(open_checkpoint(source), quantize)
    recording = RecordingCheckpoint(checkpoint)
    here = not resolved.missing_on(detect())
    options = {"context": context, "kv": kv, "activation": activation, "progress": progress}
    build = _used_here if here else _planned
    model, used = build(recording, resolved, **options)
    with new_folder(output, manifest.is_compiled) as aside:
        _write(aside, model, recording.record, used, resolved, activation, checked=here)
    return output


def _used_here(
    checkpoint: RecordingCheckpoint, target: Target, **options: Any
) -> tuple[LanguageModel, list[launch.Used]]:
    """Load the model for this host and run some steps; return the libraries that this took."""
    dispatch.forget()
    with launch.recording() as used:
        model = load_checkpoint(checkpoint, target, threads=None, whole_step=True, **options)
        ids = torch.arange(20) % model.config.vocab_size
        room = min(20, model.context - 3)
        for rows in ([ids[:room].tolist()], [[1], [1, 2, 3]]):
            model.generate(rows, max_tokens=3, ignore_eos=True, seed=0)
        model.reset()
    return model, list(used.values())


def _planned(
    checkpoint: RecordingCheckpoint, target: Target, *, context: int | None, kv: str, activation: str,
    progress: Callable[[int, int], None] | None,
) -> tuple[LanguageModel, list[launch.Used]]:  # fmt: skip
    """Pack the model for another target and build what its steps would take there."""
    plan = plan_memory(checkpoint, context=context, kv=kv)  # pyright: ignore[reportArgumentType]
    require_memory(plan)
    decoder = Decoder.from_checkpoint(
        checkpoint, context=plan.context, target=target, activation=activation, progress=progress
    ).eval()
    c = decoder.config
    with dispatch.planning(target) as chosen, torch.inference_mode():
        for rows, lengths in ((17, None), (1, None), (4, torch.tensor([2], dtype=torch.int32))):
            rows = min(rows, plan.context)
            cache = KVCache(c.num_layers, 1, c.num_kv_heads, c.head_dim, rows, dtype=kv)
            logits = decoder(torch.ones(1, rows, dtype=torch.int64), cache, 0, lengths)
            ops.sample(logits[:, -1])
    chosen = [*chosen, *plan_programs(decoder, kv, target)]
    used = [
        launch.build_only(name, form, spec, target) for name, form, spec in chosen if form.lower is not None
    ]
    model = LanguageModel(
        decoder, checkpoint.path, checkpoint.metadata, plan, target=target, threads=1, kv=kv,
        tokenizer=getattr(checkpoint, "tokenizer", None),
    )  # fmt: skip
    return model, used


def _write(
    folder: Path, model: LanguageModel, record: dict[str, Any], used: list[launch.Used], target: Target,
    activation: str, checked: bool,
) -> None:  # fmt: skip
    """Write everything; the manifest comes last."""
    os.chmod(folder, 0o700)
    weights = _write_weights(folder / manifest.WEIGHTS, model.decoder)
    (folder / "kernels").mkdir(mode=0o700)
    kernels = []
    for library in used:
        digest = manifest.file_entry(library.path)["sha256"][:16]
        name = f"kernels/{library.operator}-{digest}.so"
        shutil.copyfile(library.path, folder / name)
        kernels.append(
            {"operator": library.operator, "form": library.form, "spec": library.spec,
             "configuration": library.configuration, "file": name, "sizes": json.dumps(library.sizes)}
        )  # fmt: skip
    shutil.copyfile(launcher_file(target), folder / "kernels" / "launcher.so")
    (folder / "config.json").write_text(json.dumps(config_to_json(model.config), indent=1))
    if model.has_tokenizer:
        write_saved(folder, model.tokenizer)
    data = {
        "kind": manifest.COMPILED,
        "versions": versions("edgeformer", "torch", "apache-tvm", "apache-tvm-ffi"),
        "sources": launch.source_digest(KERNEL_SOURCES),
        "target": dataclasses.asdict(target) | {"features": sorted(target.features)},
        "options": {"context": model.context, "kv": model.kv, "activation": activation},
        "config": config_to_json(model.config),
        "checked": {"cpu": cpu_identity(), "declined": model.whole_step_declined} if checked else {},
        "chat_template": model.chat_template,
        "checkpoint": record,
        "weights": weights,
        "kernels": kernels,
    }
    manifest.save(folder, data)


def versions(*names: str) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {name: importlib.metadata.version(name) for name in names}


def _write_weights(path: Path, decoder: Decoder) -> dict[str, Any]:
    """Write every packed buffer, parameter and vector on a cache line; return where each lies."""
    packed: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    written: dict[int, int] = {}  # a shared weight lies there once
    with open(path, "wb") as file:

        def put(tensor: torch.Tensor) -> int:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            at = file.tell()
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            return at

        for name, weight in packed_weights(decoder):
            if id(weight) not in written:
                written[id(weight)] = put(weight.buffer)
            packed[name] = [written[id(weight)], weight.nbytes, weight.layout]
        for name, tensor in plain_tensors(decoder):
            tensors[name] = [put(tensor), str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        file.flush()
        os.fsync(file.fileno())
    return {"packed": packed, "tensors": tensors}


def packed_weights(decoder: torch.nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Yield (module name, packed weight) of every layer that has one."""
    for name, module in decoder.named_modules():
        if isinstance(module, PackedModule):
            yield name, module.weight


def plain_tensors(decoder: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of the checkpoint, not tables made of the configuration."""
    yield from decoder.named_parameters()
    for prefix, module in decoder.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), tensor
