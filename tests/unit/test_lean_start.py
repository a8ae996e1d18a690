"""What a start leaves out, and that all of it is there for whoever asks.

In processes of their own: what a process imported cannot be taken back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Half of a start, before it was left out.
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp")

LEAN = """
import sys
from manylora_server.model.deferred_compiler import compiler_deferred
from manylora_server.model.lean_imports import import_transformers
"""


def run(script: str, *arguments: str) -> str:
    """Run ``script`` in a fresh interpreter and return what it printed last."""
    command = [sys.executable, "-W", "error::ImportWarning", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


SERVE = """
import asyncio, json, sys
from pathlib import Path
from manylora_server.api.metrics import PrometheusMetrics
from manylora_server.cli.serve import running_engine
from manylora_server.core.config import ModelConfig, ServerConfig
from manylora_server.core.types import AdapterMix, Request, SamplingParams
from manylora_server.demo import BASE_DIR, demo_adapters

quantization, home = sys.argv[1:]
name, folder = next(iter(demo_adapters().items()))
config = ServerConfig(
    model=ModelConfig(model=str(BASE_DIR), served_name="demo", quantization=quantization),
    adapters=((name, str(folder)),),
    home=Path(home),
)

async def answer(engine, adapter):
    request = Request(
        request_id=f"r-{adapter}",
        prompt_token_ids=(5, 6, 7),
        sampling=SamplingParams(max_tokens=3, temperature=0.0),
        adapter=adapter and AdapterMix.of(engine.adapters.resolve(adapter)),
    )
    return [output async for output in engine.generate(request)][-1].finish_reason

with running_engine(config, PrometheusMetrics()) as engine:
    import manylora_server.api.app
    reasons = [asyncio.run(answer(engine, adapter)) for adapter in (None, name)]
    print(json.dumps([reasons, sorted(sys.modules)]))
"""


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_serving_needs_no_compiler_and_no_other_device(quantization: str, tmp_path: Path) -> None:
    for _ in range(2):  # the second start takes from the home what the first left there
        reasons, modules = json.loads(run(SERVE, quantization, str(tmp_path)))
        assert reasons == ["length", "length"]
    assert [name for name in HEAVY if name in modules] == []


def test_transformers_alone_needs_neither() -> None:
    script = f"""{LEAN}
with compiler_deferred():
    import_transformers()
    from transformers import LlamaForCausalLM
heavy = {(*HEAVY, "torch.distributed.tensor", "sympy", "peft")}
print([name for name in heavy if name in sys.modules])
"""
    assert run(script) == "[]"


def test_the_compiler_is_there_afterwards_and_knows_the_marks() -> None:
    script = f"""{LEAN}
import torch
with compiler_deferred():
    import_transformers()
    marked = torch.compiler.allow_in_graph(lambda x: x + 1)
    constant = torch.compiler.assume_constant_result(lambda: 1)
    away = torch.compiler.disable(lambda x: x * 2)
    late = torch.compile(lambda x: x * 3, backend="eager", fullgraph=True)
    # Both are computed in Python, by functions that torch keeps its compiler away from.
    torch.empty(2, device="meta").normal_() / torch.arange(2, device="meta")
    assert away(torch.ones(1)) == 2
    assert "torch._dynamo.utils" not in sys.modules
assert "torch._dynamo" not in sys.modules
import torch._dynamo
from torch._dynamo import trace_rules
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import masking_utils
assert id(marked) in trace_rules._allowed_callable_ids
assert constant._dynamo_marked_constant
one = torch.ones(1)
assert away(one) == 2 and late(one) == 3
traced = []
def backend(graph, example):
    traced.append(graph.code)
    return graph
assert torch.compile(lambda x: away(x) + 5, backend=backend)(one) == 7
assert traced and "* 2" not in "".join(traced) and "+ 5" in "".join(traced)
assert torch.compile(lambda x: x + 4, backend="eager")(one) == 5
assert type(masking_utils.TransformGetItemToIndex()) is TransformGetItemToIndex
with masking_utils.TransformGetItemToIndex():
    assert one[torch.tensor(0)] == 1
print("good")
"""
    assert run(script) == "good"


@pytest.mark.parametrize(
    "wanted",
    [
        "from torch._dynamo.utils import counters",
        "import torch._dynamo.backends.registry",
        "from torch._dynamo import optimize",
        "import torch; torch._dynamo.config.verbose",
        "from torch._dynamo._trace_wrapped_higher_order_op import trace_wrapped",
    ],
)
def test_what_the_stand_in_lacks_brings_the_real_compiler(wanted: str) -> None:
    script = f"""{LEAN}
with compiler_deferred():
    {wanted}
    real = sys.modules["torch._dynamo"]
    assert real.__spec__.origin.endswith("_dynamo/__init__.py")
import torch
import torch._dynamo.utils
assert torch._dynamo is real and sys.modules["torch._dynamo.utils"] is real.utils
assert real.utils.__spec__.loader.get_filename("torch._dynamo.utils") == real.utils.__file__
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
print("good")
"""
    assert run(script) == "good"


def test_a_tensor_of_several_devices_is_told_from_others() -> None:
    script = f"""{LEAN}
with compiler_deferred():
    import_transformers()
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed.utils import is_dtensor
assert not is_dtensor(torch.ones(1)) and not isinstance(torch.ones(1), DTensor)
print("good")
"""
    assert run(script) == "good"


def test_transformers_learns_the_same_of_its_models() -> None:
    script = """
import hashlib, sys
if sys.argv[1] == "lean":
    from manylora_server.model.lean_imports import import_transformers
    import_transformers()
import transformers.models
names = sorted(transformers.models.__all__)
print(len(names), hashlib.sha256(repr(names).encode()).hexdigest())
"""
    assert run(script, "lean") == run(script, "plain")


def test_another_transformers_is_imported_as_it_comes() -> None:
    script = f"""{LEAN}
import io, logging
from manylora_server.model import lean_imports
lean_imports._COMMON = ("transformers.modeling_utils", "transformers.of_another_version")
told = io.StringIO()
logging.getLogger(lean_imports.__name__).addHandler(logging.StreamHandler(told))
logging.getLogger(lean_imports.__name__).setLevel(logging.DEBUG)
import_transformers()
assert "of_another_version" in told.getvalue()
from transformers import AutoModelForCausalLM, LlamaForCausalLM
print("good")
"""
    assert run(script) == "good"
