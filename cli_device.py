"""The command `device`: let another machine tune kernels on this one."""

from __future__ import annotations

from typing import Annotated

import typer

from .compiler.errors import UnsupportedError

device_app = typer.Typer(no_args_is_help=True, help="Let another machine tune kernels on this one.")


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    app.add_typer(device_app, name="device")


@device_app.command("serve")
def device_serve(
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: the first free one from 9190.")] = 9190,
    key: Annotated[str, typer.Option(help="What clients have to ask for: a kind of device.")] = "",
    tracker: Annotated[str, typer.Option(help="HOST:PORT of a tracker that hands devices out.")] = "",
    address: Annotated[str, typer.Option(help="This device's address for the tracker's clients.")] = "",
) -> None:
    """Answer `edgeformer tune --rpc` until Ctrl-C; sessions and their processes end with this one.

    RPC means code execution: whoever reaches the port runs programs as you. Use an SSH tunnel.
    """
    from .runtime.device import LOOPBACK, WARNING, serve
    from .runtime.remote import parse_address

    if tracker and not key:
        raise UnsupportedError("--tracker needs --key: what clients ask the tracker for")

    def say(found: int) -> None:
        typer.echo(WARNING.format(port=found), err=True)
        if host not in LOOPBACK:
            typer.echo(f"warning: {host} can be reached from other machines", err=True)
        typer.echo(f"listening on {host}:{found}")

    serve(host, port, key, parse_address(tracker) if tracker else None, say, address or None)
