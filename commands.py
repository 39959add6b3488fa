"""Commands that write a model in another form, and the one that says what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import (
    Activation,
    ActivationType,
    Context,
    DryRun,
    ModelPath,
    OutputFolder,
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
from .console import DIRECTML, megabytes, print_directml, print_facts, print_needed, print_plan, stderr

TextFile = Annotated[Path | None, typer.Option("--text", "-f", help="A UTF-8 text; default: a licence's.")]
EvalTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=2, help="Tokens of the text.")]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("compile")(compile_folder)
    app.command("quantize")(quantize)
    app.command("eval")(evaluate)


def compile_folder(
    model: ModelPath,
    output: OutputFolder,
    target: TargetName = "auto",
    context: Context = None,
    kv: OwnKvType = None,
    quantize: QuantizeTo = None,
    activation: ActivationType = Activation.auto,
    dry_run: DryRun = False,
) -> None:
    """Write packed weights and kernels to a folder that `edgeformer run` starts without compiling.

    `--target directml` writes an ONNX model instead, for DirectML on Windows (fp32 or fp16 by --kv).
    """
    if dry_run and target == DIRECTML:
        from .model.loading import open_checkpoint
        from .model.onnx_plan import plan_onnx

        print_needed(
            plan_onnx(
                open_checkpoint(model), context=context, kv=value(kv) or "fp32", quantize=value(quantize),
                activation=activation.value,
            )
        )  # fmt: skip
        return
    if dry_run:
        print_plan(model, target, context, value(kv) or "bf16", value(quantize), runs_here=False)
        return
    from .model.compile_folder import compile_model

    with stderr().status("compiling"):
        folder = compile_model(
            model, output, target=target, context=context, kv=value(kv), quantize=value(quantize),
            activation=activation.value,
        )  # fmt: skip
    if target == DIRECTML:
        print_directml(folder)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    typer.echo(f"{folder}: {megabytes(total)}; start it with `edgeformer run {folder}`", err=True)


def quantize(
    model: ModelPath,
    output: OutputFolder,
    profile: Annotated[Quantize, typer.Option(help="What weights are rounded to.")] = Quantize.int4,
    text: TextFile = None,
    max_tokens: EvalTokens = 2048,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with the original.")] = True,
    as_json: JsonOutput = False,
    dry_run: DryRun = False,
) -> None:
    """Round a model's weights, write them as a folder, and say what that costs in quality."""
    from .model.loading import open_checkpoint, plan

    if dry_run:
        before, after = (plan(model, None, None, choice).weights for choice in (None, profile.value))
        facts: dict[str, Any] = {"profile": profile.value, "weights_before": before, "weights_after": after}
        print_facts(facts if as_json else _readable(facts), as_json)
        return
    from .model.compress.quantize_folder import quantize_model
    from .model.plan import weight_bytes

    with stderr().status("rounding"):
        folder = quantize_model(model, output, profile=profile.value)
    facts = {
        "folder": str(folder),
        "profile": profile.value,
        "weights_before": weight_bytes(open_checkpoint(model), None),
        "weights_after": weight_bytes(open_checkpoint(folder), None),
    }
    if check:
        facts |= compare(folder, model, text, max_tokens=max_tokens)
    print_facts(facts if as_json else _readable(facts), as_json)


def evaluate(
    model: ModelPath,
    text: TextFile = None,
    against: Annotated[
        Path | None, typer.Option(help="Compare with this model in fp32, not with the same weights.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read from an empty cache.")] = 512,
    max_tokens: EvalTokens = 4096,
    output: OutputText = Text.text,
    kv: OwnKvType = None,
    threads: Threads = None,
    target: TargetName = "auto",
    quantize: QuantizeTo = None,
    activation: OwnActivationType = None,
    trust: Trust = False,
) -> None:
    """Compare the model with fp32 PyTorch on the same weights, or on another model's."""
    options = {
        "target": target, "kv": value(kv), "threads": threads, "quantize": value(quantize),
        "activation": value(activation), "trust": trust,
    }  # fmt: skip
    found = compare(model, against, text, window=window, max_tokens=max_tokens, **options)
    print_facts(found, output == Text.json)


def compare(
    model: Path,
    against: Path | None,
    text: Path | None,
    *,
    window: int = 512,
    max_tokens: int,
    **options: Any,
) -> dict[str, Any]:
    """Return what `edgeformer eval` prints."""
    from .model.decoder import Decoder
    from .model.evaluate import evaluate as evaluate_model
    from .model.evaluate import read_text
    from .model.loading import load, open_checkpoint

    name, words = read_text(text)
    with stderr().status("evaluating"):
        loaded = load(model, context=window, **options)
        reference = None
        if against is not None:
            reference = Decoder.from_checkpoint(open_checkpoint(against), context=window)
        found = evaluate_model(loaded, words, window=window, max_tokens=max_tokens, reference=reference)
    return {
        "text": name,
        "against": f"{against or 'the same weights'} in fp32",
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "reference_perplexity": found.reference_perplexity,
        "perplexity_change": found.perplexity_change,
        "mean_kl": found.mean_kl,
        "top1_agreement": found.top1_agreement,
    }


def _readable(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts with bytes as text."""
    return {k: megabytes(v) if k.startswith("weights_") else v for k, v in facts.items()}
