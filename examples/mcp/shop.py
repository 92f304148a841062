"""A model that uses the tools of an MCP server from its code: loops over them, and catches what they raise.

The server is a program of its own, ``server.py``, started by midstream and stopped with the generator. The model is
a scripted one, so that this runs anywhere; any engine takes its place.

    python examples/mcp/shop.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import midstream as ms
from midstream.tools import ToolSet, from_mcp

QUESTION = "What does one of everything cost that is there?"
SAID = """ <code>there = [p for p in products() if in_stock(p)]
there, sum(price(p) for p in there)</code>
And ten of each?
<code>[price(p, pieces=10) for p in there]</code>
Is there a pear?
<code>try:
    print(price("pear"))
except Exception as error:
    print("no:", type(error).__name__)</code>
One of each costs 3.05."""


def main() -> int:
    console = Console()
    tools = from_mcp([sys.executable, str(Path(__file__).with_name("server.py"))], deadline=10.0)
    prompt = f"{ToolSet([tools]).describe('text')}\n\nQ: {QUESTION}\nA:"
    engine = ms.ScriptedEngine(tokenizer_of_bytes(), {prompt: SAID})
    with ms.Generator(engine, tools=[tools]) as generator:
        (trajectory,) = generator.generate([ms.Prompt(text=prompt)])
    console.print(Text(prompt, "dim"), end="")
    text = Text()
    for segment in trajectory.segments:
        text.append(segment.text.removesuffix("<|endoftext|>"), "yellow" if segment.origin == "injected" else "")
    console.print(text)
    for entry in trajectory.calls:
        for call in entry.result.tool_calls if entry.result else ():
            given = (
                *map(repr, call.arguments),
                *(f"{name}={value!r}" for name, value in call.keyword_arguments.items()),
            )
            outcome = call.error.type if call.error else repr(call.value)
            console.print(Text(f"  {call.name}({', '.join(given)}) -> {outcome}  {call.duration * 1000:.1f} ms", "dim"))
    return 0


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """Single bytes say any text, and need no file."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": len(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


if __name__ == "__main__":
    raise SystemExit(main())
