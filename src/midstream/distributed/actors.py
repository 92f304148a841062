"""Talking to actors: a thread for it, and messages that carry all that there is to say.

An actor here has two methods for what goes to and fro. ``submit`` takes a batch of orders and returns at once;
``collect`` is always being waited for, and brings back all that has happened since it last returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from midstream.errors import ConfigurationError

_T = TypeVar("_T")

CLUSTER_GONE = "the cluster is gone: ray.shutdown() was called"


class RayThread:
    """An event loop in a thread of its own. What is spawned on it ends with it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name="midstream-ray", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function called on the loop, soon. Does nothing once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)

    def spawn(self, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> None:
        """Start a task; on the loop's own thread."""
        task = self.loop.create_task(work(*arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def run(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start a coroutine from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """End all tasks, the loop and the thread."""
        self.run(self._end_tasks()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _end_tasks(self) -> None:
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Link:
    """An actor, and what goes to it and comes from it.

    Orders arrive in the order in which they are sent: there is one message with orders under way at a time, and all
    that is said meanwhile goes with the next. So messages grow with the load instead of becoming more.
    """

    def __init__(self, thread: RayThread, actor: Any) -> None:
        self.actor = actor
        self.lost = False
        self.messages = 0
        """Messages with orders that were sent."""
        self._thread = thread
        self._outgoing: list[Any] = []
        self._submitting = False

    def begin(self) -> None:
        """Start to collect; on the loop."""
        self._thread.spawn(self._collect)

    def send(self, orders: Sequence[Any]) -> None:
        """Send orders, from any thread."""
        self._thread.call(self._enqueue, orders)

    def lose(self, error: Exception) -> None:
        """The actor is gone; on the loop. Says so once."""
        if not self.lost:
            self.lost = True
            self._outgoing.clear()
            self._gone(error)

    # --- what a link is for

    def _arrived(self, batch: Any) -> None:
        """What ``collect`` has brought."""
        raise NotImplementedError

    def _gone(self, error: Exception) -> None:
        """The actor has died, or failed at what it never may."""
        raise NotImplementedError

    async def _collecting(self) -> Sequence[Any]:
        """Wait until more is wanted; the arguments of the next ``collect``."""
        return ()

    # --- on the loop

    def _enqueue(self, orders: Sequence[Any]) -> None:
        if self.lost:
            return
        self._outgoing.extend(orders)
        if not self._submitting:
            self._submitting = True
            self._thread.spawn(self._submit)

    async def _submit(self) -> None:
        from ray.exceptions import RayError

        try:
            while self._outgoing:
                orders, self._outgoing = self._outgoing, []
                self.messages += 1
                await asked(self.actor, "submit", orders)
        except RayError as error:
            self.lose(error)
        finally:
            self._submitting = False

    async def _collect(self) -> None:
        from ray.exceptions import RayError

        while not self.lost:
            try:
                batch = await asked(self.actor, "collect", *await self._collecting())
            except RayError as error:
                self.lose(error)
                return
            self._arrived(batch)


def sent(name: str, value: Any) -> Any:
    """A reference to what is in Ray's store from now on, for actors to be given.

    Raises :class:`~midstream.errors.ConfigurationError` for what cannot be pickled.
    """
    import ray

    try:
        return ray.put(value)
    except Exception as error:  # whatever pickling runs into
        raise ConfigurationError(f"{name}: cannot be sent to other machines: {error}") from error


async def asked(actor: Any, method: str, *arguments: Any) -> Any:
    """What an actor's method gives. All that is raised is a RayError: also where the actor, or all of Ray, is gone."""
    import ray
    from ray.exceptions import RayError, RaySystemError

    if not ray.is_initialized():  # a call would start a cluster
        raise RaySystemError(CLUSTER_GONE)
    try:
        return await getattr(actor, method).remote(*arguments)
    except RayError:
        raise
    except Exception as error:  # such as for an actor of the cluster before this one
        raise RaySystemError(error) from error


def start_fault(error: Exception) -> str:
    """Why an actor could not be started, in a line where Ray has a report from the node."""
    from ray.exceptions import RayActorError

    cause = getattr(error, "cause", None) or error
    why = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, RayActorError) and cause.actor_init_failed:
        why = str(cause).strip().splitlines()[-1]
    if why.startswith("ModuleNotFoundError"):
        why += "; every node needs it: installed there, or sent by ray.init(runtime_env=...)"
    return why


def end_actor(actor: Any) -> None:
    """Kill an actor, or None."""
    import ray

    if actor is not None and ray.is_initialized():
        with contextlib.suppress(Exception):  # it is gone, or was of the cluster before this one
            ray.kill(actor)
