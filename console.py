"""What a person sees in a terminal: streamed answers, the chat, speeds, reports and facts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .compiler.errors import CapacityError, UnsupportedError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .model.generate import LanguageModel
    from .model.plan import MemoryPlan


DIRECTML = "directml"  # a target of `compile` that is a tool chain, not a device


def answer(
    model: LanguageModel, prompt: str, raw: bool, messages: list[dict[str, str]], sampling: dict[str, Any]
) -> None:
    """Stream one answer to stdout; `messages` takes the prompt and what was answered."""

    def write(text: str) -> None:
        typer.echo(text, nl=False)
        sys.stdout.flush()

    messages.append({"role": "user", "content": prompt})
    if raw or model.chat_template is None:
        said = model.generate(prompt, stream=write, **sampling)
    else:
        said = model.chat(messages, stream=write, **sampling)
    messages.append({"role": "assistant", "content": said})
    typer.echo()


def chat(model: LanguageModel, raw: bool, sampling: dict[str, Any]) -> None:
    """Read prompts from the terminal until it ends; Ctrl-C ends an answer, Ctrl-D the chat."""
    if raw or model.chat_template is None:
        raise UnsupportedError("a chat needs the model's chat template; give a prompt with -p")
    typer.echo("Ctrl-C ends an answer, Ctrl-D or /exit the chat.", err=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            typer.echo("> ", nl=False, err=True)
            prompt = input()
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return
        if prompt.strip() == "/exit":
            return
        if not prompt.strip():
            continue
        kept = len(messages)
        try:
            answer(model, prompt, raw, messages, sampling)
            print_speed(model)
        except KeyboardInterrupt:
            del messages[kept:]  # as if it had not been asked
            typer.echo(err=True)
        except CapacityError as error:
            del messages[kept:]
            typer.echo(f"error: {error}", err=True)


def print_speed(model: LanguageModel) -> None:
    """Say how fast the last answer was and what memory this process needed at most."""
    from .bench.device import peak_memory

    stats, peak = model.last_run, peak_memory()
    if stats is None:
        return
    parts = [
        f"prefill {stats.prefill_speed:.1f} tokens/s ({stats.prompt_tokens - stats.reused_tokens} tokens)",
        f"decode {stats.decode_speed:.1f} tokens/s ({stats.new_tokens} tokens)",
    ]
    if peak is not None:
        parts.append(f"peak memory {megabytes(peak)}")
    parts.append(f"{model.threads} threads on {model.target.name}")
    typer.echo(", ".join(parts), err=True)


def print_plan(
    path: Path, target: str, context: int | None, kv: str | None, quantize: str | None, trust: bool = False,
    runs_here: bool = True,
) -> None:  # fmt: skip
    """Say what a model needs; CapacityError when that does not fit, TargetError when it cannot run here."""
    from .compiler.target import Target
    from .model.loading import plan

    parsed = Target.parse(target)
    if runs_here:
        parsed.require_runnable()
    print_needed(plan(path, context, kv, quantize, trust=trust))


def print_needed(needed: MemoryPlan) -> None:
    """Say how much memory a plan takes; CapacityError when that is not free."""
    from .bench.device import free_memory
    from .model.plan import require_memory

    for name in ("weights", "kv", "workspace", "total"):
        typer.echo(f"{name:10} {megabytes(getattr(needed, name)):>12}")
    typer.echo(f"{'context':10} {needed.context:>12}")
    typer.echo(f"{'free':10} {megabytes(free_memory()):>12}")
    require_memory(needed)


def print_directml(folder: Path) -> None:
    """Say how an ONNX folder was checked, and which nodes DirectML would leave to the CPU."""
    from .model.load.manifest import read

    checked = read(folder)["checked"]
    error, missing = checked.get("error"), checked["directml"]
    if error is None:
        typer.echo("not checked: onnxruntime is not installed here", err=True)
    else:
        typer.echo(f"logits on the CPU provider are {error:.1e} from fp32 PyTorch's", err=True)
    for text in missing:
        typer.echo(f"falls back to the CPU: {text}", err=True)
    count = len(missing) or "no"
    typer.echo(f"{count} nodes without a DirectML kernel (its list of {checked['table']})", err=True)


def print_report(model: LanguageModel) -> None:
    """Say for every layer what ran it, with which configuration, and who declined why."""
    console = stderr()
    console.print(report_table(model.report()))
    for row in model.types:
        console.print(
            f"{row['type']}: {row['tensors']} tensors, {row['bits']:.4g} bits a weight "
            f"({row['bits_in_file']:.4g} in the file), values {row['values']}"
        )
    declined = model.whole_step_declined
    console.print(
        f"decode runs op by op: {declined}" if declined else "decode runs in one native call a step"
    )


def report_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table of a model's report; layers that differ only in their number share a line."""
    from rich.table import Table

    groups: dict[str, list[str]] = {}
    shown: dict[str, list[str]] = {}
    for row in rows:
        form = row.get("form", "")
        facts = [
            row.get("weight", ""),
            row.get("operator", ""),
            f"{form} ({row['backend']})" if "backend" in row else form,
            _text(row.get("configuration")),
            row.get("record", ""),
            "; ".join(f"{name}: {reason}" for name, reason in row.get("declined", ())),
        ]
        key = json.dumps([re.sub(r"\d+", "*", row["layer"]), row.get("spec"), facts])
        groups.setdefault(key, []).append(row["layer"])
        shown[key] = facts
    table = Table("layer", "weight", "operator", "form", "configuration", "from", "declined")
    for key, names in groups.items():
        table.add_row(_span(names), *shown[key])
    return table


def _span(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    numbers = [re.findall(r"\d+", name) for name in names]
    first, last = numbers[0][0] if numbers[0] else "", numbers[-1][0] if numbers[-1] else ""
    return re.sub(r"\d+", f"{first}-{last}", names[0], count=1)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_text(item) for item in value)
    return str(value)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print named values on stdout, nested ones indented."""
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts)) + 1
    for name, value in facts.items():
        if isinstance(value, dict):
            typer.echo(name)
            for key, inner in value.items():
                typer.echo(f"  {key:{width}} {inner}")
        else:
            typer.echo(f"{name:{width}} {f'{value:.6g}' if isinstance(value, float) else value}")


def megabytes(count: int) -> str:
    """Return bytes as text in MB (10^6 bytes)."""
    return f"{count / 1e6:.1f} MB"


def stderr() -> Console:
    """Return a console on stderr that is wide enough for tables when it is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=160)
