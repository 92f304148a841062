"""What pages list is what there is: public names, the schema of records, columns, rules, commands."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module

import pytest

import midstream as ms
from midstream.cli import main
from midstream.cli.config_file import options_of
from midstream.cli.frame import EXIT_CODES
from midstream.records import entries
from midstream.records.schema import Record
from midstream.records.table import write_table
from tests.docs import command_line
from tests.docs.samples import ROOT

API = (ROOT / "docs" / "api.md").read_text()
RECORDS = (ROOT / "docs" / "records.md").read_text()
PARTS: list[type[entries.Entry]] = [
    entries.PromptEntry,
    entries.MessageEntry,
    entries.MediaEntry,
    entries.StopEntry,
    entries.SamplingEntry,
    entries.CallEntry,
    entries.ResultEntry,
    entries.ErrorEntry,
    entries.ToolCallEntry,
    entries.ForkPointEntry,
    entries.LimitsEntry,
    entries.MarkupEntry,
    entries.FrameEntry,
    entries.TurnEntry,
    entries.SpecialEntry,
]
NAMED_BY_THE_PACKAGE_TOO = ("midstream.sandbox", "midstream.tools")


def documented(module: str) -> set[str]:
    return set(re.findall(rf"^::: {re.escape(module)}\.(\w+)$", API, re.MULTILINE))


MODULES = ["sandbox", "tools", "records", "serve", "testing", "observing", "telemetry"]


@pytest.mark.parametrize("module", [f"midstream.{name}" for name in MODULES])
def test_the_reference_has_the_public_names_of(module: str) -> None:
    assert documented(module) == set(import_module(module).__all__)


def test_the_reference_has_the_public_names_of_the_package() -> None:
    elsewhere = set().union(*(documented(module) for module in NAMED_BY_THE_PACKAGE_TOO))
    own = documented("midstream")
    assert own | (elsewhere & set(ms.__all__)) | {"__version__"} == set(ms.__all__)
    assert not own & elsewhere


def section(title: str) -> str:
    return re.split(r"^#+ .*$", RECORDS.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """The names in the first cells of a table, its head left out."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w[\w. -]*)`", row.split(" | ")[0])]


def test_the_schema_of_a_record() -> None:
    assert first_cells(section("A record")) == list(Record.__struct_fields__)
    assert first_cells(section("A segment")) == list(entries.SegmentEntry.__struct_fields__)
    assert first_cells(section("A call")) == list(entries.BlockEntry.__struct_fields__)


@pytest.mark.parametrize("entry", PARTS, ids=lambda entry: entry.__name__)
def test_the_parts_of_a_record(entry: type[entries.Entry]) -> None:
    text = RECORDS.split("## The schema", 1)[1].split("## Parquet", 1)[0]
    assert [name for name in entry.__struct_fields__ if f"`{name}`" not in text] == []


def test_the_columns_of_the_table(tmp_path: object) -> None:
    from pyarrow import parquet

    path = f"{tmp_path}/empty.parquet"
    write_table([], path)
    assert first_cells(section("Parquet")) == parquet.read_schema(path).names


def test_the_rules_that_check_names() -> None:
    source = ROOT / "src" / "midstream"
    files = [*(source / "records").glob("*.py"), source / "verifying.py", source / "teacher_forcing.py"]
    files.append(source / "cli" / "check.py")
    named = {name for file in files for name in re.findall(r"\bViolation\(\s*\"(\w+)\"", file.read_text())}
    said = RECORDS.split("The rules that `check` names are", 1)[1].split("[What a record", 1)[0]
    assert set(re.findall(r"`(\w+)`", said)) == named


def test_commands_and_exit_codes() -> None:
    page = command_line.PAGE.read_text()
    table = page.split("## Exit codes", 1)[0]
    assert {name.split()[0] for name in first_cells(table)} == set(main.commands)
    assert set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE)) == set(
        re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)
    )


def test_the_help_of_every_command() -> None:
    page = command_line.PAGE.read_text()
    assert [found[1] for found in command_line.SECTION.findall(page)] == list(main.commands)
    assert command_line.filled(page) == page, "python -m tests.docs.command_line puts it right"


def test_options_in_a_file() -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```$", command_line.PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert tomllib.loads(example).keys() <= options_of(main.commands["run"]).keys()
