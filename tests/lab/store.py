# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example key-value store in a guest: a producer whose memory a handover must not lose."""

from tests.lab.conftest import REPOSITORY
from tests.lab.host import Host

EXAMPLES = REPOSITORY / "packaging/examples"
SOCKET = "/run/kv-store/socket"
TALK = f"""\
import hashlib, random, socket, sys

made = random.Random(20241122)
values = [made.randbytes(1 << 19).hex() for _ in range(int(sys.argv[2]))]  # a mebibyte of text each
talk = socket.socket(socket.AF_UNIX)
talk.connect("{SOCKET}")
lines = talk.makefile("rw", newline="\\n")

def ask(line):
    lines.write(line + "\\n")
    lines.flush()
    return lines.readline().rstrip("\\n")

digest = hashlib.sha256()
if sys.argv[1] == "fill":
    for number, value in enumerate(values):
        assert ask(f"SET key-{{number}} {{value}}") == "ok"
        digest.update(value.encode())
else:
    for number in range(len(values)):
        digest.update(ask(f"GET key-{{number}}").removeprefix("value ").encode())
print(digest.hexdigest())
"""


def start_store(host: Host) -> None:
    """Start the key-value store as a service that comes again at boot."""
    host.guest.put("/usr/lib/kv-store/kv-store", (EXAMPLES / "kv-store").read_bytes(), mode=0o755)
    host.guest.put("/etc/systemd/system/kv-store.service", (EXAMPLES / "kv-store.service").read_bytes())
    host.guest.put("/lab/talk.py", TALK)
    host.shell("systemctl daemon-reload; systemctl enable -q --now kv-store; sync")


def fill(host: Host, mebibytes: int) -> str:
    """Write so much into the store; its digest. Writes wait while the store is frozen."""
    return host.guest.run(["python3", "/lab/talk.py", "fill", str(mebibytes)]).stdout.strip()


def check_arrived(host: Host, digest: str, mebibytes: int) -> None:
    """Hold that khod has verified the handover, and that the store has what was written before it."""
    host.khoctl("verify")
    host.shell("systemctl start kv-store")  # restored, it may not serve yet: this waits until it does
    status = host.status()
    assert status["phase"] == "verified", status
    assert "kv-store" in status["verdict"]["arrived"]
    assert host.guest.run(["python3", "/lab/talk.py", "read", str(mebibytes)]).stdout.strip() == digest
