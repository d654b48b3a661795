# SPDX-License-Identifier: LGPL-2.1-or-later
"""The thread that tells producers `restore` before khod has started, and what it leaves to khod."""

import errno
import json
import os
import select
import socket
import threading
from contextlib import suppress

from khod.abi.peercred import peer_credentials
from khod.early.claims import EarlyClaim, read_claims
from khod.early.files import ArrivedOtherwise, take_files
from khod.handover.directory import FILE_NAME, lock_directory
from khod.producers.cgroup import unit_of
from khod.systemd.notification import send_descriptor
from khod.wire import FIRST_SERIAL, PRODUCER, PRODUCER_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from khod.early.claims import Kernel

NOTE_NAME = "early-restore"
"""A file in memory (/run) with the names of the producers, each written before it is told, and after its files were
compared: what a later khod of this boot reads of them, the producer may have changed."""
MAX_CLIENTS = 64
"""Connections that are taken; more of them wait for khod."""
MAX_OPEN = 1024
"""Descriptors of files that are taken ahead: an eighth of LimitNOFILE= of khod's unit."""
PEEK_BYTES = 16 << 10
MAX_REPLY_BYTES = 16 << 10
"""What the socket of a client that was told nothing yet takes at once; khod sends what is longer."""
RETRY_MS = 100
"""Until /dev/liveupdate is tried again while PID 1 has it."""
STOP_SECONDS = 5.0


class EarlyClient:
    """A connection that was accepted. Nothing was read from it but what stands here."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.register = b""
        """Its call of Register, b"" if that was not answered."""
        self.is_told = False
        """Whether its call of Next was answered with `restore`, under FIRST_SERIAL."""
        self.claim: EarlyClaim | None = None


class EarlyRestore:
    """Serves the producers of these claims until `stop`.

    `passed` are the descriptors from the service manager's store, by name; `note` is the path of the note. The thread
    does not enter khod's AppArmor profile, which is seldom loaded by then: a try would be a denial in the log. It ends
    when khod takes over, and opens nothing by a name from others.
    """

    def __init__(
        self, claims: list[EarlyClaim], listening: int, passed: "Mapping[str, int]", kernel: "Kernel", note: str
    ) -> None:
        self._claims = {claim.name: claim for claim in claims}
        """Those that nobody was given yet."""
        self._untaken = [claim for claim in claims if claim.files]
        self._passed = passed
        self._kernel = kernel
        self._note = note
        self._listening = socket.socket(fileno=os.dup(listening))
        self._listening.setblocking(False)
        self._clients: dict[int, EarlyClient] = {}
        self._sessions: dict[str, int] = {}
        self._keep_late: Callable[[str, int], object] | None = None
        self._waking, self._wake = socket.socketpair()
        self._poll = select.poll()
        self._lock = threading.Lock()
        """Of what is sent and noted in clients, and of `_is_stopped`: afterwards nothing is."""
        self._is_stopped = False
        self._is_device_busy = False
        self._thread = threading.Thread(target=self._run, name="early", daemon=True)
        self._thread.start()

    def stop(self, keep: "Callable[[str, int], object]") -> list[EarlyClient]:
        """End the thread and return the connections, which are the caller's.

        Those whose Register was answered come first: no other may be registered under their names before. `keep` is
        given each session that was retrieved, by its name; in the thread itself if the kernel answers later than
        STOP_SECONDS.
        """
        self._wake.close()
        self._thread.join(STOP_SECONDS)
        with self._lock:
            self._is_stopped, self._keep_late = True, keep
            sessions, self._sessions = self._sessions, {}
            clients = sorted(self._clients.values(), key=lambda client: not client.register)
        for name, session in sessions.items():
            keep(name, session)
        return clients

    def _run(self) -> None:
        try:
            self._poll.register(self._listening, select.POLLIN)
            self._poll.register(self._waking, select.POLLIN)
            while self._claims:
                for fd, _ in self._poll.poll(self._pause_ms()):
                    if fd == self._waking.fileno() or self._is_stopped:
                        return
                    if fd == self._listening.fileno():
                        self._accept_client()
                    else:
                        self._hear_client(self._clients[fd])
                self._take_next()
        finally:
            self._waking.close()
            self._listening.close()
            for claim in self._claims.values():
                _close_files(claim)

    def _pause_ms(self) -> int | None:
        """How long to wait for a call: files are taken meanwhile, because the producers take longer to start."""
        if not self._may_take_ahead():
            return None
        return RETRY_MS if self._is_device_busy else 0

    def _may_take_ahead(self) -> bool:
        """Whether there are files to take before their producer asks; khod needs descriptors to start."""
        taken = sum(len(claim.fds or ()) for claim in self._claims.values())
        return bool(self._untaken) and taken + len(self._untaken[0].files) <= MAX_OPEN

    def _take_next(self) -> None:
        if self._may_take_ahead():
            self._take_files(self._untaken.pop(0))

    def _take_files(self, claim: EarlyClaim) -> None:
        """Have the files of a claim; a claim whose files are not as they were is left to khod."""
        self._is_device_busy = False
        try:
            take_files(self._kernel, self._find_session(claim.session), claim)
        except (OSError, ArrivedOtherwise) as error:
            if isinstance(error, OSError) and error.errno == errno.EBUSY:
                self._is_device_busy = True
                self._untaken.append(claim)
            else:
                del self._claims[claim.name]

    def _find_session(self, name: str) -> int:
        """Return a session's descriptor, which the service manager keeps too: it must outlive khod."""
        if (session := self._passed.get(name, self._sessions.get(name))) is not None:
            return session
        session = self._kernel.retrieve_session(name)
        with self._lock:
            if self._keep_late is None:
                self._sessions[name] = session
            else:
                self._keep_late(name, session)
        send_descriptor(name, session)  # this may block, and khod has the session all the same
        return session

    def _accept_client(self) -> None:
        with self._lock:
            if self._is_stopped:
                return
            try:
                sock, _ = self._listening.accept()
            except OSError:  # no descriptor is free
                self._poll.unregister(self._listening)
                return
            sock.setblocking(False)
            self._clients[sock.fileno()] = EarlyClient(sock)
        self._poll.register(sock, select.POLLIN)
        if len(self._clients) >= MAX_CLIENTS:
            self._poll.unregister(self._listening)

    def _hear_client(self, client: EarlyClient) -> None:
        """Answer the next call, or leave the client to khod."""
        call, length = _peek_call(client.socket)
        if not (self._register(client, call, length) if client.claim is None else self._tell(client, call, length)):
            self._poll.unregister(client.socket)

    def _register(self, client: EarlyClient, call: "Mapping[str, Any]", length: int) -> bool:
        terms = call.get("parameters")
        if call.get("method") != f"{PRODUCER}.Register" or not isinstance(terms, dict):
            return False
        name = terms.get("name")
        claim = self._claims.get(name) if isinstance(name, str) else None
        if claim is None or not claim.has_terms(terms):
            return False
        if any(other.claim is claim for other in self._clients.values()):
            return False
        pid, uid, _ = peer_credentials(client.socket)
        if uid != 0 or unit_of(pid) != claim.unit:
            return False
        client.claim = claim
        with self._lock:
            registered = {"version": PRODUCER_VERSION, "run": claim.run, "told": "restore"}
            client.register = self._answer(client.socket, length, _encode_reply(registered))
        return bool(client.register)

    def _tell(self, client: EarlyClient, call: "Mapping[str, Any]", length: int) -> bool:
        """Answer Next with `restore`; the files are the producer's from then on."""
        claim = client.claim
        assert claim is not None
        if call.get("method") != f"{PRODUCER}.Next" or call.get("parameters") or claim.name not in self._claims:
            return False
        if claim.files and claim.fds is None:
            self._untaken = [one for one in self._untaken if one is not claim]
            self._take_files(claim)
            if claim.fds is None:
                return False
        command = {
            "serial": FIRST_SERIAL,
            "verb": "restore",
            "run": claim.run,
            "timeout": claim.timeout,
            "names": [file.name for file in claim.files],
            "tokens": [file.token for file in claim.files],
            "fds": [*range(len(claim.files))],
        }
        if len(reply := _encode_reply(command)) > MAX_REPLY_BYTES:
            return False
        try:
            with open(self._note, "a") as note:
                note.write(f"{claim.name}\n")
        except OSError:
            return False
        with self._lock:
            client.is_told = bool(self._answer(client.socket, length, reply, claim.fds or ()))
        del self._claims[claim.name]
        _close_files(claim)
        return False

    def _answer(self, sock: socket.socket, length: int, reply: bytes, fds: "list[int] | tuple[int, ...]" = ()) -> bytes:
        """Take the call off the socket, answer it, and return it; b"" if khod has taken over meanwhile.

        If the answer is not sent as a whole, the connection ends: who has not gone connects again, and what it left
        waits for it.
        """
        if self._is_stopped:
            return b""
        call = sock.recv(length)
        with suppress(OSError):
            if (socket.send_fds(sock, [reply], fds) if fds else sock.send(reply)) == len(reply):
                return call[:-1]
        with suppress(OSError):  # it has gone
            sock.shutdown(socket.SHUT_RDWR)
        return call[:-1]


def _peek_call(sock: socket.socket) -> "tuple[Mapping[str, Any], int]":
    """Return the first call that a client has sent, and its length; an empty one if it is not whole, or not a call.

    Nothing is taken off the socket, and no descriptor that came with it.
    """
    try:
        data, _, flags, _ = sock.recvmsg(PEEK_BYTES, 0, socket.MSG_PEEK)
        length = data.find(0) + 1
        # decoded as khod decodes it: what it would refuse is not a call here either
        call = json.loads(data[: length - 1].decode()) if length and not flags & socket.MSG_CTRUNC else None
    except (OSError, ValueError, RecursionError):
        return {}, 0
    return (call, length) if isinstance(call, dict) and call.keys() <= {"method", "parameters"} else ({}, 0)


def _encode_reply(parameters: "Mapping[str, Any]") -> bytes:
    return json.dumps({"parameters": parameters}, separators=(",", ":")).encode() + b"\0"


def _close_files(claim: EarlyClaim) -> None:
    for fd in claim.fds or ():
        os.close(fd)
    claim.fds = None


def read_told(note: str) -> frozenset[str]:
    """Return the names of the producers in a note."""
    try:
        with open(note) as file:
            return frozenset(file.read().split())
    except OSError:  # there is none
        return frozenset()


def begin_early_restore(
    state: str, runtime: str, passed: "Mapping[str, int]", kernel: "Kernel"
) -> "EarlyRestore | None":
    """Begin to serve the producers that wait for this boot; None if there are none, or khod must look first.

    `state` is the directory of the record, which is locked then for as long as this process lives; `runtime` is that
    of khod's files in memory.
    """
    record, note, listening = f"{state}/{FILE_NAME}", f"{runtime}/{NOTE_NAME}", passed.get("varlink")
    if listening is None or os.path.exists(note) or not read_claims(record, kernel):
        return None
    try:
        lock_directory(state)
    except OSError:
        return None
    # Read again: another khod may have ended between the first look and the lock.
    return EarlyRestore(read_claims(record, kernel), listening, passed, kernel, note)
