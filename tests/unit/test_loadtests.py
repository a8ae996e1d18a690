"""The load generator's own parts: what it sends, how it counts, what it compares with."""

from __future__ import annotations

import asyncio
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from loadtests.client import Record
from loadtests.models import SHAPES, ensure_adapters, ensure_model
from loadtests.peft_baseline import PeftBaseline
from loadtests.report import Run, percentile, ratios, summarize
from loadtests.scenarios import SCENARIOS
from loadtests.tokens import build_tokenizer, token_ids
from loadtests.verify import Verification, compare, idle_adapters
from loadtests.workload import Lengths, Request, WorkloadSpec, base_only, make_requests

ADAPTERS = [f"a{index}" for index in range(8)]


def spec(**changes) -> WorkloadSpec:
    settings = {
        "requests": 16,
        "vocabulary": 500,
        "popularity": "distinct",
        "prompt_tokens": Lengths(3, 9),
        "output_tokens": Lengths(2, 5),
    }
    return WorkloadSpec(**{**settings, **changes})


def test_a_seed_repeats_its_workload_and_another_shares_no_prompt_with_it():
    first = make_requests(spec(rate=2.0), ADAPTERS, seed=1)
    assert first == make_requests(spec(rate=2.0), ADAPTERS, seed=1)
    other = make_requests(spec(rate=2.0), ADAPTERS, seed=2)
    assert not {r.prompt for r in first} & {r.prompt for r in other}


def test_base_only_differs_in_nothing_but_the_adapter():
    requests = make_requests(spec(), ADAPTERS, seed=1)
    plain = base_only(requests)
    assert [(r.prompt, r.output_tokens) for r in plain] == [
        (r.prompt, r.output_tokens) for r in requests
    ]
    assert {r.adapter for r in plain} == {None}


def test_changing_the_popularity_leaves_the_prompts_as_they_were():
    distinct = make_requests(spec(), ADAPTERS, seed=1)
    zipf = make_requests(spec(popularity="zipf"), ADAPTERS, seed=1)
    assert [r.prompt for r in distinct] == [r.prompt for r in zipf]


def counts(popularity: str, requests: int = 4000) -> Counter[str | None]:
    made = make_requests(spec(popularity=popularity, requests=requests), ADAPTERS, seed=3)
    return Counter(request.adapter for request in made)


def test_distinct_uses_every_adapter_equally_often():
    assert counts("distinct", 16) == dict.fromkeys(ADAPTERS, 2)


def test_identical_uses_one_adapter():
    assert counts("identical", 16) == {"a0": 16}


def test_uniform_uses_every_adapter_about_equally_often():
    found = counts("uniform")
    assert all(abs(found[name] - 500) < 100 for name in ADAPTERS)


def test_zipf_falls_with_the_rank_to_the_power_of_the_exponent():
    found = counts("zipf")
    weights = [rank**-1.5 for rank in range(1, 9)]
    for name, weight in zip(ADAPTERS, weights, strict=True):
        assert found[name] == pytest.approx(4000 * weight / sum(weights), rel=0.25)


def test_lengths_reach_both_bounds_and_stay_within():
    requests = make_requests(spec(requests=300), ADAPTERS, seed=1)
    assert {len(r.prompt) for r in requests} == set(range(3, 10))
    assert {r.output_tokens for r in requests} == set(range(2, 6))


@pytest.mark.parametrize(("text", "bounds"), [("64", (64, 64)), ("8:512", (8, 512))])
def test_lengths_are_read_and_written(text, bounds):
    lengths = Lengths.parse(text)
    assert (lengths.low, lengths.high) == bounds
    assert str(lengths) == text


@pytest.mark.parametrize("text", ["0", "9:3", "many", ""])
def test_impossible_lengths_are_refused(text):
    with pytest.raises(ValueError, match=r"lengths need|invalid literal"):
        Lengths.parse(text)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_arrivals_have_the_asked_rate_and_variation(cv):
    requests = make_requests(spec(requests=20_000, rate=4.0, cv=cv), ADAPTERS, seed=1)
    times = [request.arrival_s for request in requests]
    gaps = torch.tensor([b - a for a, b in itertools.pairwise(times)])
    assert times[0] == 0.0
    assert float(gaps.mean()) == pytest.approx(0.25, rel=0.05)
    assert float(gaps.std() / gaps.mean()) == pytest.approx(cv, rel=0.05)


def test_the_text_of_tokens_gives_the_tokens_back():
    tokenizer = build_tokenizer(500)
    rng = random.Random(0)
    tokens = [*range(500), *(rng.randrange(500) for _ in range(500))]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert token_ids(text) == tokens
    assert tokenizer.encode(text) == tokens
    assert tokenizer.all_special_ids == []


@pytest.mark.parametrize("text", ["<1", "<1> <2>", "<01>", "word"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="not the text of whole tokens"):
        token_ids(text)


def test_percentiles_are_those_of_torch():
    values = [random.Random(1).expovariate(1) for _ in range(101)] + [7.0]
    for percent in (0, 50, 95, 99, 100):
        expected = float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))
        assert percentile(values, percent) == pytest.approx(expected)
    assert percentile([3.0], 99) == 3.0
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def run(wall_s: float) -> Run:
    record = Record("a", 10.0, [1, 2, 3], [10.5, 10.6, 10.9], prompt_tokens=7)
    return Run(wall_s, 7, [[1, 2, 3]], [record])


def test_a_side_is_summed_up_by_medians_and_pooled_latencies():
    summary = summarize([run(1.0), run(2.0), run(4.0)])
    assert summary["generated_tokens_per_s"] == 1.5
    assert summary["total_tokens_per_s"] == 5.0
    assert summary["time_to_first_token_s"]["p50"] == 0.5
    assert summary["inter_token_s"]["p50"] == pytest.approx(0.2)


def test_ratios_are_judged_by_their_targets():
    sides = {"manylora mixed": [run(2.0), run(4.0)], "manylora base": [run(1.0), run(3.0)]}
    [(name, entry)] = ratios(sides, {"manylora mixed / manylora base": 0.7}).items()
    assert name == "manylora mixed / manylora base"
    assert entry["by_repetition"] == [0.5, 0.75]
    assert entry["ratio"] == pytest.approx(1.125 / 2)
    assert not entry["met"]


def compared(got: Sequence[int], gap: float) -> Verification:
    async def constant(*_: object) -> float:
        return gap

    verification = Verification()
    request = Request((1, 2), 3, "a")
    asyncio.run(compare(verification, [request], [[5, 6, 7]], [got], constant))
    return verification


def test_equal_tokens_pass():
    verification = compared([5, 6, 7], gap=1.0)
    assert verification.passed
    assert verification.equal == 1


def test_a_difference_passes_only_as_a_near_tie():
    tie, mismatch = compared([5, 9, 9], gap=1e-5), compared([5, 9, 9], gap=1e-3)
    assert tie.passed
    assert tie.equal == 0
    assert [(d.position, d.expected, d.got) for d in tie.near_ties] == [(1, 6, 9)]
    assert not mismatch.passed


def test_an_adapter_that_changes_nothing_is_found():
    requests = [Request((1,), 2, "works"), Request((2,), 2, "idle"), Request((3,), 2, "idle")]
    mixed, base = [[1, 2], [3, 4], [5, 6]], [[1, 9], [3, 4], [5, 6]]
    assert idle_adapters(requests, mixed, base) == ["idle"]


@pytest.mark.parametrize("shape", ["tiny", "14m"])
def test_the_stated_number_of_parameters_is_exact(shape, tmp_path):
    from safetensors import safe_open

    folder = ensure_model(SHAPES[shape], tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as stored:
        sizes = [stored.get_tensor(name).numel() for name in stored.keys()]  # noqa: SIM118
    assert sum(sizes) == SHAPES[shape].parameters


def test_every_scenario_names_a_shape():
    assert {scenario.shape for scenario in SCENARIOS.values()} <= set(SHAPES)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> tuple[PeftBaseline, list[str | None]]:
    model = ensure_model(SHAPES["tiny"], tmp_path_factory.mktemp("loadtests"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters = ensure_adapters(model, 3, [4, 16])
        assert [adapter.rank for adapter in adapters] == [4, 16, 4]
        folders = [str(adapter.folder) for adapter in adapters]
        return PeftBaseline(model, "float32"), [*folders, None]


def test_the_mixed_peft_batch_answers_as_one_by_one(baseline):
    peft, adapters = baseline
    rng = random.Random(0)
    prompts = [[rng.randrange(512) for _ in range(rng.randint(3, 12))] for _ in range(8)]
    chosen = [adapters[index % 4] for index in range(8)]
    counts = [rng.randint(2, 8) for _ in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, mixed = peft.generate(prompts, chosen, counts)
        alone = [
            peft.generate([prompt], [adapter], [count])[1][0]
            for prompt, adapter, count in zip(prompts, chosen, counts, strict=True)
        ]
        _, base = peft.generate(prompts, [None] * 8, counts)
    assert mixed == alone
    assert [len(answer) for answer in mixed] == counts
    for adapter, with_adapter, without in zip(chosen, mixed, base, strict=True):
        assert (with_adapter == without) == (adapter is None)


def test_the_gap_of_a_token_with_itself_is_nothing_and_with_others_is_not(baseline):
    peft, adapters = baseline
    assert peft.gap([1, 2, 3], adapters[0], (4, 4)) == 0.0
    assert 0.0 < peft.gap([1, 2, 3], adapters[0], (4, 5)) <= 2.0
