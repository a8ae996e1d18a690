"""From what was received to an opened adapter: unpacked, and in safetensors."""

from __future__ import annotations

from manylora_store.checkpoint.folder import AdapterFiles, open_folder
from manylora_store.checkpoint.pickled import convert_bin
from manylora_store.checkpoint.weights import BIN_NAME, SAFETENSORS_NAME
from manylora_store.errors import AdapterInvalidError
from manylora_store.intake.archive import unpack
from manylora_store.intake.names import check_name
from manylora_store.intake.staging import ARCHIVE_NAME, WANTED, Staging

_LISTED = 10
_SHOWN = 100


def open_staged(staging: Staging, name: str, source: str) -> AdapterFiles:
    """Open what ``staging`` has received as the adapter ``name`` that comes from ``source``.

    An archive (received as ``ARCHIVE_NAME``) is unpacked, a ``.bin`` is converted; both are gone
    afterwards. As in PEFT, a ``.bin`` beside a safetensors file is left aside. What was left aside
    is in the warnings. torch is imported for a ``.bin`` only.

    Raises:
        AdapterNameError: no name for an adapter.
        AdapterError: the files are refused.
        TooLargeError: they are too large once unpacked or converted.
        StoreError: they cannot be stored.
    """
    check_name(name)
    archive = staging.received(ARCHIVE_NAME)
    if archive is not None:
        if any(staging.received(wanted) for wanted in WANTED):
            raise AdapterInvalidError(
                "an archive and single files are given; one archive or the files are expected"
            )
        staging.restart_count()
        unpack(archive, staging)
        staging.discard(ARCHIVE_NAME)
    warnings = []
    pickle = staging.received(BIN_NAME)
    if pickle is not None:
        if staging.received(SAFETENSORS_NAME) is not None:
            warnings.append(f"{BIN_NAME} is left aside; {SAFETENSORS_NAME} came with it")
        else:
            staging.restart_count()
            with staging.receive(SAFETENSORS_NAME) as sink:
                convert_bin(pickle, sink)
        staging.discard(BIN_NAME)
    ignored = staging.ignored
    if ignored:
        more = f" and {len(ignored) - _LISTED} more" if len(ignored) > _LISTED else ""
        listed = ", ".join(repr(file[-_SHOWN:]) for file in ignored[:_LISTED])
        warnings.append(f"not part of an adapter, and left aside: {listed}{more}")
    return open_folder(staging.path, name, source, warnings=tuple(warnings))
