"""What is answered where there is no answer: errors in OpenAI's form."""

from __future__ import annotations

import math
from typing import Any


class Refused(Exception):
    """A request that gets no answer, or no more of one.

    ``status``: of HTTP. ``param``: the field that is at fault. ``code``: for programs. ``retry_after``: seconds after
    which it may go otherwise.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return {**headers, "www-authenticate": "Bearer"} if self.status == 401 else headers


def bad_field(param: str, message: str, code: str | None = None) -> Refused:
    """A request whose field is at fault, by its name."""
    return Refused(400, f"{param}: {message}", param=param, code=code)


def stopping() -> Refused:
    return Refused(503, "the server is stopping", code="stopping", retry_after=5.0)


def upstream_failure(detail: str) -> Refused:
    return Refused(502, f"the server behind this one failed: {detail}", code="upstream_failure")


def out_of_time(detail: str) -> Refused:
    return Refused(504, f"the server behind this one took too long: {detail}", code="time_limit")


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
