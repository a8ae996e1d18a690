"""The automatic policy on a clock of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from manylora_server.adapters.twins.policy import AutoMerge, Decision, PolicySettings
from manylora_server.adapters.twins.record import TwinError, TwinRecord
from manylora_server.adapters.twins.step_times import PathChoice, StepTimes

FUSED = StepTimes({1: 0.010, 16: 0.040})
FASTER = PathChoice(FUSED, StepTimes({1: 0.008, 16: 0.030}))
SLOWER = PathChoice(FUSED, StepTimes({1: 0.020, 16: 0.050}))
ERROR = TwinError(24, 0.0, 0.0, 0.0, 0.0, 1.0)


def record(choice: PathChoice, *, automatic: bool = True, size: int = 100) -> TwinRecord:
    return TwinRecord(
        precision="int8",
        storage="int8",
        bytes=size,
        modules=1,
        delta_share=1.0,
        worst_delta_share=1.0,
        worst_module=None,
        delta_error=0.0,
        error=ERROR,
        forced=False,
        automatic=automatic,
        replayed=True,
        created_at=0.0,
        seconds=1.0,
        choice=choice,
    )


@dataclass
class World:
    """A server that merges at once, with room for ``room`` bytes of twins."""

    choices: dict[str, PathChoice]
    room: int = 1000
    sizes: dict[str, int] = field(default_factory=dict)
    now: float = 0.0
    twins: dict[str, TwinRecord] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    refused: str | None = None

    def __post_init__(self) -> None:
        self.policy = AutoMerge(PolicySettings(), lambda: self.now)

    def run(self, seconds: int, busy_s: dict[str | None, float]) -> list[str]:
        """Let that long pass, with so many seconds of steps a second; return what was decided.

        Each step is one token and takes what a fused one does.
        """
        before = len(self.decisions)
        for _ in range(seconds):
            self.now += 1.0
            for digest, share in busy_s.items():
                for _ in range(round(share / FUSED.at(1))):
                    self.policy.note_step(digest, 1, FUSED.at(1))
            self.decide()
        return [f"{d.action} {d.digest}" for d in self.decisions[before:]]

    def decide(self) -> None:
        free = self.room - sum(twin.bytes for twin in self.twins.values())
        decision = self.policy.decide(self.twins, free, busy=False)
        if decision is None:
            return
        self.decisions.append(decision)
        digest = decision.digest
        if decision.action == "demote":
            del self.twins[digest]
        elif self.refused is not None:
            self.policy.failed(digest, self.refused)
        elif self.sizes.get(digest, 100) > free:
            self.policy.no_room(digest, self.sizes.get(digest, 100))
        else:
            self.twins[digest] = record(self.choices[digest], size=self.sizes.get(digest, 100))
            self.policy.merged(digest, self.twins[digest])


def test_a_busy_adapter_is_promoted_once_and_stays() -> None:
    world = World({"hot": FASTER})
    assert world.run(14, {"hot": 0.5, None: 0.3}) == []
    assert world.run(1, {"hot": 0.5}) == ["promote hot"]
    assert "expected to save" in world.decisions[0].reason
    assert world.run(600, {"hot": 0.5}) == []


@pytest.mark.parametrize("busy", [{"cold": 0.1}, {None: 0.9}, {}])
def test_what_would_not_pay_is_left(busy: dict[str | None, float]) -> None:
    world = World({"cold": FASTER})
    assert world.run(600, busy) == []


def test_a_short_burst_is_not_enough() -> None:
    world = World({"hot": FASTER})
    assert world.run(4, {"hot": 0.4}) == []
    assert world.run(300, {}) == []


def test_one_whose_traffic_ends_is_demoted_after_a_while() -> None:
    world = World({"hot": FASTER})
    world.run(60, {"hot": 0.5})
    assert list(world.twins) == ["hot"]
    assert world.run(200, {}) == ["demote hot"]
    assert "less than 0.30" in world.decisions[-1].reason
    assert world.run(300, {}) == []


def test_one_that_was_measured_and_does_not_pay_is_not_tried_again() -> None:
    world = World({"hot": SLOWER})
    decided = world.run(1200, {"hot": 0.9})
    assert decided == ["promote hot", "demote hot"]
    # The wish is dropped by measurement, not for a time.
    assert world.run(3600, {"hot": 0.9}) == []


def test_it_stays_a_minute_at_least_and_does_not_flap() -> None:
    world = World({"hot": FASTER})
    for _ in range(20):
        world.run(30, {"hot": 0.6})
        world.run(30, {})
    assert [d.action for d in world.decisions] == ["promote"]


def test_the_better_of_two_gets_the_room() -> None:
    world = World({"good": FASTER, "better": FASTER}, room=100)
    assert world.run(120, {"good": 0.2}) == ["promote good"]
    decided = world.run(120, {"good": 0.2, "better": 0.6})
    assert decided == ["demote good", "promote better"] or decided == [
        "promote better",
        "demote good",
        "promote better",
    ]
    assert world.run(300, {"good": 0.2, "better": 0.6}) == []
    assert list(world.twins) == ["better"]


def test_equals_do_not_displace_each_other() -> None:
    world = World({"a": FASTER, "b": FASTER}, room=100, sizes={"a": 100, "b": 100})
    world.policy.no_room("a", 100)
    world.policy.no_room("b", 100)
    decided = world.run(1200, {"a": 0.4, "b": 0.42})
    assert decided == ["promote b"]


def test_one_larger_than_all_room_is_never_begun_again() -> None:
    world = World({"hot": FASTER}, room=100, sizes={"hot": 200})
    assert world.run(1200, {"hot": 0.9}) == ["promote hot"]


def test_one_that_fails_is_left_alone_for_ten_minutes() -> None:
    world = World({"hot": FASTER}, refused="it has virtual tokens")
    assert world.run(600, {"hot": 0.9}) == ["promote hot"]
    [candidate] = world.policy.stats()["candidates"]
    assert candidate["left_alone"] == "it has virtual tokens"
    assert world.run(600, {"hot": 0.9}) == ["promote hot"]


def test_what_an_operator_merged_is_never_demoted() -> None:
    world = World({"his": FASTER})
    world.twins["his"] = record(FASTER, automatic=False)
    world.policy.merged("his", world.twins["his"])
    assert world.run(1200, {None: 0.5}) == []


def test_nothing_is_begun_while_a_merge_is_under_way() -> None:
    world = World({"hot": FASTER})
    for _ in range(300):
        world.now += 1
        world.policy.note_step("hot", 1, 0.5)
        assert world.policy.decide({}, 1000, busy=True) is None


def test_experience_corrects_the_expectation() -> None:
    slow = PathChoice(FUSED, StepTimes({1: 0.0099, 16: 0.040}))
    world = World({"first": slow, "second": FASTER})
    assert world.policy.stats()["expected_gain"] == 0.1
    world.run(60, {"first": 0.5})
    assert world.policy.stats()["expected_gain"] == pytest.approx(0.01)
    # A hundredth of half of the time is not worth it.
    assert world.run(120, {"second": 0.5, "first": 0.5}) in ([], ["demote first"])


def test_it_explains_itself() -> None:
    world = World({"hot": FASTER})
    assert world.policy.stats()["last_decision"] is None
    world.run(100, {"hot": 0.5, "warm": 0.05, None: 0.2})
    stats: dict[str, Any] = world.policy.stats()
    assert stats["last_decision"]["action"] == "promote"
    assert stats["last_decision"]["seconds_ago"] > 0
    best: Iterable[str] = [entry["digest"] for entry in stats["candidates"]]
    assert list(best) == ["hot", "warm"]
    assert stats["candidates"][0]["measured"]
    # 50 steps a second, each 2 ms faster, over a minute.
    assert stats["candidates"][0]["saved_s_per_minute"] == pytest.approx(6.0)


class TestStepTimes:
    def test_between_and_beyond_what_was_measured(self) -> None:
        times = StepTimes({4: 0.4, 1: 0.1, 8: 0.5})
        assert times.at(1) == 0.1
        assert times.at(2) == pytest.approx(0.2)
        assert times.at(4) == pytest.approx(0.4)
        assert times.at(6) == pytest.approx(0.45)
        assert times.at(16) == pytest.approx(0.7)

    def test_noise_does_not_make_more_tokens_faster(self) -> None:
        times = StepTimes({1: 0.3, 4: 0.2})
        assert times.at(100) == pytest.approx(0.2)
        assert times.at(3) == pytest.approx(0.3 - 0.2 / 3)

    def test_one_measurement(self) -> None:
        assert StepTimes({4: 0.4}).at(100) == 0.4

    def test_the_choice(self) -> None:
        choice = PathChoice(StepTimes({1: 0.010, 16: 0.050}), StepTimes({1: 0.020, 16: 0.040}))
        assert [choice.merged_is_faster(t) for t in (1, 4, 12, 16, 64)] == [
            *[False, False, True, True, True]
        ]
        assert choice.as_dict()["merged_at"] == [16]
        assert choice.saved(16) == pytest.approx(0.010)
