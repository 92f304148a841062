"""Texts that are scored: their logprobs are those of the server behind this one, and no code runs in them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from midstream.engines.server import ServerEngine
from midstream.errors import CapabilityError, EngineError
from midstream.serve.bodies import Form
from midstream.serve.refusals import bad_field, out_of_time, stopping, upstream_failure
from midstream.serve.requests import ToScore


class Scoring:
    """A request whose texts are being scored, each by a request of its own. Made in the event loop that it is used in.

    ``leave`` is called as each is over, ``over`` once all are. ``seconds``: for all of them, None for no bound.
    """

    def __init__(
        self,
        engine: ServerEngine,
        asked: ToScore,
        form: Form,
        leave: Callable[[], object],
        over: Callable[[Scoring], object],
        *,
        seconds: float | None,
    ) -> None:
        self.form = form
        self._seconds = seconds
        self._left = len(asked.prompts)
        self._leave = leave
        self._over = over
        self._cancelled = False
        self._tasks = []
        for prompt in asked.prompts:
            given = list(prompt.ids) if prompt.ids is not None else str(prompt.text)
            task = asyncio.create_task(engine.score(given, asked.fields))
            task.add_done_callback(self._done)
            self._tasks.append(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        del task
        self._leave()
        self._left -= 1
        if not self._left:
            self._over(self)

    async def body(self) -> dict[str, Any]:
        """The answer. Raises :class:`Refused` where a text gets no scores; nothing is asked for the others then."""
        try:
            async with asyncio.timeout(self._seconds):
                return self.form.scored(await asyncio.gather(*self._tasks))
        except TimeoutError as error:
            raise out_of_time(f"no scores within {self._seconds:g} seconds") from error
        except CapabilityError as error:
            message = f"this text is not scored by the server behind this one: {error}"
            raise bad_field("echo", message, "unsupported_parameter") from error
        except EngineError as error:
            raise upstream_failure(str(error)) from error
        except asyncio.CancelledError:
            if self._cancelled:
                raise stopping() from None
            raise
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits for the scores any more."""
        self._cancelled = True
        for task in self._tasks:
            task.cancel()
