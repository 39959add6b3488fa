"""From a chosen form to a callable: artifact found or built, loaded, attached to the pool, memoised."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..compiler.artifacts import ArtifactKey, ArtifactStore
from ..compiler.backends import tvm_llvm
from ..compiler.errors import BuildError
from ..compiler.operator import Form, Operator
from ..compiler.target import Target
from . import threads

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def store() -> ArtifactStore:
    """Return this process's artifact store."""
    return ArtifactStore()


_libraries: dict[str, Any] = {}
_building = threading.Lock()  # TVM's builder is not made for two Python threads
statistics = {"built": 0, "loaded": 0}


def bind(
    operator: Operator, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target
) -> Callable[..., Any]:
    """Return the callable for (form, spec, configuration); build and store the artifact if it is missing."""
    library = None
    if form.lower is not None:
        library = load_or_build(operator.name, form, spec, configuration, target)
    return form.bind(spec, configuration, target, library)


def load_or_build(name: str, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target) -> Any:
    """Return the loaded library of (form, spec, configuration); one library a key and process."""
    key = ArtifactKey(
        operator=name,
        form=form.name,
        spec=spec.key(),
        configuration=json.dumps(dict(configuration), sort_keys=True),
        target=target.key(),
        versions=tvm_llvm.versions(),
        sources=source_digest(form.sources),
    )
    digest = key.digest()
    if digest not in _libraries:
        target.require_runnable()
        with _building:
            if digest not in _libraries:
                _libraries[digest] = _load_or_build(key, form, spec, configuration, target)
    return _libraries[digest]


def _load_or_build(
    key: ArtifactKey, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target
) -> Any:
    folder = store().get(key)
    if folder is None:
        assert form.lower is not None
        if problem := tvm_llvm.available():
            raise BuildError(problem)
        functions = form.lower(spec, configuration, target)
        statistics["built"] += 1
        if tvm_llvm.linker(target) is None:
            return tvm_llvm.JitLibrary(tvm_llvm.compile_module(functions, target))
        folder, _ = store().put(key, lambda path: tvm_llvm.build(functions, target, path))
    statistics["loaded"] += 1
    library = tvm_llvm.load(folder / tvm_llvm.LIBRARY_NAME)
    threads.attach(library)
    return library


@functools.cache
def source_digest(sources: tuple[str, ...]) -> str:
    """Return a digest of the text of package-relative files and folders: the code that made the code."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        path = _PACKAGE / source
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            digest.update(str(file.relative_to(_PACKAGE)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


_warned: set[str] = set()


def warn_once(text: str) -> None:
    """Warn about `text` once a process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=4)
