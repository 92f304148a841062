"""The weights in the package load, are small, and answer held-out problems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from midstream.markup import CODE_TAGS
from midstream.row import Execute, Row, Stopped
from midstream.types import ExecutionResult, Limits, Prompt, StopKind, Trajectory
from problems import KINDS, FixedProblem, is_correct, load_held_out, prompt_text
from tests.calculator.blocks import shown_by
from train import DEMO_FOLDER, FOLDERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHIPPED = {name: DEMO_FOLDER / folder for name, folder in FOLDERS.items()}


def _load(name: str) -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(SHIPPED[name])


def _answer(model: Any, tokenizer: Any, problem: FixedProblem) -> Trajectory:
    """A greedy answer, the whole sequence through the model at each id; blocks run in this process."""
    row = Row(Prompt(text=prompt_text(problem.question)), tokenizer, CODE_TAGS, Limits(max_new_tokens=200))
    namespace: dict[str, Any] = {}
    with torch.inference_mode():
        while True:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, -1]
            for event in row.receive([int(logits.argmax())], [0.0]).events:
                if isinstance(event, Stopped):
                    return row.trajectory
                if isinstance(event, Execute):
                    row.inject(*(ExecutionResult(shown_by(call.code, namespace)) for call in event.calls))


def _completion(trajectory: Trajectory, tokenizer: Any) -> str:
    ids = trajectory.ids[len(trajectory.prompt_ids) :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_both_models_fit_into_eight_megabytes() -> None:
    files = [path for path in DEMO_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".py", ".jinja", ".pyc"}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_tokenizer_is_the_one_that_the_program_makes(name: str, tokenizer: Tokenizer) -> None:
    shipped = AutoTokenizer.from_pretrained(SHIPPED[name])
    assert shipped.get_vocab() == tokenizer.get_vocab()
    for problem in load_held_out()[::50]:
        text = f"{prompt_text(problem.question)} <code>'{problem.answer}'.upper()</code>\n\n<result>\n-1</result>"
        assert shipped.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_models_load_in_full_precision(name: str) -> None:
    model = _load(name)
    assert model.dtype is torch.float32
    assert 500_000 < model.num_parameters() < 1_500_000
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 0


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_problems_are_answered_with_code(kind: str) -> None:
    model, tokenizer = _load("with code"), AutoTokenizer.from_pretrained(SHIPPED["with code"])
    problems = [problem for problem in load_held_out() if problem.kind == kind][::40]
    for problem in problems:
        trajectory = _answer(model, tokenizer, problem)
        assert trajectory.stop.kind is StopKind.END_OF_SEQUENCE
        assert trajectory.calls
        assert is_correct(_completion(trajectory, tokenizer), problem.answer)


def test_the_direct_model_answers_in_form_and_without_code() -> None:
    model, tokenizer = _load("direct"), AutoTokenizer.from_pretrained(SHIPPED["direct"])
    for problem in load_held_out()[::100]:
        trajectory = _answer(model, tokenizer, problem)
        completion = _completion(trajectory, tokenizer)
        assert trajectory.stop.kind is StopKind.END_OF_SEQUENCE
        assert not trajectory.calls
        assert completion.startswith(" The answer is ")
        assert completion.endswith(".")
