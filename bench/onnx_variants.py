"""What ONNX Runtime's CPU provider makes of one model: this graph, variants of it, and genai's own builder.

``python -m edgeformer.bench.onnx_variants MODEL.gguf`` writes every variant with the same weights, times a
prompt and single tokens interleaved, and prints how far each is from the fastest.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..compiler.backends.onnx_graph import Graph, require
from ..compiler.measure import Sample
from ..model.config import ModelConfig
from ..model.loading import open_checkpoint
from ..model.onnx_decoder import (
    IDS,
    LOGITS,
    POSITIONS,
    ROWS,
    SEQLENS,
    TOTAL,
    GraphOptions,
    build_graph,
    cache_names,
)
from ..model.onnx_model import LONG
from ..runtime.onnx_session import DecoderSession

CONTEXT = 1024
Change = Callable[[Any, Path], None]  # of a model whose tensors lie in a folder


def level(number: int) -> Change:
    """Another accuracy level: 0 and 1 fp32 activations, 2 fp16, 3 bf16, 4 int8."""

    def change(model: Any, folder: Path) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                    attribute.i = number

    return change


def no_rest(model: Any, folder: Path) -> None:
    """Round minima to whole zero points, as ONNX Runtime's own quantiser does: other values, fewer nodes."""
    for product, rest, both in _minima(model):
        product.output[0] = both.output[0]
        for node in (both, rest):
            model.graph.node.remove(node)


def float_zeros(model: Any, folder: Path) -> None:
    """Zero points as floats, which hold any minimum and need no second product."""
    onnx, tensors = require("onnx"), {t.name: t for t in model.graph.initializer}

    def read(name: str) -> np.ndarray:
        return onnx.numpy_helper.to_array(tensors[name], str(folder))

    rests = {product.name: rest.input[1] for product, rest, _ in _minima(model)}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        scales, eight = read(node.input[2]), any(a.name == "bits" and a.i == 8 for a in node.attribute)
        zeros = np.full_like(scales, 128 if eight else 8)
        if len(node.input) > 3:
            packed = read(node.input[3])
            both = packed if eight else np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
            zeros = both[:, : scales.shape[1]].astype(np.float32)
        if node.name in rests:
            zeros = zeros - np.divide(
                read(rests[node.name]).T, scales, out=np.zeros_like(scales), where=scales != 0
            )
        name = f"{node.name}/floats"
        model.graph.initializer.append(onnx.numpy_helper.from_array(zeros.astype(np.float32), name))
        del node.input[3:]
        node.input.append(name)
    no_rest(model, folder)


def _minima(model: Any) -> list[tuple[Any, Any, Any]]:
    """Return (the product, what its minima add, the node that adds it) of every weight with minima."""
    by_output, found = {name: node for node in model.graph.node for name in node.output}, []
    for node in model.graph.node:
        product, rest = (by_output.get(name) for name in (*node.input[:2], "", "")[:2])
        if product is None or rest is None or not rest.input[-1].endswith(".rest"):
            continue
        if (node.op_type, product.op_type, rest.op_type) == ("Add", "MatMulNBits", "MatMul"):
            found.append((product, rest, node))
    return found


def split_products(model: Any, folder: Path) -> None:
    """Gate and up as two products: rows of one tensor are two tensors at other places of the file."""
    onnx, tensors = require("onnx"), {t.name: t for t in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type != "MatMulNBits" or not node.name.endswith("gate_up/matmul"):
            continue
        split = next(n for n in model.graph.node if node.output[0] in n.input)
        for part, output in enumerate(split.output):
            own = onnx.NodeProto()
            own.CopyFrom(node)
            own.name, own.output[0] = f"{node.name}.{part}", output
            rows = next(a for a in own.attribute if a.name == "N")
            rows.i //= 2
            for at in range(1, len(own.input)):
                half = _half(onnx, tensors[own.input[at]], part)
                model.graph.initializer.append(half)
                own.input[at] = half.name
            model.graph.node.insert(list(model.graph.node).index(node), own)
        model.graph.node.remove(node)
        model.graph.node.remove(split)


def _half(onnx: Any, tensor: Any, part: int) -> Any:
    """Return the first or second half of an external tensor's rows."""
    made = onnx.TensorProto()
    made.CopyFrom(tensor)
    made.name, made.dims[0] = f"{tensor.name}.{part}", tensor.dims[0] // 2
    place = {entry.key: entry for entry in made.external_data}
    length = int(place["length"].value) // 2
    place["offset"].value = str(int(place["offset"].value) + part * length)
    place["length"].value = str(length)
    return made


# name -> (which of our graphs, changes). "ours" is the folder: int8 for short chunks, fp32 for long ones.
VARIANTS: dict[str, tuple[str, tuple[Change, ...]]] = {
    "ours": ("cpu", ()),
    "int8 activations": ("cpu", ()),
    "int8, gate and up apart": ("cpu", (split_products,)),
    "int8, DirectML's nodes": ("directml", ()),
    "int8, float zero points": ("cpu", (float_zeros,)),
    "fp32 activations": ("cpu", (level(1),)),
    "accuracy level 0": ("cpu", (level(0),)),
    "fp32, DirectML's nodes": ("directml", (level(1),)),
    "int8, rounded minima": ("cpu", (no_rest,)),
    "fp32, rounded minima": ("cpu", (level(1), no_rest)),
}
WITHOUT_MINIMA = ("int8, gate and up apart",)  # columns of a matrix are no piece of the file
MINIMA = ("int8, rounded minima", "fp32, rounded minima")  # other values
SLOW = ("int8, float zero points", "accuracy level 0")  # shown to be, and left out unless asked for


class Runner:
    """One variant in a session."""

    def __init__(self, path: Path, config: ModelConfig, threads: int, long: Path | None = None) -> None:
        self.session, self.config = DecoderSession(path, threads=threads, long=long), config
        self.buffers = self.session.buffers(
            [pair for i in range(config.num_layers) for pair in zip(*cache_names(i))]
        )

    def step(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Run tokens [T] at a position; return the last one's logits [V]."""
        count, end = len(ids), position + len(ids)
        arrays = {
            IDS: ids[None], POSITIONS: np.arange(position, end)[None],
            SEQLENS: np.array([end - 1], np.int32), TOTAL: np.array([end], np.int32),
            ROWS: np.array([count - 1]),
        }  # fmt: skip
        shape = [1, 1, self.config.vocab_size]
        return self.session.run(self.buffers, arrays, LOGITS, shape, long=count >= LONG)[0, 0]


class GenaiRunner:
    """The model as onnxruntime-genai's builder writes it (its weights rounded again), in its own runtime."""

    def __init__(self, path: Path, threads: int, folder: Path) -> None:
        from .peers.onnxruntime import OnnxRuntimeRunner

        self.peer = OnnxRuntimeRunner(str(path))
        if not folder.exists():
            shutil.copytree(self.peer.build(threads), folder)
        self.peer.open(folder, CONTEXT)
        self.generator: Any = None
        self.position = 0

    def step(self, ids: np.ndarray, position: int) -> np.ndarray | None:
        """Run tokens at a position; a prompt before it is read first where it has another length."""
        if position != self.position or not position:
            self.generator = self.peer._generator(1)
            if position:
                self.generator.append_tokens(np.ones((1, position), np.int32))
        self.generator.append_tokens(ids[None].astype(np.int32))
        self.position = position + len(ids)


def main(
    model: Annotated[Path, typer.Argument(help="A GGUF file.")],
    prompt: Annotated[int, typer.Option("-p", help="Tokens of the prompt.")] = 512,
    generate: Annotated[int, typer.Option("-n", help="Single tokens after 128 of context.")] = 32,
    repeats: Annotated[int, typer.Option("-r")] = 3,
    threads: Annotated[int, typer.Option("-t")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Variants by name; default: all.")] = None,
    genai: Annotated[
        Path | None, typer.Option(help="Time onnxruntime-genai's model, too; built here unless it is there.")
    ] = None,
) -> None:
    """Time every variant of a model's graph."""
    checkpoint = open_checkpoint(model)
    onnx, config = require("onnx"), checkpoint.config
    random = np.random.default_rng(0)
    ids = random.integers(0, config.vocab_size, prompt)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "weights.bin", "wb") as file:
            graph = Graph(file, "weights.bin")
            held = build_graph(graph, checkpoint, GraphOptions(CONTEXT))
            sibling = graph.sibling()
            build_graph(sibling, checkpoint, GraphOptions(CONTEXT, cpu=True), held=held)
        made = {
            name: one.model("decoder", {}).SerializeToString()
            for name, one in (("directml", graph), ("cpu", sibling))
        }
        minima = any(product.rest for product in held.values())
        runners: dict[str, Runner | GenaiRunner] = {}
        for variant, (base, changes) in VARIANTS.items():
            if variant not in (only or VARIANTS) or variant in (WITHOUT_MINIMA if minima else MINIMA):
                continue
            if variant in SLOW and not only:
                continue
            proto = onnx.load_model_from_string(made[base])
            for change in changes:
                change(proto, folder)
            path = folder / f"{len(runners)}.onnx"
            path.write_bytes(proto.SerializeToString())
            long = folder / "long.onnx" if variant == "ours" else None
            if long is not None:
                exact = onnx.load_model_from_string(made["cpu"])
                level(1)(exact, folder)
                long.write_bytes(exact.SerializeToString())
            runners[variant] = Runner(path, config, threads, long)
        if genai is not None:
            runners["onnxruntime-genai"] = GenaiRunner(model, threads, genai)
        for variant, runner in runners.items():
            runner.step(ids[:1], 128)
            typer.echo(f"{variant} is ready", err=True)
        times: dict[str, dict[str, list[float]]] = {v: {"pp": [], "tg": []} for v in runners}
        logits: dict[str, Any] = {}
        for _ in range(repeats):
            for variant, runner in runners.items():
                start = time.perf_counter()
                logits[variant] = runner.step(ids, 0)
                times[variant]["pp"].append(time.perf_counter() - start)
            for variant, runner in runners.items():
                runner.step(ids[:1], 127)  # the caches hold a prompt of 128
                for step in range(generate):
                    start = time.perf_counter()
                    runner.step(ids[step : step + 1], 128 + step)
                    times[variant]["tg"].append(time.perf_counter() - start)
    best = {kind: min(statistics.median(t[kind]) for t in times.values()) for kind in ("pp", "tg")}
    for variant, found in times.items():
        pp, tg = (Sample.of(found[kind]) for kind in ("pp", "tg"))
        line = f"{variant:28} pp{prompt} {_rate(prompt, pp)}, {pp.seconds / best['pp']:.2f}x the best; "
        line += f"tg {_rate(1, tg)}, {tg.seconds / best['tg']:.2f}x"
        if logits[variant] is not None:
            difference = np.linalg.norm(logits[variant] - logits["ours"]) / np.linalg.norm(logits["ours"])
            line += f"; logits {difference:.1e} from ours"
        typer.echo(line)


def _rate(tokens: int, time: Sample) -> str:
    """Tokens a second of the median, and how far the middle half of the runs lies apart."""
    return f"{tokens / time.seconds:7.1f} tokens/s +- {time.spread / time.seconds:3.0%}"


if __name__ == "__main__":
    typer.run(main)
