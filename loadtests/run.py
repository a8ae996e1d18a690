"""``python -m loadtests.run SCENARIO``: measures, prints a table and writes the JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import httpx

from loadtests.client import RequestFailedError
from loadtests.measure import Options, WrongAnswersError, measure
from loadtests.models import SHAPES
from loadtests.peft_process import BaselineFailedError
from loadtests.report import table
from loadtests.scenarios import SCENARIOS, Scenario
from loadtests.server_process import ServerFailedError
from loadtests.workload import Lengths, Popularity

_RESULTS = Path(__file__).resolve().parent / "results"
_FAILURES = (
    BaselineFailedError,
    RequestFailedError,
    ServerFailedError,
    TimeoutError,
    WrongAnswersError,
    httpx.HTTPError,
)

# Options that change a field of the scenario: field, how to read it, help.
_FIELDS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("adapters", int, "registered adapters"),
    ("ranks", lambda text: tuple(map(int, text.split(","))), "ranks in turn, such as 4,8,16"),
    ("requests", int, "requests of a repetition"),
    ("zipf_exponent", float, "steepness of zipf's law"),
    ("prompt_tokens", Lengths.parse, "a length, or the bounds of uniform ones: 8:512"),
    ("output_tokens", Lengths.parse, "a length, or the bounds of uniform ones: 8:512"),
    ("clients", int, "clients of a closed loop"),
    ("rate", float, "requests a second; makes the load an open loop"),
    ("cv", float, "coefficient of variation of an open loop's gaps"),
    ("repetitions", int, "times that every side is run"),
    ("time_limit_s", float, "most seconds for the whole"),
)


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        scenario = _scenario(arguments)
    except ValueError as error:
        parser.error(str(error))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{scenario.name}-{arguments.quantization}-{stamp}"
    options = Options(
        quantization=arguments.quantization,
        peft_nf4=arguments.peft_nf4,
        threads=arguments.threads,
        seed=arguments.seed,
        cache=arguments.cache,
        logs=_RESULTS / f"{name}-logs",
        server_arguments=shlex.split(arguments.server_arguments),
    )
    report: dict[str, Any] | None = None
    try:
        report = asyncio.run(measure(scenario, options))
    except* _FAILURES as group:
        for failure in _leaves(group):
            text = str(failure) or f"--time-limit-s: {scenario.time_limit_s:.0f} s were not enough"
            print(f"failed: {type(failure).__name__}: {text}", file=sys.stderr)
    if report is None:
        print(f"logs: {options.logs}", file=sys.stderr)
        return 1
    path = _RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(table(report))
    print(f"written to {path}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.run", description=__doc__)
    known = "; ".join(f"{name}: {scenario.summary}" for name, scenario in SCENARIOS.items())
    parser.add_argument("scenario", choices=SCENARIOS, help=known)
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--shape", choices=SHAPES, help="the model's size")
    parser.add_argument("--popularity", choices=get_args(Popularity))
    for name, read, text in _FIELDS:
        parser.add_argument("--" + name.replace("_", "-"), type=read, help=text)
    parser.add_argument(
        "--peft", action=argparse.BooleanOptionalAction, help="time PEFT's static batch, too"
    )
    parser.add_argument(
        "--peft-nf4", action="store_true", help="with nf4: PEFT on bitsandbytes' layers (slow)"
    )
    parser.add_argument("--threads", type=int, help="threads of the server and of PEFT each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-arguments", default="", help="further options of manylora serve")
    parser.add_argument(
        "--cache", type=Path, default=_RESULTS / "cache", help="where models and adapters are kept"
    )
    return parser


def _scenario(arguments: argparse.Namespace) -> Scenario:
    names = ("shape", "popularity", "peft", *(name for name, _, _ in _FIELDS))
    changes = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(SCENARIOS[arguments.scenario], **given)


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


if __name__ == "__main__":
    sys.exit(main())
