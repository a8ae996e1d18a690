"""The ``manylora`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from manylora_server.cli import adapters
from manylora_server.cli.demo import demo
from manylora_server.cli.merge import merge
from manylora_server.cli.serve import serve
from manylora_server.version import __version__

app = typer.Typer(
    name="manylora",
    help="Serve one 4-bit base model and many LoRA adapters from one process, in one batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manylora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command()(serve)
app.command()(demo)
app.command()(merge)
app.add_typer(adapters.app, name="adapters")


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 failed with a message, 2 bad usage."""
    app()


if __name__ == "__main__":
    main()
