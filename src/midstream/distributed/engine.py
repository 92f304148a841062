"""One engine made of several: replicas of a model as actors, with rows spread over them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from midstream.distributed.actors import sent
from midstream.distributed.replica import UpdateWeights
from midstream.distributed.replica_messages import (
    CloseRow,
    ExtendRow,
    ForkRow,
    HoldRow,
    OpenRows,
    ReplicaReport,
    Sampled,
)
from midstream.distributed.replicas import Replica, Replicas
from midstream.engines.base import Capabilities, Engine, Handle, RowRequest, Update
from midstream.engines.rows import RowKeeper, check_integer
from midstream.errors import CapabilityError, ConfigurationError
from midstream.types import Media

logger = logging.getLogger(__name__)

MOVES = 3
"""Replicas that one row may lose before it is given up: it may be what they die of."""

_PATIENCE = 0.1  # seconds that a step waits for news before it says that there are none


@dataclass(slots=True, eq=False)
class _Row:
    """What is known of a row: enough to go on with it on any replica."""

    handle: Handle
    request: RowRequest
    sample: int
    ids: list[int]
    limit: int | None
    noise: int | None = None
    running: bool = True
    ended: bool = False
    media: list[Media] = field(default_factory=list)
    replica: Replica | None = None
    epoch: int = 0
    moves: int = 0


class RayEngine(RowKeeper[_Row]):
    """An :class:`~midstream.Engine` whose rows are sampled by replicas of another, each in an actor.

    A row is placed where there are the fewest, and stays. When a replica dies, its rows go on elsewhere from the ids
    that they have, so nothing that was sampled and seen is lost; where sampling noise is keyed
    (:class:`~midstream.Capabilities`), what follows is what it would have been. A replica in place of the dead one
    is started. The options are those of :class:`RayGenerator`.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        replicas: int = 1,
        resources: Mapping[str, Any] | None = None,
        rows_per_replica: int | None = 256,
        samples_together: int = 8,
        steps_ahead: int = 1,
        start_timeout: float = 600.0,
    ) -> None:
        import ray

        if not callable(make_engine):
            raise ConfigurationError(f"make_engine={make_engine!r}: must be a function that makes an engine")
        for name, value, least in (
            ("replicas", replicas, 1),
            ("samples_together", samples_together, 1),
            ("steps_ahead", steps_ahead, 0),
        ):
            check_integer(name, value, least)
        if rows_per_replica is not None:
            check_integer("rows_per_replica", rows_per_replica, 1)
        if isinstance(start_timeout, bool) or not isinstance(start_timeout, int | float) or not start_timeout > 0:
            raise ConfigurationError(f"start_timeout={start_timeout!r}: must be a number of seconds over 0")
        if resources is not None and not isinstance(resources, Mapping):
            raise ConfigurationError(f"resources={resources!r}: must be a mapping of an actor's options, or None")
        if not ray.is_initialized():
            raise ConfigurationError("RayEngine: there is no cluster yet; call ray.init(...) first")
        self._rows_per_replica = rows_per_replica
        self._samples_together = samples_together
        self._waiting: deque[list[_Row]] = deque()
        self._failed: dict[Handle, str] = {}
        self._placed: list[Replica] = []
        self._later: list[tuple[Replica, Sampled]] = []
        self._replicas = Replicas(
            sent(f"make_engine={make_engine!r}", make_engine),
            replicas,
            {"num_cpus": 1, "scheduling_strategy": "SPREAD", **(resources or {})},
            steps_ahead,
            start_timeout,
        )
        report = self._replicas.first_report()
        self.takes_media = report.capabilities.media
        self._capabilities = report.capabilities
        super().__init__(
            report.tokenizer,
            context_length=report.context_length,
            eos_ids=report.eos_ids,
            weight_version=report.weight_version,
        )

    # --- what it is

    @property
    def capabilities(self) -> Capabilities:
        """Those of the replicas' engines; but new weights go by :meth:`update_weights`, not ``set_weights``."""
        return replace(self._capabilities, set_weights=False)

    @property
    def replicas(self) -> list[ReplicaReport]:
        """What the replicas that are alive say of themselves."""
        return self._replicas.reports

    @property
    def rows_waiting(self) -> int:
        """Open rows that wait for a place on a replica."""
        return sum(map(len, self._waiting))

    @property
    def loads(self) -> list[int]:
        """How many rows each replica has."""
        return [replica.rows for replica in self._placed]

    # --- an engine's methods

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        self._check_open(request, n)
        rows = [
            _Row(self._next_handle(), request, request.first_sample + place, list(request.ids), self._limit(request))
            for place in range(n)
        ]
        for first in range(0, n, self._samples_together):
            self._waiting.append(rows[first : first + self._samples_together])
        handles = [self._add(row) for row in rows]
        self._place()
        return handles

    def step(self) -> list[Update]:
        for replica in self._placed:
            replica.answer()
        # Only here, where every update was answered: a row is never opened with ids that are taken back.
        self._place()
        updates = self._settle()
        if not updates:
            self._place()
            if self._paused or not any(row.running for row in self._rows.values()):
                return []
            self._replicas.wait(_PATIENCE)
            updates = self._settle()
        return updates

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        row = self._extend(handle, ids, media)
        row.ids.extend(ids)
        row.media.extend(media)
        row.running = True
        if row.replica is not None:
            row.replica.tell(ExtendRow(handle, list(ids), tuple(media)))

    def rollback(self, handle: Handle, k: int) -> None:
        row = self._roll_back(handle, k)
        row.epoch += 1
        if row.replica is not None:
            row.replica.tell(HoldRow(handle, len(row.ids), row.epoch))

    def fork(self, handle: Handle, seed: int) -> Handle:
        row = self._row(handle)
        if not self._capabilities.fork:
            raise CapabilityError("fork: the replicas' engine cannot copy rows")
        copy = replace(
            row,
            handle=self._next_handle(),
            ids=list(row.ids),
            media=list(row.media),
            noise=seed,
            running=False,
            ended=False,
            epoch=0,
        )
        if row.replica is None:
            self._waiting.append([copy])
        else:
            row.replica.rows += 1
            row.replica.tell(ForkRow(handle, copy.handle, len(row.ids), seed))
        return self._add(copy)

    def close(self, handle: Handle) -> None:
        row = self._row(handle)
        del self._rows[handle]
        self._failed.pop(handle, None)
        if row.replica is not None:
            row.replica.rows -= 1
            row.replica.tell(CloseRow(handle))

    def pause(self) -> None:
        if not self._paused:
            super().pause()
            self._replicas.tell_all("rest")

    def resume(self) -> None:
        if self._paused:
            super().resume()
            self._replicas.tell_all("go_on")

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        del version, keep_cache
        raise CapabilityError(
            "set_weights: the weights are in the replicas; change them with RayGenerator.update_weights"
        )

    def update_weights(self, update: UpdateWeights, version: int, *, keep_cache: bool = False) -> None:
        """Have ``update`` change the weights of every replica's engine, which it is given, while nothing is sampled.

        Replicas that start later have it done to theirs too. One where it fails is replaced.

        Raises :class:`~midstream.errors.EngineError` where it fails on all; they are replaced, with the weights
        that they had before; :class:`~midstream.errors.CapabilityError` where the engine tracks no versions; and
        :class:`~midstream.errors.ConfigurationError` for an update that cannot be pickled.
        """
        check_integer("version", version, 0)
        if not self._capabilities.set_weights:
            raise CapabilityError("update_weights: the replicas' engine does not take new weights")
        self._replicas.update(sent(f"update={update!r}", update), version, keep_cache)
        self._weight_version = version

    def shutdown(self) -> None:
        self._replicas.close()

    # --- on the thread that drives the engine

    def _settle(self) -> list[Update]:
        """Take what has come."""
        news, given_up = self._replicas.take()
        updates = self._take_sampled(self._later)
        for replica, what in news:
            if what is None:
                self._placed.append(replica)
                if self._paused:
                    self._replicas.tell_all("rest")
            elif isinstance(what, Exception):
                self._move_rows(replica, what)
            else:
                replica.delivered = what.step
                self._take_sampled([(replica, sampled) for sampled in what.sampled], updates)
        failed = dict(self._failed)
        if given_up is not None and not self._placed:
            failed |= {handle: given_up for handle, row in self._rows.items() if row.replica is None}
        for handle, why in failed.items():
            row = self._rows[handle]
            if row.running and handle not in updates:
                row.running, row.ended = False, True
                updates[handle] = Update(handle, (), (), self._weight_version, error=why)
        return list(updates.values())

    def _take_sampled(
        self, sampled: list[tuple[Replica, Sampled]], updates: dict[Handle, Update] | None = None
    ) -> dict[Handle, Update]:
        """One update of each row. What several steps have sampled is one; what other weights have, waits."""
        updates = {} if updates is None else updates
        self._later = [] if sampled is self._later else self._later
        waits = {one.update.handle for _, one in self._later}
        for replica, one in sampled:
            handle = one.update.handle
            earlier = updates.get(handle)
            other = earlier is not None and earlier.weight_version != one.update.weight_version
            if handle in waits or (other and one.update.ids):
                waits.add(handle)
                self._later.append((replica, one))
            elif (update := self._taken(replica, one)) is not None:
                updates[handle] = update if earlier is None else _joined(earlier, update)
        return updates

    def _taken(self, replica: Replica, sampled: Sampled) -> Update | None:
        update = sampled.update
        row = self._rows.get(update.handle)
        if row is None or row.replica is not replica or row.epoch != sampled.epoch:
            return None
        row.ids.extend(update.ids)
        if update.error is not None or update.exhausted or update.finished:
            row.running, row.ended = False, True
        return update

    def _move_rows(self, replica: Replica, error: Exception) -> None:
        self._placed.remove(replica)
        moved = []
        for row in self._rows.values():
            if row.replica is replica:
                row.replica = None
                row.epoch += 1
                row.moves += 1
                if row.moves > MOVES:
                    self._failed[row.handle] = f"{row.moves} replicas were lost while they had this row; last: {error}"
                else:
                    moved.append(row)
        self._waiting.extendleft([row] for row in reversed(moved))

    def _place(self) -> None:
        while self._waiting:
            rows = [row for row in self._waiting[0] if row.handle in self._rows and row.replica is None]
            if not rows:
                self._waiting.popleft()
                continue
            replica = min(self._placed, key=lambda one: one.rows, default=None)
            free = self._free_places(replica)
            if replica is None or not free:
                return
            self._waiting[0] = rows[free:]
            self._open_on(replica, rows[:free])

    def _free_places(self, replica: Replica | None) -> int | None:
        """None is any number."""
        if replica is None:
            return 0
        return None if self._rows_per_replica is None else max(0, self._rows_per_replica - replica.rows)

    def _open_on(self, replica: Replica, rows: list[_Row]) -> None:
        """Rows that are as they were opened start together; others from what they have become."""
        replica.rows += len(rows)
        for row in rows:
            row.replica = replica
        for group in _together(rows):
            first = group[0]
            request = replace(
                first.request,
                ids=tuple(first.ids),
                first_sample=first.sample,
                media=(*first.request.media, *first.media),
            )
            held = not first.running
            handles = tuple(row.handle for row in group)
            replica.tell(OpenRows(handles, request, first.epoch, held, first.noise))


def _together(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows that can be opened as samples of one request: one after the other, and as they were asked for."""
    groups: list[list[_Row]] = []
    for row in rows:
        last = groups[-1][-1] if groups else None
        fresh = row.epoch == 0 and row.running and len(row.ids) == len(row.request.ids)
        follows = last is not None and last.request is row.request and last.sample + 1 == row.sample
        if last is not None and fresh and follows and last.epoch == 0:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _joined(first: Update, second: Update) -> Update:
    ids, logprobs = [*first.ids, *second.ids], [*first.logprobs, *second.logprobs]
    return replace(second, ids=ids, logprobs=logprobs, weight_version=first.weight_version)
