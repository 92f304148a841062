"""The service over HTTP, as an ASGI application: OpenAI's routes, and those that operators look at."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from midstream.serve.choices import Part
from midstream.serve.refusals import Refused
from midstream.serve.requests import ToScore
from midstream.serve.scoring import Scoring
from midstream.serve.service import Answering, Service
from midstream.serve.traffic import Traffic

logger = logging.getLogger(__name__)

Answer = Callable[[Request, str], Awaitable[Response]]
"""Answers a request of a client, by its name."""

_KEEP_ALIVE = 15.0
"""Seconds without news after which a stream says that it lives, for proxies that close what is silent."""

_GONE = 499
"""The status of an answer whose client is gone, for logs and metrics: nobody reads it."""

_DONE = b"data: [DONE]\n\n"


def application(service: Service, traffic: Traffic | None = None) -> Starlette:
    """The ASGI application of a service, for uvicorn or any other server. ``traffic`` is what ``/metrics`` shows."""
    endpoint = partial(_endpoint, service, traffic)
    routes = [
        endpoint("POST", "/v1/completions", partial(_generate, service, chat=False)),
        endpoint("POST", "/v1/chat/completions", partial(_generate, service, chat=True)),
        endpoint("GET", "/v1/models", partial(_models, service)),
        endpoint("GET", "/v1/models/{name:path}", partial(_model, service)),
        endpoint("DELETE", "/v1/sessions/{name:path}", partial(_end_session, service)),
        Route("/health", partial(_health, service), methods=["GET"]),
    ]
    if traffic is not None:
        routes.append(Route("/metrics", partial(_metrics, traffic), methods=["GET"]))
    return Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_route})


def _endpoint(service: Service, traffic: Traffic | None, method: str, path: str, answer: Answer) -> Route:
    """A route for clients: who asks is known, refusals are in OpenAI's form, and what came of it is logged."""

    async def endpoint(request: Request) -> Response:
        began, client = time.monotonic(), "-"
        try:
            client = _client(service, request)
            response = await answer(request, client)
        except Refused as refusal:
            response = _refusal(refusal)
        except Exception:
            logger.exception("%s %s: failed", request.method, request.url.path)
            response = _refusal(Refused(500, "the server failed", code="server_failure"))
        seconds = time.monotonic() - began
        if traffic is not None:
            traffic.answered(path, response.status_code)
        logger.info(
            "%s %s: %d for %s after %.3f s", request.method, request.url.path, response.status_code, client, seconds
        )
        return response

    return Route(path, endpoint, methods=[method])


def _client(service: Service, request: Request) -> str:
    if service.keys is not None:
        return service.keys.client(request.headers.get("authorization"))
    return request.client.host if request.client is not None else "unknown"


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def _refusal(refusal: Refused) -> Response:
    return _json(refusal.body, refusal.status, refusal.headers)


# --- what is asked of the model


async def _generate(service: Service, request: Request, client: str, *, chat: bool) -> Response:
    body = await _body(request, service.limits.body)
    asked = service.read(body, client, chat=chat)
    answering: Answering | Scoring
    if isinstance(asked, ToScore):
        answering = await service.score(asked, client)
        answer = _scored(answering)
    else:
        answering = await service.answer(asked, client)
        answer = _streamed(answering) if asked.stream else _whole(answering)
    response = await _unless_gone(request, answer)
    if response is None:
        logger.info("request %s: its client is gone", answering.form.id)
        answering.cancel()
        return Response(status_code=_GONE)
    return response


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Response]) -> Response | None:
    """The response, or None where the client closes its connection before it is there."""
    gone, answering = asyncio.create_task(_gone(request)), asyncio.create_task(answer)
    try:
        await asyncio.wait([gone, answering], return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        for task in (gone, answering):
            task.cancel()
        await asyncio.gather(gone, answering, return_exceptions=True)


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise Refused(413, f"the body has more than {most} bytes", code="request_too_large")
    return bytes(body)


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(answering: Answering) -> Response:
    parts: list[list[Part]] = [[] for _ in answering.choices]
    try:
        async with aclosing(answering.news()) as news:
            async for index, delta in news:
                parts[index] += answering.choices[index].take(delta)
    finally:
        answering.cancel()  # where one failed, nobody waits for the others
    await answering.recorded()
    return _json(answering.form.whole(answering.choices, parts))


async def _scored(scoring: Scoring) -> Response:
    return _json(await scoring.body())


async def _streamed(answering: Answering) -> Response:
    """The answer as a stream. One that fails before its first token is refused as any other."""
    chunks = _chunks(answering)
    try:
        first = await anext(chunks)
    except BaseException:
        answering.cancel()
        await chunks.aclose()
        raise
    return _Stream(answering, first, chunks)


class _Stream(StreamingResponse):
    """An answer chunk by chunk. Its rows are given up when its client is gone."""

    def __init__(self, answering: Answering, first: bytes, chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(
            self._events(first, chunks),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._answering = answering
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.cancel()
            await self._chunks.aclose()

    async def _events(self, first: bytes, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        try:
            yield first
            async for chunk in chunks:
                yield chunk
        except Refused as refusal:
            yield _event(refusal.body)
        except Exception:
            logger.exception("request %s: failed", self._answering.form.id)
            yield _event(Refused(500, "the server failed", code="server_failure").body)


async def _chunks(answering: Answering) -> AsyncGenerator[bytes, None]:
    form, begun = answering.form, set()
    async with aclosing(_patient(answering)) as news:
        async for item in news:
            if item is None:
                yield b": the answer goes on\n\n"
                continue
            index, delta = item
            choice = answering.choices[index]
            if index not in begun:
                begun.add(index)
                if (opening := form.opening(index)) is not None:
                    yield _event(opening)
            for part in choice.take(delta):
                yield _event(form.part(index, part))
            if choice.trajectory is not None:
                yield _event(form.closing(index, choice))
    if (usage := form.usage(answering.choices)) is not None:
        yield _event(usage)
    await answering.recorded()
    yield _DONE


async def _patient(answering: Answering) -> AsyncGenerator[Any, None]:
    """An answer's news, and None now and then while there are none."""
    async with aclosing(answering.news()) as news:
        coming = asyncio.ensure_future(anext(news, None))
        try:
            while True:
                await asyncio.wait([coming], timeout=_KEEP_ALIVE)
                if not coming.done():
                    yield None
                    continue
                item = coming.result()
                if item is None:
                    return
                yield item
                coming = asyncio.ensure_future(anext(news, None))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def _event(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


# --- what is asked of the server


async def _models(service: Service, request: Request, client: str) -> Response:
    del request, client
    return _json({"object": "list", "data": [_model_body(service)]})


async def _model(service: Service, request: Request, client: str) -> Response:
    del client
    name = request.path_params["name"]
    if name != service.model:
        raise Refused(404, f"model {name!r} is not served here", code="model_not_found")
    return _json(_model_body(service))


def _model_body(service: Service) -> dict[str, Any]:
    length = service.generator.engine.context_length
    return {"id": service.model, "object": "model", "created": 0, "owned_by": "midstream", "max_model_len": length}


async def _end_session(service: Service, request: Request, client: str) -> Response:
    service.sessions.drop(client, request.path_params["name"])
    return _json({"id": request.path_params["name"], "object": "session", "deleted": True})


async def _health(service: Service, request: Request) -> Response:
    del request
    limits = service.limits
    state = {
        "status": "stopping" if service.draining else "ok",
        "rows": service.admission.rows,
        "most_rows": limits.rows + limits.queue,
        "sessions": len(service.sessions),
        "unrecorded": service.unrecorded,
    }
    return _json(state, 503 if service.draining else 200)


async def _metrics(traffic: Traffic, request: Request) -> Response:
    del request
    text, kind = await asyncio.to_thread(traffic.metrics.exposition)
    return Response(text, media_type=kind)


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _refusal(Refused(status, f"{request.method} {request.url.path}: there is no such route", code="not_found"))
