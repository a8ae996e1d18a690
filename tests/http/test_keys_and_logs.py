"""Key files and the forms of the log."""

from __future__ import annotations

import json
import logging

import pytest

from manylora_server.cli.keys import read_keys
from manylora_server.cli.logs import JsonFormatter, TextFormatter
from manylora_server.core.errors import StartupError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "holds no key"),
        (b"# only\n\n", "holds no key"),
        (b"\xff\xfe", "not UTF-8"),
        (b"good\nsecret key\n", "line 2"),
    ],
)
def test_key_files_at_fault(tmp_path, content, message):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartupError, match=message) as caught:
        read_keys(path, "--api-key-file")
    assert caught.value.message.startswith("--api-key-file: ")
    assert "secret" not in caught.value.message


def test_no_key_file_means_no_keys():
    assert read_keys(None, "--api-key-file") == ()


def test_log_lines():
    entry = logging.makeLogRecord({"name": "n", "levelno": 30, "levelname": "WARNING", "msg": "é"})
    line = json.loads(JsonFormatter().format(entry))
    assert (line["level"], line["logger"], line["message"]) == ("warning", "n", "é")
    assert TextFormatter("[%(request_id)s] %(message)s").format(entry) == "[-] é"
