"""Images that code shows and that tools give: in the record, named in the text, and given to engines that take them."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import PIL.Image
import pytest

from midstream import CODE_TAGS, Generator, Media, Prompt, SandboxPool, ScriptedEngine, StopKind, Trajectory
from midstream.engines.base import Capabilities, Handle
from midstream.families import QWEN_TOOL_CALLS
from midstream.markup import Markup
from midstream.records.certificate import verify
from midstream.records.schema import decode_record
from tests.vocabularies import tokenizer, vocabulary

KNOWN = vocabulary("qwen")
DRAWN = "<code>from PIL import Image\nImage.new('L', (5, 4)).show()\nImage.new('L', (7, 6))</code>"


class Seeing(ScriptedEngine):
    """Keeps what it was shown."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[tuple[Media, ...]] = []

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        self.seen.append(tuple(media))
        super().extend(handle, ids, media)


class Blind(Seeing):
    takes_media = False

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities, media=False)


def run(engine: ScriptedEngine, **options: Any) -> Trajectory:
    with Generator(engine, **options) as generator:
        (row,) = generator.generate([Prompt(text="Q", id="p")])
        record = generator.record(row)
    assert verify(record) == []
    assert decode_record(record.encode()).trajectory == row
    assert row.stop.kind is StopKind.END_OF_SEQUENCE
    return row


def sizes(media: Sequence[Media]) -> list[tuple[int, int]]:
    return [PIL.Image.open(io.BytesIO(each.data), formats=["PNG"]).size for each in media]


@pytest.fixture(scope="module")
def pillow() -> Any:
    with SandboxPool(preload=["PIL.ImageShow"]) as pool:
        yield pool


@pytest.mark.parametrize("kind", [Seeing, Blind])
def test_an_image_is_in_the_record_and_goes_to_engines_that_take_images(kind: Any, pillow: SandboxPool) -> None:
    engine = kind(tokenizer("qwen"), f"{DRAWN} So.")
    row = run(engine, pool=pillow)
    (record,) = row.calls
    assert record.result is not None
    assert record.result.text == "<image of 5x4 pixels>\n<image of 7x6 pixels>"
    assert sizes(record.result.media) == [(5, 4), (7, 6)]
    assert "<image of 7x6 pixels>\n</result> So." in row.text
    (given,) = engine.seen
    assert given == (record.result.media if kind is Seeing else ())


def test_images_that_json_calls_give_are_seen_in_the_order_of_the_calls() -> None:
    def picture(width: int) -> PIL.Image.Image:
        return PIL.Image.new("RGB", (width, 2), "red")

    def several() -> dict[str, Any]:
        jpeg = Media("image/jpeg", b"\xff\xd8\xff...")
        return {"found": [jpeg, picture(9)], "sound": Media("audio/wav", b"RIFF"), "count": 2}

    calls = [("picture", {"width": 3}), ("several", {})]
    text = "".join(f"<tool_call>{json.dumps({'name': n, 'arguments': a})}</tool_call>" for n, a in calls)
    end = KNOWN.added_id("<|im_end|>")
    said = [*KNOWN.encode_text(text), end, *KNOWN.encode_text("Seen."), end]
    engine = Seeing(tokenizer("qwen"), said)
    row = run(engine, tools=[picture, several], markup=Markup.either(CODE_TAGS, QWEN_TOOL_CALLS))
    first, second = (record.result for record in row.calls)
    assert first is not None
    assert second is not None
    assert (first.text, sizes(first.media)) == ("<image of 3x2 pixels>", [(3, 2)])
    assert json.loads(second.text) == {
        "found": ["<image/jpeg>", "<image of 9x2 pixels>"],
        "sound": "<audio/wav>",
        "count": 2,
    }
    assert second.media[0] == Media("image/jpeg", b"\xff\xd8\xff...")
    assert sizes(second.media[1:]) == [(9, 2)]
    assert engine.seen[0] == (*first.media, *second.media)
