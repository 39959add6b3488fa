"""Do our figures of a peer agree with its own tool's? Turn by turn, on the same file, threads and settings.

make llama-bench                                             # builds llama-bench and runs what follows
python -m edgeformer.bench.peer_check MODEL.gguf --llama-bench PATH
python -m edgeformer.bench.peer_check MODEL.gguf --openvino  # beside a plain loop over OpenVINO's Python API
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..compiler.errors import FormatError
from ..compiler.target import available_cores
from .child import ChildEngine, Shape
from .paired import estimate
from .table import markdown_table
from .work import Test

TESTS = (Test("pp", 512), Test("tg", 128))
LLAMA = {"flash_attention": True}
OPENVINO = {"precision": "bf16", "dynamic_quantization": 32}
# As OpenVINO's documentation has it: compile, then infer with NumPy arrays; outputs are shared, or the logits
# of 512 tokens are copied, 100 MB here. A line in, two times out, each the mean of two runs.
BARE = """
import json, sys, time
import numpy as np, openvino
core = openvino.Core()
compiled = core.compile_model(sys.argv[1], "CPU", json.loads(sys.argv[2]))
request, vocabulary = compiled.create_infer_request(), int(sys.argv[3])
def infer(ids, position):
    end = position + ids.shape[1]
    return request.infer({
        "input_ids": np.ascontiguousarray(ids), "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(position, end)[None],
        "beam_idx": np.zeros(1, np.int32),
    }, share_inputs=True, share_outputs=True)
def prefill(prompt):
    infer(prompt, 0)
def decode(prompt):
    for i in range(128):
        infer(prompt[:, i:i + 1], i)
def seconds(run, prompt):
    request.reset_state()
    start = time.perf_counter()
    run(prompt)
    return time.perf_counter() - start
prompt = np.random.randint(0, vocabulary, (1, 512))
seconds(prefill, prompt), seconds(decode, prompt)
for line in sys.stdin:
    found = [(seconds(run, prompt) + seconds(run, prompt)) / 2 for run in (prefill, decode)]
    print(json.dumps(dict(zip(("pp", "tg"), found))), flush=True)
"""

Seconds = dict[str, float]


def ask_llama_bench(tool: Path, model: Path, threads: int) -> Seconds:
    """Return the mean seconds of two repeats of each test, from llama-bench; a first one warms up.

    Its own warm-up of a decode test is one token, ours is a whole test.
    """
    flash = int(LLAMA["flash_attention"])
    command = [str(tool), "-m", str(model), "-t", str(threads), "-p", "512", "-n", "128", "-r", "3"]
    command += ["-fa", str(flash), "-o", "json"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
        rows = json.loads(found)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise FormatError(f"{tool} gave no rows: {error}") from error
    return {("pp" if row["n_prompt"] else "tg"): sum(row["samples_ns"][1:]) / 2e9 for row in rows}


def start_bare_openvino(model: Path, threads: int, vocabulary: int) -> Callable[[], Seconds]:
    """Start a process with the model that openvino-genai makes of the file; return what times it once."""
    import importlib

    genai: Any = importlib.import_module("openvino_genai")
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    (folder / "model.gguf").symlink_to(model.resolve())
    genai.LLMPipeline(str(folder / "model.gguf"), "CPU", enable_save_ov_model=True)
    properties = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": "f16",
        "INFERENCE_PRECISION_HINT": OPENVINO["precision"],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": OPENVINO["dynamic_quantization"],
    }  # fmt: skip
    arguments = [str(folder / "openvino_model.xml"), json.dumps(properties), str(vocabulary)]
    child = subprocess.Popen(
        [sys.executable, "-c", BARE, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stdout is not None
    source, sink = child.stdout, child.stdin

    def ask(_kept: object = temporary) -> Seconds:  # the model's folder lives as long as this call
        sink.write("\n")
        sink.flush()
        return json.loads(source.readline())

    return ask


def compare(engine: ChildEngine, setting: dict[str, Any], tool: Callable[[], Seconds], rounds: int) -> str:
    """Return a table of both: tokens a second, and ours over the tool's with its 95% interval."""
    ours: dict[str, list[float]] = {test.kind: [] for test in TESTS}
    theirs: dict[str, list[float]] = {test.kind: [] for test in TESTS}

    def turn_of_ours() -> None:
        for test in TESTS:
            seconds = [engine.run(test, setting).seconds for _ in range(2)]
            ours[test.kind].append(sum(seconds) / 2)

    def turn_of_tool() -> None:
        found = tool()
        for test in TESTS:
            theirs[test.kind].append(found[test.kind])

    for test in TESTS:
        engine.run(test, setting)
    for i in range(rounds):
        for turn in (turn_of_ours, turn_of_tool) if i % 2 else (turn_of_tool, turn_of_ours):
            turn()
    body = []
    for test in TESTS:
        found = estimate([b / a for a, b in zip(ours[test.kind], theirs[test.kind], strict=True)])
        speeds = [test.tokens / estimate(s[test.kind]).middle for s in (ours, theirs)]
        body.append([test.name, *(f"{speed:.1f}" for speed in speeds),
                     f"{found.middle:.3f} ({found.low:.3f} to {found.high:.3f})"])  # fmt: skip
    return markdown_table(["test", "bench model", "its own tool", "ratio"], body, left=1)


def main(
    model: Annotated[Path, typer.Argument(help="A GGUF file.")],
    llama_bench: Annotated[Path | None, typer.Option(help="The program llama-bench.")] = None,
    openvino: Annotated[bool, typer.Option("--openvino", help="OpenVINO's Python API.")] = False,
    rounds: Annotated[int, typer.Option("-r", min=2)] = 8,
    threads: Annotated[int, typer.Option("-t", min=1)] = available_cores(),
) -> None:
    """Print our figures of llama.cpp and OpenVINO beside those of their own tools."""
    from .peers.llama_cpp import LlamaCppEngine
    from .peers.openvino import OpenVinoEngine

    shape = Shape(threads, 641)
    if llama_bench is not None:
        engine: ChildEngine = LlamaCppEngine(model, shape)
        typer.echo(f"llama.cpp {engine.about['version']}, {threads} threads, {LLAMA}\n")
        typer.echo(compare(engine, LLAMA, lambda: ask_llama_bench(llama_bench, model, threads), rounds))
        engine.close()
    if openvino:
        engine = OpenVinoEngine(model, shape)
        typer.echo(f"\nopenvino {engine.about['version']}, {threads} threads, {OPENVINO}\n")
        bare = start_bare_openvino(model, threads, int(engine.about["vocabulary"]))
        typer.echo(compare(engine, OPENVINO, bare, rounds))
        engine.close()


if __name__ == "__main__":
    typer.run(main)
