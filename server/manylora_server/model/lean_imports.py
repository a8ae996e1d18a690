"""Imports transformers without what only training and several devices need (decision 10)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# What every model of transformers imports.
_COMMON = (
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
)


def import_transformers() -> None:
    """Import what every model needs.

    transformers is told that torch was built without ``torch.distributed``, a build that it
    supports: it asks ``is_torch_distributed_available`` before it imports DTensor, FSDP and the
    like. This lasts as long as the process, so call it only in one that runs a model by itself.

    Whatever is not as expected here costs time only: it is logged at debug level, and transformers
    is left to be imported as it comes.
    """
    try:
        _without_distributed()
        with _models_read_once():
            for name in _COMMON:
                importlib.import_module(name)
    except Exception:
        # The plain imports that follow tell what is really wrong, if something is.
        logger.debug("transformers is imported as it comes, which takes longer", exc_info=True)


def _without_distributed() -> None:
    import torch
    import transformers.utils
    from transformers.utils import import_utils

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    # Modules that are imported from now on take the function from either.
    for module in (import_utils, transformers.utils):
        if callable(getattr(module, "is_torch_distributed_available", None)):
            module.is_torch_distributed_available = _no


def _no() -> bool:
    return False


@contextmanager
def _models_read_once() -> Iterator[None]:
    """Let ``transformers.models`` take what ``transformers`` has just read, and keeps in a cache.

    It is the source of all its models, from which it learns what they export.
    """
    import transformers
    from transformers.utils import import_utils

    original = import_utils.create_import_structure_from_path
    folder = Path(transformers.__file__).parent / "models"

    def of_folder(path: Any) -> Any:
        # The cache goes by the argument: there the folder, here a file in it that stands for it.
        return original(folder if Path(path) == folder / "__init__.py" else path)

    import_utils.create_import_structure_from_path = of_folder
    try:
        yield
    finally:
        import_utils.create_import_structure_from_path = original
