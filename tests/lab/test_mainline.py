# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mainline KHO, by `finalize` and stateless: state arrives, and the kernel's own oracles say so.

From one kernel to another of these: test_formats.py.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import trees
from tests.lab.conftest import Online
from tests.lab.host import Host


@dataclass(frozen=True)
class Shown:
    """How a kernel shows its blobs: which are FDTs and which C structures, and what becomes of some.

    With a `stale` root debugfs shows as much of the outgoing one as there was at boot, and none at all in a kernel that
    was handed to. Of the `freed` the kernel gives the page back when it has read it, and debugfs shows what is there
    now.
    """

    fdts: frozenset[str]
    structures: frozenset[str] = frozenset()
    stale: frozenset[str] = frozenset({trees.ROOT})
    freed: frozenset[str] = frozenset()


ALL = frozenset({trees.ROOT, "memblock", "kho_test"})
SHOWN = {
    "6.18.15": Shown(ALL, stale=frozenset()),
    "6.19.11": Shown(ALL | {"LUO"}),
    "7.3.4": Shown(ALL, frozenset({"LUO", "kexec-metadata"}), freed=frozenset({"LUO"})),
}


@pytest.mark.parametrize(
    "version", ["6.18.15", *(pytest.param(version, marks=pytest.mark.proof) for version in ("6.19.11", "7.3.4"))]
)
def test_preserved_memory_and_every_tree_arrive(online: Online, version: str, tmp_path: Path) -> None:
    host, shown = Host(online(version)), SHOWN[version]
    host.guest.wait_online()
    host.write_line()
    host.khoctl("activate")  # 6.18.15 has an outgoing tree only then
    out = trees.mainline(host, "out")
    assert trees.held(host, "out", out, tmp_path, cut=shown.stale, other=shown.structures) == shown.fdts - shown.stale

    host.kexec(version)

    host.khoctl("verify")
    status = host.status()
    assert status["phase"] == "verified", status
    assert {"memblock", "kho_test"} <= set(status["verdict"]["arrived"])
    log = host.dmesg()
    assert "Revived memory reservation 'trace' from KHO" in log
    assert "KHO restore succeeded" in log
    assert host.has_line()

    came = trees.mainline(host, "in")
    other = shown.structures - shown.freed
    assert trees.held(host, "in", came, tmp_path, other=other, freed=shown.freed) == shown.fdts
    unknown = trees.differing(host, "snapshot", "in", code=0)
    assert unknown - shown.freed == {name or "root" for name in shown.stale}
    assert status["run"] in host.khoctl("dt", "list").stdout
    host.khoctl("dt", "validate", "in")

    # A second handover in a row. What kho_test has taken back it does not hand on.
    host.khoctl("activate")
    assert host.status()["phase"] == "active"
    out, other = trees.mainline(host, "out"), shown.structures | shown.stale
    assert trees.held(host, "out", out, tmp_path, other=other) == shown.fdts - shown.stale - {"kho_test"}
    host.khoctl("dt", "validate")


def test_after_an_abort_a_kernel_that_forgets_is_suspect(online: Online) -> None:
    """On 6.18.15 an abort destroys the kernel's list of preserved pages: the next handover is refused."""
    host = Host(online("6.18.15"))
    host.guest.wait_online()
    host.khoctl("activate")
    assert host.word("/sys/kernel/debug/kho/out/finalize") == "1"
    host.guest.run(["systemctl", "kill", "--signal=SIGKILL", "kho-handover"])
    assert host.settled()["phase"] == "idle"  # khod is started again, and still knows this generation
    assert host.word("/sys/kernel/debug/kho/out/finalize") == "0"

    refused = host.khoctl("activate", code=3)

    assert "forget" in refused.stderr
    assert "Reboot" in refused.stderr
    assert host.word("/sys/kernel/debug/kho/out/finalize") == "0"
