"""Logging to stderr, as text or as one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import typer

from manylora_server.api.request_id import current_request_id
from manylora_server.cli.options import LogFormat
from manylora_server.core.errors import StartupError

logger = logging.getLogger("manylora_server")

_TEXT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"


class JsonFormatter(logging.Formatter):
    """Writes ``time``, ``level``, ``logger``, ``message``; ``request_id``, ``exception`` if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return ``record`` as one line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = current_request_id.get()
        if request_id is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Writes one line for people, with the request's id or a dash."""

    def format(self, record: logging.LogRecord) -> str:
        """Return ``record`` as text."""
        record.request_id = current_request_id.get() or "-"
        return super().format(record)


def configure_logging(log_format: LogFormat) -> None:
    """Send all logs to stderr: manylora's from INFO on, other packages' from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.INFO)
    # At its import, which transformers causes, it warns of a kernel from the hub; none is used.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def announce(message: str, log_format: LogFormat) -> None:
    """Tell the operator ``message`` on stderr, in the log's own form where that is JSON."""
    if log_format == "json":
        logger.info(message)
    else:
        typer.echo(f"manylora: {message}", err=True)


@contextmanager
def startup_errors_reported() -> Iterator[None]:
    """Turn a ``StartupError`` into its message on stderr and exit code 1."""
    try:
        yield
    except StartupError as error:
        typer.echo(f"manylora: error: {error.message}", err=True)
        raise typer.Exit(1) from error
