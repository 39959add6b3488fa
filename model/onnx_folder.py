"""`edgeformer compile --target directml`: a model as ONNX in a folder, and that folder back to a model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..compiler.backends.directml import Fallback, fallbacks, support
from ..compiler.backends.onnx_graph import Graph, open_graph, require
from ..compiler.errors import BuildError, UnsupportedError
from ..compiler.target import Target, detect
from ..runtime.dispatch import use_target
from ..runtime.onnx_session import CPU, DecoderSession, choose_provider
from ..runtime.threads import set_threads
from .compile_folder import versions
from .decoder import Decoder
from .evaluate import capped, reference_hidden
from .generate import LanguageModel
from .load import manifest
from .load.config_json import config_from_json, config_to_json
from .load.folders import new_folder, require_replaceable
from .load.saved_tokenizer import VOCABULARY, read_saved, write_saved
from .load.tokenizer import ModelTokenizer
from .onnx_decoder import GraphOptions, build_graph
from .onnx_model import OnnxDecoder, OnnxModel
from .onnx_plan import plan_onnx_folder
from .plan import choose_context, require_memory
from .requantise import QuantisedCheckpoint

TARGET = "directml"
MODEL = "model.onnx"  # in nodes that DirectML has kernels for
# The same decoder in the nodes that ONNX Runtime's CPU provider is fastest with, over the same tensors; the
# second with fp32 activations, for long chunks, of "auto" alone.
CPU_MODEL, LONG = "cpu.onnx", "long.onnx"
FLOATS = {"fp32": "float32", "fp16": "float16"}
LEVELS = {"auto": 4, "int8": 4, "float": 1}  # of an activation: MatMulNBits' accuracy level
WORST = {"fp32": 1e-3, "fp16": 5e-2}  # relative distance of checked logits from fp32 PyTorch
_log = logging.getLogger(__name__)


def compile_onnx(
    checkpoint: Any, output: Path, *, context: int | None = None, kv: str | None = None,
    quantize: str | None = None, activation: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Fallback]:  # fmt: skip
    """Write an opened checkpoint as an ONNX model for DirectML, with tokenizer and manifest.

    ``kv`` is the type of the cache and of all activations: "fp32" (the default) or "fp16". Its graph and the
    one for the CPU provider are run there, if ONNX Runtime is installed, and compared with fp32 PyTorch.

    Returns the nodes that DirectML has no kernel for. Raises UnsupportedError for an option that ONNX
    Runtime's operators lack or where onnx is missing, BuildError where the check fails, FormatError where
    `output` is something else than such a folder.
    """
    kv = kv or "fp32"
    if kv not in FLOATS:
        raise UnsupportedError(f"kv={kv!r} is not supported for {TARGET}; use one of {', '.join(FLOATS)}")
    if activation not in LEVELS:
        raise UnsupportedError(f"activation {activation!r} is not supported; use one of {', '.join(LEVELS)}")
    require("onnx")
    require_replaceable(output, manifest.is_compiled)
    source = QuantisedCheckpoint(checkpoint, quantize)
    options = GraphOptions(choose_context(source.config, context), LEVELS[activation])
    with new_folder(output, manifest.is_compiled) as aside:
        model, for_cpu = _write_graphs(aside, source, options, FLOATS[kv], progress)
        found = fallbacks(model)
        exact = aside / LONG
        graphs = {
            "error": _with_level(model, LEVELS["float"]),
            "cpu_error": _with_level(for_cpu, LEVELS["float"]),
        }
        checked = _check(graphs, exact, source, options, kv)
        if activation != "auto":
            exact.unlink()
        tokenizer = _tokenizer(checkpoint)
        if tokenizer is not None:
            write_saved(aside, tokenizer)
        target = dataclasses.asdict(directml_target())
        manifest.save(
            aside,
            {
                "kind": manifest.ONNX,
                "versions": versions("edgeformer", "torch", "onnx"),
                "sources": "",
                "target": target | {"features": []},
                "options": {"context": options.context, "kv": kv, "activation": activation},
                "config": config_to_json(source.config),
                "checked": {
                    **checked,
                    "directml": [str(one) for one in found],
                    "table": support()["read"].isoformat(),
                },
                "chat_template": checkpoint.metadata.get("tokenizer.chat_template"),
                "checkpoint": {},
                "weights": {},
                "kernels": [],
            },
        )
    return found


def directml_target(provider: str = "") -> Target:
    """The target of models that ONNX Runtime runs; what is left to this process runs in plain PyTorch."""
    name = f"{TARGET} ({provider})" if provider else TARGET
    return dataclasses.replace(detect(), name=name, backends=("onnx_graph", "torch"))


def _write_graphs(
    folder: Path, checkpoint: Any, options: GraphOptions, float_type: str,
    progress: Callable[[int, int], None] | None,
) -> tuple[Any, Any]:  # fmt: skip
    """Return (the model for DirectML, the one for the CPU provider), which read the same tensors."""
    with open(folder / manifest.WEIGHTS, "wb") as file:
        graph = Graph(file, manifest.WEIGHTS, float_type)
        held = build_graph(graph, checkpoint, options, progress)
        sibling = graph.sibling()
        build_graph(sibling, checkpoint, dataclasses.replace(options, cpu=True), held=held)
    metadata = {"edgeformer": versions("edgeformer")["edgeformer"]}
    models = graph.model("decoder", metadata), sibling.model("decoder", metadata)
    for name, model in zip((MODEL, CPU_MODEL), models):
        (folder / name).write_bytes(model.SerializeToString())
    return models


def _tokenizer(checkpoint: Any) -> ModelTokenizer | None:
    own = getattr(checkpoint, "tokenizer", None)
    if own is not None:
        return own()
    if not checkpoint.metadata.get("tokenizer.ggml.tokens"):
        return None
    return ModelTokenizer(checkpoint.metadata, checkpoint.path)


def _check(
    graphs: dict[str, Any], path: Path, checkpoint: Any, options: GraphOptions, kv: str
) -> dict[str, Any]:  # fmt: skip
    """Write each graph (with fp32 activations) to `path`, run it on the CPU and return how far it is off.

    The last one stays there.
    """
    try:
        api = require("onnxruntime")
    except UnsupportedError as error:
        _log.warning("the graph is not checked: %s", error)
        path.write_bytes(list(graphs.values())[-1].SerializeToString())
        return {"onnxruntime": ""}
    config = checkpoint.config
    room = min(options.context, 21)
    ids = torch.randint(0, config.vocab_size, (1, room), generator=torch.Generator().manual_seed(room))
    reference = Decoder.from_checkpoint(checkpoint, context=options.context)
    hidden = reference_hidden(reference, [ids[0]])[0]
    head = reference.head.weight.unpack().dequantize()
    expected = capped(hidden @ head.T, config.logit_softcap)
    del reference
    checked: dict[str, Any] = {"onnxruntime": api.__version__, "provider": CPU}
    for name, graph in graphs.items():
        path.write_bytes(graph.SerializeToString())
        got = _logits(path, config, options.context, ids)
        checked[name] = error = ((got - expected).norm() / expected.norm()).item()
        if not error <= WORST[kv]:
            raise BuildError(
                f"the ONNX graph's logits are {error:.1e} from fp32 PyTorch's; nothing is written"
            )
    return checked


def _logits(path: Path, config: Any, context: int, ids: torch.Tensor) -> torch.Tensor:
    """Return a graph's logits of a prompt, a second chunk, single tokens."""
    session = DecoderSession(path, threads=torch.get_num_threads(), provider=CPU)
    decoder = OnnxDecoder(session, config, context)
    cache = decoder.new_cache(1)
    parts = [ids[:, start:stop] for start, stop in ((0, 13), (13, 18), (18, 19), (19, 20), (20, 21))]
    got, position = [], 0
    for part in filter(torch.Tensor.numel, parts):
        got.append(decoder(part, cache, position, last_only=False)[0])
        position += part.shape[1]
    return torch.cat(got)


def _with_level(model: Any, level: int) -> Any:
    copy = type(model)()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    return copy


def load_onnx(
    folder: manifest.CompiledFolder, *, target: str | Target = "auto", context: int | None = None,
    kv: str | None = None, threads: int | None = None, activation: str | None = None,
) -> LanguageModel:  # fmt: skip
    """Load a folder of ``compile_onnx``: DirectML where this is Windows and has it, else the CPU.

    Raises:
        FormatError: the model is damaged, or its tensors lie elsewhere.
        UnsupportedError: onnxruntime is missing, or an option that the folder was not compiled for.
        CapacityError: more context than it was compiled for, or too little memory.
    """
    _require_options(folder, target, kv, activation)
    require("onnxruntime")
    config = config_from_json(folder.data["config"], folder.path)
    plan = plan_onnx_folder(folder, context, kv)
    kind: str = folder.data["options"]["kv"]
    require_memory(plan)
    files = folder.data["files"]
    held = {MODEL: folder.file(MODEL)}
    held |= {name: folder.file(name) for name in (CPU_MODEL, LONG) if name in files}
    for path in held.values():
        open_graph(path, files)
    folder.verify()
    count, provider = set_threads(threads), choose_provider()
    short = held[CPU_MODEL if provider == CPU and CPU_MODEL in held else MODEL]
    session = DecoderSession(short, threads=count, provider=provider, long=held.get(LONG))
    set_threads(1)  # torch does little here, and its threads would spin on the cores of ONNX Runtime's
    resolved = directml_target(session.provider)
    use_target(resolved)
    return OnnxModel(
        OnnxDecoder(session, config, plan.context), folder.path,
        {"tokenizer.chat_template": folder.data.get("chat_template")}, plan,
        target=resolved, threads=count, kv=kind,
        tokenizer=(lambda: read_saved(folder.path)) if VOCABULARY in folder.data["files"] else None,
        declined=folder.data["checked"].get("directml", []),
    )  # fmt: skip


def _require_options(
    folder: manifest.CompiledFolder, target: str | Target, kv: str | None, activation: str | None
) -> None:
    if target not in ("auto", "host", TARGET):
        raise UnsupportedError(
            f"{folder.path} was compiled for {TARGET}; compile it for {target} to run that"
        )
    options = folder.data["options"]
    for name, asked in (("kv", kv), ("activation", activation)):
        if asked is not None and asked != options.get(name):
            raise UnsupportedError(
                f"{folder.path} was compiled with --{name} {options.get(name)}; compile it again with "
                f"--{name} {asked}"
            )
