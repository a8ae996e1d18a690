"""A staging folder for as long as a block runs, without holding up the event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from manylora_server.core.blocking import in_thread
from manylora_server.core.store_errors import store_errors_translated

if TYPE_CHECKING:
    from manylora_store.intake.staging import Staging


@asynccontextmanager
async def staged(stage: Callable[[], Staging]) -> AsyncIterator[Staging]:
    """Yield a folder that ``stage`` gives, which is gone when the block ends, however it does."""
    stack = ExitStack()
    try:
        with store_errors_translated(param=None):
            staging = await in_thread(stack.enter_context, stage())
        yield staging
    finally:
        with store_errors_translated(param=None):
            await in_thread(stack.close)
