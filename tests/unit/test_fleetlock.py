# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod-fleetlock: one request, what may go wrong with it, and the file that names the server."""

import io
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from khod.errors import ConfigError, Exit
from khod.fleetlock.program import HostLock, main
from khod.fleetlock.settings import ZINCATI_APP_ID, FleetLockSettings, load_settings, node_id
from tests.unit.fleetlock import FAULTS, LOCK, Authority, Server, configure, serving
from tests.unit.khods import REPOSITORY, Answer

MACHINE = "0123456789abcdef0123456789abcdef"
SAMPLE = REPOSITORY / "etc/kho/fleetlock.toml.sample"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as made:
        yield made


def call(root: Path, command: str = "lock") -> Answer:
    """What `khod-fleetlock COMMAND` ends in; run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([command, f"--root={root}"])
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("command", ["lock", "check", "unlock"])
@pytest.mark.parametrize("name", FAULTS)
def test_no_command_takes_what_a_server_does_wrong_for_a_yes(
    tmp_path: Path, server: Server, name: str, command: str
) -> None:
    server.fault, said = FAULTS[name]
    configure(tmp_path, server, timeout=0.5 if said.startswith("no answer") else 5)
    ended = call(tmp_path, command)
    last = ended.err.splitlines()[-1]
    assert ended.code in (Exit.failed, Exit.refused)
    assert (said in last, server.url in last, "group workers" in last) == (True, True, True), last
    assert ended.out == ""


def test_pauses_grow_and_are_not_the_same_for_two_hosts(server: Server) -> None:
    pauses: list[list[float]] = []
    server.fault = FAULTS["500"][0]
    for node in ("0" * 32, "1" * 32):
        waited: list[float] = []
        pauses.append(waited)
        settings = FleetLockSettings(server.url, group="workers", deadline=3600, backoff=1, backoff_max=8)

        def pause(seconds: float, waited: list[float] = waited) -> None:
            waited.append(seconds)
            if len(waited) == 6:
                server.fault = None

        HostLock(settings, node, pause).lock()
        server.fault = FAULTS["500"][0]
        server.holders = []
    for waited in pauses:
        assert all(most / 2 <= one <= most for one, most in zip(waited, (1, 2, 4, 8, 8, 8), strict=True))
    assert pauses[0] != pauses[1]


def test_a_no_to_check_is_final(tmp_path: Path, server: Server) -> None:
    configure(tmp_path, server, deadline=3600)
    server.holders = ["f" * 32]
    assert call(tmp_path, "check").code == Exit.refused
    assert server.requests == [LOCK]


# TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_a_server_with_a_certificate_of_the_ca(tmp_path: Path, authority: Authority) -> None:
    with serving(Server(authority.serve(authority.issue("server")))) as server:
        configure(tmp_path, server, ca=authority.certificate)
        ended = call(tmp_path)
        assert ended.code == Exit.done, ended
        assert len(server.holders) == 1


def test_a_plain_ca_is_one_for_a_newer_python_too(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of Python 3.13 a default context is strict, and wants extensions that `openssl req -x509` does not make."""
    make = ssl.create_default_context

    def make_strict(**options: Any) -> ssl.SSLContext:
        context = make(**options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", make_strict)
    with serving(Server(authority.serve(authority.issue("server")))) as server:
        configure(tmp_path, server, ca=authority.certificate)
        assert call(tmp_path).code == Exit.done


def test_a_client_certificate(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue("client")
    with serving(Server(authority.serve(authority.issue("server"), clients=True))) as server:
        configure(tmp_path, server, ca=authority.certificate)
        assert call(tmp_path).code == Exit.failed
        configure(tmp_path, server, ca=authority.certificate, certificate=certificate, key=key)
        assert call(tmp_path).code == Exit.done


@pytest.mark.parametrize("bad", ["unknown CA", "another host's", "expired"])
def test_a_bad_certificate(tmp_path: Path, authority: Authority, bad: str) -> None:
    address = "DNS:other.example" if bad == "another host's" else "IP:127.0.0.1"
    signer = Authority(tmp_path, "stranger") if bad == "unknown CA" else authority
    issued = signer.issue("server", address, days=-1 if bad == "expired" else 2)
    with serving(Server(signer.serve(issued))) as server:
        configure(tmp_path, server, ca=authority.certificate, deadline=600)
        ended = call(tmp_path)
        assert ended.code == Exit.failed
        assert "the server's certificate is not valid" in ended.err
        assert server.requests == []


def test_a_server_without_tls_and_one_with_it_where_it_is_not_expected(tmp_path: Path, authority: Authority) -> None:
    with serving(Server()) as plain:
        configure(tmp_path, plain, url=plain.url.replace("http:", "https:"))
        ended = call(tmp_path)
        assert (ended.code, "TLS failed" in ended.err) == (Exit.failed, True), ended
    with serving(Server(authority.serve(authority.issue("server")))) as server:
        configure(tmp_path, server, url=server.url.replace("https:", "http:"))
        assert call(tmp_path).code == Exit.failed


def test_a_server_that_has_ipv6_alone(tmp_path: Path) -> None:
    with serving(Server(family=socket.AF_INET6)) as server:
        configure(tmp_path, server)
        assert call(tmp_path).code == Exit.done


@pytest.mark.parametrize(
    ("name", "said"),
    [("a..example", "the server's name is not valid"), ("no.invalid", "the server's name cannot be resolved")],
)
def test_a_server_whose_name_leads_nowhere(tmp_path: Path, server: Server, name: str, said: str) -> None:
    configure(tmp_path, server, url=f"http://{name}", timeout=60)
    ended = call(tmp_path)
    assert (ended.code, said in ended.err) == (Exit.failed, True), ended


# The file


def write(root: Path, text: str) -> None:
    (root / "etc/kho").mkdir(parents=True, exist_ok=True)
    (root / "etc/kho/fleetlock.toml").write_text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "`url` is missing"),
        ("url = ", "not valid TOML"),
        ("url = 7", "`url` is 7"),
        ('url = "lock.example"', "`url` is"),
        ('url = "ftp://lock.example"', "`url` is"),
        ('url = "https://"', "`url` is"),
        ('url = "https://host:port"', "`url` is"),
        ('url = "https://me:secret@host"', "`url` is"),
        ('url = "https://host/?a=1"', "`url` is"),
        ('url = "https://ho st"', "`url` is"),
        ('url = "https://h"\nurls = 1', "`urls` is an unknown key"),
        ('url = "https://h"\ngroup = ""', "`group` is"),
        ('url = "https://h"\ngroup = "a b"', "`group` is"),
        ('url = "https://h"\nid = ""', "`id` is"),
        ('url = "https://h"\nid = "a\\nb"', "`id` is"),
        ('url = "https://h"\napp_id = "de35"', "`app_id` is"),
        ('url = "https://h"\ntimeout = 0', "`timeout` is"),
        ('url = "https://h"\ndeadline = 1e9', "`deadline` is"),
        ('url = "https://h"\nbackoff = nan', "`backoff` is"),
        ('url = "https://h"\nbackoff_max = -1', "`backoff_max` is"),
        ('url = "https://h"\nkeep_after = ["idle"]', "`keep_after` is"),
        ('url = "https://h"\nca = "ca.pem"', "`ca` is"),
        ('url = "http://h"\nca = "/ca.pem"', "`ca` is"),
        ('url = "https://h"\nkey = "/k"', "`key` is"),
    ],
)
def test_a_file_that_is_wrong_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^{said}|{said}") as caught:
        load_settings(tmp_path)
    assert str(tmp_path / "etc/kho/fleetlock.toml") in caught.value.where


@pytest.mark.parametrize("contents", [b"", b"not PEM\n", None], ids=["empty", "not PEM", "not there"])
@pytest.mark.parametrize("key", ["ca", "certificate"])
def test_a_file_for_tls_that_cannot_be_used(tmp_path: Path, key: str, contents: bytes | None) -> None:
    path = tmp_path / "file.pem"
    if contents is not None:
        path.write_bytes(contents)
    with serving(Server()) as server:
        configure(tmp_path, server, url="https://127.0.0.1:1", **{key: path})
        ended = call(tmp_path)
    assert ended.code == Exit.usage, ended
    assert str(path) in ended.err


@pytest.mark.parametrize("contents", ["", "uninitialized\n", "x" * 9000, None])
def test_a_host_without_a_machine_id_has_no_name(tmp_path: Path, contents: str | None) -> None:
    (tmp_path / "etc").mkdir()
    if contents is not None:
        (tmp_path / "etc/machine-id").write_text(contents)
    settings = FleetLockSettings("https://h")
    with pytest.raises(ConfigError, match="machine id cannot be read"):
        node_id(settings, tmp_path)
    assert node_id(FleetLockSettings("https://h", id="web-1"), tmp_path) == "web-1"


def test_the_name_is_that_of_zincati(tmp_path: Path) -> None:
    """The value is that of `systemd-id128 machine-id --app-specific=`, asked on a host with this machine id."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text(f"{MACHINE}\n")
    assert node_id(FleetLockSettings("https://h"), tmp_path) == "583627a932274834a8ebd99f4ed41c0d"
    assert FleetLockSettings.app_id == ZINCATI_APP_ID == "de35106b6ec24688b63afddaa156679b"


def test_help_names_the_commands() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "khod.fleetlock", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in shown.stdout for command in ("lock", "check", "unlock", "settle"))


def test_the_sample_has_every_key_and_the_defaults(tmp_path: Path) -> None:
    write(tmp_path, SAMPLE.read_text())
    assert load_settings(tmp_path) == FleetLockSettings("https://fleetlock.example:8443")
    write(tmp_path, re.sub(r"(?m)^#(?=[a-z_]+ = )", "", SAMPLE.read_text()))
    made = load_settings(tmp_path)
    assert all(getattr(made, key) for key in FleetLockSettings.__annotations__)
