"""The command line: usage errors, start-up errors, and what importing it costs."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from typing import NoReturn

import pytest
from typer.testing import CliRunner

from manylora_server.cli import serve as serve_module
from manylora_server.cli.main import app
from manylora_server.core.config import HttpConfig, ServerConfig, StoreConfig
from manylora_server.core.errors import StartupError
from manylora_server.version import __version__

DESIGN_OPTIONS = [
    "adapter",
    "home",
    "host",
    "port",
    "served-model-name",
    "quantization",
    "dtype",
    "device",
    "cpu-math",
    "max-model-len",
    "max-batch-tokens",
    "max-sequences",
    "kv-cache-memory",
    "adapter-slots",
    "adapter-host-memory",
    "api-key-file",
    "admin-key-file",
    "log-format",
]


@pytest.fixture(autouse=True)
def logging_restored():
    """The commands configure logging for a whole process."""
    root, package = logging.getLogger(), logging.getLogger("manylora_server")
    before = root.handlers[:], root.level, package.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


@pytest.fixture
def run():
    def invoke(*arguments: str, **env: str):
        return CliRunner().invoke(app, list(arguments), env={"TERM": "dumb", **env})

    return invoke


@pytest.fixture
def configs(monkeypatch) -> list[ServerConfig]:
    """Collect what ``serve`` would start, and start nothing."""
    seen: list[ServerConfig] = []

    def start(config: ServerConfig, metrics: object) -> NoReturn:
        seen.append(config)
        raise StartupError("far enough.")

    monkeypatch.setattr(serve_module, "running_engine", start)
    return seen


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"manylora {__version__}\n")


@pytest.mark.parametrize("command", [[], ["serve"], ["demo"], ["merge"]])
def test_help(run, command):
    assert run(*command, "--help").exit_code == 0


def test_every_option_of_the_contract_exists_and_reads_its_variable():
    from typer.main import get_command

    parameters = {
        option: parameter
        for parameter in get_command(app).commands["serve"].params
        for option in parameter.opts
    }
    for name in DESIGN_OPTIONS:
        variable = "MANYLORA_" + name.upper().replace("-", "_")
        assert parameters[f"--{name}"].envvar == variable


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["nothing"],
        ["serve", "m", "--nothing"],
        ["serve", "m", "--adapter", "noequals"],
        ["serve", "m", "--adapter", "=source"],
        ["serve", "m", "--adapter", "name="],
        ["serve", "m", "--adapter", "a=x", "--adapter", "a=y"],
        ["serve", "m", "--port", "70000"],
        ["serve", "m", "--port", "http"],
        ["serve", "m", "--quantization", "int3"],
        ["serve", "m", "--dtype", "float8"],
        ["serve", "m", "--device", "tpu"],
        ["serve", "m", "--cpu-math", "int4"],
        ["serve", "m", "--max-sequences", "0"],
        ["serve", "m", "--max-model-len", "1"],
        ["serve", "m", "--kv-cache-memory", "much"],
        ["serve", "m", "--adapter-host-memory", "0"],
        ["serve", "m", "--log-format", "xml"],
        ["demo", "--port", "-1"],
        ["merge"],
        ["merge", "m", "--adapter", "a"],
        ["merge", "m", "--output", "o"],
        ["merge", "m", "--adapter", "a", "--output", "o", "--method", "slerp"],
        ["merge", "m", "--adapter", "a", "--output", "o", "--dtype", "int8"],
        ["merge", "m", "--adapter", "a", "--output", "o", "--density", "2"],
        ["merge", "m", "--adapter", "a", "--output", "o", "--rank", "0"],
        ["merge", "m", "--adapter", "a=inf", "--output", "o"],
        ["merge", "m", "--adapter", "=1", "--output", "o"],
        ["merge", "m", "--adapter", "a", "--adapter", "a=2", "--output", "o"],
        ["merge", "m", "--adapter", "a", "--output", "o", "--adapter-only", "--dtype", "nf4"],
    ],
    ids=" ".join,
)
def test_bad_usage(run, configs, arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr
    assert not configs


def test_everything_said_reaches_the_configuration(run, configs, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst\n\n  second  \n")
    admin = tmp_path / "admin"
    admin.write_text("boss\n")
    result = run(
        *["serve", str(tmp_path), "--adapter", "a=/x=y", "--adapter", "b=file:/z"],
        *["--home", str(tmp_path / "home"), "--host", "localhost", "--port", "0"],
        *["--served-model-name", "mine", "--quantization", "none", "--dtype", "float32"],
        *[
            "--device",
            "cpu",
            "--cpu-math",
            "int8",
            "--max-model-len",
            "128",
            "--max-batch-tokens",
            "64",
        ],
        *["--max-sequences", "8", "--kv-cache-memory", "1.5MiB", "--adapter-slots", "3"],
        *["--adapter-host-memory", "2G", "--api-key-file", str(keys)],
        *["--registry-url", "postgresql://db/adapters", "--blobs-url", "memory://blobs"],
        *["--max-adapter-size", "5GiB"],
        *["--admin-key-file", str(admin), "--log-format", "json"],
    )
    assert result.exit_code == 1
    assert "manylora: error: far enough." in result.stderr
    [config] = configs
    assert config.adapters == (("a", "/x=y"), ("b", "file:/z"))
    assert config.home == tmp_path / "home"
    assert config.store == StoreConfig("postgresql://db/adapters", "memory://blobs", 5 * 1024**3)
    assert config.http == HttpConfig("localhost", 0, ("first", "second"), ("boss",))
    assert (config.model.model, config.model.served_name) == (str(tmp_path), "mine")
    assert (config.model.quantization, config.model.dtype, config.model.device) == (
        "none",
        "float32",
        "cpu",
    )
    assert config.model.cpu_math == "int8"
    engine = config.engine
    assert (engine.max_model_len, engine.max_batch_tokens, engine.max_sequences) == (128, 64, 8)
    assert (engine.kv_cache_bytes, engine.adapter_slots) == (3 * 2**19, 3)
    assert engine.adapter_host_bytes == 2 * 2**30


def test_variables_stand_in_for_options(run, configs):
    run(
        "serve",
        "org/model",
        MANYLORA_PORT="0",
        MANYLORA_DTYPE="float16",
        MANYLORA_ADAPTER="a=x b=y",
    )
    [config] = configs
    assert config.http.port == 0
    assert config.model.dtype == "float16"
    assert config.adapters == (("a", "x"), ("b", "y"))
    assert config.model.served_name == "org/model"


def test_a_folder_is_served_under_its_name(run, configs, tmp_path):
    (tmp_path / "tiny").mkdir()
    run("serve", f"{tmp_path}/tiny/", "--port", "0")
    assert configs[0].model.served_name == "tiny"


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_an_open_server_is_warned_about(run, configs, host, warned):
    result = run("serve", "m", "--host", host, "--port", "0")
    assert ("without --api-key-file" in result.stderr) == warned


def test_a_port_in_use(run, configs):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("serve", "m", "--port", str(port))
    assert result.exit_code == 1
    assert f"127.0.0.1 port {port} is in use" in result.stderr
    assert not configs, "the model must not be loaded for nothing"


def test_an_address_of_another_machine(run, configs):
    result = run("serve", "m", "--host", "192.0.2.1", "--port", "0")
    assert result.exit_code == 1
    assert "--host: cannot listen on 192.0.2.1" in result.stderr


def test_importing_the_command_line_is_light():
    code = (
        "import sys, manylora_server.cli.main\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'fastapi'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_demo_keeps_its_files_in_the_home_it_is_told(run, monkeypatch, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    seen: list[ServerConfig] = []

    def start(config: ServerConfig, metrics: object) -> NoReturn:
        seen.append(config)
        raise StartupError("far enough.")

    monkeypatch.setattr("manylora_server.demo.BASE_DIR", base)
    monkeypatch.setattr("manylora_server.demo.demo_adapters", lambda: {"one": tmp_path})
    monkeypatch.setattr("manylora_server.cli.demo.running_engine", start)
    environment = {"MANYLORA_HOME": str(tmp_path / "home"), "MANYLORA_CPU_MATH": "int8"}
    assert run("demo", "--once", **environment).exit_code == 1
    [config] = seen
    assert config.home == tmp_path / "home" / "demo"
    assert config.model.cpu_math == "int8"
    assert config.adapters == (("one", str(tmp_path)),)


def test_a_demo_without_its_files_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setattr("manylora_server.demo.BASE_DIR", tmp_path / "base")
    result = run("demo", "--once")
    assert result.exit_code == 1
    assert "the demo's files are missing" in result.stderr
