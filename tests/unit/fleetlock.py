# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FleetLock server that takes nothing but the protocol, and can go wrong as servers do."""

import json
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.unit.khods import DEADLINE

LOCK, UNLOCK = "/v1/pre-reboot", "/v1/steady-state"
NODE = re.compile(r"[0-9a-f]{32}")

Fault = Callable[["Handler"], None]
"""What the server does in place of an answer."""


class Server(ThreadingHTTPServer):
    """One semaphore of `slots` slots. `requests` are the paths that were asked for, `wrong` what broke the protocol.

    With a `fault` it does that for the paths in `faulty`; a fault that hangs waits for `closing`.
    """

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None, *, family: int = socket.AF_INET, slots: int = 1) -> None:
        self.address_family = family
        self.slots = slots
        self.holders: list[str] = []
        self.requests: list[str] = []
        self.wrong: list[str] = []
        self.fault: Fault | None = None
        self.faulty = {LOCK, UNLOCK}
        self.closing = threading.Event()
        self.asked = threading.Condition()
        super().__init__(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), Handler)
        self.scheme = "http"
        if context is not None:
            self.scheme = "https"
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        host = "[::1]" if self.address_family == socket.AF_INET6 else "127.0.0.1"
        return f"{self.scheme}://{host}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that ends a handshake is the client's business."""

    def note(self, path: str) -> None:
        with self.asked:
            self.requests.append(path)
            self.asked.notify_all()

    def wait_for(self, path: str, times: int = 1) -> None:
        """Wait until this path was asked for so often."""
        with self.asked:
            assert self.asked.wait_for(lambda: self.requests.count(path) >= times, DEADLINE), self.requests

    def answer(self, path: str, node: str) -> tuple[int, dict[str, str]]:
        if path == UNLOCK:
            self.holders = [holder for holder in self.holders if holder != node]
        elif node not in self.holders:
            if len(self.holders) >= self.slots:
                return 409, {"kind": "failed_lock", "value": "all slots are taken"}
            self.holders.append(node)
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.wrong += [f"{self.path}: {text}" for text in self.wrongs(body)]
        self.server.note(self.path)
        if self.server.fault is not None and self.path in self.server.faulty:
            self.server.fault(self)
            return
        status, answer = self.server.answer(self.path, json.loads(body)["client_params"]["id"])
        self.reply(status, json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.server.wrong.append(f"GET {self.path}")

    def wrongs(self, body: bytes) -> Iterator[str]:
        if self.path not in (LOCK, UNLOCK):
            yield "path"
        if self.headers.get("fleet-lock-protocol") != "true":
            yield "header"
        if self.headers.get_content_type() != "application/json":
            yield "content type"
        found = json.loads(body)
        if found.keys() != {"client_params"} or found["client_params"].keys() != {"id", "group"}:
            yield f"body {found}"
        elif not NODE.fullmatch(found["client_params"]["id"]) or found["client_params"]["group"] != "workers":
            yield f"whose {found}"

    def reply(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the library's
        """The tests look at `requests`."""


def hang(handler: Handler) -> None:
    handler.server.closing.wait()


def drip(handler: Handler) -> None:
    """Send an answer that never ends, a byte of a header at a time."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"z")


def close_early(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 2")


def speak_smtp(handler: Handler) -> None:
    handler.wfile.write(b"220 smtp\r\n")


FAULTS: dict[str, tuple[Fault, str]] = {
    "refuses": (
        lambda handler: handler.reply(409, b'{"kind": "failed_lock", "value": "full"}'),
        "the server answered 409 Conflict: full (failed_lock)",
    ),
    "hangs": (hang, "no answer within 0.5 s"),
    "drips": (drip, "no answer within 0.5 s"),
    "500": (
        lambda handler: handler.reply(500, b'{"kind": "db", "value": "etcd is down"}'),
        "500 Internal Server Error: etcd is down (db)",
    ),
    "not JSON": (lambda handler: handler.reply(503, b"<html>"), "no reason in the form of the protocol"),
    "JSON of another form": (lambda handler: handler.reply(503, b'["kind"]'), "no reason in the form of the protocol"),
    "deep JSON": (lambda handler: handler.reply(503, b"[" * 60000), "no reason in the form of the protocol"),
    "huge": (lambda handler: handler.reply(500, b"x" * (1 << 20)), "more than 64 KiB"),
    "redirect": (
        lambda handler: handler.reply(307, b"", Location="https://other.example/"),
        "307 Temporary Redirect, to https://other.example/: a redirect is not followed",
    ),
    "web page": (lambda handler: handler.reply(200, b"<html>", "text/html"), "with a web page"),
    "204": (lambda handler: handler.reply(204, b""), "the server answered 204"),
    "closes early": (close_early, "the answer is not HTTP, or not complete"),
    "not HTTP": (speak_smtp, "the answer is not HTTP, or not complete"),
    "escapes": (
        lambda handler: handler.reply(409, b'{"kind": "k", "value": "\\u001b[2J\\n\\u202e"}'),
        "409 Conflict: ?[2J ? (k)",
    ),
}
"""By name: what the server does, and what is said of it."""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Serve until the end of the block; afterwards, nothing may have broken the protocol."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
    assert not server.wrong


def configure(root: Path, server: Server, **keys: object) -> None:
    """Write the client's file below this root, and a machine id; by default it gives up after one request or two."""
    (root / "etc/kho").mkdir(parents=True, exist_ok=True)
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    given = {"url": server.url, "group": "workers", "deadline": 0.1, "backoff": 0.1, **keys}
    text = "".join(f"{key} = {json.dumps(str(v) if isinstance(v, Path) else v)}\n" for key, v in given.items())
    (root / "etc/kho/fleetlock.toml").write_text(text)


class Authority:
    """A certificate authority in a directory, made by openssl(1)."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self.certificate, self._key = directory / f"{name}.pem", directory / f"{name}.key"
        self._openssl("req", "-x509", "-keyout", self._key, "-out", self.certificate, "-subj", f"/CN={name}", *NEW)

    def issue(self, name: str, address: str = "IP:127.0.0.1", *, days: int = 2) -> tuple[Path, Path]:
        """Return a certificate for an address and its key."""
        certificate, key, asked = (self._directory / f"{name}.{end}" for end in ("pem", "key", "csr"))
        self._openssl(
            "req", "-keyout", key, "-out", asked, "-subj", f"/CN={name}", "-addext", f"subjectAltName={address}", *NEW
        )
        signed: list[str | Path] = [
            "-CA",
            self.certificate,
            "-CAkey",
            self._key,
            "-copy_extensions",
            "copy",
            "-out",
            certificate,
        ]
        self._openssl("x509", "-req", "-in", asked, "-days", str(days), *signed)
        return certificate, key

    def serve(self, issued: tuple[Path, Path], *, clients: bool = False) -> ssl.SSLContext:
        """Return what a server has of a certificate and key; with `clients` it wants a certificate of theirs."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*issued)
        if clients:
            context.load_verify_locations(self.certificate)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _openssl(self, *words: str | Path) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=DEADLINE)


NEW = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
