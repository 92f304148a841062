"""Records for pages, among them one that attacks whoever shows it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from midstream.records import Record
from midstream.types import Call, ExecutionResult, Media, Prompt, ToolCall
from tests.records.trajectories import RICH_RESULT, Scenario, by_code, drive

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAoAAAAKCAIAAAACUFjqAAAAEklEQVR4nGP4z8CAB+GTG8HSALfKY52fTcuYAAAAAElFTkSuQmCC"
)
"""A red square, ten pixels wide."""

ATTACK = (
    "</script></style></title></textarea>--><script>window.owned=1</script><img src=x onerror=window.owned=1>"
    "<svg onload=window.owned=1><iframe srcdoc='<script>parent.owned=1</script>'></iframe>"
    "\"'><a href='javascript:window.owned=1' autofocus onfocus=window.owned=1>x</a>{{7*7}}${window.owned=1}\u2028\u0000"
)


def hostile() -> Record:
    """A record whose every text is an attack."""

    def answer(call: Call) -> ExecutionResult:
        error = None if RICH_RESULT.error is None else replace(RICH_RESULT.error, message=ATTACK, traceback=ATTACK)
        calls = (ToolCall(ATTACK, (ATTACK,), {ATTACK: ATTACK}, ATTACK, None, 0.1, 0.2),)
        media = (Media("image/svg+xml", ATTACK.encode()), Media('image/png"><script>', PNG), Media("image/png", PNG))
        return replace(RICH_RESULT, text=ATTACK, stdout=ATTACK, error=error, tool_calls=calls, media=media)

    said = f"{ATTACK}<code>rich = '''{ATTACK}'''</code>{ATTACK}"
    metadata = {ATTACK: ATTACK, "__proto__": {"polluted": 1}}
    prompt = Prompt(text=ATTACK, id=ATTACK, group=ATTACK, metadata=metadata)
    return drive(Scenario([said], answer, prompt=prompt), {ATTACK: ATTACK, "midstream": "0"})


def named(record: Record, name: str, **fields: Any) -> Record:
    """The record under another prompt's id, with other fields."""
    return msgspec.structs.replace(record, prompt=msgspec.structs.replace(record.prompt, id=name), **fields)


def some() -> list[Record]:
    """A few rollouts that differ in everything that the list filters and sorts by."""

    def picture(call: Call) -> ExecutionResult:
        return ExecutionResult("<Figure size 10x10>", duration=0.5, media=(Media("image/png", PNG),))

    plain = drive(Scenario(["Nothing to compute here.\nOnly the word zebra."]))
    short = drive(
        Scenario(["First <code>1 + 1</code> then <code>def f(x):\n    return x # lines\n</code> done."], by_code)
    )
    rich = drive(Scenario(["Ask: <code>rich('quoted', 12)</code> Grüße 你好 🙂🙃."], by_code, name="qwen"))
    drawn = drive(Scenario(["Draw <code>plt.plot([1, 2])</code> it."], picture))
    return [
        named(plain, "plain", reward=0.0, sample=0),
        named(short, "short", reward=1.0, sample=0),
        named(short, "short", reward=0.5, sample=1),
        named(rich, "rich", reward=None, sample=0),
        named(drawn, "drawn", reward=1.0, sample=0),
    ]


def data(page: Path) -> dict[str, Any]:
    """What a page holds: each of its blocks of data by name, unpacked."""
    blocks = re.findall(
        r"<script type=application/octet-stream id=([\w-]+)>([A-Za-z0-9+/=]*)</script>", page.read_text()
    )
    return {name: json.loads(gzip.decompress(base64.b64decode(packed))) for name, packed in blocks}
