"""EdgeFormer runs PyTorch transformers fast on the hardware one has.

The names below are the front door; each is imported when it is first used, so that ``import edgeformer``
itself touches no compiler, no hardware and no file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.errors import (
        BuildError,
        CapacityError,
        DeclinedError,
        EdgeFormerError,
        FormatError,
        TargetError,
        TrustError,
        UnsupportedError,
    )
    from .compiler.target import Target
    from .model.compile import compile
    from .model.compress.quantize_folder import quantize_model as quantize
    from .model.dropin.cache import EdgeFormerCache
    from .model.dropin.quantizer import EdgeFormerQuantConfig
    from .model.evaluate import evaluate
    from .model.loading import load, plan
    from .model.replace import optimize
    from .model.report import report
    from .model.tuning import tune

__version__ = "0.1.0"

_HOMES = {
    "load": ".model.loading",
    "plan": ".model.loading",
    "optimize": ".model.replace",
    "EdgeFormerCache": ".model.dropin.cache",
    "EdgeFormerQuantConfig": ".model.dropin.quantizer",
    "evaluate": ".model.evaluate",
    "report": ".model.report",
    "compile": ".model.compile",
    "quantize": ".model.compress.quantize_folder:quantize_model",
    "tune": ".model.tuning",
    "Target": ".compiler.target",
    "EdgeFormerError": ".compiler.errors",
    "TargetError": ".compiler.errors",
    "FormatError": ".compiler.errors",
    "UnsupportedError": ".compiler.errors",
    "TrustError": ".compiler.errors",
    "BuildError": ".compiler.errors",
    "DeclinedError": ".compiler.errors",
    "CapacityError": ".compiler.errors",
}

__all__ = [
    "BuildError",
    "CapacityError",
    "DeclinedError",
    "EdgeFormerCache",
    "EdgeFormerError",
    "EdgeFormerQuantConfig",
    "FormatError",
    "Target",
    "TargetError",
    "TrustError",
    "UnsupportedError",
    "compile",
    "evaluate",
    "load",
    "optimize",
    "plan",
    "quantize",
    "report",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeformer' has no attribute {name!r}")
    module, _, own = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module, __name__), own or name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
