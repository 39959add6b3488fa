"""A device that others measure on: TVM's RPC server; its sessions answer tuning requests in a child."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import socket
from typing import Any

from ..compiler.child import Child, ChildError, end_with_parent
from ..compiler.errors import CapacityError, UnsupportedError
from ..compiler.target import Target, detect

ANSWER, DESCRIBE = "edgeformer.answer", "edgeformer.describe"  # what a session can be asked
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PORTS = (9190, 9999)  # of which the first free one is taken
WARNING = (
    "RPC means code execution: whoever reaches this port runs any program as this user, unencrypted and "
    "without a password. Keep it on 127.0.0.1 and come in through an SSH tunnel: "
    "ssh -L {port}:127.0.0.1:{port} THIS-DEVICE"
)


def serve(
    host: str, port: int, key: str, tracker: tuple[str, int] | None, say: Any, address: str | None = None
) -> None:
    """Serve until this process ends; sessions and their children end with it.

    Port 0 is the first free one from 9190 on. `say(port)` is called when the port is open. A tracker tells
    clients `address`, or what it sees.

    Raises UnsupportedError without TVM's RPC, CapacityError where the port is taken.
    """
    try:
        import tvm_ffi
        from tvm.rpc.server import PopenRPCServerState
    except ImportError as error:
        text = f"`device serve` needs TVM's RPC: pip install 'edgeformer[tune]' ({error})"
        raise UnsupportedError(text) from None
    if tracker is not None and (problem := unreachable(*tracker)):
        raise CapacityError(f"the tracker {tracker[0]}:{tracker[1]} does not answer: {problem}")
    os.register_at_fork(after_in_child=end_with_parent)
    tvm_ffi.register_global_func(ANSWER, answer, override=True)
    tvm_ffi.register_global_func(DESCRIBE, describe, override=True)
    try:
        ports = (port, port + 1) if port else _PORTS
        state = PopenRPCServerState(
            host, *ports, tracker_addr=tracker, key=key, custom_addr=address, silent=True
        )
    except (OSError, ValueError) as error:
        raise CapacityError(f"{host}:{port} cannot be listened on: {error}") from None
    say(state.port)
    state.thread.join()


def unreachable(host: str, port: int) -> str:
    """Return why nobody listens at an address, or "". TVM itself would try for a minute."""
    try:
        socket.create_connection((host, port), 5).close()
    except OSError as error:
        return str(error)
    return ""


def describe() -> str:
    """Return this device's target as JSON."""
    data = dataclasses.asdict(detect())
    return json.dumps(data | {"features": sorted(data["features"])})


def target_of(text: str) -> Target:
    """Return the target that a device described."""
    data = json.loads(text)
    data["features"], data["backends"] = frozenset(data["features"]), tuple(data["backends"])
    return Target(**data)


_child: Child | None = None  # of this session: each session is a process of its own


def answer(request: bytes) -> bytes:
    """Answer a pickled (runtime.trial.Request, seconds); a crash or hang costs this answer alone."""
    global _child
    wanted, seconds = pickle.loads(request)
    if _child is None:
        _child = Child("edgeformer.runtime.trial:answer", environment={"EDGEFORMER_TUNE": "cached"})
    try:
        found: tuple[str, Any] = ("answer", _child.ask(wanted, seconds))
    except ChildError as error:
        found = (error.kind, str(error))
    return pickle.dumps(found)
