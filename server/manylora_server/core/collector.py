"""When Python's cyclic garbage collector may run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect nothing until the block ends; what is there then is never looked at again.

    For imports. They create hundreds of thousands of objects, nearly all of which stay: a seventh
    of their time goes into looking through them over and over, and each later collection would too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
