"""Files into a session and out of it: within caps, within the working directory, and never by the host's own hand."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from midstream.errors import ConfigurationError, MidstreamError, ProtocolError, SandboxFileError
from midstream.sandbox import SandboxLimits, SandboxPool, Session, files
from midstream.sandbox.inside import files as inside
from midstream.sandbox.replay import PastBlock
from tests.sandbox.conftest import SHORT
from tests.sandbox.inner import FIND_WORKER
from tests.sandbox.test_lifecycle import kill_fork_server

EVERY_BYTE = bytes(range(256))


class TestThereAndBack:
    @pytest.mark.parametrize("size", [0, 1, 255, 51_840, 262_144, 262_145, 3_000_000])
    def test_content_comes_back_as_it_went(self, session: Session, size: int) -> None:
        data = (EVERY_BYTE * (size // 256 + 1))[:size]
        session.put("file.bin", data)
        assert session.run("import os\nos.path.getsize('file.bin')").text == str(size)
        assert session.get("file.bin") == data

    def test_code_reads_what_was_put_and_the_host_what_code_wrote(self, session: Session) -> None:
        session.put("table.csv", b"a,b\n1,2\n")
        assert session.run("import csv\nlist(csv.DictReader(open('table.csv')))").text == "[{'a': '1', 'b': '2'}]"
        session.run("with open('out.txt', 'w') as f: f.write('done é')")
        assert session.get("out.txt").decode() == "done é"

    def test_folders_on_the_way_are_made(self, session: Session) -> None:
        session.put(PurePosixPath("a") / "b" / "c.txt", bytearray(b"deep"))
        session.put("./a//b/d.txt", memoryview(b"too"))
        assert session.run("import os\nsorted(os.listdir('a/b'))").text == "['c.txt', 'd.txt']"
        assert session.get("a/b/d.txt") == b"too"

    def test_a_longer_file_is_replaced_whole(self, session: Session) -> None:
        session.put("file", b"x" * 1000)
        session.put("file", b"short")
        assert session.get("file") == b"short"

    def test_paths_do_not_follow_the_code_elsewhere(self, session: Session) -> None:
        session.run("import os\nos.mkdir('below')\nos.chdir('below')")
        session.put("file", b"1")
        assert session.run("os.listdir('.'), sorted(os.listdir('..'))").text == "([], ['below', 'file'])"
        assert session.get("file") == b"1"

    def test_small_frames_are_enough(self, level: str) -> None:
        limits = SandboxLimits(output_characters=256, argument_characters=256, image_bytes=0)
        with SandboxPool(isolation=level, preload=[], limits=limits) as pool, pool.session() as session:  # type: ignore[arg-type]
            session.put("file", EVERY_BYTE * 2000)
            assert session.get("file") == EVERY_BYTE * 2000

    async def test_the_same_for_asyncio(self, pool: SandboxPool) -> None:
        async def row(number: int) -> bytes:
            with await pool.session_async() as session:
                await session.put_async("in", str(number).encode() * 100_000)
                await session.run_async("open('out', 'wb').write(open('in', 'rb').read()[::-1])")
                return await session.get_async("out")

        contents = await asyncio.gather(*(row(number) for number in range(5)))
        assert contents == [str(number).encode() * 100_000 for number in range(5)]

    def test_the_session_is_untouched_by_it(self, session: Session) -> None:
        session.run("import random, os\nx = 1\nrandom.seed(3)")
        session.put("file", b"1")
        with pytest.raises(SandboxFileError):
            session.get("none")
        assert session.run("x, random.random()").text == "(1, 0.23796462709189137)"
        assert not session.run("1").state_lost


class TestRefused:
    @pytest.mark.parametrize(
        "path", ["", "/etc/passwd", "..", "../x", "a/../../x", "a/..", ".", "a/", "a\0b", "x" * 1025, 5, b"bytes", None]
    )
    def test_paths_that_name_no_file_in_the_working_directory(self, session: Session, path: Any) -> None:
        with pytest.raises(ConfigurationError, match="path="):
            session.put(path, b"")
        with pytest.raises(ConfigurationError, match="path="):
            session.get(path)

    @pytest.mark.parametrize("data", ["text", 5, None, [1]])
    def test_what_is_not_bytes(self, session: Session, data: Any) -> None:
        with pytest.raises(ConfigurationError, match="data: must be bytes"):
            session.put("file", data)

    def test_more_than_the_cap(self, level: str) -> None:
        limits = SandboxLimits(file_size=100_000)
        with SandboxPool(isolation=level, preload=[], limits=limits) as pool, pool.session() as session:  # type: ignore[arg-type]
            with pytest.raises(ConfigurationError, match="100001 bytes, where SandboxLimits allow a file of 100000"):
                session.put("file", b"x" * 100_001)
            session.put("file", b"x" * 100_000)
            assert len(session.get("file")) == 100_000

    def test_where_files_have_no_cap_the_directory_has(self) -> None:
        assert files.largest(SandboxLimits(file_size=None, working_directory=70_000)) == 70_000

    @pytest.mark.parametrize(
        ("path", "number"),
        [
            ("none", errno.ENOENT),
            ("none/below", errno.ENOENT),
            ("folder", errno.EISDIR),
            ("file/below", errno.ENOTDIR),
            ("n" * 300, errno.ENAMETOOLONG),
        ],
    )
    def test_what_cannot_be_got(self, session: Session, path: str, number: int) -> None:
        session.run("import os\nos.mkdir('folder')\nopen('file', 'w').close()")
        with pytest.raises(SandboxFileError) as caught:
            session.get(path)
        assert (caught.value.errno, caught.value.filename) == (number, path)
        assert os.strerror(number) in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, MidstreamError)

    def test_no_room(self) -> None:
        limits = SandboxLimits(working_directory=1 << 20)
        try:
            pool = SandboxPool(isolation="full", preload=[], limits=limits).start()
        except MidstreamError:
            pytest.skip("only a file system of its own has a size, and this machine has none to give")
        with pool, pool.session() as session:
            session.put("kept", b"1")
            with pytest.raises(SandboxFileError) as caught:
                session.put("large", b"x" * (2 << 20))
            assert caught.value.errno == errno.ENOSPC
            assert session.run("import os\nos.listdir()").text == "['kept']"

    def test_a_closed_session(self, pool: SandboxPool) -> None:
        session = pool.session()
        session.close()
        with pytest.raises(ProtocolError, match="closed"):
            session.get("file")


class TestLinks:
    def test_none_is_followed(self, tmp_path: Path) -> None:
        """Code cannot make any; where a layer is missing, it might."""
        (tmp_path / "secret").write_text("secret")
        work = tmp_path / "work"
        work.mkdir()
        (work / "link").symlink_to(tmp_path / "secret")
        (work / "folder").symlink_to(tmp_path)
        (work / "new").symlink_to(tmp_path / "made")
        for path in ("link", "folder/secret"):
            question = {"get": path, "offset": 0, "size": 100}
            assert inside.answer(str(work), question)["errno"] in (errno.ELOOP, errno.ENOTDIR)
        for path in ("new", "link", "folder/made"):
            question = {"put": path, "offset": 0, "data": "eA=="}
            assert inside.answer(str(work), question)["errno"] in (errno.ELOOP, errno.ENOTDIR)
        assert sorted(os.listdir(tmp_path)) == ["secret", "work"]
        assert (tmp_path / "secret").read_text() == "secret"

    def test_what_is_no_plain_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert inside.answer(str(tmp_path), {"get": "pipe", "offset": 0, "size": 9}) == {"errno": errno.EINVAL}


class TestHostile:
    """The session answers what it likes; the host believes none of it."""

    @pytest.mark.parametrize(
        "answer",
        [
            "{'nonce': n, 'file': {'data': 'x' * 5, 'end': True}}",
            "{'nonce': n, 'file': {'data': 'QUJD' * 200_000, 'end': True}}",
            "{'nonce': n, 'file': {'data': 5}}",
            "{'nonce': n, 'file': {'errno': 'ENOENT'}}",
            "{'nonce': n, 'file': {'errno': 99999}}",
            "{'nonce': n, 'file': {'errno': -1}}",
            "{'nonce': n, 'file': []}",
            "{'nonce': n}",
            "{'nonce': 'other', 'file': {'data': '', 'end': True}}",
            "{'nonce': n, 'call': 1, 'tool': 'f', 'arguments': '[[],{}]'}",
            "{}",
        ],
    )
    def test_lies_end_the_session_only(self, short_pool: SandboxPool, answer: str) -> None:
        lie = (
            "def receive(plain=worker._channel.receive):\n    request = plain()\n    if 'file' in request:\n"
            f"        n = request['nonce']\n        worker._channel.send({answer})\n    return request\n"
            "worker._channel.receive = receive"
        )
        with short_pool.session() as other, short_pool.session() as session:
            session.run("kept = 1")
            session.run(FIND_WORKER + lie)
            with pytest.raises(SandboxFileError) as caught:
                session.get("file")
            assert caught.value.errno == errno.EIO
            assert not session.alive
            # The block that lies is not run again.
            assert session.run("kept").text.endswith("\n1")
            session.put("file", b"2")
            assert session.get("file") == b"2"
            assert other.run("1").text == "1"

    def test_a_file_without_end_is_cut_off(self, level: str) -> None:
        limits = dataclasses.replace(SHORT, file_size=1 << 20)
        endless = (
            "import time\ndef send(frame, plain=worker._channel.send):\n    if 'file' in frame:\n"
            "        frame['file'] = {'data': 'QUJD' * 10_000}\n    plain(frame)\nworker._channel.send = send"
        )
        with SandboxPool(isolation=level, preload=[], limits=limits) as pool, pool.session() as session:  # type: ignore[arg-type]
            session.run(FIND_WORKER + endless)
            with pytest.raises(SandboxFileError, match="larger than 1048576 bytes"):
                session.get("file")

    def test_no_answer(self, short: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "_SECONDS", 0.1)
        short.run(
            FIND_WORKER + "worker._channel.send = lambda f, p=worker._channel.send: None if 'file' in f else p(f)"
        )
        with pytest.raises(SandboxFileError, match="gave no answer in time"):
            short.get("file")
        assert not short.alive

    def test_dying_meanwhile(self, short: Session) -> None:
        short.run(FIND_WORKER + "import os\nworker._channel.send = lambda f, p=worker._channel.send: "
                  "os._exit(1) if 'file' in f else p(f)")  # fmt: skip
        with pytest.raises(SandboxFileError, match="the interpreter ended meanwhile"):
            short.put("file", b"1")


class TestLostAndFound:
    def test_what_was_put_is_there_again(self, short: Session) -> None:
        short.put("a/file", b"1" * 300_000)
        short.run("first = open('a/file').read()[:3]")
        short.put("a/file", b"2")
        short.run("import os; os._exit(1)")
        result = short.run("first, open('a/file').read()")
        assert (result.text, result.state_lost) == ("('111', '2')", False)

    def test_also_when_the_fork_server_dies(self, level: str) -> None:
        with SandboxPool(isolation=level, preload=[]) as pool, pool.session() as session:  # type: ignore[arg-type]
            session.put("file", b"1")
            kill_fork_server(pool)
            assert session.get("file") == b"1"
            kill_fork_server(pool)
            session.put("other", b"2")
            assert session.run("open('file').read(), open('other').read()").text == "('1', '2')"

    def test_what_cannot_be_put_again_is_said(self, short: Session) -> None:
        short.run("import os\nx = 3\nos.mkdir('folder')")
        short._interpreter.past.append(PastBlock.of_file("folder", b"where a folder is now"))
        short.run("os._exit(1)")
        result = short.run("x")
        assert result.state_lost
        assert result.text.startswith("[The interpreter was restarted. The earlier blocks were run again, but")
        assert result.text.endswith("\n3")

    def test_into_a_session_that_has_no_interpreter_yet(self, pool: SandboxPool) -> None:
        with pool.session() as first:
            history = [("x = 5", first.run("x = 5"))]
        with pool.session(history=history) as session:
            assert not session.alive
            session.put("file", b"1")
            assert session.run("x, open('file').read()").text == "(5, '1')"
