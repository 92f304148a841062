"""An engine in the hands of its checks: rows driven over it, and held against what was to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from midstream.batch import TrajectoryBatch
from midstream.engines.base import Capabilities, Engine, Handle, RowRequest
from midstream.errors import CapabilityError, MidstreamError
from midstream.generation import Generator
from midstream.sandbox import SandboxPool
from midstream.testing.outcomes import Wrong
from midstream.testing.remains import Remains
from midstream.testing.steering import EOS, PERIOD, Steered, next_logprobs, piece
from midstream.types import Limits, Prompt, StopKind, StopReason, Trajectory

LIMITS = Limits(max_new_tokens=PERIOD, time_limit=1800.0)
"""Of rows that are to end by themselves, so that those of a broken engine end too."""

ENDED = StopReason(StopKind.END_OF_SEQUENCE, str(EOS))

_MOST_STEPS = 100_000


def expect(true: bool, what: str) -> None:
    """Raise :class:`Wrong` unless it is true."""
    if not true:
        raise Wrong(what)


def refused(call: Callable[[], Any], what: str, kind: type[MidstreamError] = CapabilityError) -> None:
    """Raise :class:`Wrong` unless ``call`` raises an error of that kind, with a message."""
    try:
        call()
    except kind as error:
        expect(len(str(error)) > 10, f"{what}: it is refused without a word")
    else:
        raise Wrong(f"{what}: it is not refused")


@dataclass(frozen=True)
class Case:
    """A row: what it is to become, under which limits, and why and after how many ids it is to stop.

    ``length``: of the ids behind the prompt; by default all that was steered.
    """

    steered: Steered
    limits: Limits = LIMITS
    stop: StopReason = ENDED
    length: int | None = None
    name: str = ""

    @property
    def expected_length(self) -> int:
        return len(self.steered.ids) if self.length is None else self.length


@dataclass
class CheckedEngine:
    """``before``: what there was before the engine was made."""

    engine: Engine
    pool: SandboxPool | None
    tolerance: float | None
    before: Remains

    @property
    def capabilities(self) -> Capabilities:
        return self.engine.capabilities

    # --- through a generator

    def generator(self, tools: Mapping[str, Callable[..., Any]] | None = None, **options: Any) -> Generator:
        return Generator(self.engine, tools=tools or {}, pool=self.pool, limits=LIMITS, **options)

    def prompts(self, cases: Sequence[Case]) -> list[Prompt]:
        return [
            Prompt(ids=case.steered.prompt, id=case.name or str(place), limits=case.limits)
            for place, case in enumerate(cases)
        ]

    def run(
        self,
        cases: Sequence[Case],
        *,
        n: int = 1,
        tools: Mapping[str, Callable[..., Any]] | None = None,
        reward: Callable[[Trajectory], Any] | None = None,
        **options: Any,
    ) -> TrajectoryBatch:
        """The cases as one batch, ``n`` samples of each, all of them held against what was to come."""
        with self.generator(tools, **options) as generator:
            batch = generator.generate(self.prompts(cases), n, reward=reward)
        self.hold([case for case in cases for _ in range(n)], batch)
        return batch

    def hold(self, cases: Sequence[Case], batch: TrajectoryBatch) -> None:
        """Trajectories, in the order of their cases, are what was to come; nothing is left of them in the engine."""
        expect(len(batch) == len(cases), f"{len(batch)} trajectories came for {len(cases)} rows")
        for trajectory, case in zip(batch, cases, strict=True):
            name = f"row {trajectory.prompt.id!r}"
            self._hold_ids(name, trajectory, case)
            self._hold_numbers(name, trajectory)
        for trajectory, violations in zip(batch, batch.verify(), strict=True):
            expect(not violations, f"row {trajectory.prompt.id!r} fails its certificate: {violations[:1]}")
        self.hold_nothing_open()

    def hold_nothing_open(self) -> None:
        expect(self.engine.step() == [], "a step without open rows gave something")
        still = getattr(self.engine, "open_rows", 0)
        expect(still == 0, f"{still} rows are still open in the engine")

    def _hold_ids(self, name: str, trajectory: Trajectory, case: Case) -> None:
        expect(trajectory.prompt_ids == case.steered.prompt, f"{name}: the ids of its prompt are changed")
        start = len(trajectory.prompt_ids)
        ids, mask = trajectory.ids[start:], trajectory.mask[start:]
        place = case.steered.agrees(ids, mask)
        if place is not None:
            raise Wrong(f"{name}: {_difference(case.steered, ids, mask, place)} (it stopped for {trajectory.stop})")
        expect(
            (len(ids), trajectory.stop) == (case.expected_length, case.stop),
            f"{name}: it stopped after {len(ids)} ids for {trajectory.stop}, not after {case.expected_length} for "
            f"{case.stop}",
        )

    def _hold_numbers(self, name: str, trajectory: Trajectory) -> None:
        """Logprobs, mask and weight versions are aligned with the ids and say what they must."""
        numbers = (trajectory.mask, trajectory.logprobs, trajectory.weight_versions)
        expect({len(one) for one in numbers} == {trajectory.total_length}, f"{name}: its lists differ in length")
        kind = self.capabilities.logprobs
        expect(trajectory.fit_for_training == (kind is not None), f"{name}: it is said fit for training wrongly")
        expect(kind in (None, trajectory.logprob_kind), f"{name}: its logprobs are said to be of another kind")
        if kind is None or self.tolerance is None:
            return
        temperature = trajectory.sampling.temperature if kind == "processed" else 1.0
        for place, (token_id, own) in enumerate(zip(trajectory.ids, trajectory.mask, strict=True)):
            if own:
                wanted = next_logprobs(trajectory.ids[:place], temperature).get(token_id)
                found = trajectory.logprobs[place]
                expect(
                    wanted is not None and abs(found - wanted) <= self.tolerance,
                    f"{name}: id {place} has logprob {found}, the model gives it {wanted}",
                )

    # --- by hand

    def open(self, steered: Steered, n: int = 1, **options: Any) -> list[Handle]:
        handles = self.engine.open(RowRequest(steered.prompt, stop_ids=(EOS,), **options), n)
        expect(len(handles) == n, f"open gave {len(handles)} handles for {n} rows")
        return handles

    def advance(self, handles: Sequence[Handle], count: int, beyond: int = 0) -> list[list[int]]:
        """``count`` new ids for each of these running rows; then they are held, what came beyond taken back.

        Each row is taken ``beyond`` ids further first, where its engine gives them.
        """
        found: dict[Handle, list[int]] = {handle: [] for handle in handles}
        running = set(handles)
        for _ in range(_MOST_STEPS):
            if not running:
                return [found[handle][:count] for handle in handles]
            for update in self.engine.step():
                expect(update.handle in running, f"an update came for row {update.handle}, which does not run")
                expect(len(update.ids) == len(update.logprobs), "an update has not one logprob for each id")
                expect(update.error is None, f"an update says: {update.error}")
                ids = found[update.handle]
                ids += update.ids
                over = update.exhausted or update.finished
                expect(len(ids) >= count or not over, f"a row was over after {len(ids)} of {count} ids")
                if len(ids) >= count + beyond or over:
                    self.engine.rollback(update.handle, len(ids) - count)
                    running.discard(update.handle)
        raise Wrong(f"{_MOST_STEPS} steps did not give {count} ids")

    def close(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            self.engine.close(handle)
        self.hold_nothing_open()


def under(case: Case, **limits: Any) -> Case:
    """The case under other limits."""
    return replace(case, limits=replace(case.limits, **limits))


def _difference(steered: Steered, ids: Sequence[int], mask: Sequence[int], place: int) -> str:
    origin = "generated" if mask[place] else "injected"
    if place >= len(steered.ids):
        return f"it goes on behind its {len(steered.ids)} ids with {piece(ids[place])!r}, which is {origin}"
    wanted = "generated" if steered.mask[place] else "injected"
    return (
        f"id {place} behind the prompt is {piece(ids[place])!r} and {origin}, "
        f"it must be {piece(steered.ids[place])!r} and {wanted}"
    )
