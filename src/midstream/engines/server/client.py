"""One HTTP client, for JSON and for server-sent events, whose every failure is a :class:`Fault`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import msgspec

from midstream.engines.server.asks import Fault, FaultKind, Unauthorized
from midstream.engines.server.connection import ServerConnection
from midstream.errors import ConfigurationError

_logger = logging.getLogger(__name__)

_KEEPALIVE = 2.0
"""Seconds for which an idle connection is used again. Servers close theirs after 5 (uvicorn): a request that meets
a closing connection is lost, and whether it was read is not known."""

_SHOWN = 500
"""Characters of a server's own words in an error."""


class Client:
    """Speaks to one server. To be made and used in one event loop; ``url``: without a path of an API."""

    def __init__(self, url: str, connection: ServerConnection) -> None:
        import httpx2

        self.url = url
        self._connection = connection
        headers = {"Accept": "application/json, text/event-stream", **connection.headers}
        if connection.api_key is not None:
            headers["Authorization"] = f"Bearer {connection.api_key}"
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            verify=True if connection.tls is None else connection.tls,
            timeout=httpx2.Timeout(
                connect=connection.connect_timeout,
                read=connection.idle_timeout,
                write=connection.idle_timeout,
                pool=None,  # requests wait for their turn before they come here
            ),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEPALIVE),
            trust_env=not is_local(url),  # a proxy cannot reach this machine's own ports
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> tuple[int, Any]:
        """A status, and what was answered with it: JSON, or None where it is no JSON."""
        with _faults():
            response = await self._http.get(path)
        self._refuse_statuses(response.status_code, response.text, response.headers, only=(401,))
        return response.status_code, _json_or_none(response.content)

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """As :meth:`get`."""
        with _faults():
            response = await self._http.post(path, content=msgspec.json.encode(body), headers=_JSON)
        self._refuse_statuses(response.status_code, response.text, response.headers, only=(401,))
        return response.status_code, _json_or_none(response.content)

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """What is answered to ``body``: the JSON of each event of a stream, or the one JSON of an answer."""
        import httpx2

        content = msgspec.json.encode({**body, **self._connection.body})
        with _faults():
            async with (
                asyncio.timeout(self._connection.request_timeout),
                self._http.stream("POST", path, content=content, headers=_JSON) as response,
            ):
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    self._refuse_statuses(response.status_code, text, response.headers)
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    async for event in httpx2.EventSource(response, max_event_size=None):
                        if event.data != "[DONE]":  # the body may go on behind it
                            yield _json(event.data.encode())
                else:
                    yield _json(await response.aread())

    def _refuse_statuses(
        self, status: int, text: str, headers: Mapping[str, str], only: tuple[int, ...] | None = None
    ) -> None:
        if status == 200 or (only is not None and status not in only):
            return
        message = f"{status}: {words_of(text)}" if text.strip() else str(status)
        if status == 401:
            key = "without an API key" if self._connection.api_key is None else "with this API key"
            raise Unauthorized(f"the server refuses requests {key} ({message})")
        if 300 <= status < 400:
            raise Fault(FaultKind.FINAL, f"the server sends elsewhere ({status}, {headers.get('location')!r})")
        if status == 504:
            raise Fault(FaultKind.LOST, message, retry_after(headers))
        if status in (408, 425, 429) or status >= 500:
            raise Fault(FaultKind.UNDONE, message, retry_after(headers))
        raise Fault(FaultKind.FINAL, message)


_JSON = {"Content-Type": "application/json"}


@contextmanager
def _faults() -> Iterator[None]:
    """Turns what the HTTP library raises into faults, by whether the request had been sent."""
    import httpx2

    unsent = (
        httpx2.ConnectError,
        httpx2.ConnectTimeout,
        httpx2.PoolTimeout,
        httpx2.ProxyError,
        httpx2.WriteError,  # it did not get through whole, so there was nothing to compute
        httpx2.WriteTimeout,
    )
    try:
        yield
    except unsent as error:
        raise Fault(FaultKind.UNDONE, _said(error)) from error
    except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.InvalidURL) as error:
        raise Fault(FaultKind.FINAL, _said(error)) from error
    except httpx2.HTTPError as error:
        raise Fault(FaultKind.LOST, _said(error)) from error
    except TimeoutError as error:
        raise Fault(FaultKind.LOST, "the request took longer than request_timeout") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def base_url(url: str) -> str:
    """``url`` without a slash or ``/v1`` at its end. Raises :class:`ConfigurationError` for what is no server's."""
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"url={url!r}: must be a server's, such as 'http://localhost:8000'")
    if parts.username or parts.password:
        raise ConfigurationError("url: holds a user or a password; give a key as ServerConnection(api_key=...)")
    if parts.query or parts.fragment:
        raise ConfigurationError(f"url={url!r}: must end with its path; more headers go into ServerConnection")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def is_local(url: str) -> bool:
    """Whether a URL is of this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def warn_of_plain_key(url: str, connection: ServerConnection) -> None:
    if connection.api_key is not None and url.startswith("http:") and not is_local(url):
        _logger.warning("the API key for %s goes over the network in the clear: use https", url)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a ``Retry-After`` header asks for: a number, or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.fromtimestamp(time.time(), UTC)).total_seconds())


def words_of(text: str) -> str:
    """What an error's body says, in short."""
    found = _json_or_none(text.encode())
    if isinstance(found, dict):
        inner = found.get("error", found)
        if isinstance(inner, dict):
            inner = inner.get("message", inner.get("detail", inner))
        text = str(inner)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise Fault(FaultKind.LOST, f"the server sent what is no JSON: {data[:80]!r}") from error


def _json_or_none(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        return None
