"""The process that watches over one session and its clones, and the only one that can let them be cloned.

It is outside of all that confines the session; with namespaces, it is process 1 of one. Snippets cannot
fork: the kernel stops whoever tries and asks the warden, which refuses, unless the host has just asked for
clones of that very process. A clone is born with all that its parent has. Before it runs on, it must have
moved to a place of its own (see :mod:`midstream.sandbox.inside.grounds`), and the warden, having looked at it
from outside, takes every descriptor from it. What does not get so far in time is killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
from typing import Any, NoReturn

from midstream.sandbox.inside import copying, inspection
from midstream.sandbox.inside.asking import Asking, readable, says
from midstream.sandbox.inside.cloning import Hello
from midstream.sandbox.inside.deaths import Deaths
from midstream.sandbox.inside.grounds import Ground, Place, Refused
from midstream.sandbox.inside.kin import Allowance, Member, Newborn, Settings, end
from midstream.sandbox.inside.worker import CHANNEL
from midstream.sandbox.isolation.supervision import Listener, Waiting
from midstream.sandbox.protocol import encode

MOST_CLONES = 32
"""How many clones one request can ask for."""

_REQUEST_BYTES = 1 << 12
_PLAN_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031


class Warden:
    """Serves one family until it is extinct, or the host lets go of it."""

    def __init__(
        self, settings: Settings, ground: Ground[Any], listener: int, host: socket.socket, zygote: int | None
    ) -> None:
        self._settings = settings
        self._ground = ground
        self._zygote = zygote
        self._listener = Listener(listener)
        self._host = host
        self._members: dict[int, Member] = {}
        self._asking = Asking(self._listener, self._members)
        self._allowance = Allowance(settings, ground)
        self._deaths = Deaths(settings.limits)
        self._newborn: list[Newborn] = []
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def add(self, process: int, channel: socket.socket, place: Place, passed: list[int]) -> Member:
        """Take in a process and tell the host. ``passed``: descriptors for the host, after the pidfd."""
        member = Member(process, os.pidfd_open(process), channel, place, kills=self._deaths.kills())
        self._members[process] = member
        with contextlib.suppress(OSError):  # the host may be gone
            told = {"started": process, "folder": place.shared}
            socket.send_fds(channel, [encode(told)], [member.pidfd, *passed])
        return member

    def loop(self) -> NoReturn:
        """Serve. Its end is the end of every process of the family."""
        try:
            self._serve()
        finally:
            self._ground.close()
            os._exit(0)

    def _serve(self) -> None:
        while self._members:
            poll = select.poll()
            watched = [self._host.fileno(), self._listener.descriptor, *(m.pidfd for m in self._members.values())]
            if self._zygote is not None:
                watched.append(self._zygote)
            for descriptor in watched:
                poll.register(descriptor, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(0 if self._asking.anybody else None)}
            if self._zygote in ready:
                return
            for member in list(self._members.values()):
                if member.pidfd in ready:
                    self._bury(member)
            if self._listener.descriptor in ready:
                self._asking.hear()
            # Whoever asks leave is answered only when the host has no request waiting: it may be for them.
            if not readable(self._host.fileno()):
                self._asking.decide_held()
            elif not self._serve_request():
                return

    def _serve_request(self) -> bool:
        """Whether the host is still there."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._host, _REQUEST_BYTES, MOST_CLONES)
        except OSError:
            return False
        if not data:
            return False
        channels = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        ((what, process),) = json.loads(data).items()
        member = self._members.get(process)
        if member is None:
            _tell(channels, "its process is gone")
        elif what == "rollback":
            self._roll_back(member)
        else:
            self._fork(member, channels, checkpoint=what == "checkpoint")
        return True

    def _bury(self, member: Member) -> None:
        """Tell the host how a member ended, and forget it."""
        status = None
        with contextlib.suppress(OSError, ValueError, IndexError), self._ground.acting():
            status = inspection.exit_status(member.process)
        spent = self._allowance.spent(member)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # also those whose parent it was
                pass
        del self._members[member.process]
        for other in self._members.values():
            if other.copy == member.process:
                other.copy = None  # the number may come again
        self._deaths.tell(member.channel, status, spent, member.kills)
        member.channel.close()
        os.close(member.pidfd)
        with contextlib.suppress(OSError):
            member.place.remove()

    # -- cloning

    def _fork(self, parent: Member, channels: list[socket.socket], *, checkpoint: bool) -> None:
        waiting_for_others = list(channels)
        try:
            members = self._members.values()
            self._allowance.make_room_for_threads(members, len(channels), checkpoint=checkpoint)
            for channel in channels:
                self._clone(parent, channel, checkpoint=checkpoint)
                waiting_for_others.remove(channel)
        except Refused as refusal:
            _tell(waiting_for_others, str(refusal))
        except OSError as error:
            _tell(waiting_for_others, f"no clone can be made: {error}")
        try:
            done = self._part(parent, follows=self._ground.follows and not checkpoint)
            # From here on the parent stands still. What has escaped it would have all that it had.
            self._kill_strangers()
        except Refused as refusal:
            done = None
            self._bury_killed(parent)
            try:
                self._kill_strangers()
            except Refused as trouble:
                self._abandon_newborn(str(trouble))
            if checkpoint:
                self._abandon_newborn(str(refusal))
        standing = False
        while self._newborn:
            clone = self._newborn.pop(0)
            standing = self._set_free(parent, clone, exactly=checkpoint) and checkpoint
        if standing:
            parent.standing = done
        elif done is not None:
            self._listener.answer(done)

    def _part(self, parent: Member, *, follows: bool) -> Waiting:
        """Where the parent has come to its end of the matter, out of reach of its clones' places."""
        process = parent.process
        done = self._from(process, process, Hello.DONE, "it did not come back")
        if not self._newborn or not follows:
            return done
        try:
            self._ground.part(parent.place)
            self._listener.answer(done, value=self._listener.give(done, self._null))
            done = self._from(process, process, Hello.MOVED, "it did not come along", parent.place)
            if not self._ground.has_parted(process, parent.place):
                raise Refused("it did not come along")
            for number in self._ground.outside(process, parent.place):
                self._listener.give(done, self._null, number)
        except OSError as error:
            raise Refused(f"it did not come along: {error}") from None
        return done

    def _bury_killed(self, member: Member) -> None:
        """Kill a member that is in the way."""
        end(member.process)
        if member.process in self._members:
            self._bury(member)

    def _roll_back(self, parent: Member) -> None:
        """Kill the copy of a member that stands still, and let that go on."""
        copy = self._members.get(parent.copy) if parent.copy is not None else None
        if copy is not None:
            end(copy.process)
            parent.spent += inspection.processor_seconds(copy.process)
            self._allowance.bound_processor_time(parent)
            self._bury(copy)  # before its parent lets go of it, and of how it ended
        waiting, parent.standing, parent.copy = parent.standing, None, None
        if waiting is None:
            return
        value = 0
        try:
            parent.place, moved = self._ground.take_back(parent.place)
            if moved:
                value = self._tell_plan(waiting, {**(parent.plan or {}), "home": parent.place.home})
        except OSError:  # it cannot go on with files that are not its own
            self._bury_killed(parent)
        else:
            self._listener.answer(waiting, value=value)

    def _clone(self, parent: Member, channel: socket.socket, *, checkpoint: bool) -> None:
        process = parent.process
        asking = self._asking.next(
            lambda it: it.process == process and (it.calls("clone") or says(it, Hello.DONE)),
            process,
            "it did not fork",
        )
        if not asking.calls("clone"):
            self._asking.hold(asking)
            raise Refused("its process could not be forked")
        fresh: Place | None = None
        try:
            plan = self._examine(parent, exactly=checkpoint)
            if checkpoint:
                place, still = self._ground.stand_in(parent.place)
            else:
                place, still = self._ground.prepare(parent.place), parent.place
            fresh = still if place is parent.place else place
            self._copy_files(parent.place, fresh)
            self._listener.proceed(asking)
        except BaseException:
            self._listener.answer(asking, error=errno.EAGAIN)
            self._discard(fresh)
            raise
        try:
            waiting = self._settle(parent, place)
        except BaseException:
            self._kill_strangers()
            self._discard(fresh)
            raise
        self._newborn.append(Newborn(waiting, place, still, fresh, plan, channel))

    def _examine(self, parent: Member, *, exactly: bool) -> dict[str, Any]:
        if self._allowance.is_spent(parent):
            raise Refused("it has used up its processor time")
        if not exactly:  # a block goes on without its checkpoint, and need not wait
            inspection.await_leaving_threads(parent.process)
        with self._ground.acting():
            reason = inspection.why_not_cloned(parent.process, self._ground.is_written_to)
            if reason is not None:
                raise Refused(reason)
            if exactly and inspection.dead_ends(parent.process, CHANNEL):
                raise Refused("its code has pipes or sockets open")
            plan = inspection.plan(parent.process, CHANNEL)
        if plan is None:
            raise Refused("its code has a file open that has been deleted")
        if len(json.dumps(plan)) > _PLAN_BYTES:
            raise Refused("the names of its open files are too long")
        return plan

    def _copy_files(self, source: Place, target: Place) -> None:
        limits = self._settings.limits
        room = copying.Room(limits["working_directory"], limits["files"])
        try:
            copying.copy_tree(source.files, target.files, self._settings.number, room)
        except copying.CannotCopy as error:
            raise Refused(str(error)) from None

    def _settle(self, parent: Member, place: Place) -> Waiting:
        """Lead a clone from its birth to where it is nobody's but its own."""
        born = self._asking.next(self._is_birth, parent.process, "its clone did not report")
        process = born.process
        folder = place.open()
        try:
            self._listener.answer(born, value=self._listener.give(born, folder))
        finally:
            os.close(folder)
        waiting = self._from(process, parent.process, Hello.MOVED, "its clone did not move", place)
        self._inspect(process, place)
        with self._ground.acting():
            opened = inspection.open_files(process)
        for number in opened:
            self._listener.give(waiting, self._null, number)
        return waiting

    def _from(self, process: int, parent: int, what: Hello, otherwise: str, place: Place | None = None) -> Waiting:
        """Where a process says ``what``; on its way to ``place`` it is granted what it needs for that."""
        while True:
            waiting = self._asking.next(lambda it: it.process == process, parent, otherwise)
            if says(waiting, what):
                return waiting
            if place is None or not self._ground.lead(self._listener, waiting, place):
                self._asking.decide(waiting)

    def _set_free(self, parent: Member, clone: Newborn, *, exactly: bool) -> bool:
        """Let a clone open its files again, and go on; whether it does."""
        process, home = clone.waiting.process, clone.place.home
        try:
            self._ground.open_up(clone.place)
            self._listener.give(clone.waiting, clone.channel.fileno(), CHANNEL)
            told = self._tell_plan(clone.waiting, {**clone.plan, "home": home})
            self._listener.answer(clone.waiting, value=told)
            waiting = self._from(process, parent.process, Hello.REOPENED, "its clone did not open its files")
            with self._ground.acting():
                if exactly and inspection.plan(process, CHANNEL) != clone.plan:
                    raise Refused("its code has a file open that cannot be opened again")
            member = self.add(process, clone.channel, clone.place, [])
            member.spent = self._allowance.spent(parent)
            self._allowance.bound_processor_time(member)
        except (Refused, OSError) as error:  # it may have been killed meanwhile
            end(process)
            self._discard(clone.fresh)
            _tell([clone.channel], str(error) if isinstance(error, Refused) else f"no clone can be made: {error}")
            return False
        if exactly:
            parent.place, parent.plan, parent.copy = clone.still, clone.plan, process
        self._listener.answer(waiting)
        return True

    def _tell_plan(self, waiting: Waiting, plan: dict[str, Any]) -> int:
        """Give a waiting process a plan to read; its descriptor there."""
        encoded = json.dumps(plan).encode()
        source, sink = os.pipe()
        try:
            with os.fdopen(sink, "wb") as pipe:
                _fit(sink, len(encoded))
                pipe.write(encoded)
            return self._listener.give(waiting, source)
        finally:
            os.close(source)

    def _abandon_newborn(self, reason: str) -> None:
        newborn, self._newborn = self._newborn, []
        for clone in newborn:
            end(clone.waiting.process)
            self._discard(clone.fresh)
        _tell([clone.channel for clone in newborn], reason)

    def _is_birth(self, waiting: Waiting) -> bool:
        return says(waiting, Hello.BORN) and waiting.process not in self._known()

    def _known(self) -> set[int]:
        return {*self._members, *(clone.waiting.process for clone in self._newborn)}

    def _inspect(self, process: int, place: Place) -> None:
        """Whether a clone, stopped, has nothing left of its parent's but copied memory and descriptors."""
        seen = inspection.status(process)
        in_place = (
            int(seen["Tgid"]) == process
            and int(seen["CapEff"], 16) == self._settings.effective
            and int(seen["CapPrm"], 16) == self._settings.permitted
            and self._ground.has_arrived(process, place)
        )
        if not in_place:
            raise Refused("its clone did not move to a place of its own")
        with self._ground.acting():
            reason = inspection.why_not_cloned(process, self._ground.is_written_to)
        if reason is not None:
            raise Refused(reason)

    def _kill_strangers(self) -> None:
        for process in self._ground.strangers(self._known()):
            if not end(process):
                raise Refused("a process that is none of its clones cannot be killed")

    def _discard(self, place: Place | None) -> None:
        if place is not None:
            with contextlib.suppress(OSError):
                self._ground.discard(place)


def _tell(channels: list[socket.socket], reason: str) -> None:
    for channel in channels:
        with channel, contextlib.suppress(OSError):
            channel.send(encode({"refused": reason}), socket.MSG_DONTWAIT)


def _fit(pipe: int, size: int) -> None:
    import fcntl

    if size > 1 << 15:
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, max(size, 1 << 16))
