"""Adapter records for people at a terminal, or as tab-separated lines for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import typer

Json = dict[str, Any]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_DIGEST_DIGITS = 12


def on_terminal() -> bool:
    """Return whether a person reads the standard output."""
    return sys.stdout.isatty()


def print_json(content: Json) -> None:
    """Print ``content`` as one JSON document."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def print_rows(records: Iterable[Json]) -> None:
    """Print one line for each of ``records``; a table with headings on a terminal."""
    if not on_terminal():
        for record in records:
            typer.echo("\t".join(plain(_text(value)) for value in _row(record).values()))
        return
    rows = [_row_for_people(record) for record in records]
    if not rows:
        typer.echo("no adapters", err=True)
        return
    _print_table(list(rows[0]), [list(row.values()) for row in rows])


def print_fields(record: Json) -> None:
    """Print one line for each field of ``record``; on a terminal, some take several."""
    if on_terminal():
        rows = [[name, _for_people(name, value)] for name, value in record.items()]
        _print_table(["FIELD", "VALUE"], rows)
        return
    for name, value in record.items():
        typer.echo(f"{name}\t{plain(_text(value))}")


def plain(text: str) -> str:
    """Return ``text`` in one line, with nothing in it that a terminal or a table acts upon."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _row(record: Json) -> Json:
    """The fields of a line for programs, in the order that ``list --help`` states."""
    return {
        "name": record["name"],
        "digest": record["digest"],
        "type": record["peft_type"],
        "rank": record["rank"],
        "bytes": record["bytes"],
        "residency": record["residency"],
        "pinned": record["pinned"],
        "in_use": record["in_use"],
        "created_at": datetime.fromtimestamp(record["created_at"], UTC).isoformat(),
        "source": record["source"],
    }


def _row_for_people(record: Json) -> dict[str, str]:
    return {
        "NAME": record["name"],
        "DIGEST": record["digest"][:_DIGEST_DIGITS],
        "TYPE": record["peft_type"],
        "RANK": str(record["rank"]),
        "SIZE": size_text(record["bytes"]),
        "WHERE": _where(record),
        "IN USE": str(record["in_use"]),
        "ADDED": _time(record["created_at"]),
        "SOURCE": plain(record["source"]),
    }


def _where(record: Json) -> str:
    where = [record["residency"]]
    if record["pinned"]:
        where.append("pinned")
    if record["merged"] is not None:
        where.append(f"merged as {record['merged']}")
    return ", ".join(where)


def _for_people(name: str, value: Any) -> str:
    """Return a field's value in as few lines as say it; what is unknown here as JSON."""
    if value is None or value in ([], {}):
        return "-"
    match name, value:
        case "created_at", int():
            return _time(value)
        case "bytes", int():
            return size_text(value)
        case "ranks", dict():
            return f"{min(value.values())} to {max(value.values())} in {len(value)} modules"
        case "revisions", list():
            lines = (f"{entry['digest']}  {_time(entry['created_at'])}" for entry in value)
            return "\n".join(lines)
        case _, dict():
            return "\n".join(f"{key}: {plain(_text(item))}" for key, item in value.items())
        case _, list():
            return "\n".join(plain(_text(item)) for item in value)
    return plain(_text(value))


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        # The first column is what one looks for, and what one copies.
        table.add_column(heading, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console().print(table)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def size_text(count: int) -> str:
    """Return ``count`` bytes in the unit that fits."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
