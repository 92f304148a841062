"""Questions about Python, answered with what a search over Python's own documentation finds.

The documents are those of ``help()`` (``pydoc_data.topics``), which every Python has. The model is a scripted one,
so that this runs anywhere and says the same each time: it writes code that calls ``retrieve``, reads what came back,
and quotes it. With ``--model`` a model of yours answers instead, and is told of the tool in its prompt.

    python examples/retrieval/ask.py [--model PATH] [--out rollouts.jsonl]
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import midstream as ms
from midstream.tools import Documents, Retriever, ToolSet

QUESTIONS = {
    "Which method of a context manager is called when a with statement is left?": "__exit__",
    "Which exception does an iterator raise when there are no further items?": "StopIteration",
    "What does a function return that executes a return statement without an expression?": "None",
    "Which statement deletes the binding of a name from the namespace?": "del",
    "Which statement makes names refer to bindings in the nearest enclosing function scope?": "nonlocal",
}
"""To each question a word that what is quoted in answer must hold."""


def documents() -> Documents:
    """Python's help topics, in passages that fit a result."""
    return Documents(pydoc_data.topics.topics.values(), passage_words=80)


def script(question: str) -> str:
    """What a model would write that knows how to use the tool, and not the answer."""
    return (
        f" <code>found = retrieve({question!r})\nlen(found), [len(text) for text in found]</code> Let me read them."
        "\n<code>for text in found:\n    print('-', ' '.join(text.split()))</code>"
        "\nThat is what the documentation says."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a Hugging Face model and its tokenizer")
    parser.add_argument("--out", type=Path, help="where to keep the rollouts, as JSON lines")
    arguments = parser.parse_args()

    retriever = Retriever(documents(), num_results=3)
    told = ToolSet([retriever]).describe("text")
    prompts = [
        ms.Prompt(text=f"{told}\n\nQ: {question}\nA:", id=f"question-{number}", metadata={"word": word})
        for number, (question, word) in enumerate(QUESTIONS.items(), start=1)
    ]
    console = Console()
    with ms.Generator(engine(arguments.model, prompts), tools=[retriever]) as generator:
        batch = generator.generate(prompts, reward=quotes_the_word)
    for question, trajectory in zip(QUESTIONS, batch, strict=True):
        show(console, question, trajectory)
    if arguments.out is not None:
        batch.save(arguments.out)
    right = sum(trajectory.reward or 0 for trajectory in batch)
    console.print(f"[bold]{right:.0f} of {len(batch)} answers hold the right word[/]")
    return 0


def quotes_the_word(trajectory: ms.Trajectory) -> float:
    """Whether what the model read, or then wrote, has the word that an answer must hold."""
    shown = "".join(segment.text for segment in trajectory.segments[-2:])
    return float(trajectory.prompt.metadata["word"] in shown)


def engine(model: str | None, prompts: list[ms.Prompt]) -> Any:
    if model is not None:
        return ms.HuggingFaceEngine.from_pretrained(model)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A tokenizer of single bytes says any text, and needs no file.
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": len(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|endoftext|>")
    said = map(script, QUESTIONS)
    return ms.ScriptedEngine(tokenizer, {str(p.text): text for p, text in zip(prompts, said, strict=True)})


def show(console: Console, question: str, trajectory: ms.Trajectory) -> None:
    console.print(f"\n[bold]Q: {question}[/]")
    text = Text()
    for segment in trajectory.segments:
        text.append(segment.text.removesuffix("<|endoftext|>"), "yellow" if segment.origin == "injected" else "")
    console.print(text)


if __name__ == "__main__":
    raise SystemExit(main())
