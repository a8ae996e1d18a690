"""Starting: what is refused, with which words; the cache of the quantized base; keys; the demo."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from support.server_process import Run, wait_until_idle
from support.world import BASE, NEW_TOKENS, PROMPTS, World


def failed(run: Run, *, code: int = 1) -> str:
    """Wait for the end and return the one message that the user is told, the last on stderr."""
    assert run.finish(120) == code, run.stderr
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    if code == 2:
        assert "Usage:" in run.stderr
        return run.stderr
    _, *told = run.stderr.split("manylora: error: ")
    assert len(told) == 1, run.stderr
    assert not re.search(r"^\d{4}-\d\d-\d\d ", told[0], re.MULTILINE), "the log goes on behind it"
    return told[0]


def copy_of(folder: Path, to: Path, **changes: Any) -> Path:
    """Copy a model or an adapter, with ``changes`` in its config."""
    shutil.copytree(folder, to)
    [path] = [to / n for n in ("config.json", "adapter_config.json") if (to / n).exists()]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


class TestBase:
    def test_a_missing_folder(self, start, tmp_path):
        run = start(str(tmp_path / "nothing"), command="serve")
        assert "no such folder" in failed(run)

    def test_an_empty_folder(self, start, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "no config.json" in failed(start(str(tmp_path / "empty"), command="serve"))

    def test_a_hub_id_without_a_hub(self, start):
        told = failed(start("nobody/nothing", command="serve"))
        assert "nobody/nothing" in told

    def test_an_unsupported_architecture(self, start, world: World, tmp_path):
        folder = copy_of(world.base, tmp_path / "mamba", model_type="mamba")
        told = failed(start(str(folder), command="serve"))
        assert "'mamba' is not served" in told
        assert "llama, mistral" in told

    def test_an_unknown_architecture(self, start, world: World, tmp_path):
        folder = copy_of(world.base, tmp_path / "odd", model_type="nobody-knows")
        assert "nobody-knows" in failed(start(str(folder), command="serve"))

    def test_a_config_that_is_no_json(self, start, world: World, tmp_path):
        folder = copy_of(world.base, tmp_path / "broken")
        (folder / "config.json").write_text("{")
        assert "config" in failed(start(str(folder), command="serve"))

    def test_truncated_weights(self, start, world: World, tmp_path):
        folder = copy_of(world.base, tmp_path / "short")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        assert "cannot be loaded" in failed(start(str(folder), command="serve"))

    def test_no_weights(self, start, world: World, tmp_path):
        folder = copy_of(world.base, tmp_path / "light")
        (folder / "model.safetensors").unlink()
        assert "cannot be loaded" in failed(start(str(folder), command="serve"))

    def test_no_tokenizer(self, start, world: World, tmp_path):
        folder = copy_of(world.base, tmp_path / "mute")
        for path in folder.glob("tokenizer*"):
            path.unlink()
        assert "tokenizer" in failed(start(str(folder), command="serve"))


class TestAdapter:
    def serve(self, start, world: World, folder: Path) -> Run:
        return start(str(world.base), f"--adapter=odd={folder}", command="serve")

    def test_for_another_base(self, start, world: World, tmp_path):
        folder = copy_of(world.adapters["plain"], tmp_path / "wide")
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = tensors[name][:, :48].contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        told = failed(self.serve(start, world, folder))
        # Which adapter, which tensor, what came and what would be right.
        for part in ("--adapter odd=", name, "48", "64"):
            assert part in told

    def test_of_a_kind_that_is_not_served(self, start, world: World, tmp_path):
        folder = copy_of(world.adapters["plain"], tmp_path / "ia3", peft_type="NOBODY")
        told = failed(self.serve(start, world, folder))
        assert "--adapter odd=" in told
        assert "NOBODY" in told

    def test_without_a_config(self, start, world: World, tmp_path):
        folder = copy_of(world.adapters["plain"], tmp_path / "bare")
        (folder / "adapter_config.json").unlink()
        told = failed(self.serve(start, world, folder))
        assert "--adapter odd=" in told
        assert "adapter_config.json" in told

    def test_with_broken_weights(self, start, world: World, tmp_path):
        folder = copy_of(world.adapters["plain"], tmp_path / "short")
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "--adapter odd=" in failed(self.serve(start, world, folder))

    def test_that_is_nowhere(self, start, world: World, tmp_path):
        told = failed(self.serve(start, world, tmp_path / "nowhere"))
        assert "is no folder of this machine" in told

    def test_of_an_impossible_name(self, start, world: World):
        path = world.adapters["plain"]
        run = start(str(world.base), f"--adapter=no spaces={path}", command="serve")
        assert "'no spaces' is not an adapter name" in failed(run)


class TestOptions:
    def test_a_cache_too_small_for_a_block(self, start):
        told = failed(start("--kv-cache-memory=100"))
        assert "--kv-cache-memory" in told
        assert "at least 16384 bytes" in told

    def test_a_context_beyond_the_model_s(self, start):
        told = failed(start("--max-model-len=5000"))
        assert "--max-model-len 5000" in told
        assert "4096" in told

    @pytest.mark.parametrize("option", ["--api-key-file", "--admin-key-file"])
    def test_a_key_file_that_is_missing(self, start, tmp_path, option):
        told = failed(start(f"{option}={tmp_path / 'nothing'}"))
        assert option in told
        assert "No such file" in told

    def test_a_port_in_use(self, start):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"port {port} is in use" in failed(start(f"--port={port}"))

    @pytest.mark.parametrize(
        "arguments",
        [
            ["serve"],
            ["serve", "model", "--kv-cache-memory=much"],
            ["serve", "model", "--adapter=nothing"],
            ["serve", "model", "--quantization=int3"],
            ["serve", "model", "--nothing"],
            ["nothing"],
        ],
        ids=" ".join,
    )
    def test_bad_usage(self, world: World, tmp_path, arguments):
        run = Run(tmp_path / "run", *arguments, env={"MANYLORA_HOME": str(tmp_path)})
        failed(run, code=2)


def test_the_second_start_finds_the_base_quantized(start, tmp_path, expect):
    """And answers as the first, which quantized it, and as bitsandbytes does."""
    prompt, home = PROMPTS[3], tmp_path / "home"
    runs = [start(home=home).until_ready()]
    runs.append(start(home=home).until_ready())
    logged = "using the quantized base cached in"
    assert [logged in run.stderr for run in runs] == [False, True]
    answers = []
    for run in runs:
        with openai.OpenAI(base_url=f"{run.url}/v1", api_key="-", max_retries=0) as client:
            answers.append(
                {
                    adapter: client.completions.create(
                        model=BASE,
                        prompt=prompt,
                        max_tokens=NEW_TOKENS,
                        temperature=0,
                        logprobs=2,
                        extra_body={"adapter": adapter, "ignore_eos": True},
                    ).choices[0]
                    for adapter in (None, "ada", "dora", "plain", "rs")
                }
            )
    assert answers[0] == answers[1]
    for adapter, choice in answers[1].items():
        assert choice.text == expect(adapter, prompt).text


def test_one_adapter_under_two_names_and_one_named_like_the_base(start, world: World, expect):
    run = start(
        f"--adapter=twin={world.adapters['rs']}", f"--adapter={BASE}={world.adapters['ada']}"
    )
    run.until_ready()
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key="-", max_retries=0) as client:
        models = {model.id: model.model_extra.get("digest") for model in client.models.list()}
        assert list(models) == [BASE, "ada", f"{BASE}:{BASE}", "dora", "plain", "rs", "twin"]
        assert models["twin"] == models["rs"]
        assert models[f"{BASE}:{BASE}"] == models["ada"]
        for model, adapter in {
            BASE: None,
            f"{BASE}:{BASE}": "ada",
            "rs": "rs",
            "twin": "rs",
        }.items():
            answer = client.completions.create(
                model=model,
                prompt=PROMPTS[2],
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            assert answer.choices[0].text == expect(adapter, PROMPTS[2]).text
            if adapter is not None:
                [field] = answer.model_extra["adapter"]
                assert field["name"] == model.removeprefix(f"{BASE}:")
                assert field["digest"] == models[model]
        # Content counts, not the name: what "rs" has read, "twin" has read.
        assert answer.usage.prompt_tokens_details.cached_tokens == 32


def test_the_log_is_the_server_s_own(server: Run, client):
    """Nothing on stdout, and on stderr no other package's warnings, nor anybody's text."""
    client.completions.create(model="rs", prompt="a secret of mine", max_tokens=2)
    assert server.stdout == ""
    assert "a secret of mine" not in server.stderr
    assert "bitsandbytes" not in server.stderr
    assert "Traceback" not in server.stderr


def test_keys(start, tmp_path, expect):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-one\n\nsk-two\n")
    run = start(f"--api-key-file={keys}", "--log-format=json", "--served-model-name=org/own")
    run.until_logged("serving org/own")
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    url = lines[-1]["message"].rpartition(" ")[2]
    for key in ("sk-one", "sk-two"):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            assert next(iter(client.models.list())).id == "org/own"
            answer = client.completions.create(
                model="org/own:plain",
                prompt=PROMPTS[0],
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            assert answer.choices[0].text == expect("plain", PROMPTS[0]).text
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-three", max_retries=0) as client:
        for call in (
            lambda: client.models.list(),
            lambda: client.completions.create(model="org/own", prompt="Hi"),
            lambda: client.completions.create(model="org/own", prompt="Hi", stream=True),
        ):
            with pytest.raises(openai.AuthenticationError) as refused:
                call()
            assert refused.value.code == "unauthorized"
    with httpx.Client(base_url=url) as http:
        assert http.post("/v1/completions", json={"prompt": "Hi"}).status_code == 401
        assert http.post("/tokenize", json={"prompt": "Hi"}).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert http.get(path).status_code == 200
    wait_until_idle(url)
    assert "sk-" not in run.stderr
    assert all(json.loads(line)["message"] for line in run.stderr.splitlines())


def test_the_demo(start, tmp_path):
    """The command of the README, as it stands there: base and adapters in one mixed batch."""
    from manylora_server.demo import DEMO_PROMPT, demo_adapters

    names = sorted(demo_adapters())
    assert len(names) >= 4
    run = start("--once", command="demo", forked=False, home=tmp_path / "home")
    assert run.finish(120) == 0, run.stderr
    assert "Traceback" not in run.stderr
    sections, summary = run.stdout.split("── ")[1:], run.stdout.rstrip().splitlines()[-1]
    assert [section.split(" ", 1)[0] for section in sections] == ["manylora-demo", *names]
    texts = [section.split("\n", 1)[1].split("\n\n")[0] for section in sections]
    assert all(text.startswith(DEMO_PROMPT) and len(text) > 60 for text in texts)
    assert len(set(texts)) == len(names) + 1, "two of them write the same"
    assert f"up to {len(names)} at once" in summary


def test_the_demo_serves(start, tmp_path):
    from manylora_server.demo import DEMO_PROMPT, demo_adapters

    run = start("--port=0", command="demo", home=tmp_path / "home").until_ready()
    printed = run.stdout
    assert f"curl {run.url}/v1/completions" in printed
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key="-", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        assert names == ["manylora-demo", *sorted(demo_adapters())]
        for name in names:
            answer = client.completions.create(
                model=name, prompt=DEMO_PROMPT, max_tokens=64, temperature=0
            )
            # What it printed at its start came from a mixed batch, this comes alone.
            assert DEMO_PROMPT + answer.choices[0].text.rstrip() in printed
