# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lock of a fleet on a real host: refused, held over the jump, and released by the next kernel's own units."""

import shlex

import pytest

from tests.lab.conftest import Online
from tests.lab.host import Host, image

# Its state outlives the jump; /run/deny has it refuse.
SERVER = """\
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOLDER = "/var/lib/lockd.holder"

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["fleet-lock-protocol"] == "true"
        node, holder = body["client_params"]["id"], open(HOLDER, "a+")
        holder.seek(0)
        held = holder.read()
        denied = self.path == "/v1/pre-reboot" and (os.path.exists("/run/deny") or held not in ("", node))
        if not denied:
            holder.truncate(0)
            holder.write(node if self.path == "/v1/pre-reboot" else "")
            holder.flush()
            os.fsync(holder.fileno())
        answer = json.dumps({"kind": "failed_lock", "value": "not today"} if denied else {}).encode()
        self.send_response(409 if denied else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"""
SERVER_UNIT = """\
[Service]
ExecStart=/usr/bin/python3 /usr/lib/lockd.py
[Install]
WantedBy=multi-user.target
"""
CLIENT = """\
url = "http://127.0.0.1:8080"
deadline = 60
"""
APP_ID = "de35106b6ec24688b63afddaa156679b"
SETTLE = "khod-fleetlock@settle.service"
UNITS = (SETTLE, "khod-fleetlock.timer")
MAX_EXPOSURE_TENTHS = 30


def holder(host: Host) -> str:
    return host.shell("cat /var/lib/lockd.holder")


@pytest.mark.proof
def test_a_handover_takes_the_lock_along_and_the_next_kernel_releases_it(online: Online) -> None:
    host = Host(online("7.3.4"))
    host.shell(f"systemd-analyze verify --man=no {' '.join(UNITS)} 2>&1 | grep -F khod-fleetlock && exit 1 || true")
    host.shell(f"systemd-analyze security --no-pager --threshold={MAX_EXPOSURE_TENTHS} {SETTLE}")
    assert host.shell("systemctl is-enabled khod-fleetlock.timer").strip() == "enabled"
    host.guest.put("/usr/lib/lockd.py", SERVER)
    host.guest.put("/etc/systemd/system/lockd.service", SERVER_UNIT)
    host.shell("systemctl daemon-reload; systemctl enable -q --now lockd; touch /run/deny")
    listens = shlex.quote("import socket; socket.create_connection(('127.0.0.1', 8080))")
    host.shell(f"timeout 60 sh -c {shlex.quote(f'until python3 -c {listens} 2>/dev/null; do sleep 0.2; done')}")

    host.guest.put("/etc/kho/fleetlock.toml", CLIENT.replace("60", "0.1"))
    refused = host.khoctl("kexec", *image("7.3.4"), code=3)
    assert "http://127.0.0.1:8080" in refused.stderr
    assert "not today (failed_lock)" in " ".join(refused.stderr.split())
    assert holder(host) == ""
    assert host.status()["phase"] == "idle"
    assert host.hook_leftovers() == ("", "")

    host.shell("rm /run/deny")
    host.guest.put("/etc/kho/fleetlock.toml", CLIENT)
    host.khoctl("producers", "test", "fleetlock")
    assert holder(host) == ""
    host.khoctl("kexec", *image("7.3.4"), "--load-only")
    node = host.shell(f"systemd-id128 machine-id --app-specific={APP_ID}").strip()
    assert holder(host) == node
    host.khoctl("abort")
    assert holder(host) == ""
    host.shell("sync")

    host.kexec("7.3.4")
    assert host.settled()["outcome"] == "verified"
    until = f"journalctl -b -o cat -u {SETTLE} | grep -q 'The lock is released'"
    host.shell(f"timeout 200 sh -c {shlex.quote(f'until {until}; do sleep 0.5; done')}")
    assert holder(host) == ""
