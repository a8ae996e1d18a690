"""A process killed at any step of a change: the old state or the new one, and nothing left over."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unit.store.churn import check_integrity, seeds_by_digest
from unit.store.conftest import OpenStore
from unit.store.crash_runs import SCENARIOS
from unit.store.store_process import command, environment

# Steps that a run cannot do without; were one missing, the run would not test what it says.
UPLOAD = {"before replace", "after replace"}
REMOVAL = {"before unlink", "after unlink"}
COMMIT = {"before Connection.commit", "after Connection.commit"}
STEPS = {
    "creation": COMMIT,
    "first-upload": UPLOAD | REMOVAL | COMMIT,
    "new-revision": UPLOAD | REMOVAL | COMMIT,
    "other-bytes": COMMIT,
    "rollback": COMMIT,
    "removal": REMOVAL | COMMIT,
    "last-removal": REMOVAL | COMMIT,
}


# A step takes long on PostgreSQL; these have every kind of it.
RUNS = [("sqlite", scenario) for scenario in STEPS] + [
    ("postgresql", scenario) for scenario in ("creation", "new-revision", "removal")
]


@pytest.mark.parametrize(("registry_url", "scenario"), RUNS, indirect=["registry_url"])
def test_a_change_cut_off_at_any_step_is_done_or_not(
    scenario: str, home: Path, registry_url: str
) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "unit.store.crash_runs",
            scenario,
            str(home),
            registry_url,
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    before, after, found = report["before"], report["after"], report["found"]
    for step, (where, state) in enumerate(found, 1):
        assert state in (before, after), f"step {step}, {where}"
    steps = {where for where, _ in found}
    assert steps >= STEPS[scenario]
    if registry_url.startswith("sqlite") and STEPS[scenario] >= UPLOAD:
        assert steps >= {"before fsync", "after fsync", "before mkdir", "after fchmod"}
    states = [state for _, state in found]
    assert states[0] == before
    assert states[-1] == after
    # A change is made by one commit: what comes before it is not done, what comes after it is.
    decided = states.index(after)
    assert all(state == after for state in states[decided:])
    assert before == after or found[decided][0] == "after Connection.commit"


def test_every_scenario_is_run() -> None:
    assert set(STEPS) == {*SCENARIOS, "creation"}


def test_processes_killed_at_any_moment_leave_a_sound_store(
    home: Path, registry_url: str, open_store: OpenStore, tmp_path: Path
) -> None:
    known = seeds_by_digest(tmp_path / "known")
    chance = random.Random(1)
    open_store()
    for round_ in range(4):
        processes = [
            subprocess.Popen(
                command("churn_and_count", home, registry_url, 100_000, 10 * round_ + number),
                env=environment(),
                stdout=subprocess.DEVNULL,
            )
            for number in range(2)
        ]
        time.sleep(chance.uniform(0.8, 1.6))
        for process in processes:
            process.kill()
        assert [process.wait() for process in processes] == [-9, -9]
        store = open_store()
        check_integrity(store, home, known)
        store.close()
