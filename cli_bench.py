"""The commands `edgeformer bench ...`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import (
    Activation,
    ActivationType,
    Kv,
    KvType,
    ModelPath,
    OpByOp,
    Output,
    QuantizeTo,
    TargetName,
    value,
)  # fmt: skip
from .compiler.errors import UnsupportedError

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed beside the limits of this machine.")


Strict = Annotated[bool, typer.Option("--strict", help="Refuse when the device check finds something.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the same run, killed before its end.")]
OutputForm = Annotated[Output, typer.Option("--output", "-o", help="Form of the table.")]
ThreadList = Annotated[str, typer.Option("-t", "--threads", help="A comma list; default: the cores.")]


@bench_app.command("model")
def bench_model(
    model: ModelPath,
    prompt: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt tokens, comma list.")] = "512",
    generate: Annotated[str, typer.Option("-n", "--n-gen", help="Tokens to generate, comma list.")] = "128",
    depth: Annotated[str, typer.Option("-d", "--n-depth", help="Tokens in the cache before.")] = "0",
    repeats: Annotated[
        int | None, typer.Option("-r", "--repetitions", min=1, help="Default: until ratios are known well.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Without -r: of an engine and test.")] = 20.0,
    threads: ThreadList = "",
    batch: Annotated[str, typer.Option("-b", "--batch", help="Sequences side by side, for decode.")] = "1",
    output: OutputForm = Output.md,
    peers: Annotated[str, typer.Option(help="Also measure, on the same file: a comma list of peers.")] = "",
    scenarios: Annotated[
        str, typer.Option(help="MLPerf-style: single-stream, multi-stream, offline; a comma list.")
    ] = "",
    queries: Annotated[int, typer.Option(min=1, help="Samples of a scenario.")] = 16,
    ttft: Annotated[bool, typer.Option(help="Time to the first token, warm and of a new process.")] = True,
    quality_tokens: Annotated[int, typer.Option(min=0, help="Of text compared with fp32; 0: none.")] = 1024,
    watts: Annotated[
        float | None, typer.Option(help="The device's power, to estimate energy without a counter.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds of silence before a peer hangs.")] = 300.0,
    profile: Annotated[
        Path | None, typer.Option(help="Only tell where the time goes; write a Chrome trace here.")
    ] = None,
    strict: Strict = False,
    resume: Resume = False,
    kv: KvType = Kv.bf16,
    target: TargetName = "auto",
    quantize: QuantizeTo = None,
    activation: ActivationType = Activation.auto,
    op_by_op: OpByOp = False,
) -> None:
    """Measure prefill (pp) and decode (tg) as llama-bench does, beside the limits of this machine."""
    from .bench.model import bench, require_plausible
    from .bench.options import Options
    from .bench.table import render

    settings = Options(
        prompt=numbers(prompt, "-p"), generate=numbers(generate, "-n"), depth=numbers(depth, "-d"),
        batch=numbers(batch, "-b", least=1), threads=numbers(threads, "-t", least=1), repeats=repeats,
        seconds=seconds,
        target=target, kv=kv.value, activation=activation.value, quantize=value(quantize),
        whole_step=not op_by_op,
        peers=names(peers), scenarios=names(scenarios), queries=queries, ttft=ttft,
        quality_tokens=quality_tokens, watts=watts, timeout=timeout, strict=strict, resume=resume,
    )  # fmt: skip
    if profile is not None:
        print_profile(model, settings, profile)
        return
    rows = bench(model, settings, progress)
    typer.echo(render(rows, output.value))
    require_plausible(rows)


def print_profile(model: Path, settings: Any, out: Path) -> None:
    """Print the phases of each test's call, and write the trace."""
    from .bench import profile

    settings.check()
    found = profile.profile(model, [test for test in settings.tests() if test.batch == 1], settings)
    profile.write_trace(found, out)
    typer.echo(profile.table(found))


_STARTED = time.monotonic()


def progress(text: str) -> None:
    """Tell on stderr what is going on, and when."""
    typer.echo(f"{time.monotonic() - _STARTED:6.1f} s  {text}", err=True)


def names(text: str) -> tuple[str, ...]:
    """Read a comma list of names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str, option: str, least: int = 0) -> tuple[int, ...]:
    """Read a comma list of whole numbers."""
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UnsupportedError(f"{option} takes whole numbers with commas between, not {text!r}") from None
    if any(n < least for n in found):
        raise UnsupportedError(f"{option} takes numbers of at least {least}, not {text!r}")
    return found


Files = Annotated[list[Path], typer.Argument(metavar="FILES...", help="Rows, as -o json or jsonl.")]


@bench_app.command("report")
def bench_report(
    files: Files,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write every plot as PNG into this folder.")] = None,
) -> None:
    """Make one self-contained page of results: tables, plots, where they come from."""
    from .bench.report import write
    from .bench.result_files import read_all

    for path in write(read_all(files), output, png):
        typer.echo(path)


@bench_app.command("compare")
def bench_compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Rows to compare with.", show_default=False)],
    new: Annotated[list[Path], typer.Argument(metavar="NEW...", help="Rows of other runs.")],
    output: OutputForm = Output.md,
    threshold: Annotated[float, typer.Option(min=0.0, help="Changes up to this part are no change.")] = 0.03,
) -> None:
    """Set runs side by side; exit code 1 when something is slower beyond spread, threshold and machine."""
    from .bench.compare import render
    from .bench.result_files import read_all

    first, *others = read_all([base, *new])
    text, regressed = render(first, others, threshold, output.value)
    typer.echo(text)
    if regressed:
        raise typer.Exit(1)


@bench_app.command("ops")
def bench_ops_command(
    everything: Annotated[
        bool, typer.Option("--all", help="All models, 1 to 4,096 tokens at once, contexts to 32k: hours.")
    ] = False,
    operators: Annotated[str, typer.Option(help="A comma list; default: all.")] = "",
    shapes: Annotated[str, typer.Option(help="Models whose shapes to take, a comma list, or all.")] = "",
    rows: Annotated[str, typer.Option("-m", "--rows", help="Tokens at once, a comma list.")] = "",
    context: Annotated[str, typer.Option("-c", "--context", help="Tokens in the cache, comma list.")] = "",
    formats: Annotated[str, typer.Option(help="Weights: int4, int8.")] = "int4",
    forms: Annotated[str, typer.Option(help="Ask for forms by name; default: what dispatch takes.")] = "",
    target: TargetName = "auto",
    repeats: Annotated[int, typer.Option("-r", "--repetitions", min=1)] = 7,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1)] = None,
    output: OutputForm = Output.md,
    strict: Strict = False,
    resume: Resume = False,
) -> None:
    """Measure single kernels on shapes of real models, beside their limits and beside PyTorch.

    --target cuda measures the Triton kernels of this machine's GPU, beside its copy and GEMM rates; it has
    shapes of its own.
    """
    from .compiler.backends.triton_gpu import DEVICES

    if target in DEVICES:
        if shapes or rows or context or forms or threads:
            raise UnsupportedError(f"--target {target} takes --operators and -r: its shapes are its own")
        from .bench.gpu_ops import GpuOptions, bench_gpu, render_gpu

        found = bench_gpu(GpuOptions(target, names(operators), max(repeats, 3)), progress)
        typer.echo(render_gpu(found, output.value))
        return
    from .bench.op_cases import shapes as known
    from .bench.op_table import render_ops
    from .bench.ops import OpsOptions, bench_ops

    given: dict[str, Any] = {
        "operators": names(operators), "models": tuple(known()) if shapes == "all" else names(shapes),
        "rows": numbers(rows, "--rows", least=1), "contexts": numbers(context, "--context", least=1),
        "formats": names(formats), "forms": names(forms),
    }  # fmt: skip
    make = OpsOptions.everything if everything else OpsOptions
    options = make(
        **{k: v for k, v in given.items() if v},
        target=target,
        repeats=repeats,
        threads=threads,
        strict=strict,
        resume=resume,
    )
    typer.echo(render_ops(bench_ops(options, progress), output.value))


@bench_app.command("suite")
def bench_suite(
    model: ModelPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where rows and page go.")] = Path(
        "bench-out"
    ),
    peers: Annotated[str, typer.Option(help="A comma list.")] = "llama.cpp,openvino",
    everything: Annotated[bool, typer.Option("--all", help="Of the kernels all shapes: hours.")] = False,
    strict: Strict = False,
    resume: Resume = False,
) -> None:
    """Measure the default suite, a quarter of an hour: a model beside its peers, single kernels, one page."""
    from .bench.ops import OpsOptions
    from .bench.options import Options
    from .bench.suite import suite

    ops = (OpsOptions.everything if everything else OpsOptions)(strict=strict, resume=resume)
    settings = Options(peers=names(peers), strict=strict, resume=resume)
    for path in suite(model, settings, ops, output, progress):
        typer.echo(path)
