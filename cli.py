"""The command `edgeformer`: answers and data on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from . import cli_device, cli_targets, cli_tune
from .cli_bench import bench_app
from .cli_options import (
    Activation,
    Context,
    Kv,
    MaxTokens,
    ModelPath,
    OpByOp,
    OutputText,
    OwnActivationType,
    OwnKvType,
    Quantize,
    QuantizeTo,
    TargetName,
    Text,
    Threads,
    Trust,
    value,
)  # fmt: skip
from .commands import register
from .compiler.errors import EdgeFormerError
from .console import answer, chat, megabytes, print_facts, print_plan, print_report, print_speed, stderr

if TYPE_CHECKING:
    from .model.generate import LanguageModel

EXIT_ERROR = 2


class Commands(TyperGroup):
    """Tells an EdgeFormerError in one line and ends with exit code 2; `--debug` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeFormerError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_ERROR) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(bench_app, name="bench")
register(app)
cli_tune.register(app)
cli_device.register(app)
cli_targets.register(app)


def main() -> None:
    """Run the command line."""
    app()


def print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        from .bench.device import version_of

        typer.echo(f"edgeformer {version_of('edgeformer')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and end."),
    ] = False,
) -> None:
    """Run transformers as fast as this device allows."""
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)


@app.command()
def run(
    model: ModelPath,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Without one: a chat.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this part of the likeliest.")] = 0.0,
    repeat_penalty: Annotated[float, typer.Option(help="Above 1 makes repetition less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws; default: a fresh one.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the prompt without chat template.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Then say which kernels ran, and why.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how much memory it takes.")] = False,
    context: Context = None,
    kv: OwnKvType = None,
    threads: Threads = None,
    target: TargetName = "auto",
    quantize: QuantizeTo = None,
    activation: OwnActivationType = None,
    op_by_op: OpByOp = False,
    trust: Trust = False,
) -> None:
    """Answer a prompt, or chat when there is none."""
    if dry_run:
        print_plan(model, target, context, value(kv), value(quantize), trust)
        return
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    with no_collections():
        loaded = load_model(model, target, context, kv, threads, quantize, activation, op_by_op, trust)
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repeat_penalty, "seed": seed,
    }  # fmt: skip
    if prompt is None:
        chat(loaded, raw, sampling)
    else:
        answer(loaded, prompt, raw, [], sampling)
        print_speed(loaded)
    if report:
        print_report(loaded)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Hold Python's collector still: importing torch alone runs it for 0.3 s, and nothing here is garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections need not look at it either
        gc.enable()


def load_model(
    path: Path, target: str, context: int | None, kv: Kv | None, threads: int | None,
    quantize: Quantize | None, activation: Activation | None, op_by_op: bool = False, trust: bool = False,
) -> LanguageModel:  # fmt: skip
    """Load a model with a progress bar on stderr."""
    from .model.load.manifest import is_compiled, open_folder

    options: dict[str, Any] = {
        "target": target, "context": context, "kv": value(kv), "threads": threads,
        "quantize": value(quantize),
        "activation": value(activation), "whole_step": not op_by_op,
    }  # fmt: skip
    if is_compiled(path):
        folder = open_folder(path, trust=trust)  # hashes the weights while torch is imported
        from .model.loading import load

        return load(folder, **options)
    from rich.progress import Progress

    from .model.loading import load

    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"loading {path.name}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done == total:  # the first run of a model takes some seconds here
                bar.update(task, total=None, description="compiling kernels that are not in the cache yet")

        return load(path, progress=progress, **options)


@app.command()
def doctor(output: OutputText = Text.text) -> None:
    """Describe this machine and the tools, for an issue."""
    from .bench import device as machine

    facts = {k: v for k, v in machine.device().items() if k != "features"}
    free = machine.free_memory()
    if output == Text.text:
        facts |= {k: megabytes(facts[k]) for k in ("l2_bytes", "l3_bytes", "memory_bytes")}
    found = machine.versions()
    facts |= {
        "memory_free": megabytes(free) if output == Text.text else free,
        "limits": machine.limits(),
        "threads": machine.thread_settings(),
        "gpu": machine.cuda(),
        "opencl": machine.opencl(),
        "linker": machine.linker(),
        "cache": machine.cache_state(),
        "back_ends": machine.back_ends(),
        "versions": found,
        "warnings": machine.warnings_of(found) or "none",
    }
    print_facts(facts, output == Text.json)


if __name__ == "__main__":
    main()
