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
Change = Callable[[Any], None]


def no_zeros(model: Any) -> None:
    """Leave out zero points: MatMulNBits takes the middle, 8 or 128, which is right without minima."""
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            del node.input[3:]


def level(number: int) -> Change:
    """Another accuracy level: 1 fp32 activations, 2 fp16, 3 bf16, 4 int8."""

    def change(model: Any) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                    attribute.i = number

    return change


def packed_attention(model: Any) -> None:
    """Queries, keys and values as one input, turned inside of GroupQueryAttention (no DirectML kernel)."""
    helper, by_output, drop = require("onnx").helper, {}, []
    for node in model.graph.node:
        by_output |= dict.fromkeys(node.output, node)
    for node in model.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        split = by_output[node.input[0]]
        turned = by_output[split.input[0]]
        first = by_output[turned.input[0]]
        node.input[0], node.input[1], node.input[2] = first.input[0], "", ""
        node.input.extend(turned.input[2:4])
        node.attribute.append(helper.make_attribute("do_rotary", 1))
        drop += [split, turned, first]
    for node in drop:
        model.graph.node.remove(node)


def no_rest(model: Any) -> None:
    """Round minima to whole zero points, as ONNX Runtime's own quantiser does: other values, fewer nodes."""
    by_output = {name: node for node in model.graph.node for name in node.output}
    for node in list(model.graph.node):
        product, rest = (by_output.get(name) for name in (*node.input[:2], "", "")[:2])
        if node.op_type != "Add" or product is None or rest is None or rest.op_type != "MatMul":
            continue
        if product.op_type == "MatMulNBits" and rest.input[1].endswith(".rest"):
            product.output[0] = node.output[0]
            model.graph.node.remove(node)
            model.graph.node.remove(rest)


VARIANTS: dict[str, tuple[Change, ...]] = {
    "ours": (),  # int8 for short chunks, fp32 for long ones
    "int8 activations": (),
    "without zero points": (no_zeros,),
    "packed attention": (packed_attention,),
    "packed, without zero points": (packed_attention, no_zeros),
    "fp32 activations": (level(1),),
    "rounded minima": (no_rest,),
    "packed, rounded minima": (packed_attention, no_rest),
}
SYMMETRIC = ("without zero points", "packed, without zero points")  # another model where there are minima
MINIMA = ("rounded minima", "packed, rounded minima")


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
            build_graph(graph, checkpoint, GraphOptions(CONTEXT))
        made = graph.model("decoder", {}).SerializeToString()
        minima = any(t.name.endswith(".rest") for t in graph.model("decoder", {}).graph.initializer)
        runners: dict[str, Runner | GenaiRunner] = {}
        for variant, changes in VARIANTS.items():
            if (only and variant not in only) or variant in (SYMMETRIC if minima else MINIMA):
                continue
            proto = onnx.load_model_from_string(made)
            for change in changes:
                change(proto)
            path = folder / f"{len(runners)}.onnx"
            path.write_bytes(proto.SerializeToString())
            long = folder / "long.onnx" if variant == "ours" else None
            if long is not None:
                exact = onnx.load_model_from_string(made)
                level(1)(exact)
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
        pp, tg = (statistics.median(found[kind]) for kind in ("pp", "tg"))
        line = (
            f"{variant:28} pp{prompt} {prompt / pp:7.1f} tokens/s, {pp / best['pp']:.2f}x the best's time; "
        )
        line += f"tg {1 / tg:6.1f} tokens/s, {tg / best['tg']:.2f}x"
        if logits[variant] is not None:
            difference = np.linalg.norm(logits[variant] - logits["ours"]) / np.linalg.norm(logits["ours"])
            line += f"; logits {difference:.1e} from ours"
        typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
