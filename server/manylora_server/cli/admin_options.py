"""The arguments and options of commands that talk to a running server."""

from __future__ import annotations

import math
from typing import Annotated, Literal
from urllib.parse import urlsplit

import typer

from manylora_store.intake.names import AdapterNameError, check_name

DEFAULT_URL = "http://127.0.0.1:8000"


def server_url(text: str) -> str:
    """Parse the server's address; what is none is bad usage."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise typer.BadParameter(f"{text!r} is not an address such as {DEFAULT_URL}.")
    return text


def key_option(text: str) -> str:
    """Parse a key without ever showing it; what no header could hold is bad usage."""
    key = text.strip()
    if not key or not (key.isascii() and key.isprintable()) or " " in key:
        raise typer.BadParameter("a key is printable ASCII without spaces.")
    return key


def name_argument(text: str) -> str:
    """Parse an adapter's name; what is none is bad usage."""
    try:
        return check_name(text)
    except AdapterNameError as error:
        raise typer.BadParameter(f"{error.message}.") from error


def mix_option(values: list[str]) -> dict[str, float]:
    """Return the ``ADAPTER=WEIGHT`` pairs of ``--mix``; what is none is bad usage."""
    mix: dict[str, float] = {}
    for value in values:
        name, _, text = value.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise typer.BadParameter(
                f"{value!r} is not ADAPTER=WEIGHT, for example support=0.7.", param_hint="--mix"
            )
        if name in mix:
            raise typer.BadParameter(f"{name!r} is given twice.", param_hint="--mix")
        mix[name] = weight
    return mix


Name = Annotated[
    str, typer.Argument(metavar="NAME", parser=name_argument, help="The adapter's name.")
]
Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[SOURCE]",
        show_default=False,
        help="A folder or an archive (.zip, .tar.gz) to upload; or, for the server to fetch, "
        "hf:ORGANISATION/NAME or hf:ORGANISATION/NAME@REVISION from the hub, or file:/FOLDER on "
        "its own machine.",
    ),
]
Mix = Annotated[
    list[str],
    typer.Option(
        "--mix",
        metavar="ADAPTER=WEIGHT",
        help="In place of a source: an adapter of the server and its weight in the sum that is "
        "added. Repeatable.",
    ),
]
Digest = Annotated[
    str, typer.Argument(metavar="DIGEST", help="The revision: 8 digits of its digest, or more.")
]
Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="MANYLORA_URL", parser=server_url, metavar="URL", help="The server."
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        "--admin-key",
        envvar="MANYLORA_ADMIN_KEY",
        parser=key_option,
        metavar="KEY",
        help="A key of its --admin-key-file. (default: none, which does on the server's machine)",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the server sends it.")]
Residency = Annotated[
    Literal["disk", "host", "device"] | None,
    typer.Option("--residency", help="Only those that are there now."),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Not more than that. (default: all)")
]
Drain = Annotated[
    bool, typer.Option("--drain", help="Refuse new requests and wait for the running ones.")
]
Pin = Annotated[
    bool | None, typer.Option("--pin/--unpin", help="Also keep it there, or stop keeping it.")
]
Precision = Annotated[
    Literal["bf16", "int8", "nf4"],
    typer.Option("--precision", help="What the merged weights are kept in."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Take it even if nf4 loses more than a tenth of the change.")
]
