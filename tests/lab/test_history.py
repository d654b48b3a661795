# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a confined khod remembers of handovers on a real kernel, and who reads it."""

import json
from typing import Any

from tests.lab.conftest import Online
from tests.lab.host import Host, image

VERSION = "7.3.4"
DATABASE = "/var/lib/khod/history.db"


def attempts(host: Host, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.khoctl("history", "--json", *words).stdout)["attempts"]
    return found


def test_a_handover_is_in_the_history_of_both_kernels(online: Online) -> None:
    host = Host(online(VERSION))
    host.khoctl("activate")
    host.khoctl("abort")
    host.kexec(VERSION, "--yes")
    host.khoctl("verify")
    host.shell("timeout 60 sh -c 'until khoctl history --json | grep -q verified; do sleep 0.2; done'")
    # It is remembered at the verdict, and again with what takes longer to find out.
    log = f"/var/lib/khod/runs/{host.status()['run']}.jsonl"
    host.shell(f"timeout 120 sh -c 'until grep -q \"^{{.departure\" {log}; do sleep 0.2; done'")
    host.shell(
        'timeout 60 sh -c \'until [ "$(khoctl history --json)" = "$(sleep 1; khoctl history --json)" ]; do :; done\''
    )
    verified, rolled_back = attempts(host)
    assert (verified["outcome"], rolled_back["outcome"]) == ("verified", "idle")
    assert verified["last_boot_id"] == host.guest.boot_id
    assert verified["first_boot_id"] == rolled_back["first_boot_id"] != host.guest.boot_id
    assert json.loads(host.khoctl("history", "chain", "--json").stdout) == [verified]

    page = host.khoctl("history", "show", verified["run"][:6]).stdout
    assert host.sha256(image(VERSION)[1]) in page
    host.shell(f"cp {DATABASE} /tmp/copy.db")
    assert attempts(host, "--db", "/tmp/copy.db") == [verified, rolled_back]

    others = host.shell(
        f"setpriv --reuid=65534 --regid=65534 --clear-groups khoctl history show {verified['run']} --json"
    )
    assert json.loads(others)["origin"]["cmdline"] == json.loads(others)["summary"]["by"] == ""
    refused = "setpriv --reuid=65534 --regid=65534 --clear-groups khoctl history ack 000000 || echo $?"
    assert host.shell(refused).strip().endswith("3")

    assert "history" not in host.shell("journalctl -b -p warning -u kho-handover -o cat || true")
    assert "DENIED" not in host.dmesg()
