"""An adapter's files in a repository of the Hugging Face hub, brought into the hub's own cache.

huggingface_hub is imported when a repository is asked for, not before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manylora_store.checkpoint.config_reader import CONFIG_NAME
from manylora_store.checkpoint.weights import BIN_NAME, SAFETENSORS_NAME
from manylora_store.errors import AdapterInvalidError, StoreUnavailableError
from manylora_store.intake.staging import Staging

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]*")


def snapshot(
    source: str, repository: str, revision: str | None, staging: Staging
) -> tuple[Path, str]:
    """Return the folder with the adapter's files of ``repository``, and the commit they are from.

    They are downloaded if the cache lacks them, after ``staging`` was asked for their size. If the
    hub cannot be reached, the cache is all there is.

    Raises:
        AdapterInvalidError: a malformed, unknown or private repository, or an unknown revision.
        TooLargeError: the files are larger than ``staging`` takes.
        StoreUnavailableError: the hub cannot be reached, and the cache lacks the files.
    """
    if not _REPOSITORY.fullmatch(repository) or not _REVISION.fullmatch(revision or "main"):
        raise AdapterInvalidError(f"source: {source!r} is not of the form 'hf:org/repo[@revision]'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    def download(**options: Any) -> Any:
        return snapshot_download(repository, **options)

    wanted = [CONFIG_NAME, SAFETENSORS_NAME]
    try:
        listed = _ask(
            source, download, revision=revision, allow_patterns=[*wanted, BIN_NAME], dry_run=True
        )
    except DryRunError:
        # No answer. What follows looks into the cache, and otherwise says why there was none.
        listed = []
    if listed:
        if all(file.filename != SAFETENSORS_NAME for file in listed):
            wanted.append(BIN_NAME)
        staging.expect(sum(file.file_size or 0 for file in listed if file.filename in wanted))
        revision = listed[0].commit_hash
    folder = Path(_ask(source, download, revision=revision, allow_patterns=wanted))
    return folder, folder.name


def _ask(source: str, download: Callable[..., Any], **options: Any) -> Any:
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return download(**options)
    except DryRunError:
        raise
    except GatedRepoError as error:
        raise AdapterInvalidError(
            f"source: {source!r} is gated; accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise AdapterInvalidError(
            f"source: {source!r}: the hub has no such repository, or it is private; check the name,"
            " or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterInvalidError(
            f"source: {source!r}: the repository has no such branch, tag or commit"
        ) from error
    except HFValidationError as error:
        raise AdapterInvalidError(f"source: {source!r}: {error}") from error
    except LocalEntryNotFoundError as error:
        raise StoreUnavailableError(
            f"source: {source!r}: the hub cannot be reached (or HF_HUB_OFFLINE is set), and its"
            " cache lacks the files; connect, or name a folder that has them"
        ) from error
    except Exception as error:
        # Whatever HTTP library is below has a tree of errors of its own.
        raise StoreUnavailableError(
            f"source: {source!r}: the hub failed: {type(error).__name__}: {error}"
        ) from error
