"""How commands that talk to a cluster run: whom they ask, and what is said when that goes wrong.

Exit codes: 1 the cluster refused or failed, 2 wrong usage, 3 no cluster to talk to, 130 interrupted.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console

from darkroom.cli_options import UsageError
from darkroom.errors import DarkroomError, InvalidRequest, NotFound
from darkroom.runtime.cluster import read_state
from darkroom.runtime.processes import ChildFailed

_err = Console(stderr=True)

CachemgrAddress = Annotated[
    str,
    typer.Option(
        envvar="DARKROOM_CACHEMGR", help="Cache manager to ask, host:port. Default: the cluster of `darkroom up`."
    ),
]


def cachemgr_address(address: str) -> str:
    """The cache manager asked for, else that of the cluster that is up. Raises UsageError."""
    known = read_state()
    if not address and known is None:
        raise UsageError("no cluster is up; `darkroom up` starts one, or name a cache manager with --cachemgr", 3)
    return address or (known.cachemgr if known else "")


def run_command(work: Coroutine[Any, Any, None]) -> None:
    """Runs a command, and says what went wrong."""
    with told():
        asyncio.run(work)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Says what went wrong inside in one line, and exits with the code that fits."""
    try:
        yield
    except DarkroomError as error:
        _err.print(f"[red]{error.message}[/]  ({error.reason()})", highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, InvalidRequest | NotFound) else 1) from error
    except UsageError as error:
        _err.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(error.code) from error
    except (ChildFailed, TimeoutError, FileNotFoundError) as error:
        _err.print(f"[red]{str(error) or 'the cluster did not become ready in time'}[/]", highlight=False)
        raise typer.Exit(1) from error
    except grpc.aio.AioRpcError as error:
        _err.print(f"[red]the cluster failed: {error.details()}[/] ({error.code().name})", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _err.print("Interrupted.")
        raise typer.Exit(130) from None
