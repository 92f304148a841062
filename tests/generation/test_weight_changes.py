"""Weights that change while rows are open: each row records when, and whether what was computed of it was kept."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
import torch

from midstream import Generator, HuggingFaceEngine, Limits, Prompt, SandboxPool, StopKind, Trajectory, WeightChange
from midstream.records import Record, verify
from midstream.teacher_forcing import compare
from tests.generation.test_joins_model import DEMO, PROMPTS, Stepping
from tests.rollouts import LONG, one
from tests.rollouts import Stepping as Scripted

TEXT = "word " * 30


class Changes:
    """At these steps of ``engine`` the weights change, each time ``(version, keep_cache)``."""

    def __init__(self, generator: Generator, engine: Any, at: Mapping[int, tuple[int, bool]]) -> None:
        self._generator = generator
        self._at = at
        self._change: Callable[[], None] = lambda: None
        self._threads: list[threading.Thread] = []
        engine.at_step = self

    def __call__(self, step: int) -> None:
        if step in self._at:
            version, keep_cache = self._at[step]
            self.start(lambda: self._generator.update_weights(self._change, version, keep_cache=keep_cache))

    def start(self, update: Callable[[], None]) -> None:
        thread = threading.Thread(target=update)
        self._threads.append(thread)
        thread.start()
        deadline = time.monotonic() + LONG
        while not self._generator._control.rest_requested:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def generate(self, prompts: list[Any], change: Callable[[], None] | None = None) -> list[Trajectory]:
        self._change = change or self._change
        batch = list(self._generator.generate(prompts))
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive()
        return batch


def check_sound(generator: Generator, row: Trajectory) -> None:
    """Each change stands where the versions of the ids change, and the record holds what the row holds."""
    for change in row.weight_changes:
        assert row.weight_versions[change.length - 1] < change.version
        assert row.weight_versions[change.length] == change.version
    record = generator.record(row)
    assert verify(record) == []
    assert record.trajectory.weight_changes == row.weight_changes


def test_a_row_says_when_the_weights_changed_and_whether_its_cache_was_kept(sandboxes: SandboxPool) -> None:
    whole = one(TEXT, sandboxes)
    engine = Scripted([whole])
    with Generator(engine, pool=sandboxes) as generator:
        (row,) = Changes(generator, engine, {5: (1, True), 9: (4, False)}).generate([whole.prompt])
        assert [(change.version, change.cache_kept) for change in row.weight_changes] == [(1, True), (4, False)]
        check_sound(generator, row)
        (other,) = generator.generate([whole.prompt])  # of a later batch, which no change came to
        assert other.weight_changes == ()


def test_a_row_that_is_gone_on_with_has_lost_what_was_kept(sandboxes: SandboxPool) -> None:
    whole = one(TEXT, sandboxes)
    engine = Scripted([whole])
    with Generator(engine, pool=sandboxes) as generator:
        changes = Changes(generator, engine, {4: (1, True)})
        engine.at_step = lambda step: generator.interrupt() if step == 8 else changes(step)
        (paused,) = changes.generate([whole.prompt])
        assert paused.stop.kind is StopKind.PAUSED
        assert [(change.version, change.cache_kept) for change in paused.weight_changes] == [(1, True)]
        generator.update_weights(lambda: None, 2)
        (row,) = generator.generate([paused])
        assert row.weight_changes == (*paused.weight_changes, WeightChange(paused.total_length, 2, cache_kept=False))
        check_sound(generator, row)


def test_a_copy_has_the_changes_of_what_it_was_copied_from(sandboxes: SandboxPool) -> None:
    whole = one(TEXT, sandboxes)
    engine = Scripted([whole])
    with Generator(engine, pool=sandboxes) as generator:
        changes = Changes(generator, engine, {4: (1, True), 9: (2, False)})

        def at_step(step: int) -> None:
            changes(step)
            if step == 6:
                generator.fork(str(whole.prompt.id), replay=True)

        engine.at_step = at_step
        row, copied = changes.generate([whole.prompt])
        assert len(row.weight_changes) == 2
        assert copied.lineage
        assert copied.weight_changes == row.weight_changes
        check_sound(generator, copied)


def test_changes_that_cannot_be_are_told(sandboxes: SandboxPool) -> None:
    whole = one(TEXT, sandboxes)
    with Generator(Scripted([whole]), pool=sandboxes) as generator:
        record = generator.record(whole)
    length = record.total_length
    for version, at in ((-1, length), (1, length + 1), (1, len(record.prompt_ids) - 1)):
        changes = [{"length": at, "version": version, "cache_kept": True}]
        wrong = msgspec.convert({**msgspec.to_builtins(record), "weight_changes": changes}, Record)
        assert [violation.rule for violation in verify(wrong)] == ["versions"]


@pytest.fixture
def engine() -> Stepping:
    torch.set_num_threads(1)
    return Stepping.from_pretrained(str(DEMO), device="cpu", max_batch_size=4)


@pytest.mark.parametrize("keep_cache", [True, False])
def test_ids_over_what_older_weights_computed_are_not_held_against_any(
    engine: Stepping, sandboxes: SandboxPool, keep_cache: bool
) -> None:
    before = copy.deepcopy(engine.model)
    with Generator(engine, pool=sandboxes, limits=Limits(max_new_tokens=60), seed=5) as generator:
        changes = Changes(generator, engine, {12: (1, keep_cache)})
        rows = changes.generate([Prompt(text=text) for text in PROMPTS], lambda: _scale(engine))
        records = [generator.record(row) for row in rows]
        assert all(len(row.weight_changes) == 1 for row in rows)
    for found in compare(records, before, weight_version=0):
        assert (found.violations, found.left_out, found.reason) == ([], 0, "")
    for record, found in zip(records, compare(records, engine.model, weight_version=1), strict=True):
        assert found.violations == []
        assert bool(found.left_out) == keep_cache
        assert (found.compared == 0) == keep_cache
        assert ("over a cache of theirs" in found.reason) == keep_cache
        record.weight_changes = []
    # It is these ids that no weights would agree with.
    assert any(found.violations for found in compare(records, engine.model, weight_version=1)) == keep_cache


def _scale(engine: HuggingFaceEngine) -> None:
    with torch.no_grad():
        for layer in engine.model.model.layers:
            layer.input_layernorm.weight.mul_(1.3)
