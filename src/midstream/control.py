"""How a batch that is being generated is paused, updated and ended from other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from midstream.errors import ProtocolError
from midstream.types import StopKind


@dataclass(frozen=True, slots=True, eq=False)
class ForkRequest:
    """Copy a row ``n`` times, as soon as it stands between two ids with no code running.

    ``replay``: where its session cannot be copied, the copies' are built by running its blocks again.
    ``copies`` is set to the copies' sample numbers, or to why there are none.
    """

    prompt_id: str
    sample: int
    n: int
    replay: bool
    copies: Future[list[int]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.copies.set_running_or_notify_cancel()  # whoever waits cannot cancel it half-way

    def succeed(self, samples: list[int]) -> None:
        self.copies.set_result(samples)

    def fail(self, error: BaseException) -> None:
        """There will be no copies, or not all. Does nothing where the outcome is known."""
        if not self.copies.done():
            self.copies.set_exception(error)

    def ended(self) -> None:
        """The row is over, or was never there."""
        self.fail(ProtocolError(f"fork: sample {self.sample} of prompt {self.prompt_id!r} is not being generated"))


@dataclass(frozen=True, slots=True)
class RowName:
    """A row by its prompt's id and the number of its sample; all samples of the prompt where that is None."""

    prompt_id: str
    sample: int | None = None

    def names(self, prompt_id: str | None, sample: int) -> bool:
        return prompt_id == self.prompt_id and self.sample in (None, sample)


class Control:
    """Shared by a generator, whose methods any thread may call, and the drive of its current batch.

    The drive asks between two steps whether it must rest or end. Whoever asks it to rest waits until it does.
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._one_update = threading.Lock()
        self._resting = False
        self._claimed = False
        self._sampling = False
        self._pause_requested = False
        self._updating = False
        self._thread: int | None = None
        self._changed: Callable[[], None] = _nothing
        self._forks: list[ForkRequest] = []
        self._unwanted: list[RowName] = []
        self._weight_changes: list[tuple[int, bool]] = []
        self.ending: StopKind | None = None
        """Why every row is to stop, once that was asked for."""

    # --- by the generator

    def claim(self) -> None:
        """Take the generator for one batch. Raises :class:`ProtocolError` while another has it."""
        with self._lock:
            if self._claimed:
                raise ProtocolError("this generator is generating already; one batch at a time")
            self._claimed = self._sampling = True
            self._thread = threading.get_ident()  # which may wait for nobody before the drive is attached
            self._resting = False
            self._weight_changes.clear()
            self._unwanted.clear()
            self.ending = None

    def release(self) -> None:
        """The batch is over. What :meth:`claim` took is free again."""
        with self._lock:
            self._claimed = False
            self._stop_sampling()

    def end(self, kind: StopKind) -> None:
        """Every row stops, for ``kind``, between two steps. What was cancelled is not paused any more."""
        with self._lock:
            if self.ending is not StopKind.CANCELLED:
                self.ending = kind
            self._changed()

    def cancel(self, row: RowName) -> None:
        """One row stops between two steps, or all of a prompt. Nothing happens where there is none."""
        with self._lock:
            self._unwanted.append(row)
            self._changed()

    def look(self) -> None:
        """Have the drive look for what is new."""
        with self._lock:
            self._changed()

    def fork(self, request: ForkRequest) -> None:
        """Hand a request to the drive. Raises :class:`ProtocolError` where nothing is being generated."""
        with self._lock:
            if not self._sampling:
                raise ProtocolError("fork: nothing is being generated")
            self._forks.append(request)
            self._changed()

    def pause(self) -> None:
        """Returns once nothing is sampled any more, or another thread has resumed."""
        with self._lock:
            self._refuse_own_thread("pause")
            self._pause_requested = True
            self._ask_to_rest()
            self._lock.wait_for(lambda: self._resting or not self._pause_requested)

    def resume(self) -> None:
        with self._lock:
            self._pause_requested = False
            self._let_go()

    @contextmanager
    def update(self) -> Iterator[None]:
        """Nothing is sampled, opened or closed within; one update at a time."""
        with self._one_update:
            with self._lock:
                self._refuse_own_thread("update_weights")
                self._updating = True
            try:
                with self._lock:
                    self._ask_to_rest()
                    self._lock.wait_for(lambda: self._resting)
                yield
            finally:
                with self._lock:
                    self._updating = False
                    self._let_go()

    def weights_changed(self, version: int, *, cache_kept: bool) -> None:
        """Said within :meth:`update`, once it is done."""
        with self._lock:
            self._weight_changes.append((version, cache_kept))

    # --- by the drive

    def attach(self, changed: Callable[[], None]) -> None:
        """``changed`` is called, in any thread, when there is something new to look at."""
        with self._lock:
            self._changed = changed
            self._thread = threading.get_ident()

    def detach(self) -> None:
        """``changed`` is not called any more."""
        with self._lock:
            self._changed = _nothing
            self._thread = None

    @property
    def rest_requested(self) -> bool:
        """Whether the drive must come to rest. A pause ends with the batch, an update is waited for."""
        return self._updating or (self._pause_requested and self.ending is None)

    def rest(self) -> bool:
        """Tell those who wait that nothing is sampled. False once the drive need not rest any more."""
        with self._lock:
            self._resting = self.rest_requested
            self._lock.notify_all()
            return self._resting

    def take_weight_changes(self) -> list[tuple[int, bool]]:
        """What has changed since the last time: versions, and whether caches were kept."""
        with self._lock:
            taken, self._weight_changes = self._weight_changes, []
            return taken

    def take_unwanted(self) -> list[RowName]:
        """Rows that were cancelled since the last time."""
        if not self._unwanted:  # as at most steps
            return []
        with self._lock:
            taken, self._unwanted = self._unwanted, []
            return taken

    def take_forks(self) -> list[ForkRequest]:
        """What was asked for since the last time."""
        if not self._forks:  # as at most steps
            return []
        with self._lock:
            taken, self._forks = self._forks, []
            return taken

    def sampled_all(self) -> None:
        """No row is open any more, though rewards may still be under way."""
        with self._lock:
            self._stop_sampling()

    # --- inside, with the lock held

    def _ask_to_rest(self) -> None:
        if not self._sampling:
            self._resting = True
        self._changed()

    def _let_go(self) -> None:
        if not (self._pause_requested or self._updating):
            self._resting = False
        self._lock.notify_all()
        self._changed()

    def _stop_sampling(self) -> None:
        self._sampling = False
        for request in self._forks:
            request.ended()
        self._forks.clear()
        if self._pause_requested or self._updating:
            self._resting = True
            self._lock.notify_all()

    def _refuse_own_thread(self, method: str) -> None:
        if self._sampling and threading.get_ident() == self._thread:
            raise ProtocolError(
                f"{method}: called on the event loop that generates, it would wait for itself; "
                "call it from another thread, such as with asyncio.to_thread"
            )


def _nothing() -> None:
    """While no batch is under way."""
