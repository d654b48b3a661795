# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl on another host: over a real sshd on the loopback, on the simulated kernel; no guest."""

import json
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from khoctl import follow
from khod.errors import Exit
from tests.lab.sshd import Operator, Sshd, make_key, mute_host
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import DEADLINE, REPOSITORY, Khod


@pytest.fixture(autouse=True)
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write as for no terminal: pytest-xdist sets COLUMNS, and ssh does not take it along."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[Khod]:
    directory = tmp_path / "khod"
    directory.mkdir()
    (directory / "vmlinuz").write_bytes(bzimage())
    (directory / "initrd").write_bytes(CPIO)
    made = Khod(directory)
    yield made
    made.close()


@pytest.fixture
def web(operator: Operator, khod: Khod) -> Sshd:
    return operator.add("web", khod)


@pytest.mark.usefixtures("web")
def test_the_answer_and_the_exit_code_are_those_of_khoctl_there(operator: Operator, khod: Khod) -> None:
    for words in (["--host", "web", "status", "--json"], ["status", "--host=web", "--json"]):
        there = operator.khoctl(*words)
        assert (there.code, there.err) == (Exit.done, "")
        assert there.json["boot_id"] == khod.khoctl("status", "--json").json["boot_id"]
    refused = operator.khoctl("--host", "web", "kexec", "--load-only")
    assert refused.code == Exit.usage
    assert refused.err == khod.khoctl("kexec", "--load-only").err


@pytest.mark.usefixtures("web")
def test_words_reach_the_other_host_as_they_are(operator: Operator, khod: Khod) -> None:
    hostile = "$(touch broken); 'a b' \"c\" `d` \\ *"
    here = khod.khoctl("dt", "show", hostile)
    there = operator.khoctl("--host", "web", "dt", "show", hostile)
    assert (there.code, there.err) == (here.code, here.err)


@pytest.mark.parametrize(
    "name",
    ["-oProxyCommand=touch /tmp/x", "", "root@-v", "ssh://-v", "two words", "line\nbreak", "$(id)", "a;b", "root@"],
)
def test_what_is_no_host_is_refused(operator: Operator, name: str) -> None:
    assert operator.khoctl(f"--host={name}", "status").code == Exit.usage


@pytest.mark.usefixtures("web")
def test_two_hosts_are_refused(operator: Operator) -> None:
    assert operator.khoctl("--host=web", "--host=web", "status").code == Exit.usage


def test_another_host_key_is_refused(operator: Operator, web: Sshd) -> None:
    web.stop()
    for name in ("host_key", "host_key.pub"):
        (web.directory / name).unlink()
    make_key(web.directory / "host_key")
    web.start()
    for words in (["status"], ["monitor"], ["kexec"]):
        ended = operator.khoctl("--host", "web", *words)
        assert ended.code == Exit.refused
        assert "The host key of web is not the one that is known here" in ended.err
        assert "Nothing was changed there" in ended.err


@pytest.mark.usefixtures("web")
def test_an_unknown_host_key_is_refused_where_nobody_can_be_asked(operator: Operator) -> None:
    (operator.directory / "known_hosts").unlink()
    ended = operator.khoctl("--host", "web", "status", "--json")
    assert ended.code == Exit.refused
    assert "The host key of web is not known here" in json.loads(ended.out)["what"]
    assert not (operator.directory / "known_hosts").exists()


def test_a_host_that_wants_a_password_is_refused_at_once(operator: Operator, web: Sshd) -> None:
    web.stop()
    web.settings |= {"PubkeyAuthentication": "no", "PasswordAuthentication": "yes", "PermitRootLogin": "yes"}
    web.start()
    ended = operator.khoctl("--host", "web", "status")
    assert ended.code == Exit.refused
    assert "web refuses the login" in ended.err


def test_a_host_that_is_not_there_and_one_without_khoctl(operator: Operator, khod: Khod) -> None:
    operator.add("bare", khod, khoctl=False)
    without = operator.khoctl("--host", "bare", "status")
    assert (without.code, "khoctl is not installed on bare" in without.err) == (Exit.unsupported, True)
    assert operator.khoctl("--host", "bare", "monitor").code == Exit.unsupported
    operator.add("down", khod).stop()
    ended = operator.khoctl("--host", "down", "status")
    assert (ended.code, "down cannot be reached" in ended.err) == (Exit.unreachable, True)
    assert "Connection refused" in ended.err


@pytest.mark.parametrize("command", ["status", "monitor", "kexec"])
def test_a_host_that_does_not_answer_costs_the_time_limit(operator: Operator, command: str) -> None:
    with mute_host() as port:
        ended = operator.khoctl("--host", f"ssh://127.0.0.1:{port}", command, "--timeout", "1")
    assert ended.code == Exit.unreachable, ended.err


def test_a_host_without_khod_is_named_by_what_watches_it(operator: Operator, tmp_path: Path) -> None:
    operator.add("idle", tmp_path / "nothing")
    ended = operator.khoctl("--host", "idle", "monitor")
    assert ended.code == Exit.unreachable
    assert "idle: khod is not running" in ended.err


@pytest.mark.usefixtures("web")
def test_a_monitor_goes_through_the_jump_and_a_lost_connection(operator: Operator, khod: Khod, web: Sshd) -> None:
    """The simulated host jumps: khod ends, and its successor answers; before, the way to it is lost for a time."""
    khod.kernel.set_fault("lose", True)
    monitor = operator.start("--host", "web", "monitor", "--json")
    assert monitor.stdout is not None
    assert json.loads(monitor.stdout.readline())["phase"] == "idle"
    files = ("--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd")
    assert khod.khoctl("activate").code == Exit.done
    lines = iter(monitor.stdout.readline, "")
    assert any(json.loads(line).get("phase") == "active" for line in lines)
    web.stop()
    assert any(follow.LOST in line for line in lines)
    web.start()
    assert any(follow.CONNECTED in line for line in lines)
    khod.khoctl("kexec", *files, "--now", "--yes")
    rest = list(lines)
    _out, err = monitor.communicate(timeout=DEADLINE)
    assert any(follow.OTHER_BOOT in line for line in rest), (rest, err)
    assert (monitor.returncode, json.loads(rest[-1])["phase"]) == (Exit.degraded, "degraded")


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(("fault", "code"), [(None, Exit.done), ("cold", Exit.degraded)])
def test_a_jump_is_followed_to_its_verdict(operator: Operator, khod: Khod, fault: str | None, code: Exit) -> None:
    if fault:
        khod.kernel.set_fault(fault, True)
    files = ("--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd")
    ended = operator.khoctl("kexec", "--host", "web", *files, "--now")
    assert ended.code == code, ended.err
    assert follow.OTHER_BOOT in ended.err


@pytest.mark.usefixtures("web")
def test_what_does_not_jump_ends_as_it_does_there(operator: Operator, khod: Khod) -> None:
    files = ("--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd")
    loaded = operator.khoctl("--host", "web", "kexec", *files, "--load-only", "--json")
    assert (loaded.code, loaded.json["phase"]) == (Exit.done, "loaded")
    assert operator.khoctl("--host", "web", "abort").code == Exit.done
    gone = operator.khoctl("--host", "web", "kexec", "--image", "/nowhere", "--initrd", "/nowhere")
    assert gone.code == Exit.usage


@pytest.mark.usefixtures("web")
def test_a_control_master_carries_the_connections(operator: Operator, khod: Khod) -> None:
    path = operator.directory / "master"
    operator.configure(f"Host *\n  ControlMaster auto\n  ControlPath {path}\n  ControlPersist 60\n")
    assert operator.khoctl("--host", "web", "status").code == Exit.done
    assert path.is_socket()
    (operator.directory / "login.pub").unlink()  # another connection cannot log in
    assert operator.khoctl("--host", "web", "status", "--json").json["boot_id"]
    assert operator.khoctl("--host", "web", "wait", "idle").code == Exit.done
    subprocess.run([operator.directory / "bin/ssh", "-O", "exit", "web"], capture_output=True, check=True)
    assert khod.process.poll() is None


@pytest.mark.usefixtures("web")
def test_on_a_terminal_an_interrupt_reaches_khoctl_there(operator: Operator) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        command = operator.command("--host", "web", "status", "--watch")
        os.execve(command[0], command, {**operator.environment, "TERM": "xterm"})
    said = b""
    while b"No handover" not in said:
        said += os.read(terminal, 1 << 16)
    os.write(terminal, b"\x03")
    while True:
        try:
            os.read(terminal, 1 << 16)
        except OSError:  # EIO: nobody has the terminal open any more
            break
    _pid, code = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(code) == 130


@pytest.mark.usefixtures("web")
def test_a_bridge_speaks_varlink_on_its_standard_streams(operator: Operator, khod: Khod) -> None:
    call = json.dumps({"method": "io.kho.Handover.Status", "parameters": {}}) + "\0"
    ended = subprocess.run(
        [operator.directory / "bin/ssh", "web", "khoctl bridge"],
        input=call,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    reply = json.loads(ended.stdout.rstrip("\0"))
    assert reply["parameters"]["status"]["boot_id"] == khod.khoctl("status", "--json").json["boot_id"]
