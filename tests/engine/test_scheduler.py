"""What each step computes, with pretended device slots and no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_server.engine.sequence import SequenceStatus
from manylora_server.engine.slot_turns import PATIENCE_STEPS, TURN_STEPS
from support.scheduling import World


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    world = World(budget=16)
    world.add("long", 50, new=2)
    assert [world.step() for _ in range(5)] == [
        [("long", 16)],
        [("long", 16)],
        [("long", 16)],
        [("long", 2)],
        [("long", 1)],
    ]
    assert world.finished == ["long"]


def test_decode_goes_before_prefill_and_prefill_before_admission() -> None:
    world = World(budget=10)
    for name in ("a", "b", "c"):
        world.add(name, 3, new=20)
    assert world.step() == [("a", 3), ("b", 3), ("c", 3)]
    world.add("long", 12, new=5)
    world.add("new", 2, new=5)
    assert world.step() == [("a", 1), ("b", 1), ("c", 1), ("long", 7)]
    assert world.step() == [("a", 1), ("b", 1), ("c", 1), ("long", 5), ("new", 2)]


def test_higher_priority_then_earlier_arrival_is_admitted_first() -> None:
    world = World(most=2, budget=64)
    world.add("first", 3)
    world.add("second", 3)
    world.add("urgent", 3, priority=5)
    world.add("late urgent", 3, priority=5)
    world.add("low", 3, priority=-1)
    world.run()
    assert world.finished == ["urgent", "late urgent", "first", "second", "low"]


def test_the_last_in_order_is_preempted_and_still_finishes() -> None:
    world = World(blocks=10, budget=64, prefix_cache=False)
    names = [("old", 0), ("important", 3), ("newest", 0)]
    sequences = {n: world.add(n, 12, new=10, priority=p) for n, p in names}
    preempted = []
    while world.scheduler.running or world.scheduler.waiting:
        before = {s.request.request_id for s in world.scheduler.running}
        world.step()
        waiting = {s.request.request_id for s in world.scheduler.waiting}
        preempted += sorted(before & waiting)
    assert preempted[0] == "newest"
    assert "important" not in preempted
    assert world.scheduler.preemptions == len(preempted)
    assert world.finished[0] == "important"
    assert sorted(world.finished) == sorted(sequences)
    assert all(s.output_length == 10 for s in sequences.values())


def test_a_large_prompt_is_not_passed_for_ever_by_small_ones() -> None:
    world = World(blocks=11, budget=64, most=8)
    world.add("running", 20, new=4)
    world.step()
    world.add("large", 36, new=2)
    for number in range(30):
        world.add(f"small {number}", 4, new=2)
        world.step()
        if "large" in world.finished:
            break
    assert "large" in world.finished
    assert not any(name.startswith("small") for name in world.finished)


def test_an_adapter_that_is_loading_holds_up_nobody_else() -> None:
    world = World(slots=2, budget=64, load_steps=5)
    world.add("loading", 3, new=2, adapter="a")
    world.add("base", 3, new=9)
    assert world.step() == [("base", 3)]
    assert [world.step() for _ in range(3)] == [[("base", 1)]] * 3
    assert dict(world.step()) == {"base": 1, "loading": 3}
    world.run()
    assert world.finished == ["loading", "base"]


def test_a_first_token_does_not_wait_for_somebody_s_whole_answer() -> None:
    world = World(slots=1, budget=64)
    world.add("holder", 3, new=40, adapter="a")
    world.step()
    world.add("blocked", 3, new=40, adapter="b")
    world.add("base", 3, new=1)
    # The holder has got a token in its turn, so it is parked at once, and keeps its blocks.
    holder = world.scheduler.running[0]
    blocks = list(holder.block_table)
    assert dict(world.step()) == {"blocked": 3, "base": 3}
    assert (holder.parked, holder.block_table) == (True, blocks)
    world.run()
    assert world.scheduler.preemptions == 0
    assert sorted(world.finished) == ["base", "blocked", "holder"]


def test_parked_adapters_take_turns_of_a_bounded_length() -> None:
    world = World(slots=1, budget=64, blocks=400)
    for adapter in "abc":
        world.add(adapter, 3, new=100, adapter=adapter)
    ran = [name for _ in range(300) for name, _ in world.step()]
    runs = [(name, len(list(run))) for name, run in groupby(ran)]
    assert max(length for _, length in runs) <= TURN_STEPS + 1
    # After the first tokens a turn is not cut short, or swapping would be all there is.
    assert min(length for _, length in runs[3:-3]) >= TURN_STEPS
    assert Counter(ran).total() == 300


def test_a_lower_priority_does_not_park_a_higher_one() -> None:
    world = World(slots=1, budget=64)
    world.add("important", 3, new=30, adapter="a", priority=1)
    world.step()
    world.add("other", 3, new=1, adapter="b")
    world.run()
    assert world.finished == ["important", "other"]


def test_a_pinned_adapter_is_not_parked() -> None:
    world = World(slots=2, budget=64)
    world.slots.pinned.add("a")
    for name in ("a", "b", "c"):
        world.add(name, 3, new=30, adapter=name)
    steps = [dict(world.step()) for _ in range(29)]
    assert all("a" in step for step in steps[1:])
    assert any("c" in step for step in steps)


def test_an_adapter_that_waits_for_memory_takes_no_slot_from_others() -> None:
    world = World(slots=1, budget=64, blocks=6, prefix_cache=False)
    world.add("holder", 8, new=8, adapter="a")
    world.step()
    # Five blocks in all: this one must wait until the holder has given its own back.
    world.add("large", 16, new=1, adapter="b")
    while "holder" not in world.finished:
        assert dict(world.step()) == {"holder": 1}
    world.run()
    assert world.scheduler.preemptions == 0


def steady(world: World, adapters: Iterable[str], step: int, new: int) -> None:
    for adapter in adapters:
        world.add(f"{adapter} {step}", 3, new=new, adapter=adapter)


@pytest.mark.parametrize("waiting", [1, 2, 5])
@pytest.mark.parametrize("resident", [1, 2, 3])
def test_no_adapter_starves_under_steady_traffic_of_resident_ones(
    resident: int, waiting: int
) -> None:
    world = World(slots=resident, budget=256, most=200, blocks=4000)
    new = 6
    held = [f"r{i}" for i in range(resident)]
    for step in range(10):
        steady(world, held, step, new)
        world.step()
    wanted = [
        world.add(f"wanted {number}", 3, new=new, adapter=f"w{number}") for number in range(waiting)
    ]
    first: dict[str, int] = {}
    for step in range(10, 10 + 6 * PATIENCE_STEPS):
        steady(world, held, step, new)
        world.step()
        for sequence in wanted:
            if sequence.output_length:
                first.setdefault(sequence.request.request_id, step - 10)
    # Each step can give every slot to somebody who has waited longer.
    assert max(first.values()) <= 2 * waiting
    assert len(first) == waiting
    assert {n for n in world.finished if n.startswith("wanted")} == set(first)


def test_a_flood_of_new_adapters_does_not_starve_a_parked_one() -> None:
    world = World(slots=2, budget=256, most=400, blocks=8000)
    parked = world.add("parked", 3, new=6, adapter="p")
    world.step()
    for step in range(4 * PATIENCE_STEPS):
        for number in range(2):
            world.add(f"new {step} {number}", 3, new=2, adapter=f"n{step}.{number}")
        world.step()
        if parked.status is SequenceStatus.FINISHED:
            break
    assert "parked" in world.finished


def test_resident_adapters_get_their_turn_back() -> None:
    world = World(slots=1, budget=256, most=100, blocks=4000)
    gaps: dict[str, int] = {"a": 0, "b": 0}
    worst = 0
    for step in range(200):
        steady(world, gaps, step, new=3)
        names = {name.split()[0] for name, _ in world.step()}
        gaps = {adapter: 0 if adapter in names else gap + 1 for adapter, gap in gaps.items()}
        worst = max(worst, *gaps.values())
    assert worst <= TURN_STEPS
    assert world.slots.loads >= 200 // (TURN_STEPS + 1)


def test_a_mix_runs_once_all_of_its_adapters_are_there() -> None:
    world = World(slots=3, budget=64)
    world.add("mix", 3, new=4, adapter="a+b+c")
    world.add("single", 3, new=4, adapter="b")
    assert world.step() == [("mix", 3), ("single", 3)]
    assert world.slots.loads == 3
    assert [world.slots.references(adapter) for adapter in "abc"] == [1, 2, 1]
    world.run()
    assert not any(world.slots.references(adapter) for adapter in "abc")


@pytest.mark.parametrize("second", ["d+e+f", "c+d", "a+b", "c+d+e"])
def test_two_mixes_that_compete_for_slots_take_turns(second: str) -> None:
    world = World(slots=3, budget=64, blocks=400)
    world.add("first", 3, new=60, adapter="a+b+c")
    world.add("second", 3, new=60, adapter=second)
    ran = [name for _ in range(80) for name, _ in world.step()]
    counts = Counter(ran)
    shared = set("abc") >= set(second.split("+"))
    if shared:
        assert counts["first"] == counts["second"] == 60
    else:
        assert abs(counts["first"] - counts["second"]) <= TURN_STEPS + 1
        runs = [len(list(run)) for _, run in groupby(ran)]
        assert max(runs) <= TURN_STEPS + 1
    world.run()
    assert sorted(world.finished) == ["first", "second"]


@pytest.mark.parametrize("needs", ["m+n", "m+n+o", "r0+m", "m+n+o+r0"])
@pytest.mark.parametrize("new", [1, 6, 40])
def test_a_mix_does_not_starve_behind_single_adapters(needs: str, new: int) -> None:
    slots = 4
    world = World(slots=slots, budget=256, most=400, blocks=8000)
    held = [f"r{i}" for i in range(slots)]
    for step in range(10):
        steady(world, held, step, new)
        world.step()
    mix = world.add("mix", 3, new=new, adapter=needs)
    waited = 0
    for step in range(10, 10 + 8 * PATIENCE_STEPS):
        # Others that nobody has had before come as well, one after the other.
        steady(world, [*held, f"w{step % 7}"], step, new)
        world.step()
        if mix.output_length:
            break
        waited += 1
    assert waited <= TURN_STEPS + 1
    for step in range(1000, 1000 + 8 * PATIENCE_STEPS):
        if "mix" in world.finished:
            break
        steady(world, [*held, f"w{step % 7}"], step, new)
        world.step()
    else:
        # It gets whole turns, and not only a step now and then.
        assert mix.output_length >= min(new, 2 * TURN_STEPS)


@pytest.mark.parametrize("new", [1, 6, 40])
def test_single_adapters_do_not_starve_behind_mixes(new: int) -> None:
    world = World(slots=3, budget=256, most=400, blocks=8000)
    mixes = ["a+b+c", "a+d", "b+c+e", "d+e+f"]
    for step in range(10):
        steady(world, mixes, step, new)
        world.step()
    single = world.add("single", 3, new=new, adapter="s")
    waited = 0
    for step in range(10, 10 + 8 * PATIENCE_STEPS):
        steady(world, mixes, step, new)
        world.step()
        if single.output_length:
            break
        waited += 1
    # Mixes that came before may each have a turn first.
    assert waited <= len(mixes) * TURN_STEPS


def test_a_single_adapter_and_a_mix_with_it_share_the_slot_and_both_get_turns() -> None:
    world = World(slots=2, budget=64, blocks=900)
    for adapter in ("a", "a+b", "w"):
        world.add(adapter, 3, new=200, adapter=adapter)
    ran = Counter(name for _ in range(300) for name, _ in world.step())
    assert min(ran.values()) >= 60


def test_slots_that_a_mix_waits_for_go_to_nobody_else() -> None:
    world = World(slots=3, budget=64, blocks=400)
    world.slots.pinned.add("p")
    for name, adapter in (("pinned", "p"), ("holder", "a"), ("gone", "b")):
        world.add(name, 3, new=2 if name == "gone" else 30, adapter=adapter)
    for _ in range(2):
        world.step()
    # It waits until "a" has had its turn, as if it had been parked before; "b" is idle meanwhile.
    world.scheduler._turns._turns["a",].resumed = True
    world.add("mix", 3, new=3, adapter="c+d")
    world.add("late", 3, new=1, adapter="b")
    world.add("other", 3, new=1, adapter="e")
    world.add("another pinned", 3, new=1, adapter="p")
    ran = [dict(world.step()) for _ in range(TURN_STEPS - 2)]
    assert all("mix" not in step and "late" not in step and "other" not in step for step in ran)
    assert "another pinned" in ran[0]
    assert all("holder" in step for step in ran)
    assert "mix" in dict(world.step())
    world.run()


def test_a_mix_that_must_wait_for_a_higher_priority_holds_up_nobody() -> None:
    world = World(slots=2, budget=64, blocks=400)
    world.add("important", 3, new=40, adapter="a", priority=1)
    world.step()
    world.add("mix", 3, new=2, adapter="c+d")
    world.add("single", 3, new=2, adapter="e")
    world.run()
    assert world.finished == ["single", "important", "mix"]


def test_one_broken_adapter_ends_every_request_that_needs_it() -> None:
    world = World(slots=3, budget=64)
    world.slots.broken.add("bad")
    for adapter in ("a+bad", "bad", "bad+c", "a+c"):
        world.add(adapter, 3, adapter=adapter, new=1)
    plan = world.scheduler.schedule()
    assert [s.sequence.request.request_id for s in plan] == ["a+c"]
    assert sorted(s.request.request_id for s, _ in world.scheduler.failed) == [
        "a+bad",
        "bad",
        "bad+c",
    ]
    world.scheduler.check_integrity()


def test_a_broken_adapter_ends_its_requests_and_no_others() -> None:
    world = World(slots=1, budget=64)
    world.slots.broken.add("bad")
    bad = world.add("bad", 3, adapter="bad")
    world.add("good", 3, adapter="good", new=1)
    plan = world.scheduler.schedule()
    assert [s.sequence.request.request_id for s in plan] == ["good"]
    assert [(s.request.request_id, str(e)) for s, e in world.scheduler.failed] == [
        ("bad", "it is broken")
    ]
    assert (bad.status, bad.block_table) == (SequenceStatus.FINISHED, [])
    world.scheduler.check_integrity()


def test_waiting_for_a_slot_costs_no_cached_prefix() -> None:
    world = World(slots=1, budget=64, blocks=9)
    world.add("holder", 3, new=30, adapter="a")
    world.step()
    world.add("prefix", list(range(100, 117)), new=1)
    world.step()
    assert world.scheduler.blocks.cached == 4
    world.slots.pinned.add("a")
    world.add("blocked", 8, adapter="b")
    for _ in range(5):
        world.step()
    assert world.scheduler.blocks.cached == 4


@pytest.mark.parametrize("end", ["waiting", "running", "half computed"])
def test_finishing_early_frees_everything(end: str) -> None:
    world = World(slots=1, budget=16, prefix_cache=False)
    sequence = world.add("it", 40 if end == "half computed" else 4, new=9, adapter="a")
    if end != "waiting":
        world.step()
    world.scheduler.finish(sequence)
    world.scheduler.check_integrity()
    assert world.scheduler.blocks.available == world.scheduler.blocks.capacity
    assert world.slots.references("a") == 0
    assert world.step() == []


REQUEST = st.tuples(
    st.integers(1, 24),
    st.integers(1, 8),
    st.sampled_from([None, "a", "b", "c", "d", "bad", "a+b", "b+c+d", "a+bad", "c+e"]),
    st.integers(-1, 1),
    st.integers(0, 6),
)


@given(
    st.lists(REQUEST, min_size=1, max_size=25),
    st.integers(9, 30),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([True, False]),
    st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_everything_ends_whatever_comes(
    requests: list[tuple[int, int, str | None, int, int]],
    blocks: int,
    slots: int,
    budget: int,
    most: int,
    prefix_cache: bool,
    load_steps: int,
) -> None:
    world = World(
        blocks=blocks,
        slots=slots,
        budget=budget,
        most=most,
        prefix_cache=prefix_cache,
        load_steps=load_steps,
    )
    world.slots.broken.add("bad")
    names = []
    for number, (prompt, new, adapter, priority, pause) in enumerate(requests):
        if adapter is not None and adapter.count("+") >= slots:
            continue  # refused before it is queued
        names.append(str(number))
        world.add(str(number), [5] * prompt, new, adapter, priority)
        for _ in range(pause):
            world.step()
    world.run()
    assert sorted(world.finished) == sorted(names)
    assert world.scheduler.blocks.available == world.scheduler.blocks.capacity
    assert not any(world.slots.held.values())
    assert not any(world.slots.expected.values())
