"""`darkroom store`: what an operator does with a model store itself."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from darkroom.store.header import Malformed
from darkroom.store.indexing import write_index
from darkroom.store.manifest import Manifest

store_app = typer.Typer(help="Prepare a folder of models to be served as a model store.", no_args_is_help=True)
_out, _err = Console(), Console(stderr=True)


@store_app.callback()
def _commands() -> None:
    """Prepare a folder of models to be served as a model store."""


@store_app.command("index")
def index_folder(
    folder: Annotated[
        Path, typer.Argument(help="Folder of models in diffusers’ directory format.", exists=True, file_okay=False)
    ],
) -> None:
    """Write FOLDER/.darkroom: sizes and digests of every model's files, which a store needs to be used by its URL.

    Run it again after every change. A folder that has it is verified when it is used in place, too.
    """
    try:
        index = write_index(folder, on_entry=_say)
    except (Malformed, OSError) as error:
        _err.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    _out.print(f"[green]{folder}[/] has an index of {len(index.entries)} entries", soft_wrap=True, highlight=False)


def _say(entry_id: str, manifest: Manifest) -> None:
    size_bytes = sum(file.size_bytes for file in manifest.files.values())
    _out.print(f"  {entry_id}: {len(manifest.files)} files, {size_bytes / 1e6:.1f} MB", highlight=False)
