"""The options of the commands, each also read from ``MANYLORA_<OPTION>``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from manylora_server.core.config import CpuMath, DeviceName, DTypeName, Quantization, parse_size
from manylora_server.core.errors import StartupError

LogFormat = Literal["text", "json"]


def size_option(text: str) -> int:
    """Parse a size; what is none is bad usage."""
    try:
        return parse_size(text, "SIZE")
    except StartupError as error:
        raise typer.BadParameter(error.message) from error


def parse_adapters(values: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the ``NAME=SOURCE`` pairs of ``--adapter``; what is none is bad usage."""
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, source = value.partition("=")
        if not equals or not name.strip() or not source.strip():
            raise typer.BadParameter(
                f"{value!r} is not NAME=SOURCE, for example tales=/path/to/adapter.",
                param_hint="--adapter",
            )
        if name in pairs:
            raise typer.BadParameter(
                f"the name {name!r} is given twice: {pairs[name]} and {source}.",
                param_hint="--adapter",
            )
        pairs[name] = source
    return tuple(pairs.items())


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder or a Hugging Face Hub id.")
]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="NAME=SOURCE",
        envvar="MANYLORA_ADAPTER",
        help="An adapter to serve: its name and its folder (a path or file:/dir). Repeatable.",
    ),
]
Home = Annotated[
    Path | None,
    typer.Option(
        envvar="MANYLORA_HOME",
        help="Where manylora keeps its files. (default: the platform's user data folder)",
        file_okay=False,
    ),
]
Host = Annotated[str, typer.Option(envvar="MANYLORA_HOST", help="Address to listen on.")]
Port = Annotated[
    int,
    typer.Option(
        envvar="MANYLORA_PORT", min=0, max=65535, help="Port to listen on; 0 takes a free one."
    ),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(
        envvar="MANYLORA_SERVED_MODEL_NAME",
        help="The base's id for clients. (default: the hub id or the folder's name)",
    ),
]
QuantizationOption = Annotated[
    Quantization,
    typer.Option("--quantization", envvar="MANYLORA_QUANTIZATION", help="How to hold the base."),
]
DType = Annotated[
    DTypeName, typer.Option("--dtype", envvar="MANYLORA_DTYPE", help="What to compute in.")
]
Device = Annotated[
    DeviceName, typer.Option("--device", envvar="MANYLORA_DEVICE", help="Where to compute.")
]
CpuMathOption = Annotated[
    CpuMath,
    typer.Option(
        "--cpu-math",
        envvar="MANYLORA_CPU_MATH",
        help="What 4-bit layers compute in on a CPU; int8 is faster and rounds activations.",
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        envvar="MANYLORA_MAX_MODEL_LEN",
        min=2,
        help="Most tokens of prompt and output together. (default: the model's own limit)",
    ),
]
MaxBatchTokens = Annotated[
    int,
    typer.Option(envvar="MANYLORA_MAX_BATCH_TOKENS", min=1, help="Most tokens of one step."),
]
MaxSequences = Annotated[
    int,
    typer.Option(envvar="MANYLORA_MAX_SEQUENCES", min=1, help="Most sequences that run at once."),
]
KvCacheMemory = Annotated[
    int | None,
    typer.Option(
        envvar="MANYLORA_KV_CACHE_MEMORY",
        parser=size_option,
        metavar="SIZE",
        help="Memory of the KV cache, such as 4GiB. (default: a share of what is free)",
    ),
]
AdapterSlots = Annotated[
    int,
    typer.Option(
        envvar="MANYLORA_ADAPTER_SLOTS", min=1, help="Most adapters on the device at once."
    ),
]
AdapterHostMemory = Annotated[
    int | None,
    typer.Option(
        envvar="MANYLORA_ADAPTER_HOST_MEMORY",
        parser=size_option,
        metavar="SIZE",
        help="Host memory for compiled adapters. (default: a tenth of what is free)",
    ),
]
MergeMemory = Annotated[
    int | None,
    typer.Option(
        envvar="MANYLORA_MERGE_MEMORY",
        parser=size_option,
        metavar="SIZE",
        help="Memory for merged copies of adapters. (default: a quarter of what is free)",
    ),
]
AutoMerge = Annotated[
    bool,
    typer.Option(
        "--auto-merge",
        envvar="MANYLORA_AUTO_MERGE",
        help="Merge adapters whose traffic makes it pay, and unmerge them when it does not.",
    ),
]
MaxAdapterSize = Annotated[
    int | None,
    typer.Option(
        envvar="MANYLORA_MAX_ADAPTER_SIZE",
        parser=size_option,
        metavar="SIZE",
        help="Most bytes of one adapter's files. (default: 4GiB)",
    ),
]
RegistryUrl = Annotated[
    str | None,
    typer.Option(
        envvar="MANYLORA_REGISTRY_URL",
        help="Database of registered adapters, such as postgresql://host/name. "
        "(default: SQLite in --home)",
    ),
]
BlobsUrl = Annotated[
    str | None,
    typer.Option(
        envvar="MANYLORA_BLOBS_URL",
        help="Where adapters' files are kept, as fsspec names it. (default: in --home)",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        envvar="MANYLORA_API_KEY_FILE",
        help="Keys for inference, one a line. (default: inference is open)",
    ),
]
AdminKeyFile = Annotated[
    Path | None,
    typer.Option(
        envvar="MANYLORA_ADMIN_KEY_FILE",
        help="Keys for admin calls, one a line. (default: admin calls from loopback only)",
    ),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option("--log-format", envvar="MANYLORA_LOG_FORMAT", help="Form of the log on stderr."),
]
