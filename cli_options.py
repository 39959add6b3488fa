"""Options that several commands share, and the values they take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kv(StrEnum):
    """Types of the KV cache."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    int8 = "int8"


class Activation(StrEnum):
    """How activations meet quantised weights."""

    auto = "auto"
    int8 = "int8"
    float = "float"


class Quantize(StrEnum):
    """What wider weights are rounded to while they load."""

    int8 = "int8"
    int4 = "int4"
    balanced = "balanced"


class Output(StrEnum):
    """Forms of a table."""

    md = "md"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Text(StrEnum):
    """Forms of a short answer."""

    text = "text"
    json = "json"


ModelPath = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A GGUF file, or a model's folder.", show_default=False),
]
TargetName = Annotated[
    str, typer.Option(help="auto, a name of `edgeformer targets`, or directml (compile only).")
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Default: the physical cores.")]
Context = Annotated[int | None, typer.Option("--context", "-c", min=1, help="Tokens to hold.")]
KvType = Annotated[Kv, typer.Option("--kv", help="Type of the KV cache.")]
OwnKvType = Annotated[
    Kv | None, typer.Option("--kv", help="Type of the KV cache; default: bf16 (directml: fp32).")
]
QuantizeTo = Annotated[Quantize | None, typer.Option(help="Round wider weights while loading.")]
OpByOp = Annotated[bool, typer.Option("--op-by-op", help="Call every kernel from PyTorch.")]
ActivationType = Annotated[
    Activation, typer.Option(help="int8 is fast; float keeps activations; auto: int8, bf16 on matrix units.")
]
OwnActivationType = Annotated[
    Activation | None,
    typer.Option("--activation", help="int8 is fast; float keeps activations; default: auto."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Run native code that others could have written.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens of an answer at most.")]
OutputText = Annotated[Text, typer.Option("--output", "-o", help="Form of the answer.")]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it takes.")]


def value(choice: StrEnum | None) -> str | None:
    """Return the text of a choice, None where none was made."""
    return None if choice is None else choice.value
