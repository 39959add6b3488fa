"""From a chosen form to a callable: artifact found or built, loaded, attached to the pool, memoised."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..compiler import emulator
from ..compiler.artifacts import ArtifactKey, ArtifactStore
from ..compiler.backends import tvm_llvm
from ..compiler.errors import BuildError, TargetError
from ..compiler.lookup import octaves
from ..compiler.operator import Form, Operator, Sizes
from ..compiler.target import Target
from . import threads

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def store() -> ArtifactStore:
    """Return this process's artifact store."""
    return ArtifactStore()


_libraries: dict[str, Any] = {}
_emulated = False
_building = threading.Lock()  # TVM's builder is not made for two Python threads
statistics = {"built": 0, "loaded": 0}


@dataclass(frozen=True)
class Used:
    """A library that was asked for: what it was built for, and its file.

    `sizes` are the buckets of run-time sizes whose calls it serves; of several libraries of one problem, the
    one that serves the nearest bucket runs.
    """

    operator: str
    form: str
    spec: str
    configuration: str  # JSON
    path: Path
    sizes: list[dict[str, int]] = field(default_factory=list)


_travelled: dict[tuple[str, str, str, str], list[Used]] = {}
_recorders: list[dict[tuple[str, ...], Used]] = []


def use_travelled(kernels: Iterable[Used], target: Target) -> None:
    """Take a compiled folder's libraries, in place of those that were taken before for the same problems."""
    found: dict[tuple[str, str, str, str], list[Used]] = {}
    for kernel in kernels:
        key = (kernel.operator, kernel.form, kernel.spec, target.key())
        found.setdefault(key, []).append(kernel)
    _travelled.update(found)


def travelled_configuration(
    name: str, form: Form, spec: Any, target: Target, sizes: Sizes | None = None
) -> dict[str, Any] | None:
    """Return the configuration that a compiled folder's library was built with; None without one.

    Of several it is that of the nearest bucket of the same phase.
    """
    found = _travelled.get((name, form.name, spec.key(), target.key()))
    if found is None:
        return None
    served = [(kernel, at) for kernel in found for at in kernel.sizes if sizes and at.keys() == sizes.keys()]
    if sizes and form.tuning is not None:
        phase = form.tuning.phase(spec, sizes)
        served = [entry for entry in served if form.tuning.phase(spec, entry[1]) == phase] or served
    chosen = min(served, key=lambda entry: octaves(entry[1], sizes or {}))[0] if served else found[0]
    return json.loads(chosen.configuration)


def is_recording() -> bool:
    """Whether what is bound now is collected, to travel."""
    return bool(_recorders)


def serves(name: str, form: Form, spec: Any, configuration: Mapping[str, Any], sizes: Sizes) -> None:
    """Note that the library of a configuration serves a bucket of sizes."""
    key = (name, form.name, spec.key(), json.dumps(dict(configuration), sort_keys=True))
    for used in _recorders:
        if key in used and sizes not in used[key].sizes:
            used[key].sizes.append(dict(sizes))


@contextmanager
def recording() -> Iterator[dict[tuple[str, ...], Used]]:
    """Collect every library that is asked for inside of the block."""
    used: dict[tuple[str, ...], Used] = {}
    _recorders.append(used)
    try:
        yield used
    finally:
        _recorders.remove(used)


def _record(name: str, form: Form, spec: Any, configuration: str, library: Any) -> None:
    for used in _recorders:
        if library.handle is not None:
            key = (name, form.name, spec.key(), configuration)
            used.setdefault(key, Used(*key, library.path))


def bind(
    operator: Operator, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target
) -> Callable[..., Any]:
    """Return the callable for (form, spec, configuration); build and store the artifact if it is missing."""
    if form.backend == "tvm_opencl":
        from . import opencl

        return opencl.bind(operator, form, spec, configuration, target)
    library = None
    if form.lower is not None:
        library = load_or_build(operator.name, form, spec, configuration, target)
    return form.bind(spec, configuration, target, library)


def load_or_build(name: str, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target) -> Any:
    """Return the loaded library of (form, spec, configuration); one library a key and process."""
    text = json.dumps(dict(configuration), sort_keys=True)
    library = _load_travelled(name, form, spec, text, target) or _library(
        name, form, spec, text, configuration, target
    )
    _record(name, form, spec, text, library)
    return library


def build_only(name: str, form: Form, spec: Any, target: Target) -> Used:
    """Build the library of (form, spec) for a target that need not run here; nothing is loaded."""
    configuration = form.space(spec, target)[0]
    text = json.dumps(configuration, sort_keys=True)
    key = _key(name, form, spec, text, target)
    with _building:
        folder = _stored(key, form, spec, configuration, target)
    if not isinstance(folder, Path):
        raise BuildError(tvm_llvm.no_linker(target))
    return Used(name, form.name, spec.key(), text, folder / tvm_llvm.LIBRARY_NAME)


def is_built(name: str, form: Form, spec: Any, target: Target) -> bool:
    """Whether the library of (form, spec) in its default configuration is stored, or came with a folder."""
    text = json.dumps(form.space(spec, target)[0], sort_keys=True)
    if (name, form.name, spec.key(), target.key()) in _travelled:
        return True
    return store().get(_key(name, form, spec, text, target)) is not None


def _load_travelled(name: str, form: Form, spec: Any, configuration: str, target: Target) -> Any:
    found = _travelled.get((name, form.name, spec.key(), target.key()))
    file = next((kernel.path for kernel in found or () if kernel.configuration == configuration), None)
    if file is None:
        return None
    path = str(file)
    if _emulated:
        path += f" emulated {threads.team_size()}"
    if path not in _libraries:
        _libraries[path] = _open(file, target)
    return _libraries[path]


def _library(
    name: str, form: Form, spec: Any, text: str, configuration: Mapping[str, Any], target: Target
) -> Any:
    key = _key(name, form, spec, text, target)
    digest = key.digest()
    if _emulated:
        digest += f" emulated {threads.team_size()}"
    if digest not in _libraries:
        require_runnable(target)
        with _building:
            if digest not in _libraries:
                _libraries[digest] = _load_or_build(key, form, spec, configuration, target)
    return _libraries[digest]


def _key(name: str, form: Form, spec: Any, configuration: str, target: Target) -> ArtifactKey:
    return ArtifactKey(
        operator=name,
        form=form.name,
        spec=spec.key(),
        configuration=configuration,
        target=target.key(),
        versions=tvm_llvm.versions(),
        sources=source_digest(form.sources),
    )


def _stored(key: ArtifactKey, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target) -> Any:
    """Return the artifact's folder, built if there is none; without a linker, a library of this process."""
    folder = store().get(key)
    if folder is not None:
        return folder
    assert form.lower is not None
    if problem := tvm_llvm.available():
        raise BuildError(problem)
    functions = form.lower(spec, configuration, target)
    statistics["built"] += 1
    if tvm_llvm.linker(target) is None:
        return tvm_llvm.JitLibrary(tvm_llvm.compile_module(functions, target))
    return store().put(key, lambda path: tvm_llvm.build(functions, target, path))[0]


def require_runnable(target: Target) -> None:
    """Raise TargetError when neither this host nor, inside of `emulation`, qemu runs code for `target`."""
    if not _emulated:
        target.require_runnable()
    elif reason := emulator.missing(target.arch):
        raise TargetError(reason)


def emulated() -> bool:
    """Whether libraries are loaded into qemu."""
    return _emulated


@contextmanager
def emulation() -> Iterator[None]:
    """Load libraries of another architecture into qemu inside of this block: for checks, never for timing."""
    global _emulated
    if reason := emulator.missing():
        raise TargetError(reason)
    _emulated = True
    try:
        yield
    finally:
        _emulated = False


def _load_or_build(
    key: ArtifactKey, form: Form, spec: Any, configuration: Mapping[str, Any], target: Target
) -> Any:
    folder = _stored(key, form, spec, configuration, target)
    if not isinstance(folder, Path):
        return folder
    return _open(folder / tvm_llvm.LIBRARY_NAME, target)


def _open(path: Path, target: Target) -> Any:
    statistics["loaded"] += 1
    if _emulated:
        return emulator.EmulatedLibrary(path, emulator.cpu_for(target), threads.team_size())
    library = tvm_llvm.load(path)
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
