"""What trainers' workers run rows with: an engine, sandboxes and a file of its own for each."""

from __future__ import annotations

import asyncio
from pathlib import Path

import midstream as ms
from midstream.integrations.hosting import Host, RolloutSettings
from midstream.records import read_records
from tests.vocabularies import tokenizer


def test_hosts_of_one_process_have_a_file_each(tmp_path: Path) -> None:
    class Settings(RolloutSettings):
        save_to = tmp_path

    said = {"one": " <code>1 + 1</code> end", "two": " done"}
    hosts = [Host(ms.ScriptedEngine(tokenizer("o200k"), {name: text}), Settings) for name, text in said.items()]

    async def run() -> None:
        prompts = [ms.Prompt(text=name, id=name) for name in said]
        await asyncio.gather(
            *(host.rollout(prompt, ms.Sampling()) for host, prompt in zip(hosts, prompts, strict=True))
        )

    asyncio.run(run())
    for host in hosts:
        host.close()
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    assert {record.prompt.id for path in files for record in read_records(path)} == set(said)
