"""Work on files, off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

ArgumentsT = ParamSpec("ArgumentsT")
ResultT = TypeVar("ResultT")


async def in_thread(
    function: Callable[ArgumentsT, ResultT], *args: ArgumentsT.args, **kwargs: ArgumentsT.kwargs
) -> ResultT:
    """Return ``function``'s result, from a worker thread.

    Unlike with ``asyncio.to_thread``, a cancelled caller goes on only once the thread has ended,
    so that what it cleans up next is in nobody's hands.
    """
    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    work = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            # Cancelled again while waiting: once is enough, and is raised below.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({work})
        # Looked at, so that asyncio does not report a failure as lost.
        work.exception()
        raise
