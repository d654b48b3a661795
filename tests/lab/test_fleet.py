# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fleet over real sshds on the loopback, each with a khod on the simulated kernel; no guest."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from khod.errors import Exit
from tests.lab.sshd import Operator, make_key, mute_host
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import Khod, until
from tests.unit.test_follow import jump as leave_kernel

HOSTS = 3


@pytest.fixture
def khods(tmp_path: Path, operator: Operator) -> Iterator[list[Khod]]:
    with ExitStack() as stack:
        made = []
        for number in range(HOSTS):
            directory = tmp_path / f"web{number}"
            directory.mkdir()
            (directory / "vmlinuz").write_bytes(bzimage())
            (directory / "initrd").write_bytes(CPIO)
            made.append(Khod(directory))
            stack.callback(made[-1].close)
            operator.add(f"web{number}", made[-1])
        yield made


def jump(khod: Khod) -> None:
    """Take a host into its next kernel, and wait until the handover is remembered, which comes after the verdict."""
    leave_kernel(khod)
    khod.word("READY=1")
    until(lambda: bool(khod.khoctl("history", "--json").json["attempts"]), khod.process)


def test_a_fleet_is_asked_and_nobody_holds_up_the_others(operator: Operator, khods: list[Khod], tmp_path: Path) -> None:
    khods[1].kernel.set_fault("lose", True)
    for khod in khods[:2]:
        jump(khod)
    operator.add("bare", khods[0], khoctl=False)
    operator.add("idle", tmp_path / "nothing")
    operator.add("down", khods[0]).stop()
    changed = operator.add("changed", khods[0])
    (changed.directory / "host_key.pub").unlink()
    (changed.directory / "host_key").unlink()
    changed.stop()
    make_key(changed.directory / "host_key")
    changed.start()
    with mute_host() as port:
        (tmp_path / "inventory").write_text(
            f"[web]\nweb[0:2]\n[others]\nbare\nidle\ndown\nchanged\nmute ansible_host=127.0.0.1 ansible_port={port}\n"
        )
        ended = operator.khoctl("fleet", "status", "-i", tmp_path / "inventory", "--timeout", "20", "--json")
    assert ended.code == Exit.degraded, ended
    hosts = {one["name"]: one for one in ended.json["fleet"]["hosts"]}
    found = {name: [remark["kind"] for remark in one["remarks"]] for name, one in hosts.items() if one["remarks"]}
    assert found == {
        "web1": ["degraded"],
        "bare": ["without_kho"],
        "idle": ["not_reached"],
        "down": ["not_reached"],
        "changed": ["refused_login"],
        "mute": ["not_reached"],
    }
    assert "did not answer within 20 s" in hosts["mute"]["remarks"][0]["text"]
    assert "khod is not running" in hosts["idle"]["remarks"][0]["text"]
    assert [len(hosts[f"web{number}"]["attempts"]) for number in range(HOSTS)] == [1, 1, 0]
    assert abs(hosts["web0"]["clock_offset_seconds"]) <= hosts["web0"]["clock_error_seconds"] + 0.01
    assert ended.json["fleet"]["blackout"]["count"] == 2

    exports = tmp_path / "exports"
    exports.mkdir()
    for number, khod in enumerate(khods):
        lines = [khod.khoctl(*words, "--json").out for words in (["status"], ["history"])]
        (exports / f"web{number}.json").write_text("".join(lines))
    exported = operator.khoctl("fleet", "status", "--from", exports, "--json").json["fleet"]["hosts"]
    told = ("name", "state", "kernel", "attempts", "remarks")
    for one in exported:
        assert {key: one[key] for key in told} == {key: hosts[one["name"]][key] for key in told}, "the same by a file"
    assert len(exported) == HOSTS


def test_a_clock_that_is_off_is_named(operator: Operator, tmp_path: Path) -> None:
    """The host's khoctl passes on answers whose times are an hour behind."""
    (tmp_path / "web").mkdir()
    khod = Khod(tmp_path / "web")
    script = operator.add("web", khod).directory / "bin/khoctl"
    first, real = script.read_text().splitlines()
    late = "import re,sys\nfor part in iter(lambda: sys.stdin.buffer.read1(65536), b''):\n"
    late += " sys.stdout.buffer.write(re.sub(rb'\"at\": ?(\\d+)', lambda m: b'\"at\":%d' % (int(m[1])-3600), part))\n"
    late += " sys.stdout.buffer.flush()"
    script.with_name("late.py").write_text(late)
    script.write_text(f"{first}\n{real.removeprefix('exec ')} | python3 {script.with_name('late.py')}\n")
    ended = operator.khoctl("fleet", "status", "web")
    khod.close()
    assert ended.code == Exit.refused
    assert re.search(r"web  clock off: Its clock is 3(600|599|601) s behind this host's", ended.out), ended


REPLIES = {
    "nonsense": r"printf 'hello\0'",
    "shape": r"""printf '{"parameters": {"version": 5}}\0{"parameters": {"status": 5}}\0'""",
    "deep": r"head -c 200000 /dev/zero | tr '\0' '['; printf '\0'",
    "endless": r"tr '\0' 'x' </dev/zero",
}
"""What hosts send instead of khod's answers."""


def test_hosts_that_send_anything_else_are_named(operator: Operator, tmp_path: Path) -> None:
    for name, command in REPLIES.items():
        script = operator.add(name, tmp_path / "nothing").directory / "bin/khoctl"
        script.write_text(f"#!/bin/sh\n{command}\ncat >/dev/null\n")
    ended = operator.khoctl("fleet", "status", *REPLIES, "--json")
    found = {one["name"]: one["remarks"] for one in json.loads(ended.out)["fleet"]["hosts"]}
    assert [remark["kind"] for remarks in found.values() for remark in remarks] == ["not_reached"] * len(REPLIES)
    assert "more than 8 MiB" in found["endless"][0]["text"]
