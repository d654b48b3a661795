# SPDX-License-Identifier: LGPL-2.1-or-later
"""The scanner: looks for LUO sessions in a unit of its own (kho-sessions.service); and how khod asks it.

systemd starts it with the first connection to kho-sessions.socket, and it stays. To each connection it writes what it
finds as one JSON document, and closes it. It reads nothing.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from khod.abi.calls import Calls, HostCalls
from khod.abi.liveupdate import LIVEUPDATE
from khod.producers.session_scan import SessionScan, look_into_processes
from khod.values import decode_value, encode_value

SCANNER_SOCKET = "/run/khod/sessions"
ANSWER_SECONDS = 20.0
"""What the scanner has for its answer. It looks into every process of the host, under emulation for seconds."""
MAX_ANSWER_BYTES = 16 << 20
CHUNK_BYTES = 1 << 16
LISTENER = 3  # SD_LISTEN_FDS_START, see sd_listen_fds(3)


def ask_scanner(calls: Calls, path: str = SCANNER_SOCKET, seconds: float = ANSWER_SECONDS) -> SessionScan:
    """Find every LUO session that a process of the host has open, by the scanner behind the socket at `path`.

    Where it gives no answer, nothing is found, and `unseen` says why.
    """
    if not calls.path_exists(LIVEUPDATE):
        return SessionScan()
    try:
        return _decode_answer(_read_answer(path, seconds))
    except TimeoutError:
        why = f"no answer within {seconds:g} s"
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
    except (ValueError, RecursionError):
        why = "the answer cannot be read; see journalctl -u kho-sessions"
    return SessionScan(unseen=f"kho-sessions.socket ({path}): {why}")


def _read_answer(path: str, seconds: float) -> bytes:
    """All that comes until the other end closes. TimeoutError after `seconds`, ValueError if it is too much."""
    deadline = time.monotonic() + seconds
    answer = bytearray()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        connection.connect(path)
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (chunk := connection.recv(CHUNK_BYTES)):
                return bytes(answer)
            answer += chunk
            if len(answer) > MAX_ANSWER_BYTES:
                raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes")
    raise TimeoutError


def _decode_answer(answer: bytes) -> SessionScan:
    """Decode an answer; ValueError or RecursionError if it is none."""
    scan = decode_value(SessionScan, json.loads(answer))
    for held in scan.sessions:
        if not held.processes:
            raise ValueError("a session that nobody has open")
        for process in held.processes:
            "".join(process.units).encode()  # systemd is asked for them: no half of a surrogate pair
    return scan


def serve_scans(calls: Calls, listener: socket.socket) -> None:
    """Answer every connection, one after the other, until the process is ended."""
    while True:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # khod waits no longer
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(_encode_answer(calls))


def _encode_answer(calls: Calls) -> bytes:
    try:
        scan = look_into_processes(calls)
    except OSError as error:
        scan = SessionScan(unseen=str(error))
    return json.dumps(scan, default=encode_value).encode()


def main() -> None:
    """Serve the socket that systemd passed. The host's root may be given as an argument."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "/")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, LISTENER) as listener:
        listener.setblocking(True)
        serve_scans(HostCalls(root), listener)


if __name__ == "__main__":
    main()
