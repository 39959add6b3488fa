"""`edgeformer.compile`: a file to a folder of weights and kernels, or a model's step to one native call."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from torch import nn

from .dropin.whole import CompiledModel


@overload
def compile(model: str | Path, output: str | Path, **options: Any) -> Path: ...


@overload
def compile(model: nn.Module, profile: str | None = None, **options: Any) -> CompiledModel: ...


def compile(model: Any, *arguments: Any, **options: Any) -> Any:
    """Compile a model file into a folder, or a transformers model's decode step into one native call.

    A path: see ``compile_folder.compile_model(path, output, target=..., context=..., kv=..., quantize=...)``.
    A module: see ``dropin.whole.compile_module(model, profile, target=..., context=..., kv=...)``.
    """
    if isinstance(model, nn.Module):
        from .dropin.whole import compile_module

        return compile_module(model, *arguments, **options)
    from .compile_folder import compile_model

    return compile_model(model, *arguments, **options)
