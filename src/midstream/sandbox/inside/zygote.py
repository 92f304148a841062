"""The fork server: imports what sessions will want, once, and forks a process for each session.

It serves one socket, on which the host asks for sessions and hands over their channels, and never reads
what a session writes. When the host goes, by whatever death, every session and folder goes with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from midstream.sandbox.inside import confinement, folders, grounds, inspection, kin, preload, trees, warden
from midstream.sandbox.inside.deaths import Deaths
from midstream.sandbox.inside.worker import CHANNEL, Worker, adapt_standard_library
from midstream.sandbox.isolation import cgroups, kernel, landlock, roots
from midstream.sandbox.protocol import encode

_REQUEST_BYTES = 1 << 18


class StartError(Exception):
    """The fork server cannot serve; ``kind`` says whose matter it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(slots=True)
class _Child:
    channel: socket.socket | None
    folder: str | None
    group: cgroups.Group | None = None
    kills: int = 0
    """See :meth:`Deaths.kills`: at its birth."""


def serve(control_descriptor: int, host_descriptor: int) -> NoReturn:
    """Serve until the host is gone. Never returns."""
    control = socket.socket(fileno=control_descriptor)
    _yield_to_the_host()
    try:
        settings = json.loads(control.recv(_REQUEST_BYTES))
        server = _Zygote(control, host_descriptor, settings)
    except confinement.LayerMissing as error:
        _fail(control, "isolation", str(error))
    except confinement.ClonesImpossible as error:
        _fail(control, "clones", str(error))
    except preload.PreloadError as error:
        _fail(control, "preload", str(error))
    except BaseException:  # noqa: BLE001  # the host tells it, whatever it is
        _fail(control, "internal", traceback.format_exc())
    server.loop()


def _yield_to_the_host() -> None:
    """Let no session take the processor from the host in the middle of its work.

    The kernel takes who writes to a socket for one that is about to wait, and wakes the reader on the writer's
    processor, in the writer's place. The host has many to write to. A batch process waits there for its turn, or is
    run on another processor that has nothing to do.
    """
    with contextlib.suppress(OSError):  # where a container's filter refuses it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _fail(control: socket.socket, kind: str, message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        control.send(json.dumps({"failed": kind, "message": message[-50_000:]}).encode())
    os._exit(1)


class _Zygote:
    def __init__(self, control: socket.socket, host_descriptor: int, settings: dict[str, Any]) -> None:
        self._control = control
        self._host = host_descriptor
        self._settings = settings
        self._children: dict[int, _Child] = {}
        self._deaths = Deaths(settings["limits"])  # while the host's /proc is still to be seen
        self._count = 0
        self._group: cgroups.Group | None = None  # of the session that is being started
        _raise_descriptor_limit()
        self._wake_source, self._wake_sink = os.pipe()
        for descriptor in (self._wake_source, self._wake_sink):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_sink, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        preloaded = preload.load(settings["preload"])
        adapt_standard_library()
        self._confinement = confinement.Confinement(settings)
        # With namespaces, working directories are in memory, and gone with their sessions.
        self._base = None if self._confinement.namespaces else folders.Base(settings["folder"])
        self._itself = None  # what the wardens without a namespace see this process's end by
        if self._base is not None and self._confinement.clones:
            self._itself = os.pidfd_open(os.getpid())
            # A family that has lost its warden comes here.
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        self._worker = self._make_worker()
        gc.collect()
        gc.freeze()
        self._send({"ready": self._confinement.report(), "preloaded": preloaded, "process": os.getpid()})

    def _make_worker(self) -> Worker:
        limits = self._settings["limits"]
        return Worker(
            {
                "output_characters": limits["output_characters"],
                "argument_characters": limits["argument_characters"],
                "image_bytes": limits["image_bytes"],
                "capabilities": self._confinement.capabilities,
                "rooted": self._confinement.namespaces,
            }
        )

    def _send(self, message: dict[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())

    def loop(self) -> NoReturn:
        """Wait for requests, deaths and the end of the host."""
        poll = select.poll()
        for descriptor in (self._control.fileno(), self._host, self._wake_source):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake_source in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_source, 4096)
                self._reap()
            if self._host in ready:
                self._end()
            if self._control.fileno() in ready:
                self._serve_request()

    def _serve_request(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, _REQUEST_BYTES, 1)
        except OSError:
            self._end()
        if not data or not descriptors:
            self._end()
        channel = socket.socket(fileno=descriptors[0])
        try:
            self._spawn(channel)
        except OSError as error:
            with contextlib.suppress(OSError):
                channel.send(encode({"failed": f"cannot start a session: {error}"}))
            channel.close()

    def _spawn(self, channel: socket.socket) -> None:
        index = self._count
        self._count += 1
        number = self._confinement.identity.number(index)
        clones = self._confinement.clones
        folder = None
        if self._base is not None:
            folder = self._base.make_passage(str(index)) if clones else self._base.make(str(index), number)
        kills = self._deaths.kills()
        self._group = None
        try:
            self._group = self._make_group(str(index))
            process = self._confinement.fork()
        except OSError:
            self._remove(folder)
            self._dissolve(self._group)
            raise
        if process == 0:
            if clones:
                self._become_warden(channel, folder, number)
            self._become_session(channel, folder, number)
        if clones:  # all else is between the host and the warden
            self._children[process] = _Child(None, folder, self._group)
            channel.close()
            return
        self._children[process] = _Child(channel, folder, self._group, kills)
        pidfd = os.pidfd_open(process)
        try:
            # The session writes to the same channel. Either message may come first.
            socket.send_fds(channel, [encode({"started": process, "folder": folder})], [pidfd])
        except OSError:
            os.kill(process, signal.SIGKILL)
        finally:
            os.close(pidfd)

    def _become_warden(self, channel: socket.socket, folder: str | None, number: int | None) -> NoReturn:
        """In the child: start the session's process, and watch over it and its clones."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            ground, kept = self._settle(folder, number)
            place = ground.first()
            its_warden = os.getpid()
            ours, theirs = socket.socketpair()
            process = os.fork()
            if process == 0:
                self._become_session(channel, None, number, place, theirs, its_warden)
            theirs.close()
            _, descriptors, _, _ = socket.recv_fds(ours, 64, 1)
            ours.close()
            if descriptors:  # else the session has said what failed
                host, hosts_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                kept |= {channel.fileno(), host.fileno(), hosts_end.fileno(), descriptors[0]}
                if isinstance(place, roots.Root):
                    kept.add(place.descriptor)
                _close_all_but(kept)
                base = sum(1 << capability for capability in self._confinement.capabilities)
                dormant = sum(1 << capability for capability in self._confinement.dormant)
                told = kin.Settings(number, self._settings["limits"], effective=base, permitted=base | dormant)
                family = warden.Warden(told, ground, descriptors[0], host, self._itself)
                with hosts_end:
                    family.add(process, channel, place, [hosts_end.fileno()])
                family.loop()
        except BaseException:  # noqa: BLE001  # the host tells it, and nothing of this process may go on
            with contextlib.suppress(OSError):
                channel.send(encode({"failed": traceback.format_exc()[-50_000:]}))
        os._exit(1)

    def _settle(self, folder: str | None, number: int | None) -> tuple[grounds.Ground[Any], set[int]]:
        """In a warden: where its family is to live, and the descriptors that this takes."""
        if folder is None:
            # Process 1 of its namespace, which ends with it.
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            roots.prepare()
            limits = self._settings["limits"]
            return grounds.Roots(number, limits["working_directory"], limits["files"]), set()
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        assert self._itself is not None
        levels, fence = self._confinement.generations, self._confinement.fence
        return trees.Trees(folder, number, levels, fence), {*self._confinement.descriptors, self._itself}

    def _become_session(
        self,
        channel: socket.socket,
        folder: str | None,
        number: int | None,
        place: roots.Root | trees.Tree | None = None,
        to_warden: socket.socket | None = None,
        its_warden: int = 0,
    ) -> NoReturn:
        """In the child: shut everything out, then serve the host's requests."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            if self._group is not None:
                self._group.enter()
            if place is None:
                path = self._confinement.enter_folder(folder, number)
            else:
                path = self._confinement.enter_place(place)
            ruleset = self._confinement.ruleset(self._confinement.working_area(path, place))
            to_warden = _keep_only(channel.detach(), ruleset, to_warden)
            for name in ("HOME", "TMPDIR", "PWD"):
                os.environ[name] = path
            tempfile.tempdir = None
            sys.path.insert(0, "")
            sys.dont_write_bytecode = True
            self._worker.open()
            self._confinement.enforce(ruleset, number, to_warden, its_warden)
            self._worker.serve()
        except BaseException:  # noqa: BLE001  # the host tells it, and nothing of this process may go on
            with contextlib.suppress(OSError):
                os.write(CHANNEL, encode({"failed": traceback.format_exc()[-50_000:]}))
        os._exit(1)

    def _reap(self) -> None:
        while self._children or folders.Base.removers:
            try:
                process, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            child = self._children.pop(process, None)
            if status:
                self._kill_orphans()
            if child is None:
                folders.Base.removers.discard(process)
                continue
            if child.channel is not None:
                # So that the host hears how it ended, and then the end of the channel.
                killed = child.group is not None and child.group.kills() > 0
                self._deaths.tell(child.channel, status, used.ru_utime + used.ru_stime, child.kills, killed)
                child.channel.close()
            self._remove(child.folder)
            self._dissolve(child.group)

    def _make_group(self, name: str) -> cgroups.Group | None:
        groups, limit = self._confinement.groups, self._settings["limits"]["resident_memory"]
        return None if groups is None else groups.make(name, limit)

    def _dissolve(self, group: cgroups.Group | None) -> None:
        if group is not None and self._confinement.groups is not None:
            self._confinement.groups.remove(group)

    def _kill_orphans(self) -> None:
        """Kill what was a warden's, which has died without doing that itself."""
        if self._itself is None:
            return
        for process in inspection.children(os.getpid()) - set(self._children) - folders.Base.removers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _remove(self, folder: str | None) -> None:
        if self._base is not None and folder is not None:
            self._base.remove(folder)

    def _end(self) -> NoReturn:
        signal.set_wakeup_fd(-1)
        for process in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        while True:
            self._kill_orphans()
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        if self._base is not None:
            self._base.remove_all()
        if self._confinement.groups is not None:
            for child in self._children.values():
                self._dissolve(child.group)
            self._confinement.groups.close()
        os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    first = 0
    for descriptor in sorted(kept):
        if descriptor > first:
            kernel.system_call("close_range", first, descriptor - 1, 0)
        first = descriptor + 1
    kernel.system_call("close_range", first, 0xFFFFFFFF, 0)


def _keep_only(
    channel: int, ruleset: landlock.Ruleset | None, its_warden: socket.socket | None
) -> socket.socket | None:
    """Close all descriptors but the channel, the ruleset and what leads to the warden; 0 to 2 lead nowhere."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    first_free = CHANNEL + 1
    # By way of high numbers: either may stand where the other is to go.
    spare_channel = fcntl.fcntl(channel, fcntl.F_DUPFD, 64)
    spare_warden = None if its_warden is None else fcntl.fcntl(its_warden.detach(), fcntl.F_DUPFD, 64)
    if ruleset is not None:
        spare_ruleset = fcntl.fcntl(ruleset.descriptor, fcntl.F_DUPFD, 64)
        ruleset.descriptor = first_free
        os.dup2(spare_ruleset, first_free)
        first_free += 1
    os.dup2(spare_channel, CHANNEL)
    kept = None
    if spare_warden is not None:
        os.dup2(spare_warden, first_free)
        kept = socket.socket(fileno=first_free)
        first_free += 1
    kernel.system_call("close_range", first_free, 0xFFFFFFFF, 0)
    return kept


def _raise_descriptor_limit() -> None:
    # One descriptor per living session.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
