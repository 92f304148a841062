"""The public suite: engines pass it, and one that is broken fails the check that is about what it breaks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from midstream import PolicyEngine, ScriptedEngine
from midstream.decoding import decode
from midstream.engines.base import Capabilities, Handle, RowRequest, Update
from midstream.engines.huggingface import HuggingFaceEngine
from midstream.errors import ConfigurationError
from midstream.sandbox import SandboxPool
from midstream.testing import CheckFailed, Steering, check_engine, write_steered_model
from midstream.testing.engine import CHECKS
from midstream.testing.steering import CHOICE, EOS, PERIOD, VOCABULARY, next_id, next_logprobs, steered
from midstream.types import Media
from tests.policies import padded_output

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = write_steered_model(tmp_path_factory.mktemp("steered"))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


class CopyingPolicy:
    """Says what the steered model says, in rounds that end at any row's stop string, a few ids late."""

    def __init__(self, overshoot: int = 0) -> None:
        self._overshoot = overshoot
        self._random = random.Random(0)

    def generate(self, batch: Any) -> Any:
        stops = {stop for strings in batch["stop_strings"] for stop in strings}
        prompts = [
            line[:length]
            for line, length in zip(batch["input_ids"].tolist(), batch["input_lengths"].tolist(), strict=True)
        ]
        rounds = [self._round(prompt, stops) for prompt in prompts]
        new = [ids for ids, _ in rounds]
        return padded_output(dict, prompts, new, [said for _, said in rounds], pad_id=EOS, truncated=[False] * len(new))

    def _round(self, prompt: list[int], stops: set[str]) -> tuple[list[int], list[float]]:
        ids, logprobs, left = list(prompt), [], PERIOD
        while (left and ids[-1] != EOS) or len(ids) == len(prompt):
            left -= 1
            likely = next_logprobs(ids)
            ids.append(next_id(ids, self._random.random()))
            logprobs.append(likely[ids[-1]])
            if left > self._overshoot and any(stop in decode(VOCABULARY, ids[len(prompt) :]) for stop in stops):
                left = self._overshoot
        return ids[len(prompt) :], logprobs


def test_scripted_engines_pass(sandboxes: SandboxPool) -> None:
    for tokens in (1, 3):
        outcomes = check_engine(
            lambda steering, tokens=tokens: ScriptedEngine(steering.tokenizer, steering.script, tokens_per_step=tokens),
            tolerance=None,
            pool=sandboxes,
        )
        assert [outcome.name for outcome in outcomes] == [check.__name__.replace("_", " ") for check in CHECKS]
        assert len(outcomes) == 24


@pytest.mark.parametrize("overshoot", [0, 3])
def test_policies_pass(sandboxes: SandboxPool, overshoot: int) -> None:
    check_engine(lambda steering: PolicyEngine(CopyingPolicy(overshoot), steering.tokenizer), pool=sandboxes)


def test_models_pass(sandboxes: SandboxPool) -> None:
    check_engine(lambda steering: HuggingFaceEngine.from_pretrained(str(steering.folder), device="cpu"), pool=sandboxes)


def test_models_with_few_places_and_half_the_bits_pass(sandboxes: SandboxPool) -> None:
    options: dict[str, Any] = {"max_batch_size": 3, "max_cached_rows": 4, "prefill_chunk": 50, "dtype": "bfloat16"}
    check_engine(
        lambda steering: HuggingFaceEngine.from_pretrained(str(steering.folder), device="cpu", **options),
        tolerance=0.05,
        pool=sandboxes,
    )


# --- broken ones ------------------------------------------------------------------------------------------


class Broken:
    """An engine that hands everything on to another, for others to break one thing of."""

    def __init__(self, inner: HuggingFaceEngine) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class LateLogprobs(Broken):
    """Each id has the logprob of the one before."""

    def __init__(self, inner: HuggingFaceEngine) -> None:
        super().__init__(inner)
        self.last: dict[Handle, float] = {}

    def step(self) -> list[Update]:
        updates = []
        for update in self.inner.step():
            shifted = [self.last.get(update.handle, 0.0), *update.logprobs][: len(update.ids)]
            self.last[update.handle] = [0.0, *update.logprobs][-1]
            updates.append(replace(update, logprobs=shifted))
        return updates


class OfTheTemperature(Broken):
    """Raw logprobs, it says, and gives those behind the temperature."""

    def step(self) -> list[Update]:
        rows = self.inner._rows
        return [
            replace(
                u, logprobs=[next_logprobs(rows[u.handle].ids[:-1], rows[u.handle].sampling.temperature or 1)[u.ids[0]]]
            )
            if u.ids
            else u
            for u in self.inner.step()
        ]


class ForgetsTheLast(Broken):
    """A result goes where the last sampled id should be."""

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        if ids:
            self.inner.rollback(handle, 1)
        self.inner.extend(handle, ids, media)


class TakesBackTooLittle(Broken):
    def rollback(self, handle: Handle, k: int) -> None:
        self.inner.rollback(handle, max(0, k - 1))


class WritesAnew(Broken):
    """What it is given is text to it: decoded, and cut into ids again."""

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        tail = VOCABULARY.encode_text(decode(VOCABULARY, [i for i in request.ids[PERIOD:] if i < 256 + 40]))
        return self.inner.open(replace(request, ids=(*request.ids[:PERIOD], *tail)), n)


class SharesNoise(Broken):
    """The seed of a row is its place in the engine."""

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        return self.inner.open(replace(request, seed=self.inner.open_rows), n)


class SamplesAlike(Broken):
    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        return [self.inner.open(replace(request, first_sample=0))[0] for _ in range(n)]


class CountsAnew(Broken):
    """Numbers samples from 0, whatever number the first of them has."""

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        return self.inner.open(replace(request, first_sample=0), n)


class GoesOnHeld(Broken):
    """Says something more of a row that is held."""

    def __init__(self, inner: HuggingFaceEngine) -> None:
        super().__init__(inner)
        self.held: Handle | None = None

    def rollback(self, handle: Handle, k: int) -> None:
        self.inner.rollback(handle, k)
        self.held = handle

    def step(self) -> list[Update]:
        updates = self.inner.step()
        held, self.held = self.held, None
        return [*updates, Update(held, (), ())] if held is not None and updates else updates


class EndsAtPadding(Broken):
    """Takes the padding id, wherever it stands in a prompt, for its end."""

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        ids = tuple(i for i in request.ids if i != EOS) or request.ids
        return self.inner.open(replace(request, ids=ids), n)


class StopsBeforeItsTime(Broken):
    """Counts its prompt among the new ids."""

    def step(self) -> list[Update]:
        return [
            replace(update, exhausted=update.exhausted or len(self.inner._rows[update.handle].ids) >= PERIOD + 20)
            for update in self.inner.step()
        ]


class MixesRows(Broken):
    """What is for one row comes to another, where two run."""

    def step(self) -> list[Update]:
        updates = self.inner.step()
        if len(updates) > 1:
            first, second, *rest = updates
            return [replace(first, handle=second.handle), replace(second, handle=first.handle), *rest]
        return updates


class OldVersion(Broken):
    def step(self) -> list[Update]:
        return [replace(update, weight_version=0) for update in self.inner.step()]


class CannotAndDoes(Broken):
    capabilities = Capabilities(sampling=True, fork=False, set_weights=True, keyed_noise=True)


class KeepsRows(Broken):
    def close(self, handle: Handle) -> None:
        self.inner.rollback(handle, 0)


class UsesHandlesAgain(Broken):
    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        self.inner._handles = iter(range(1, 1000))
        return self.inner.open(request, n)


class LeavesAThread(Broken):
    def shutdown(self) -> None:
        self.inner.shutdown()
        threading.Thread(target=release.wait, name="left behind").start()


class ForgetsWhatItSaid(Broken):
    """A row that comes with more than its prompt begins with the prompt alone."""

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        return self.inner.open(replace(request, ids=request.ids[:PERIOD]), n)


class OneForkForAll(Broken):
    def fork(self, handle: Handle, seed: int) -> Handle:
        return self.inner.fork(handle, 0)


class DoesNotPause(Broken):
    """Drops what rows had when it comes to rest."""

    def pause(self) -> None:
        self.inner.pause()
        for row in self.inner._rows.values():
            row.ids[PERIOD:] = row.ids[PERIOD:-1]


release = threading.Event()


@pytest.mark.parametrize(
    ("kind", "check", "says"),
    [
        (LateLogprobs, "logprobs are those of the sampled ids", "has logprob"),
        (OfTheTemperature, "logprobs are those of the sampled ids", "has logprob"),
        (ForgetsTheLast, "ids are taken back and results go in their place", "came where"),
        (ForgetsTheLast, "tags split in every way", "behind the prompt is"),
        (TakesBackTooLittle, "a row that was taken back says the same again", "came where"),
        (WritesAnew, "a paused row goes on as if nothing had been", "behind the prompt is"),
        (SharesNoise, "rows do not depend on their neighbours", "rows have other ids"),
        (CountsAnew, "samples keep their numbers", "is another one"),
        (SamplesAlike, "samples of one prompt", "are the same"),
        (SamplesAlike, "samples keep their numbers", "are the same"),
        (GoesOnHeld, "a held row gets nothing", "does not run"),
        (EndsAtPadding, "an end of sequence that is the padding too", "row 'behind"),
        (StopsBeforeItsTime, "budgets at every boundary", "it stopped after"),
        (MixesRows, "many rows of every length", "behind the prompt is"),
        (OldVersion, "weights change between two tokens", "have the versions"),
        (DoesNotPause, "weights change between two tokens", "behind the prompt is"),
        (CannotAndDoes, "forks share a past and no more", "it is not refused"),
        (KeepsRows, "a row driven out of turn is refused", "still open"),
        (UsesHandlesAgain, "a row driven out of turn is refused", "used again"),
        (LeavesAThread, "shutting down leaves nothing", "left behind"),
        (ForgetsWhatItSaid, "a row that starts with more than its prompt", "came where"),
        (OneForkForAll, "forks share a past and no more", "sampled the same"),
    ],
)
def test_a_broken_engine_fails_its_check(
    model: Any,
    sandboxes: SandboxPool,
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[[HuggingFaceEngine], Any],
    check: str,
    says: str,
) -> None:
    monkeypatch.setattr("midstream.testing.remains.GRACE", 0.1)

    def make(steering: Steering) -> Any:
        return kind(HuggingFaceEngine(model, steering.tokenizer))

    release.clear()
    try:
        with pytest.raises(CheckFailed, match=says) as caught:
            check_engine(make, pool=sandboxes, only=[check])
    finally:
        release.set()
    assert [outcome.name for outcome in caught.value.outcomes] == [check]


# --- what does not fit ------------------------------------------------------------------------------------


def test_engines_that_the_checks_do_not_fit_are_refused(sandboxes: SandboxPool) -> None:
    class TextOnly(ScriptedEngine):
        @property
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities, exact_ids=False)

    with pytest.raises(ConfigurationError, match="exchanges text"):
        check_engine(lambda steering: TextOnly(steering.tokenizer, steering.script), pool=sandboxes)
    with pytest.raises(ConfigurationError, match="tokenizer or its ends of sequence"):
        check_engine(lambda steering: ScriptedEngine(steering.tokenizer, steering.script, eos_id=5), pool=sandboxes)
    with pytest.raises(ConfigurationError, match="there is no check 'tags'"):
        check_engine(lambda steering: ScriptedEngine(steering.tokenizer, steering.script), only=["tags"])


def test_a_prompt_cannot_say_more_than_a_period() -> None:
    assert len(steered(*["x"] * PERIOD, end=False).ids) == PERIOD
    with pytest.raises(ConfigurationError, match=f"they are {PERIOD + 1} ids"):
        steered(*["x"] * PERIOD)


def test_the_model_and_its_description_say_the_same(model: Any) -> None:
    prompt = steered("is", CHOICE, CHOICE, "<code>").prompt
    ids = [*prompt, *prompt[:2], ord("3"), ord("7")]
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    for place in range(PERIOD, len(ids)):
        for token_id, logprob in next_logprobs(ids[:place]).items():
            assert logprobs[place - 1, token_id].item() == pytest.approx(logprob, abs=1e-5)
