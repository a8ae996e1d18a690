"""Decode graphs without a GPU: a "graph" here calls again, through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora_kernels import RankExtent, Segment, gpu, select_backend, selected_backend
from manylora_server.core.types import AdapterMix
from manylora_server.model.attention import KVCache, LayerShape
from manylora_server.model.batch import Chunk
from manylora_server.model.cuda_graphs import DecodeGraphs
from manylora_server.model.graph_inputs import (
    StaticInputs,
    batch_bucket,
    depth_bucket,
    width_bucket,
)
from support.adapters import lora, save_adapter
from support.models import save_model
from support.serving import Recorder, bring_in, build, inner, request, run, tokens_of
from support.triton import requires_triton

CPU = torch.device("cpu")
PROMPT = [5, 60, 7]


class Again:
    """Stands in for a captured graph: computes the same call from the same tensors again."""

    def __init__(self, call: Callable[[], torch.Tensor]) -> None:
        self.call = call
        self.output = call()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.call())


@pytest.mark.parametrize(
    ("sequences", "bucket"),
    [(1, 1), (3, 4), (8, 8), (9, 16), (17, 24), (64, 64), (65, 80), (256, 256), (257, None)],
)
def test_batches_are_padded_to_a_few_sizes(sequences: int, bucket: int | None) -> None:
    assert batch_bucket(sequences) == bucket


@pytest.mark.parametrize(("blocks", "bucket"), [(1, 16), (16, 16), (17, 32), (100, 128)])
def test_tables_are_padded_to_powers_of_two(blocks: int, bucket: int) -> None:
    assert width_bucket(blocks) == bucket


@pytest.mark.parametrize(("adapters", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 4), (9, 16)])
def test_mixes_are_padded_to_powers_of_two(adapters: int, bucket: int) -> None:
    assert depth_bucket(adapters) == bucket


def test_inputs_describe_the_step_and_nothing_of_the_last() -> None:
    cache = KVCache({0: LayerShape(1, 2, 2)}, 8, 4, torch.float32, CPU)
    inputs = StaticInputs(cache, 4, 16, CPU)
    addresses = [inputs.input_ids.data_ptr(), inputs.attention.block_tables.data_ptr()]
    steps = [
        [Chunk([7], 9, [1, 2, 3], (), True), Chunk([8], 0, [5], ((1, 1.0),), True)],
        [Chunk([9], 4, [6, 7], (), True)],
    ]
    for step in (steps[0], steps[1]):
        inputs.fill(step)
    assert inputs.input_ids.tolist() == [[9, 0, 0, 0]]
    assert inputs.position_ids.tolist() == [[4, 0, 0, 0]]
    attention = inputs.attention
    assert attention.positions.tolist() == [28, -1, -1, -1]
    assert attention.context_lens.tolist() == [5, 0, 0, 0]
    assert attention.block_tables[0].tolist() == [6, 7, *[0] * 14]
    assert not attention.block_tables[1:].any()
    assert attention.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert attention.num_decodes == 4
    assert attention.block_tables.is_contiguous()
    assert addresses == [inputs.input_ids.data_ptr(), attention.block_tables.data_ptr()]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """An engine whose adapters are of several ranks and targets, and its decode graphs."""
    base = save_model("llama", tmp_path / "base")
    configs = {
        "small": lora("llama", r=2),
        "wide": lora("llama", r=20, target_modules=["q_proj", "up_proj"]),
        "dora": lora("llama", r=3, use_dora=True),
        "biased": lora("llama", r=3, lora_bias=True),
        "embedding": lora("llama", r=2, target_modules=["embed_tokens", "q_proj"]),
    }
    adapters = {
        name: save_adapter(base, config, tmp_path / name, seed)
        for seed, (name, config) in enumerate(configs.items())
    }
    engine = build(
        tmp_path / "base", tmp_path / "home", device="cpu", adapters=adapters, prefix_cache=False
    )
    bring_in(engine)
    # The engine has chosen what is fast on a CPU.
    before = {operation: selected_backend(operation) for operation in gpu.OPERATIONS}
    for operation in before:
        select_backend(operation, gpu.TRITON)
    core = inner(engine)
    modules = core.residency.slots._modules
    captured: list[Again] = []

    def capture(call: Callable[[], torch.Tensor]) -> Again:
        captured.append(Again(call))
        return captured[-1]

    runner = core._runner
    graphs = DecodeGraphs(
        runner.model, runner.cache, lambda: modules.wrapped, torch.float32, CPU, capture
    )
    yield {
        "engine": engine,
        "core": core,
        "runner": runner,
        "graphs": graphs,
        "captured": captured,
        "modules": modules,
    }
    for operation, backend in before.items():
        select_backend(operation, backend)


def mix_of(engine: Any, name: str) -> AdapterMix | None:
    """Return the base, one adapter, or ``a+b``, whose weights differ."""
    if name == "base":
        return None
    choices = [engine.adapters.resolve(part) for part in name.split("+")]
    if len(choices) == 1:
        return AdapterMix.of(choices[0])
    return AdapterMix(tuple((c, 0.5 - i) for i, c in enumerate(choices)))


def outputs_of(served: dict[str, Any], names: list[str]) -> tuple[list[list[int]], torch.Tensor]:
    core, engine = served["core"], served["engine"]
    recorder = Recorder(core)
    requests = [request(name, PROMPT, mix_of(engine, name), max_tokens=4) for name in names]
    # A prefill, then three decode steps: one as always, one captured, one replayed.
    outputs = run(core, {0: requests})
    core._runner = served["runner"]
    rows = [row for r in requests for row in recorder.rows[r.request_id]]
    return [tokens_of(outputs[r.request_id]) for r in requests], torch.stack(rows)


@requires_triton
def test_replays_give_what_the_steps_give(served: dict[str, Any]) -> None:
    names = ["wide", "dora"]
    expected, logits = outputs_of(served, names)
    served["runner"].graphs = served["graphs"]
    tokens, got = outputs_of(served, names)
    assert tokens == expected
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=0)
    assert not served["graphs"].given_up
    assert served["graphs"].buckets == ((2, 16, 1),)
    # The first replay is the test of the capture.
    assert [graph.replays for graph in served["captured"]] == [3]
    assert outputs_of(served, ["base"])[0] not in (expected[:1], expected[1:])
    assert served["graphs"].buckets == ((2, 16, 1), (1, 16, 0))


@requires_triton
def test_mixes_have_graphs_with_more_room(served: dict[str, Any]) -> None:
    names = ["small+wide+biased", "wide+biased", "base", "dora"]
    expected, logits = outputs_of(served, names)
    assert len({tuple(tokens) for tokens in expected}) == 4
    served["runner"].graphs = served["graphs"]
    tokens, got = outputs_of(served, names)
    assert tokens == expected
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=0)
    assert not served["graphs"].given_up
    assert served["graphs"].buckets == ((4, 16, 4),)
    # Alone, so that the bucket is full.
    for name in names[:2]:
        alone, _ = outputs_of(served, [name])
        assert alone == [expected[names.index(name)]]
    assert served["graphs"].buckets == ((4, 16, 4), (1, 16, 4), (1, 16, 2))


@requires_triton
def test_loads_that_move_memory_drop_the_graphs(served: dict[str, Any]) -> None:
    served["runner"].graphs = served["graphs"]
    names = ["small"]
    expected, _ = outputs_of(served, names)
    assert len(served["captured"]) == 1
    # Another adapter's rank rows go, so pools shrink and move.
    digest = served["engine"].adapters.resolve("wide").digest
    assert served["core"].residency.drop(digest)
    assert outputs_of(served, names)[0] == expected
    assert len(served["captured"]) == 2
    assert served["captured"][0].replays == 3


@requires_triton
def test_what_a_graph_cannot_do_runs_without_one(served: dict[str, Any]) -> None:
    expected, _ = outputs_of(served, ["embedding"])
    served["runner"].graphs = served["graphs"]
    assert outputs_of(served, ["embedding"])[0] == expected
    assert served["captured"] == []


@requires_triton
@pytest.mark.parametrize("failure", ["raises", "lies"])
def test_a_capture_that_fails_costs_speed_only(
    served: dict[str, Any], failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = outputs_of(served, ["small"])
    graphs = served["graphs"]

    def capture(call: Callable[[], torch.Tensor]) -> Again:
        if failure == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        graph = Again(call)
        graph.call = lambda: -call()
        return graph

    graphs._capture = capture
    served["runner"].graphs = graphs
    assert outputs_of(served, ["small"])[0] == expected
    assert graphs.given_up
    assert graphs.buckets == ()
    assert "decode steps run without CUDA graphs, which is slower: " in caplog.text
    assert ("not permitted" if failure == "raises" else "differ by") in caplog.text


@requires_triton
def test_tables_hold_until_layouts_or_memory_change(served: dict[str, Any]) -> None:
    from manylora_server.model.adapted import AdaptedLinear
    from manylora_server.model.graph_adapters import AdapterTables

    modules = served["modules"].wrapped
    tables = AdapterTables(modules, 4, 1, CPU, torch.float32)
    assert tables.hold(modules)
    linear = [m for m in modules if isinstance(m, AdaptedLinear) and m.ranks.extents]
    slot = next(iter(linear[0].ranks.extents))
    assert tables.fill([Segment(0, 1, slot), Segment(1, 3, slot, 0.5)])
    plan = tables.segments.resolve(linear[0].ranks.extents).plan
    assert plan.cells[:, 1].tolist() == [1, 2, 0, 0]
    # More segments over the same tokens than there is room for.
    assert not tables.fill([Segment(0, 4, slot, 0.1)] * 100)
    extents = linear[0].ranks.extents
    before = extents[slot]
    extents[slot] = RankExtent(before.start, before.rank, before.scaling + 1)
    assert not tables.hold(modules)
    extents[slot] = before
    assert tables.hold(modules)
    linear[0].ranks.a = linear[0].ranks.a.clone()
    assert not tables.hold(modules)
