# SPDX-License-Identifier: LGPL-2.1-or-later
"""One request to a FleetLock server: POST of this host's name and group, and what the answer means.

The protocol is that of Zincati (https://coreos.github.io/zincati/development/fleetlock/protocol/): 200 is a yes, and
any other answer has a JSON object with `kind` and `value`, for people. No proxy is used, and no redirect is followed:
a lock that another server gave would be none.
"""

import json
import socket
import ssl
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from khod.errors import ConfigError, errno_text
from khod.fleetlock import FILE
from khod.fleetlock.settings import FleetLockSettings
from khod.text import one_line

LOCK = "v1/pre-reboot"
UNLOCK = "v1/steady-state"
MAX_BODY_BYTES = 1 << 16
MAX_SHOWN = 100
"""Characters that are shown of what the server says."""
FINAL = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
)
"""Answers that come again however often the request is repeated."""


class NotGranted(Exception):
    """The server has not said yes; the message is the reason.

    `denied` tells that it has said no in the protocol's words, `final` that the same request cannot succeed later.
    """

    def __init__(self, reason: str, *, denied: bool = False, final: bool = False) -> None:
        super().__init__(reason)
        self.denied = denied
        self.final = final


class FleetLockServer:
    """The server of these settings, which knows this host as `node`; ConfigError if a file for TLS cannot be used."""

    def __init__(self, settings: FleetLockSettings, node: str) -> None:
        self._settings = settings
        self._url = urlsplit(settings.url)
        self._context = _make_context(settings) if self._url.scheme == "https" else None
        self._body = json.dumps({"client_params": {"id": node, "group": settings.group}}).encode()

    def send_request(self, endpoint: str) -> None:
        """Send one request, and return after a yes; NotGranted after anything else, within `timeout` seconds.

        The name of the server is resolved, and its answer read, in a thread: neither has a deadline of its own.
        """
        connection = self._connect()
        outcome: list[BaseException | None] = []

        def work() -> None:
            try:
                self._exchange(connection, endpoint)
                outcome.append(None)
            except Exception as error:  # noqa: BLE001 - it is raised again below
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self._settings.timeout)
        if not outcome or isinstance(outcome[0], TimeoutError):
            raise NotGranted(f"no answer within {self._settings.timeout:g} s")
        if outcome[0] is not None:
            raise _explain_error(outcome[0]) from None

    def _connect(self) -> HTTPConnection:
        host, port, timeout = self._url.hostname or "", self._url.port, self._settings.timeout
        if self._context is None:
            return HTTPConnection(host, port, timeout=timeout)
        return HTTPSConnection(host, port, timeout=timeout, context=self._context)

    def _exchange(self, connection: HTTPConnection, endpoint: str) -> None:
        headers = {"fleet-lock-protocol": "true", "Content-Type": "application/json", "Connection": "close"}
        try:
            connection.request("POST", f"{self._url.path.rstrip('/')}/{endpoint}", self._body, headers)
            answer = connection.getresponse()
            _require_yes(answer)
        finally:
            connection.close()


def _make_context(settings: FleetLockSettings) -> ssl.SSLContext:
    context: ssl.SSLContext = _use_file(
        "ca", settings.ca, lambda: ssl.create_default_context(cafile=settings.ca or None)
    )
    # Python 3.13 switches it on, and refuses the plain CAs that fleets make themselves, which Zincati accepts.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if settings.certificate:
        # A key with a pass phrase would be asked for at a terminal; this one cannot be right.
        load = context.load_cert_chain
        _use_file(
            "certificate",
            f"{settings.certificate} {settings.key}".rstrip(),
            lambda: load(settings.certificate, settings.key or None, password=lambda: b""),
        )
    return context


def _use_file(key: str, paths: str, use: Callable[[], Any]) -> Any:
    try:
        return use()
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "reason", None)
        why = (
            f"not usable ({reason or 'wrong format'})" if isinstance(error, ssl.SSLError) else _explain_os_error(error)
        )
        raise ConfigError(
            f"`{key}` of the FleetLock client cannot be used: {paths}: {why}",
            where=f"/{FILE}",
            remedy="It must be a PEM file that root can read, a key without a pass phrase.",
        ) from None


def _require_yes(answer: HTTPResponse) -> None:
    """Raise NotGranted unless the answer is 200."""
    status = f"the server answered {answer.status} {one_line(answer.reason or '', MAX_SHOWN)}".rstrip()
    if answer.status == HTTPStatus.OK:
        # A portal that wants to be logged in to answers 200 to anything, with a page.
        if answer.headers.get_content_type() == "text/html":
            raise NotGranted(f"{status} with a web page, as no FleetLock server does", final=True)
        return
    if HTTPStatus.MULTIPLE_CHOICES <= answer.status < HTTPStatus.BAD_REQUEST:
        to = one_line(answer.headers.get("Location", "elsewhere"), MAX_SHOWN)
        raise NotGranted(f"{status}, to {to}: a redirect is not followed", final=True)
    said = _read_denial(answer)
    raise NotGranted(f"{status}: {said[0]}", denied=said[1], final=answer.status in FINAL)


def _read_denial(answer: HTTPResponse) -> tuple[str, bool]:
    """Return what a no says, and whether it is one of the protocol."""
    body = answer.read(MAX_BODY_BYTES + 1)
    if len(body) > MAX_BODY_BYTES:
        return f"more than {MAX_BODY_BYTES >> 10} KiB", False
    try:
        found = json.loads(body)
        kind, value = found["kind"], found["value"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return "no reason in the form of the protocol", False
    return f"{one_line(str(value), MAX_SHOWN)} ({one_line(str(kind), MAX_SHOWN)})", True


def _explain_error(error: BaseException) -> NotGranted:
    """Return in plain words why a request has no answer."""
    if isinstance(error, NotGranted):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return NotGranted(
            f"the server's certificate is not valid: {one_line(error.verify_message, MAX_SHOWN)}", final=True
        )
    if isinstance(error, ssl.SSLError):
        return NotGranted(f"TLS failed: {one_line(error.reason or str(error), MAX_SHOWN)}")
    if isinstance(error, HTTPException):
        return NotGranted(f"the answer is not HTTP, or not complete: {one_line(repr(error), MAX_SHOWN)}")
    if isinstance(error, OSError):
        return NotGranted(_explain_os_error(error))
    if isinstance(error, UnicodeError):  # of the codec `idna`, as for two dots in a row
        return NotGranted("the server's name is not valid", final=True)
    return NotGranted(f"khod-fleetlock itself failed: {one_line(repr(error), MAX_SHOWN)}", final=True)


def _explain_os_error(error: OSError | ValueError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the server's name cannot be resolved: {one_line(error.strerror or '', MAX_SHOWN)}"
    return errno_text(error) if isinstance(error, OSError) else one_line(str(error), MAX_SHOWN)
