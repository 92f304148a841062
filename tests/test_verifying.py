"""Trajectories held against their tokenizer and their model: what agrees passes, and what does not is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner

from midstream import Generator, HuggingFaceEngine, Limits, Prompt, Sampling, SandboxPool, TrajectoryBatch
from midstream.cli import main
from midstream.errors import ConfigurationError
from midstream.records import Record, RecordWriter
from midstream.teacher_forcing import compare
from midstream.verifying import verify_with_tokenizer
from tests.records.trajectories import Scenario, by_code, drive
from tests.vocabularies import tokenizer

torch.set_num_threads(1)
DEMO = Path(__file__).parents[1] / "src" / "midstream" / "demo"
QUESTIONS = ("What is 4 plus 19?", "What is 48213 times 977?", "What is left when 267 is divided by 10078?")
DRAWN = Sampling(temperature=1.3, top_k=40)


@pytest.fixture(scope="module")
def engine() -> HuggingFaceEngine:
    return HuggingFaceEngine.from_pretrained(str(DEMO), device="cpu")


def generated(engine: HuggingFaceEngine, pool: SandboxPool, sampling: Sampling) -> TrajectoryBatch:
    prompts = [Prompt(text=f"Question: {text}\nAnswer:", id=str(place)) for place, text in enumerate(QUESTIONS)]
    with Generator(engine, pool=pool, limits=Limits(max_new_tokens=120), sampling=sampling) as generator:
        return generator.generate(prompts, n=2)


@pytest.fixture(scope="module")
def drawn(engine: HuggingFaceEngine, sandboxes: SandboxPool) -> TrajectoryBatch:
    return generated(engine, sandboxes, DRAWN)


@pytest.fixture
def records(drawn: TrajectoryBatch) -> list[Record]:
    assert sum(len(record.calls) for record in drawn.records) >= 3
    return copy.deepcopy(drawn.records)


def said(record: Record, engine: HuggingFaceEngine, **options: Any) -> list[str]:
    (comparison,) = compare([record], engine.model, **options)
    return [str(violation) for violation in comparison.violations]


def test_what_the_engine_records_is_what_the_model_says(engine: HuggingFaceEngine, records: list[Record]) -> None:
    comparisons = compare(records, engine.model)
    for record, one in zip(records, comparisons, strict=True):
        assert not one.violations
        assert one.compared == sum(len(s.ids) for s in record.segments if s.origin == "generated")
        assert 0 < one.worst < 1e-4
        assert verify_with_tokenizer(record, engine.tokenizer) == []


def test_a_trajectory_and_a_batch_verify_themselves(
    engine: HuggingFaceEngine, sandboxes: SandboxPool, drawn: TrajectoryBatch
) -> None:
    greedy = generated(engine, sandboxes, Sampling(temperature=0))
    settings = {
        "limits": Limits(max_new_tokens=120),
        "eos_ids": engine.eos_ids,
        "context_length": engine.context_length,
    }
    for batch in (drawn, greedy):
        assert batch.verify(model=engine.model) == [[]] * len(batch)
        for trajectory in batch:
            assert trajectory.verify(engine.tokenizer, model=engine.model, **settings) == []
    few = drawn[0].verify(engine.tokenizer, **{**settings, "limits": Limits(max_new_tokens=3)})
    assert {violation.rule for violation in few} >= {"limits"}
    other = drawn[0].verify(engine.tokenizer, model=engine.model, tolerance=0.0, **settings)
    assert [violation.rule for violation in other] == ["model"]
    with pytest.raises(ConfigurationError, match="give model too"):
        drawn[0].verify(engine.tokenizer, tolerance=1.0, **settings)


def shifted(record: Record) -> int:
    logprobs = record.segments[0].logprobs
    logprobs[:] = [logprobs[-1], *logprobs[:-1]]
    return len(record.prompt_ids)


def one_off(record: Record) -> int:
    record.segments[0].logprobs[4] -= 0.01
    return len(record.prompt_ids) + 4


def another_id(record: Record) -> int:
    record.segments[0].ids[3] = record.segments[0].ids[3] % 400 + 2
    return len(record.prompt_ids) + 3


def another_prompt(record: Record) -> int:
    record.prompt_ids[2] = record.prompt_ids[2] % 400 + 2
    return len(record.prompt_ids)


def behind_the_temperature(record: Record) -> int:
    record.logprob_kind = "processed"
    return len(record.prompt_ids)


@pytest.mark.parametrize("change", [shifted, one_off, another_id, another_prompt, behind_the_temperature])
def test_the_first_wrong_place_is_told(
    engine: HuggingFaceEngine, records: list[Record], change: Callable[[Record], int]
) -> None:
    wrong = records[0]
    expected = compare([copy.deepcopy(wrong)], engine.model)[0]
    place = change(wrong)
    (violation,) = compare(records, engine.model)[0].violations
    assert not expected.violations
    assert violation.rule == "model"
    assert violation.position is not None
    assert place <= violation.position <= place + 6  # where an id is as likely as it was, a later one shows it
    recorded = wrong.segments[0].logprobs[violation.position - len(wrong.prompt_ids)]
    assert f"logprob {recorded:.6g} is recorded for id" in violation.message
    assert "the model gives" in violation.message
    assert [one.violations for one in compare(records, engine.model)[1:]] == [[]] * (len(records) - 1)


def test_processed_logprobs_are_those_behind_temperature_and_filters(
    engine: HuggingFaceEngine, records: list[Record]
) -> None:
    from midstream.engines.sampling import filtered

    for record in records:
        ids = [*record.prompt_ids, *(i for segment in record.segments for i in segment.ids)]
        with torch.inference_mode():
            scores = filtered(engine.model(input_ids=torch.tensor([ids])).logits[0].float(), [DRAWN] * len(ids))
        position = len(record.prompt_ids)
        for segment in record.segments:
            if segment.origin == "generated":
                segment.logprobs = [
                    scores[place - 1].log_softmax(-1)[token_id].item()
                    for place, token_id in enumerate(segment.ids, start=position)
                ]
            position += len(segment.ids)
        assert said(record, engine)  # they are said to be raw
        record.logprob_kind = "processed"
        assert said(record, engine) == []


def test_a_greedy_row_says_the_likeliest(engine: HuggingFaceEngine, records: list[Record]) -> None:
    assert any("is behind the likeliest by" in line for r in records for line in said(as_greedy(r), engine))


def as_greedy(record: Record) -> Record:
    record.sampling.temperature, record.sampling.top_k = 0.0, 0
    return record


def test_ids_of_other_weights_are_left_out(engine: HuggingFaceEngine, records: list[Record]) -> None:
    record = records[0]
    segment = record.segments[0]
    segment.weight_versions[:4] = [7] * 4
    segment.logprobs[2] = -9.0
    assert said(record, engine)
    (others,) = compare([record], engine.model, weight_version=0)
    (those,) = compare([record], engine.model, weight_version=7)
    (none,) = compare([record], engine.model, weight_version=8)
    assert (others.violations, others.reason) == ([], "")
    assert those.compared == 4
    assert [violation.position for violation in those.violations] == [len(record.prompt_ids) + 2]
    assert (none.compared, none.reason) == (0, "holds no id that was sampled by these weights")


def test_what_cannot_be_compared_says_so(engine: HuggingFaceEngine, records: list[Record]) -> None:
    unfit, strange, long = records[:3]
    unfit.fit_for_training = False
    strange.segments[0].ids[1] = 448
    long.segments[0].ids = [5] * 600
    long.segments[0].logprobs = [-1.0] * 600
    long.segments[0].weight_versions = [0] * 600
    first, second, third = compare(records[:3], engine.model)
    assert first.reason.startswith("not fit for training")
    assert not first.violations
    assert "id 448 is none of the model's" in str(second.violations[0])
    assert "are more than the model's context, 512" in str(third.violations[0])
    with pytest.raises(ConfigurationError, match="tolerance=-1"):
        compare(records, engine.model, tolerance=-1)
    with pytest.raises(ConfigurationError, match="no transformers model"):
        compare(records, torch.nn.Linear(2, 2))


def test_the_model_is_left_as_it_was_and_rows_are_compared_alike_in_every_batch(
    engine: HuggingFaceEngine, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = compare(records, engine.model)
    monkeypatch.setattr("midstream.teacher_forcing._MOST_LOGITS", 1)
    monkeypatch.setattr("midstream.teacher_forcing._SLICE", 448 * 3)
    engine.model.train()
    alone = compare(records, engine.model)
    assert engine.model.training
    engine.model.eval()
    assert [one.compared for one in alone] == [one.compared for one in together]
    assert [one.worst for one in alone] == pytest.approx([one.worst for one in together], abs=1e-5)


# --- the tokenizer


@pytest.mark.parametrize("name", ["o200k", "llama3", "tagged", "mistral3", "metaspace", "qwen"])
def test_results_of_every_kind_of_vocabulary_are_its_own(name: str) -> None:
    chunks = ["A <code>1</code>", " and <code>lines</code>\n", "<code>long</code> é🙂"]
    record = drive(Scenario(chunks, by_code, name))
    assert any(segment.origin == "injected" for segment in record.segments)
    assert verify_with_tokenizer(record, tokenizer(name)) == []


def test_ids_that_are_another_tokenizers_and_results_cut_otherwise_are_told() -> None:
    record = drive(Scenario(["A <code>lines</code> b"], by_code))
    (found,) = verify_with_tokenizer(record, tokenizer("llama3"))
    assert (found.rule, found.position) == ("tokenizer", 0)
    injected = record.segments[1]
    known = tokenizer("o200k")
    injected.ids = [i for character in injected.text for i in known.encode(character)]
    record.pieces.update({i: known.decode([i]) for i in injected.ids})
    (found,) = verify_with_tokenizer(record, known)
    at = len(record.prompt_ids) + len(record.segments[0].ids)
    assert (found.message, found.position) == (
        "the ids of a result are not those that this tokenizer makes of its text",
        at,
    )
    other = msgspec.structs.replace(drive(Scenario(["b"])), prompt_ids=known.encode("Say") + known.encode(" it."))
    other.prompt.text = "Say it!"
    other.pieces.update({i: known.decode([i]) for i in other.prompt_ids})
    assert "the prompt's ids are not those" in str(verify_with_tokenizer(other, known)[0])


# --- the command


def check(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def write(path: Path, records: list[Record]) -> Path:
    with RecordWriter(path) as writer:
        for record in records:
            writer.append(record)
    return path


def test_the_command_compares_with_a_model(tmp_path: Path, records: list[Record]) -> None:
    sound = write(tmp_path / "sound.jsonl", records)
    count = sum(len(s.ids) for r in records for s in r.segments if s.origin == "generated")
    result = check("--model", DEMO, "--device", "cpu", sound)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"6 trajectories, all sound ({count} ids generated" in result.stdout
    assert f"; {count} logprobs compared with the model, " in result.stdout
    records[1].segments[0].logprobs[5] -= 0.5
    records[2].fit_for_training = False
    wrong = write(tmp_path / "wrong.jsonl", records)
    assert check(wrong).exit_code == 0  # a record alone cannot show it
    assert "all sound, 1 not fit for training" in check(wrong).stdout
    result = check("--model", DEMO, "--device", "cpu", wrong)
    place = len(records[1].prompt_ids) + 5
    assert result.exit_code == 1
    assert f"wrong.jsonl:2: prompt '0' sample 1: model at id {place}: logprob " in result.stdout
    assert "wrong.jsonl:3: prompt '1' sample 0: not compared with the model: not fit for training" in result.stdout
    assert check("--model", DEMO, "--device", "cpu", "--tolerance", 1, wrong).exit_code == 0
    assert check("--model", DEMO, "--device", "cpu", "--weight-version", 3, wrong).exit_code == 0


def test_the_command_refuses_what_cannot_be(tmp_path: Path) -> None:
    for arguments, says in [
        (["--tolerance", 0.1], "give --model too"),
        (["--model", tmp_path / "nowhere"], "there is no such folder"),
        (["--model", DEMO, "--device", "cpu", "--tolerance", -1], "--tolerance -1"),
    ]:
        path = write(tmp_path / "r.jsonl", [])
        if "-1" in map(str, arguments):
            path = write(tmp_path / "one.jsonl", [drive(Scenario(["b"]))])
        result = check(*arguments, path)
        assert result.exit_code == 2
        assert says in result.stderr
