"""Commands that write a model in another form: compile."""

from __future__ import annotations

import typer

from .cli_options import (
    Activation,
    ActivationType,
    Context,
    DryRun,
    Kv,
    KvType,
    ModelPath,
    OutputFolder,
    QuantizeTo,
    TargetName,
    value,
)  # fmt: skip
from .console import megabytes, print_plan, stderr


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("compile")(compile_folder)


def compile_folder(
    model: ModelPath,
    output: OutputFolder,
    target: TargetName = "auto",
    context: Context = None,
    kv: KvType = Kv.bf16,
    quantize: QuantizeTo = None,
    activation: ActivationType = Activation.auto,
    dry_run: DryRun = False,
) -> None:
    """Write packed weights and kernels to a folder that `edgeformer run` starts without compiling."""
    if dry_run:
        print_plan(model, target, context, kv.value, value(quantize), runs_here=False)
        return
    from .model.compile_folder import compile_model

    with stderr().status("compiling"):
        folder = compile_model(
            model, output, target=target, context=context, kv=kv.value, quantize=value(quantize),
            activation=activation.value,
        )  # fmt: skip
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    typer.echo(f"{folder}: {megabytes(total)}; start it with `edgeformer run {folder}`", err=True)
