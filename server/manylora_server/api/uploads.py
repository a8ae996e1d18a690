"""A multipart upload, written to a staging folder while it comes in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from manylora_server.core.blocking import in_thread
from manylora_server.core.errors import InvalidRequestError
from manylora_server.core.store_errors import store_errors_translated
from manylora_store.intake.names import AdapterNameError, check_name
from manylora_store.intake.staging import ARCHIVE_NAME

if TYPE_CHECKING:
    from manylora_store.intake.files import Sink
    from manylora_store.intake.staging import Staging

MULTIPART = "multipart/form-data"

# What one trip to a worker thread takes along, in bytes.
_PIECE = 1024**2
# Bytes of a body that are not in a file: boundaries, headers, the name.
_MAX_OVERHEAD = 64 * 1024
# No name is that long; more of one need not come to be refused.
_MAX_NAME = 1024
_MAX_FILES = 100
# RFC 2046, section 5.1.1.
_MAX_BOUNDARY = 70
_FIELDS = ("name", "files", "archive")


async def receive_upload(request: Request, staging: Staging) -> str:
    """Write the files of a multipart ``request`` to ``staging`` and return the adapter's name.

    Fields may come in any order. Nothing is kept in memory but a piece of the body.
    Raises ``InvalidRequestError`` naming the field at fault, what ``staging`` raises as the
    ``ManyloraError`` for it, and ``ClientDisconnect``.
    """
    upload = Upload(_boundary(request), staging)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        with store_errors_translated(param=None):
            staging.expect(max(0, int(announced) - _MAX_OVERHEAD))
    try:
        async for piece in _pieces(request):
            await in_thread(upload.feed, piece)
        return upload.finish()
    finally:
        await in_thread(upload.close)


def _boundary(request: Request) -> bytes:
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= _MAX_BOUNDARY:
        raise InvalidRequestError(
            f"content-type: {MULTIPART} needs a boundary of 1 to {_MAX_BOUNDARY} characters; "
            f"{len(boundary)} came. Let the HTTP client write this header."
        )
    return boundary


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """Yield the body, joined to pieces that are worth a trip to another thread."""
    piece = bytearray()
    async for chunk in request.stream():
        piece += chunk
        if len(piece) >= _PIECE:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


class Upload:
    """Takes a multipart body apart. Blocking; used by one thread at a time."""

    def __init__(self, boundary: bytes, staging: Staging) -> None:
        self._staging = staging
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )
        self._fed = self._written = 0
        self._ended = False
        self._name: str | None = None
        self._files = 0
        self._archive = False
        # The part being read.
        self._header = bytearray()
        self._value = bytearray()
        self._disposition: bytes | None = None
        self._field = ""
        self._text = bytearray()
        self._sink: Sink | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        if self._ended:
            # RFC 2046 allows more after the last boundary, and gives it no meaning.
            return
        self._fed += len(data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError(f"the body is not valid {MULTIPART}: {error}.") from error
        if not self._ended and self._fed - self._written > _MAX_OVERHEAD:
            raise InvalidRequestError(
                f"the body has more than {_MAX_OVERHEAD} bytes outside of its files."
            )

    def finish(self) -> str:
        """Return the adapter's name once the whole body was fed."""
        if not self._ended:
            raise InvalidRequestError(
                f"the body ends before the last boundary of its {MULTIPART}: it was cut off"
                f"{f' within {self._field}' if self._field else ''}.",
                param=self._field or None,
            )
        if not self._files and not self._archive:
            raise InvalidRequestError(
                "files: is required: send adapter_config.json and adapter_model.safetensors as "
                "two parts called files, or one part called archive.",
                param="files",
            )
        if self._name is None:
            raise InvalidRequestError("name: is required.", param="name")
        return self._name

    def close(self) -> None:
        """Close the file being written, if any."""
        sink, self._sink = self._sink, None
        if sink is not None:
            with store_errors_translated(param=self._field):
                sink.close()

    def _on_part_begin(self) -> None:
        self._disposition = None
        self._field = ""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequestError(
                "the body has a part without the header 'content-disposition: form-data; "
                'name="..."\'.'
            )
        field = options[b"name"].decode("utf-8", "replace")
        if field not in _FIELDS:
            raise InvalidRequestError(
                f"{field[:100]}: unknown field; this call has name, files and archive.",
                param=field[:100],
            )
        self._field = field
        if field == "name":
            if self._name is not None:
                raise InvalidRequestError("name: is given more than once.", param="name")
            self._text.clear()
        else:
            self._begin_file(options.get(b"filename", b""))

    def _begin_file(self, raw_filename: bytes) -> None:
        field = self._field
        if field == "archive":
            if self._archive:
                raise InvalidRequestError("archive: is given more than once.", param=field)
            self._archive = True
        else:
            self._files += 1
        if self._archive and self._files:
            raise InvalidRequestError(
                "archive: came together with files; send either.", param="archive"
            )
        if self._files > _MAX_FILES:
            raise InvalidRequestError(
                f"files: more than {_MAX_FILES} came; an adapter needs adapter_config.json and "
                "adapter_model.safetensors.",
                param=field,
            )
        filename = ARCHIVE_NAME if self._archive else _filename(raw_filename)
        with store_errors_translated(param=field):
            self._sink = self._staging.receive(filename)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is None:
            self._text += data[start:end]
            if len(self._text) > _MAX_NAME:
                self._name = self._read_name()
            return
        with store_errors_translated(param=self._field):
            self._sink.write(memoryview(data)[start:end])
        self._written += end - start

    def _on_part_end(self) -> None:
        if self._field == "name":
            self._name = self._read_name()
        self.close()

    def _read_name(self) -> str:
        try:
            return check_name(self._text.decode("utf-8", "replace"))
        except AdapterNameError as error:
            raise InvalidRequestError(f"{error.message}.", param="name") from error

    def _on_end(self) -> None:
        self._ended = True


def _filename(raw: bytes) -> str:
    try:
        filename = raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            "files: a part's filename is not UTF-8 text.", param="files"
        ) from error
    if not filename:
        raise InvalidRequestError(
            "files: a part came without a filename; send it as a file.", param="files"
        )
    return filename
