"""ONNX: graphs whose tensors lie in a file beside them, checked on the way in; run by ONNX Runtime.

Nothing here imports onnx or onnxruntime before it is needed. A model file from elsewhere is data, but its
external data may name any path: `open_graph` reads only what lies inside of its folder.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from ..errors import FormatError, UnsupportedError

OPSET = 18  # the first with BitwiseAnd
IR_VERSION = 9
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
INLINE = 1024  # bytes: smaller tensors are part of the model file
ALIGNMENT = 4096  # bytes: a tensor starts on a page, so that it can be mapped
MAX_MODEL = 256 << 20  # bytes of a model file without its tensors
INSTALL = (
    "pip install 'edgeformer[onnx]' (on Windows, for a GPU: onnxruntime-directml in place of onnxruntime)"
)


def available() -> bool:
    """Return whether ONNX models can be written here."""
    return importlib.util.find_spec("onnx") is not None


def require(name: str) -> Any:
    """Return the module `onnx` or `onnxruntime`. Raises UnsupportedError where it is missing or broken."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"{name} cannot be imported ({error}); install it: {INSTALL}") from error


class Graph:
    """An ONNX graph under construction; `file` takes the tensors, named `location` beside the model.

    ``float_type`` is "float32" or "float16": the type of activations and scales.
    """

    def __init__(self, file: BinaryIO, location: str, float_type: str = "float32") -> None:
        onnx = require("onnx")
        self._helper, self._proto = onnx.helper, onnx.TensorProto
        self._file, self._location = file, location
        self.float_type = float_type
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._values: dict[str, list[Any]] = {"inputs": [], "outputs": []}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def sibling(self) -> Graph:
        """An empty graph over the same tensors: one that both add by the same name is stored once."""
        other = Graph(self._file, self._location, self.float_type)
        other._initializers, other._constants = self._initializers, self._constants
        return other

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare an input; a text in ``shape`` names a length that is only known when the model runs."""
        return self._value("inputs", name, dtype, shape)

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare an output, which a node named ``name`` or with such an output gives."""
        return self._value("outputs", name, dtype, shape)

    def _value(self, kind: str, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        self._values[kind].append(
            self._helper.make_tensor_value_info(name, self.onnx_type(dtype), list(shape))
        )
        return name

    def onnx_type(self, dtype: str) -> int:
        """Return ONNX's number of a NumPy type."""
        return self._helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def node(self, op: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return its name; "" among the inputs is one that is left out."""
        return self.nodes(op, *inputs, outputs=1, name=name, domain=domain, **attributes)[0]

    def nodes(
        self, op: str, *inputs: str, outputs: int | Sequence[str], name: str = "", domain: str = "",
        **attributes: Any,
    ) -> list[str]:  # fmt: skip
        """Add a node with several outputs (their number, or their names) and return their names."""
        if not name:
            self._count += 1
            name = f"{op}_{self._count}"
        if isinstance(outputs, int):
            outputs = [name if outputs == 1 else f"{name}.{i}" for i in range(outputs)]
        self._nodes.append(
            self._helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain, **attributes)
        )
        return list(outputs)

    def floats(self, name: str, values: Any) -> str:
        """Add a tensor of ``float_type``."""
        return self.tensor(name, np.asarray(values).astype(self.float_type))

    def tensor(self, name: str, values: np.ndarray) -> str:
        """Add a constant tensor: in the model file where it is small, else in the file beside it.

        A name that is known already, in a sibling, is that tensor.
        """
        if name in self._initializers:
            return name
        values = np.ascontiguousarray(values)
        dtype = self.onnx_type(str(values.dtype))
        if values.nbytes <= INLINE:
            tensor = self._helper.make_tensor(name, dtype, values.shape, values.tobytes(), raw=True)
        else:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            place = {"location": self._location, "offset": self._file.tell(), "length": values.nbytes}
            self._file.write(values.data)
            tensor = self._proto(name=name, data_type=dtype, dims=values.shape)
            tensor.data_location = self._proto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def constant(self, values: Any, dtype: str = "int64") -> str:
        """Return a small constant; equal ones are one tensor. ``dtype`` "float" is ``float_type``."""
        array = np.asarray(values, dtype=self.float_type if dtype == "float" else dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tensor(f"constant_{len(self._constants)}", array)
        return self._constants[key]

    def model(self, name: str, metadata: dict[str, str]) -> Any:
        """Return the finished ModelProto, with the tensors that its nodes read."""
        read = {name for node in self._nodes for name in node.input}
        graph = self._helper.make_graph(
            self._nodes, name, self._values["inputs"], self._values["outputs"],
            [tensor for key, tensor in self._initializers.items() if key in read],
        )  # fmt: skip
        domains = [self._helper.make_opsetid("", OPSET), self._helper.make_opsetid(MICROSOFT, 1)]
        model = self._helper.make_model(
            graph, producer_name="edgeformer", ir_version=IR_VERSION, opset_imports=domains
        )
        self._helper.set_model_props(model, metadata)
        return model


def open_graph(path: Path, files: Iterable[str]) -> Any:
    """Read a model file and check that its tensors lie in ``files``, which stand beside it.

    Raises:
        FormatError: the model is damaged, or names data outside of its folder or past a file's end.
        UnsupportedError: onnx is not installed.
    """
    onnx, names = require("onnx"), set(files)
    from google.protobuf.message import DecodeError

    try:
        if path.stat().st_size > MAX_MODEL:
            raise FormatError(
                f"{path} has {path.stat().st_size} bytes; a model file without tensors is small"
            )
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise FormatError(f"{path} is no ONNX model: {str(error)[:200]}") from error
    if not model.graph.node:
        raise FormatError(f"{path} is no ONNX model: it has no nodes")
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_place(path, tensor, names)
    return model


def _tensors(graph: Any) -> Iterable[Any]:
    """Yield every tensor of a graph: initializers, attributes of nodes, and those of graphs within."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for sparse in (*attribute.sparse_tensors, attribute.sparse_tensor):
                yield from (sparse.values, sparse.indices)
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _tensors(inner)


def _check_place(path: Path, tensor: Any, files: set[str]) -> None:
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    name = repr(tensor.name[:80])
    parts = PurePosixPath(location).parts
    if len(parts) != 1 or location in (".", "..") or location not in files or "\\" in location:
        raise FormatError(f"{path}: the data of {name} lies in {location[:80]!r}, outside of this folder")
    file = path.parent / location
    if file.is_symlink() or not file.is_file():
        raise FormatError(f"{path}: {location} is no plain file")
    try:
        at, length = int(place.get("offset", 0)), int(place["length"])
    except (KeyError, ValueError) as error:
        raise FormatError(f"{path}: the place of {name} in {location} is damaged") from error
    if at < 0 or length < 0 or at + length > file.stat().st_size:
        raise FormatError(f"{path}: {name} lies past the end of {location}")
