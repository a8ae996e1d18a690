"""``manylora merge``: a base and adapters to a checkpoint, without a server."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora_server.cli.logs import configure_logging
from manylora_server.cli.options import LogFormat, LogFormatOption, Model, size_option
from manylora_server.cli.tables import plain, print_fields, print_json
from manylora_server.core.collector import collector_paused
from manylora_server.core.errors import ManyloraError
from manylora_server.export.job import ExportDtype
from manylora_server.export.progress import CancelledError, Progress
from manylora_server.model.deferred_compiler import compiler_deferred
from manylora_server.model.lean_imports import import_transformers
from manylora_store.errors import CombinationError
from manylora_store.export.methods import DEFAULT_DENSITY, Method, Recipe

if TYPE_CHECKING:
    from manylora_server.export.export import Export, WeightedFiles

_MAX_ADAPTER_BYTES = 2**40
_STEP_TOLD = 0.1


@dataclass(frozen=True, slots=True)
class _Wanted:
    source: str
    weight: float


Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="A[=W]",
        help="An adapter and its weight (1 unless given): a folder, an archive (.zip, .tar.gz), or "
        "hf:ORGANISATION/NAME[@REVISION]. Repeatable.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="The folder to make; it must not exist.")
]
MethodOption = Annotated[
    Method, typer.Option("--method", help="How to combine adapters; cat is their exact sum.")
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density",
        help="Share of values that ties, dare_linear, dare_ties and magnitude_prune keep, over 0 "
        f"and up to 1. (default: {DEFAULT_DENSITY})",
    ),
]
Dtype = Annotated[
    ExportDtype | None,
    typer.Option("--dtype", help="Of the weights; nf4 is bitsandbytes'. (default: the base's own)"),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", help="What method svd cuts to. (default: the largest rank of the adapters)"
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of dare_linear and dare_ties.")]
AdapterOnly = Annotated[
    bool,
    typer.Option(
        "--adapter-only", help="Write the combination as one PEFT adapter, without the base."
    ),
]
MaxShardSize = Annotated[
    int,
    typer.Option(
        "--max-shard-size", parser=size_option, metavar="SIZE", help="Most bytes of one file."
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check/--no-check",
        help="Load the result in a process of its own and compare its logits with those of base "
        "and adapters unmerged.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def merge(
    model: Model,
    adapter: Adapters,
    output: Output,
    method: MethodOption = "cat",
    density: Density = None,
    dtype: Dtype = None,
    rank: Rank = None,
    seed: Seed = 0,
    adapter_only: AdapterOnly = False,
    max_shard_size: MaxShardSize = "5GB",  # type: ignore[assignment] # typer parses it
    check: Check = True,
    as_json: AsJson = False,
    log_format: LogFormatOption = "text",
) -> None:
    """Merge adapters into a base model and write an ordinary Hugging Face checkpoint.

    Needs no server. The report goes to stdout, progress to stderr. What is interrupted leaves
    nothing behind.
    """
    wanted = parse_weighted(adapter)
    try:
        recipe = Recipe(method, density, rank, seed)
    except CombinationError as error:
        raise typer.BadParameter(f"{error.message}.", param_hint=f"--{error.param}") from error
    if adapter_only and dtype == "nf4":
        raise typer.BadParameter("an adapter is not written in nf4.", param_hint="--dtype")
    configure_logging(log_format)
    goal = output.expanduser().absolute()
    with _failures_told(), _bar(log_format) as report, ExitStack() as stack:
        progress = Progress(report)
        stack.enter_context(_signals_cancel(progress))
        result = _run(
            stack,
            progress,
            model,
            wanted,
            lambda base, adapters, kind: kind(
                model=_shown(model),
                base=base,
                adapters=adapters,
                goal=goal,
                recipe=recipe,
                dtype=dtype,
                adapter_only=adapter_only,
                max_shard_bytes=max_shard_size,
                check=check,
            ),
        )
    for warning in result["warnings"]:
        _say(f"warning: {warning}")
    _say(f"{goal} is written")
    result = {"path": str(goal), **result}
    if as_json:
        print_json(result)
    else:
        print_fields(result)


def parse_weighted(values: list[str]) -> list[_Wanted]:
    """Return what ``A[=W]`` names; what is none, or the same twice, is bad usage."""
    found: dict[str, float] = {}
    for value in values:
        source, equals, text = value.rpartition("=")
        weight = _number(text) if equals else None
        if weight is None:
            source, weight = value, 1.0
        if not source.strip() or not math.isfinite(weight):
            raise typer.BadParameter(
                f"{value!r} is not A or A=W, for example ./support-lora=0.7.",
                param_hint="--adapter",
            )
        if source in found:
            raise typer.BadParameter(f"{source!r} is given twice.", param_hint="--adapter")
        found[source] = weight
    return [_Wanted(source, weight) for source, weight in found.items()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _run(
    stack: ExitStack,
    progress: Progress,
    model: str,
    wanted: list[_Wanted],
    plan: Callable[[Path, list[WeightedFiles], type[Export]], Export],
) -> dict[str, Any]:
    with compiler_deferred():
        with collector_paused():
            import_transformers()
        from manylora_server.adapters.intake import Intake

        Intake.warm_up()
        from manylora_server.export.export import Export, run_export
        from manylora_server.model.loader import resolve_folder
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    base = resolve_folder(model)
    adapters = [_opened(stack, one) for one in wanted]
    progress.check()
    return run_export(plan(base, adapters, Export), progress, None)


def _opened(stack: ExitStack, wanted: _Wanted) -> WeightedFiles:
    """Open an adapter where it is, or fetch and unpack it first."""
    from manylora_server.core.store_errors import store_errors_translated
    from manylora_server.export.export import WeightedFiles
    from manylora_store.checkpoint.folder import open_folder
    from manylora_store.checkpoint.weights import SAFETENSORS_NAME
    from manylora_store.intake.open import open_staged
    from manylora_store.intake.sources import fetch
    from manylora_store.intake.staging import ARCHIVE_NAME, Staging

    source = wanted.source
    path = Path(source.removeprefix("file:")).expanduser()
    name = _shown(source)
    with store_errors_translated(param="--adapter"):
        if (path / SAFETENSORS_NAME).is_file():
            return WeightedFiles(name, wanted.weight, open_folder(path, name, source))
        root = stack.enter_context(TemporaryDirectory(prefix="manylora-merge-"))
        staging = stack.enter_context(Staging(Path(root), _MAX_ADAPTER_BYTES))
        if path.is_file():
            with staging.receive(ARCHIVE_NAME) as sink, path.open("rb") as file:
                while piece := file.read(2**20):
                    sink.write(piece)
        else:
            source = fetch(source, staging)
        files = open_staged(staging, "adapter", source)
        return WeightedFiles(name, wanted.weight, files)


def _shown(source: str) -> str:
    """Return a folder's name, or anything else as it is."""
    path = Path(source.removeprefix("file:")).expanduser()
    return path.resolve().name if path.exists() else source


@contextmanager
def _failures_told() -> Iterator[None]:
    """Tell a failure in one line on stderr; exit code 1."""
    try:
        yield
    except ManyloraError as error:
        _say(f"error: {error.message}")
        raise typer.Exit(1) from error
    except (CancelledError, KeyboardInterrupt) as error:
        _say("interrupted; nothing was kept")
        raise typer.Exit(1) from error


@contextmanager
def _signals_cancel(progress: Progress) -> Iterator[None]:
    """Let a signal end the work at its next step, and a second one at once."""

    def on_signal(_number: int, _frame: object) -> None:
        if progress.cancelled:
            raise KeyboardInterrupt
        progress.cancel()

    previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _bar(log_format: LogFormat) -> Iterator[Callable[[float, float | None], None]]:
    """Yield what shows how far it is: a bar on stderr, or a line now and then if no terminal."""
    if not sys.stderr.isatty() or log_format == "json":
        told = 0.0

        def tell(share: float, left: float | None) -> None:
            nonlocal told
            if share - told >= _STEP_TOLD:
                told = share
                _say(f"{share:.0%}" + ("" if left is None else f", {left:.0f} s left"))

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    text = TextColumn("merging")
    columns = (text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, left: bar.update(task, completed=share)


def _say(message: str) -> None:
    typer.echo(f"manylora: {plain(message)}", err=True)
