"""``manylora adapters``: the adapters of a running server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from manylora_server.cli import admin_options as options
from manylora_server.cli.tables import plain, print_fields, print_json, print_rows, size_text

if TYPE_CHECKING:
    from manylora_server.cli.client import AdminClient

app = typer.Typer(help="List and change the adapters of a running server.", no_args_is_help=True)


@app.command("list")
def list_adapters(
    residency: options.Residency = None,
    limit: options.Limit = None,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """List adapters by name.

    Not on a terminal, a line has separated by tabs: name, digest, type, rank, bytes, residency,
    pinned, requests that use it, time of registration, source.
    """
    records: list[dict[str, Any]] = []
    with _server(url, admin_key) as server:
        for page in server.pages(residency, limit):
            records += page["data"]
    if as_json:
        print_json({**page, "data": records})
    else:
        print_rows(records)


@app.command()
def show(
    name: options.Name,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Show all that is known of an adapter: content, revisions, receipt."""
    with _server(url, admin_key) as server:
        record = server.get(name)
    if as_json:
        print_json(record)
    else:
        print_fields(record)


@app.command()
def add(
    name: options.Name,
    source: options.Source = None,
    mix: options.Mix = [],  # noqa: B006 - typer reads it, nobody writes to it
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Add an adapter, or a new revision of one; requests that come later get it.

    With --mix, the exact sum of adapters that the server has becomes one of its own.
    """
    weights = options.mix_option(mix)
    if (source is None) == (not weights):
        raise typer.BadParameter("give either a SOURCE or --mix.", param_hint="SOURCE")
    with _server(url, admin_key) as server:
        if source is None:
            record = server.add_mix(name, weights)
        elif source.startswith(("hf:", "file:")):
            record = server.add_source(name, source)
        else:
            with _progress() as progress:
                record = server.upload(name, _files(source), progress)
    _say(f"{name} is revision {record['digest']} now")
    for warning in record["warnings"]:
        _say(f"warning: {warning}")
    _print(record, as_json)


@app.command()
def remove(
    name: options.Name,
    drain: options.Drain = False,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove an adapter with all of its revisions."""
    with _server(url, admin_key) as server:
        answer = server.remove(name, drain=drain)
    _say(f"{name} is removed")
    if as_json:
        print_json(answer)


@app.command()
def load(
    name: options.Name,
    pin: options.Pin = None,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Bring an adapter to the device now."""
    body = {} if pin is None else {"pin": pin}
    _change(name, "load", url, admin_key, as_json, body=body)


@app.command()
def unload(
    name: options.Name,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Free the memory that an adapter takes; a request for it brings it back."""
    _change(name, "unload", url, admin_key, as_json)


@app.command()
def pin(
    name: options.Name,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Keep an adapter on the device."""
    _change(name, "pin", url, admin_key, as_json)


@app.command()
def unpin(
    name: options.Name,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Let an adapter give way to others again."""
    _change(name, "unpin", url, admin_key, as_json)


@app.command()
def merge(
    name: options.Name,
    precision: options.Precision = "bf16",
    force: options.Force = False,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Fold an adapter into a copy of the base's weights; returns once steps may use it."""
    body = {"precision": precision, "force": force}
    record = _change(name, "merge", url, admin_key, as_json, body=body)
    _say_twin(record)


@app.command()
def unmerge(
    name: options.Name,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Drop an adapter's merged copy; its memory comes back."""
    _change(name, "unmerge", url, admin_key, as_json)


@app.command()
def rollback(
    name: options.Name,
    digest: options.Digest,
    url: options.Url = options.DEFAULT_URL,
    admin_key: options.AdminKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Let a name point at an earlier revision; 'show' lists them."""
    _change(name, "rollback", url, admin_key, as_json, body={"digest": digest})


@contextmanager
def _server(url: str, key: str | None) -> Iterator[AdminClient]:
    """Yield a client; a call that fails is told on stderr, with exit code 1."""
    from manylora_server.cli.client import AdminClient, CallFailedError

    try:
        with AdminClient(url, key) as client:
            yield client
    except CallFailedError as error:
        _say(f"error: {error.message}")
        raise typer.Exit(1) from error


def _change(
    name: str,
    action: str,
    url: str,
    key: str | None,
    as_json: bool,
    *,
    body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    with _server(url, key) as server:
        record = server.change(name, action, body)
    _print(record, as_json)
    return record


def _say_twin(record: dict[str, Any]) -> None:
    """Say what a merge cost and what it kept."""
    twin = record["twin"]
    _say(
        f"{record['name']} is merged as {record['merged']} ({size_text(twin['bytes'])} in "
        f"{twin['storage']}): {twin['delta_share']:.1%} of its change survived, mean KL divergence "
        f"{twin['error']['kl_divergence']:.1e}"
    )


def _print(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        print_rows([record])


def _say(message: str) -> None:
    typer.echo(f"manylora: {plain(message)}", err=True)


def _files(source: str) -> list[tuple[str, Path]]:
    """Return the form fields and files of an upload of ``source``."""
    from manylora_server.cli.client import CallFailedError
    from manylora_store.checkpoint.config_reader import CONFIG_NAME
    from manylora_store.checkpoint.weights import BIN_NAME, SAFETENSORS_NAME

    path = Path(source).expanduser()
    if path.is_file():
        return [("archive", path)]
    if not path.is_dir():
        raise CallFailedError(
            f"{source}: no such folder or archive here; write hf:{source} for a repository of the "
            "hub, file:/FOLDER for a folder on the server's machine."
        )
    weights = [path / name for name in (SAFETENSORS_NAME, BIN_NAME) if (path / name).is_file()]
    config = path / CONFIG_NAME
    if not config.is_file() or not weights:
        missing = SAFETENSORS_NAME if config.is_file() else CONFIG_NAME
        raise CallFailedError(
            f"{source}: it holds no {missing}; give a folder that PEFT's save_pretrained wrote."
        )
    return [("files", config), ("files", weights[0])]


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield what shows how far an upload is: a bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("uploading", total=None)

        def show_progress(done: int, total: int) -> None:
            checking = "checking" if done == total else "uploading"
            bar.update(task, completed=done, total=total, description=checking)

        yield show_progress
