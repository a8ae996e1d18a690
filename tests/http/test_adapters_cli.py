"""``manylora adapters`` against a server on a socket."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from manylora_server.cli.client import AdminClient, CallFailedError
from manylora_server.cli.main import app
from manylora_server.core import errors
from support.fake_engine import FakeEngine
from support.server_process import served

KEY = "boss-key"
ACTIONS = ["load", "unload", "pin", "unpin", "merge", "unmerge"]


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with served(engine, api_keys=("client-key",), admin_keys=(KEY,)) as url:
        yield url


@pytest.fixture(autouse=True)
def clean(engine: FakeEngine, tmp_path: Path) -> None:
    engine.adapter_service.clear()
    engine.adapter_service.root = tmp_path / "staging"
    engine.adapter_service.root.mkdir()


@pytest.fixture
def run(url: str) -> Callable[..., Result]:
    def invoke(*arguments: str, **env: str) -> Result:
        variables = {"MANYLORA_URL": url, "MANYLORA_ADMIN_KEY": KEY, "TERM": "dumb", **env}
        return CliRunner().invoke(app, ["adapters", *arguments], env=variables)

    return invoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tales"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(3 * 2**20))
    (folder / "README.md").write_text("not part of it")
    return folder


def rows(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.stderr
    return [line.split("\t") for line in result.stdout.splitlines()]


def failure(result: Result, code: int = 1) -> str:
    """Return the one line that says what went wrong."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    if code == 2:
        return result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("manylora: error: ")
    return line


def stock(run, *names: str) -> None:
    for name in names:
        assert run("add", name, f"file:/{name}").exit_code == 0


class TestAdding:
    def test_a_folder_is_uploaded(self, run, engine, folder):
        result = run("add", "tales", str(folder))
        [row] = rows(result)
        assert (row[0], row[-1]) == ("tales", "upload")
        [(name, content)] = engine.adapter_service.uploads
        assert name == "tales"
        assert {key: len(value) for key, value in content.items()} == {
            "adapter_config.json": 2,
            "adapter_model.safetensors": 3 * 2**20,
        }
        assert "revision" in result.stderr
        assert list(engine.adapter_service.root.iterdir()) == []

    def test_an_older_weight_file_goes_where_there_is_no_other(self, run, engine, folder):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        assert run("add", "tales", str(folder)).exit_code == 0
        assert "adapter_model.bin" in engine.adapter_service.uploads[0][1]

    def test_an_archive_is_uploaded(self, run, engine, tmp_path):
        archive = tmp_path / "tales.zip"
        archive.write_bytes(b"PK")
        assert run("add", "tales", str(archive)).exit_code == 0
        assert engine.adapter_service.uploads == [("tales", {"archive": b"PK"})]

    @pytest.mark.parametrize("source", ["hf:org/tales@v1", "file:/adapters/tales"])
    def test_the_server_fetches_a_source(self, run, engine, source):
        [row] = rows(run("add", "tales", source))
        assert row[-1] == source
        assert not engine.adapter_service.uploads

    def test_json(self, run, folder):
        result = run("add", "tales", str(folder), "--json")
        assert json.loads(result.stdout)["name"] == "tales"

    def test_a_source_that_is_not_there(self, run):
        message = failure(run("add", "tales", "org/tales"))
        assert "org/tales: no such folder or archive" in message
        assert "hf:org/tales" in message

    @pytest.mark.parametrize(
        "missing", ["adapter_config.json", "adapter_model.safetensors"], ids=["config", "weights"]
    )
    def test_a_folder_that_is_no_adapter(self, run, folder, missing):
        (folder / missing).unlink()
        assert missing in failure(run("add", "tales", str(folder)))

    def test_a_refusal_names_its_reason(self, run, folder):
        (folder / "adapter_config.json").write_text("refused")
        assert "q_proj.lora_A: has NaN." in failure(run("add", "tales", str(folder)))

    def test_an_upload_that_is_too_large(self, run, engine, folder):
        engine.adapter_service.script.upload_limit = 2**20
        assert "limit of 1048576 bytes" in failure(run("add", "tales", str(folder)))

    def test_memory_does_not_hold_the_files(self, url, folder):
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.truncate(48 * 2**20)
        held: list[int] = []

        def progress(done: int, total: int) -> None:
            # At the end the fake of the service, in this process, reads all that came.
            if done < total:
                held.append(tracemalloc.get_traced_memory()[0])

        parts = [("files", path) for path in sorted(folder.glob("adapter_*"))]
        tracemalloc.start()
        try:
            with AdminClient(url, KEY) as client:
                client.upload("tales", parts, progress)
        finally:
            tracemalloc.stop()
        assert len(held) > 100
        assert max(held) < 16 * 2**20

    def test_a_file_that_cannot_be_read(self, run, url, tmp_path):
        with AdminClient(url, KEY) as client, pytest.raises(CallFailedError) as caught:
            client.upload("tales", [("archive", tmp_path / "gone.zip")], lambda *_: None)
        assert "gone.zip: cannot be read" in caught.value.message


class TestListing:
    def test_lines_for_programs(self, run, engine):
        stock(run, "one", "two")
        engine.adapter_service.script.in_use.add("two")
        first, second = rows(run("list"))
        digest = engine.adapter_service.adapters["one"].digest
        assert first == [
            *["one", digest, "LORA", "4", "4096", "disk", "false", "0"],
            *["2023-11-14T22:13:21+00:00", "file:/one"],
        ]
        assert (second[0], second[7]) == ("two", "1")

    def test_nothing(self, run):
        result = run("list")
        assert (result.exit_code, result.stdout) == (0, "")

    def test_all_pages_are_read(self, run, monkeypatch):
        monkeypatch.setattr("manylora_server.cli.client._PAGE", 2)
        names = [f"a{number}" for number in range(5)]
        stock(run, *names)
        assert [row[0] for row in rows(run("list"))] == names
        content = json.loads(run("list", "--json").stdout)
        assert [record["name"] for record in content["data"]] == names
        assert (content["object"], content["has_more"], content["next"]) == ("list", False, None)

    def test_a_limit(self, run, monkeypatch):
        monkeypatch.setattr("manylora_server.cli.client._PAGE", 2)
        stock(run, *[f"a{number}" for number in range(5)])
        assert len(rows(run("list", "--limit", "3"))) == 3
        content = json.loads(run("list", "--limit", "3", "--json").stdout)
        assert (len(content["data"]), content["has_more"], content["next"]) == (3, True, "a2")

    def test_by_residency(self, run):
        stock(run, "one", "two")
        run("load", "two")
        assert [row[0] for row in rows(run("list", "--residency", "device"))] == ["two"]

    def test_a_source_cannot_break_the_lines(self, run):
        run("add", "tales", "file:/a\tb\n\x1b[31mc")
        [row] = rows(run("list"))
        assert row[-1] == "file:/a\\tb\\n\\x1b[31mc"


class TestOne:
    def test_show(self, run, engine):
        stock(run, "tales")
        fields = dict(rows(run("show", "tales")))
        assert fields["name"] == "tales"
        assert json.loads(fields["revisions"])[0]["digest"] == fields["digest"]
        assert json.loads(run("show", "tales", "--json").stdout)["name"] == "tales"

    def test_changes(self, run):
        stock(run, "tales")
        assert rows(run("load", "tales"))[0][5:7] == ["device", "false"]
        assert rows(run("pin", "tales"))[0][6] == "true"
        assert rows(run("unpin", "tales"))[0][6] == "false"
        assert rows(run("load", "tales", "--pin"))[0][6] == "true"
        assert rows(run("load", "tales"))[0][6] == "true"
        assert rows(run("load", "tales", "--unpin"))[0][6] == "false"
        assert rows(run("unload", "tales"))[0][5] == "disk"

    def test_roll_back(self, run):
        [[_, old, *_]] = rows(run("add", "tales", "file:/old"))
        [[_, new, *_]] = rows(run("add", "tales", "file:/new"))
        assert new != old
        assert rows(run("rollback", "tales", old[:8]))[0][1] == old
        assert json.loads(run("rollback", "tales", old, "--json").stdout)["digest"] == old

    @pytest.mark.parametrize("flags", [[], ["--drain"]])
    def test_remove(self, run, flags):
        stock(run, "tales")
        result = run("remove", "tales", *flags)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "tales is removed" in result.stderr
        assert rows(run("list")) == []

    def test_remove_for_programs(self, run):
        stock(run, "tales")
        assert json.loads(run("remove", "tales", "--json").stdout)["deleted"] is True


class TestFailures:
    def test_an_unknown_name(self, run):
        message = failure(run("show", "nobody"))
        assert "'nobody'" in message
        assert "manylora adapters list" in message

    def test_an_adapter_in_use(self, run, engine):
        stock(run, "tales")
        engine.adapter_service.script.in_use.add("tales")
        assert "--drain" in failure(run("remove", "tales"))
        assert "tales" in engine.adapter_service.adapters

    @pytest.mark.parametrize(
        ("refusal", "hint"),
        [
            (errors.AdapterConflictError("name: it is pinned."), "name: it is pinned."),
            (errors.OverloadedError("busy."), "try again later"),
            (errors.StorageError("no\nroom."), "no\\nroom."),
        ],
    )
    def test_what_the_server_says(self, run, engine, refusal, hint):
        engine.adapter_service.script.refusal = refusal
        assert hint in failure(run("unload", "tales"))

    @pytest.mark.parametrize("key", ["wrong", "client-key"])
    def test_a_wrong_key(self, run, key):
        message = failure(run("list", "--admin-key", key))
        assert "MANYLORA_ADMIN_KEY" in message
        assert "(" in message

    def test_no_key(self, run):
        assert "--admin-key" in failure(run("list", MANYLORA_ADMIN_KEY=""))

    def test_an_option_goes_before_its_variable(self, run):
        assert run("list", "--admin-key", KEY, MANYLORA_ADMIN_KEY="wrong").exit_code == 0

    def test_no_server(self, run):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        message = failure(run("list", "--url", f"http://127.0.0.1:{port}"))
        assert f"cannot reach http://127.0.0.1:{port}" in message
        assert "MANYLORA_URL" in message

    def test_another_server(self, run):
        with other_server() as url:
            message = failure(run("list", "--url", url))
        assert "status 200" in message
        assert "is it a manylora server?" in message

    def test_a_server_that_hangs_up(self, run):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            hanging_up = threading.Thread(target=lambda: listener.accept()[0].close())
            hanging_up.start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            assert "broke off" in failure(run("list", "--url", url))
            hanging_up.join()


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def other_server() -> Iterator[str]:
    """Serve one request as something else than manylora would."""
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        thread.join()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["show"],
        ["show", "a/b"],
        ["show", ".."],
        ["show", "a" * 129],
        ["add", "tales"],
        ["rollback", "tales"],
        ["list", "--limit", "0"],
        ["list", "--residency", "gpu"],
        ["list", "--url", "127.0.0.1:8000"],
        ["list", "--url", "ftp://127.0.0.1"],
        ["list", "--url", "http://"],
        ["list", "--url", "http://[::1"],
        ["list", "--admin-key", "two words"],
        ["list", "--admin-key", "schlüssel"],
        ["melt", "tales"],
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_usage(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    message = result.output
    assert message
    assert "schlüssel" not in message
    assert "two words" not in message


class TestMerging:
    @pytest.mark.parametrize("precision", [None, "int8"])
    def test_merge_and_unmerge(self, run, engine, precision):
        stock(run, "tales")
        chosen = () if precision is None else ("--precision", precision)
        result = run("merge", "tales", *chosen)
        [row] = rows(result)
        assert row[0] == "tales"
        assert engine.adapter_service.adapters["tales"].merged == (precision or "bf16")
        assert "3.0 MiB in bfloat16): 99.9% of its change survived" in result.stderr
        assert run("unmerge", "tales").exit_code == 0
        assert engine.adapter_service.adapters["tales"].merged is None

    def test_a_loss_is_refused_unless_forced(self, run):
        stock(run, "tales")
        assert "3.0% of it would survive" in failure(run("merge", "tales", "--precision", "nf4"))
        result = run("merge", "tales", "--precision", "nf4", "--force", "--json")
        assert json.loads(result.stdout)["merged"] == "nf4"

    def test_a_precision_that_is_none(self, run):
        assert "fp8" in failure(run("merge", "tales", "--precision", "fp8"), code=2)


@pytest.mark.parametrize("command", ["list", "show", "add", "remove", "rollback", *ACTIONS])
def test_every_command_has_the_options_of_the_contract(command):
    from typer.main import get_command

    parameters = {
        option: parameter
        for parameter in get_command(app).commands["adapters"].commands[command].params
        for option in parameter.opts
    }
    assert parameters["--url"].envvar == "MANYLORA_URL"
    assert parameters["--admin-key"].envvar == "MANYLORA_ADMIN_KEY"
    assert "--json" in parameters


def on_terminal(url: str, *arguments: str) -> str:
    """Run the command on a terminal of its own and return all that it shows."""
    leader, follower = pty.openpty()
    environment = {
        **os.environ,
        **{"MANYLORA_URL": url, "MANYLORA_ADMIN_KEY": KEY},
        **{"COLUMNS": "140", "TERM": "xterm", "NO_COLOR": "1"},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "manylora_server.cli.main", "adapters", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            # Linux' way to say that nobody has the terminal open any more.
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert process.wait(30) == 0, shown
    # Without what sets a weight of letters or moves the cursor.
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_tables_and_a_bar_on_a_terminal(run, url, folder):
    shown = on_terminal(url, "add", "tales", str(folder))
    assert "checking" in shown
    assert "3.0/3.0 MiB" in shown
    run("pin", "tales")
    shown = on_terminal(url, "list")
    heading, line = shown.splitlines()[:2]
    assert heading.split()[:3] == ["NAME", "DIGEST", "TYPE"]
    assert line.startswith("tales ")
    assert "disk, pinned" in line
    assert "4.0 KiB" in line
    assert "\t" not in shown
    shown = on_terminal(url, "show", "tales")
    fields = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert fields["ranks"].split() == ["4", "to", "4", "in", "1", "modules"]
    assert fields["bytes"].split() == ["4.0", "KiB"]
    assert fields["warnings"].strip() == fields["merged"].strip() == "-"
    assert fields["receipt"].strip() == "max_difference: 1e-06"
    assert json.loads(on_terminal(url, "show", "tales", "--json"))["name"] == "tales"


class TestMixes:
    def test_a_mix_is_added_by_its_members_and_weights(self, run, engine: FakeEngine) -> None:
        stock(run, "one", "two")
        result = run("add", "blend", "--mix", "one=0.7", "--mix", "two=-0.3")
        assert rows(result)[0][0] == "blend"
        assert engine.adapter_service.adapters["blend"].source == "mix:{'one': 0.7, 'two': -0.3}"

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["file:/x", "--mix", "one=1"],
            ["--mix", "one"],
            ["--mix", "one=much"],
            ["--mix", "=1"],
            ["--mix", "one=nan"],
            ["--mix", "one=1", "--mix", "one=2"],
        ],
        ids=" ".join,
    )
    def test_bad_usage(self, run, arguments: list[str]) -> None:
        failure(run("add", "blend", *arguments), code=2)

    def test_an_unknown_member(self, run) -> None:
        assert "nobody" in failure(run("add", "blend", "--mix", "nobody=1"))
