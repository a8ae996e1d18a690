"""Plan and ledger of an adapter, remembered for others that differ in their values only.

Most adapters of a fleet come from one recipe: the same configuration, the same tensors in the same
places. What the compiler works out from these alone, it works out once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from manylora_store.checkpoint.config import AdapterConfig
from manylora_store.checkpoint.folder import AdapterFiles
from manylora_store.compiler.accounting import Ledger, account
from manylora_store.compiler.canonical import BaseLayout, ModuleSpec
from manylora_store.compiler.targets import Plan, plan_targets

MAX_REMEMBERED = 16
MAX_TENSORS = 4096
"""Adapters with more tensors (experts) are not remembered: reading them takes longer anyway."""

_NOT_IN_PLAN = frozenset({"raw", "base_model"})


@dataclass(frozen=True, slots=True)
class _Entry:
    """``modules`` is held so that its identity, which is in the key, stays its own."""

    modules: Mapping[str, ModuleSpec]
    plan: Plan
    ledger: Ledger


_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_lock = threading.Lock()


def prepare(files: AdapterFiles, layout: BaseLayout) -> tuple[Plan, Ledger]:
    """Return what the configuration does to the base, and the place of every tensor.

    Neither may be changed: other adapters have the same. Thread-safe.

    Raises:
        AdapterError: as ``plan_targets`` and ``account`` do.
    """
    key = (
        id(layout.modules),
        layout.model_type,
        files.weights.header_digest,
        _planned_from(files.config),
    )
    with _lock:
        entry = _entries.get(key)
        if entry is not None:
            _entries.move_to_end(key)
            return entry.plan, entry.ledger
    plan = plan_targets(files.config, layout)
    ledger = account(files.weights.header, files.config, plan, layout)
    if len(files.weights.header) <= MAX_TENSORS:
        with _lock:
            _entries[key] = _Entry(layout.modules, plan, ledger)
            while len(_entries) > MAX_REMEMBERED:
                _entries.popitem(last=False)
    return plan, ledger


def _planned_from(config: AdapterConfig) -> Hashable:
    """All of ``config`` that a plan can depend on; the order of patterns is part of it."""
    return tuple(
        _hashable(getattr(config, field.name))
        for field in fields(config)
        if field.name not in _NOT_IN_PLAN
    )


def _hashable(value: Any) -> Hashable:
    return tuple(value.items()) if isinstance(value, Mapping) else value
