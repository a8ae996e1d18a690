"""Runs a plan and answers it, whole or as a stream; the same for every generating endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from manylora_server.api.errors import error_event, internal_error
from manylora_server.api.generation import Generation, until_disconnect
from manylora_server.api.planning import Plan
from manylora_server.api.schemas import GenerationRequest
from manylora_server.api.shapes import Answer, Json, Shape, envelope, usage
from manylora_server.api.sse import DONE, EventStreamResponse, data_event
from manylora_server.core.errors import ManyloraError
from manylora_server.core.types import RequestOutput

if TYPE_CHECKING:
    from manylora_server.engine.async_engine import AsyncEngine


async def respond(
    request: Request, engine: AsyncEngine, plan: Plan, shape: Shape, body: GenerationRequest
) -> Response:
    """Answer ``plan`` in ``shape``; a client that goes takes its requests with it."""
    if not body.stream:
        return await until_disconnect(request.receive, _whole(engine, plan, shape))
    generation = Generation(engine, plan.requests)
    try:
        # Whatever can refuse the call does so before this, so it is still an HTTP status.
        first = await until_disconnect(request.receive, anext(generation))
    except BaseException:
        await generation.close()
        raise
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStreamResponse(
        _events(plan, shape, first, generation, include_usage), generation.close
    )


async def _whole(engine: AsyncEngine, plan: Plan, shape: Shape) -> Response:
    answers = [Answer() for _ in plan.requests]
    async with Generation(engine, plan.requests) as generation:
        async for index, output in generation:
            answers[index].add(output)
    choices = [shape.choice(index, answer) for index, answer in enumerate(answers)]
    content = envelope(plan, shape.object_name, choices)
    content["usage"] = usage(plan, [answer.final for answer in answers])
    return JSONResponse(content)


async def _events(
    plan: Plan,
    shape: Shape,
    first: tuple[int, RequestOutput],
    generation: Generation,
    include_usage: bool,
) -> AsyncIterator[bytes]:
    """Yield the stream's events; after the first byte a failure is an event, too."""
    finals: dict[int, RequestOutput] = {}

    def chunk(choices: list[Json], used: Json | None = None) -> bytes:
        content = envelope(plan, shape.chunk_object_name, choices)
        if include_usage:
            content["usage"] = used
        return data_event(content)

    def deltas(index: int, output: RequestOutput) -> list[bytes]:
        if output.finish_reason is not None:
            finals[index] = output
        return [chunk([choice]) for choice in shape.delta(index, output)]

    try:
        for index in range(len(plan.requests)):
            for choice in shape.opening(index):
                yield chunk([choice])
        for event in deltas(*first):
            yield event
        async for index, output in generation:
            for event in deltas(index, output):
                yield event
        if include_usage:
            ordered = [finals[index] for index in range(len(plan.requests))]
            yield chunk([], usage(plan, ordered))
    except ManyloraError as error:
        yield error_event(error)
    except Exception as error:  # noqa: BLE001 - internal_error logs it
        yield error_event(internal_error(error))
    yield DONE
