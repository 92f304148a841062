"""The file itself: what it holds, what it could let run, and how it is written."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from midstream.cli import main
from midstream.records import Record, RecordWriter
from midstream.viewer import write_page
from midstream.viewer.entries import SUMMARY_COLUMNS
from tests.viewer.pages import ATTACK, data, hostile, named, some


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of its scripts and styles."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open = ""
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in self.inside:
            self.inside[self.open][-1] += data


def test_every_record_stands_in_the_page_whole(tmp_path: Path) -> None:
    records = some()
    assert write_page(records, tmp_path / "p.html") == len(records)
    held = data(tmp_path / "p.html")
    details = [detail for name in sorted(held) if name != "index" for detail in held[name]]
    rows = [dict(zip(held["index"]["columns"], row, strict=True)) for row in held["index"]["rows"]]
    assert len(details) == len(rows) == len(records)
    for record, detail, row in zip(records, details, rows, strict=True):
        trajectory = record.trajectory
        assert detail["ids"] == trajectory.ids
        assert "".join(detail["texts"]) == record.prompt_text + trajectory.text
        assert len(detail["texts"]) == len(detail["ids"])
        spread = [origin for origin, length in detail["origins"] for _ in range(length)]
        assert [origin == "generated" for origin in spread] == [bool(bit) for bit in trajectory.mask]
        assert spread.count("prompt") == len(trajectory.prompt_ids)
        wanted = [round(p, 5) for p, bit in zip(trajectory.logprobs, trajectory.mask, strict=True) if bit]
        assert detail["logprobs"] == wanted
        assert sum(length for _, length in detail["versions"]) == len(wanted)
        assert [entry["call"]["code"] for entry in detail["calls"]] == [entry.call.code for entry in trajectory.calls]
        assert detail["violations"] == []
        assert (row["id"], row["sample"], row["reward"]) == (record.prompt.id, record.sample, record.reward)
        assert row["generated"] == sum(trajectory.mask)
        assert row["prompt"] + row["generated"] + row["injected"] == record.total_length
        assert row["errors"] == sum(bool(c.result and c.result.error) for c in trajectory.calls)


def test_what_the_certificate_says_stands_beside_the_record(tmp_path: Path) -> None:
    wrong = named(some()[1], "wrong", total_length=3)
    write_page([wrong], tmp_path / "p.html")
    held = data(tmp_path / "p.html")
    (detail,) = held["chunk-0"]
    assert any("total_length is 3" in text for text in detail["violations"])
    assert held["index"]["rows"][0][SUMMARY_COLUMNS.index("violations")] == len(detail["violations"])
    write_page([wrong], tmp_path / "q.html", check=False)
    assert data(tmp_path / "q.html")["index"]["checked"] is False


def test_nothing_of_a_record_is_markup_and_only_our_script_may_run(tmp_path: Path) -> None:
    write_page([hostile()], tmp_path / "bad.html", title=ATTACK)
    write_page(some(), tmp_path / "good.html", title="good")
    bad, good = Elements(tmp_path / "bad.html"), Elements(tmp_path / "good.html")
    assert bad.found == good.found  # not one element, not one attribute more
    assert bad.inside["style"] == good.inside["style"]
    assert bad.inside["script"][-1] == good.inside["script"][-1]
    policy = next(
        attributes["content"] for tag, attributes in bad.found if tag == "meta" and "http-equiv" in attributes
    )
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (bad.inside["script"][-1], bad.inside["style"][0])
    }
    assert policy is not None
    assert set(re.findall(r"'sha256-[^']+'", policy)) == hashes
    directives = {name: sources for name, *sources in (part.split() for part in policy.split(";"))}
    assert directives["default-src"] == ["'none'"]
    assert directives["img-src"] == ["data:"]
    assert "unsafe" not in policy
    runnable = [a for tag, a in bad.found if tag == "script" and a.get("type") != "application/octet-stream"]
    assert runnable == [{}]


def test_a_page_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    write_page(some(), tmp_path / "p.html")
    for tag, attributes in Elements(tmp_path / "p.html").found:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), tag


def test_a_page_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "p.html").write_text("old")

    def failing() -> Iterator[Record]:
        yield some()[0]
        raise ValueError

    with pytest.raises(ValueError):
        write_page(failing(), tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text() == "old"
    assert os.listdir(tmp_path) == ["p.html"]


def test_details_come_in_chunks_of_bounded_size(tmp_path: Path) -> None:
    records = [named(some()[1], f"n{index}") for index in range(200)]
    write_page(records, tmp_path / "p.html", check=False)
    held = data(tmp_path / "p.html")
    assert len(held) > 2
    assert [len(held[f"chunk-{index}"]) for index in range(len(held) - 1)] == held["index"]["chunks"]
    assert sum(held["index"]["chunks"]) == 200


def test_the_command(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r.jsonl") as writer:
        for record in some():
            writer.append(record)
    run = CliRunner().invoke
    done = run(main, ["view", str(tmp_path / "r.jsonl"), "--limit", "2"])
    assert (done.exit_code, "r.html: 2 rollouts" in done.output) == (0, True), done.output
    assert len(data(tmp_path / "r.html")["index"]["rows"]) == 2
    done = run(main, ["view", str(tmp_path / "r.jsonl"), str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "x.html")])
    assert len(data(tmp_path / "x.html")["index"]["rows"]) == 10
    same = run(main, ["view", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "r.jsonl")])
    assert (same.exit_code, "is one of the files to show" in same.output) == (2, True)
    missing = run(main, ["view", str(tmp_path / "missing.jsonl")])
    assert (missing.exit_code, "cannot be read" in missing.output) == (2, True)
    nowhere = run(main, ["view", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "no" / "x.html")])
    assert (nowhere.exit_code, "cannot be written" in nowhere.output) == (2, True)
