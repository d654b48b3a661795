"""Producers on real kernels: what they hold arrives, and whoever refuses or changes the hardware ends it for all."""

from tests.lab.conftest import REPOSITORY, Online
from tests.lab.host import Host

EXAMPLES = REPOSITORY / "packaging/examples"
MEBIBYTES = 64
STORE = "/run/kv-store/socket"
TALK = f"""\
import hashlib, random, socket, sys

made = random.Random(20241122)
values = [made.randbytes(1 << 19).hex() for _ in range({MEBIBYTES})]  # a mebibyte of text each
talk = socket.socket(socket.AF_UNIX)
talk.connect("{STORE}")
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


def with_store(host: Host) -> None:
    """Start the key-value store as a service that comes again at boot."""
    host.guest.put("/usr/lib/kv-store/kv-store", (EXAMPLES / "kv-store").read_bytes(), mode=0o755)
    host.guest.put("/etc/systemd/system/kv-store.service", (EXAMPLES / "kv-store.service").read_bytes())
    host.guest.put("/lab/talk.py", TALK)
    host.shell("systemctl daemon-reload; systemctl enable -q --now kv-store; sync")


def talk(host: Host, verb: str) -> str:
    return host.guest.run(["python3", "/lab/talk.py", verb]).stdout.strip()


def test_a_key_value_store_keeps_its_data_over_two_handovers(online: Online) -> None:
    """The second with khod killed and started again half-way."""
    host = Host(online("7.3.4"))
    host.guest.wait_online()
    with_store(host)
    digest = talk(host, "fill")
    # One that does not end at SIGTERM, and while it is frozen not even gets it.
    host.guest.put("/etc/kho/producers.d/stubborn.toml", 'unit = "stubborn.service"\n')
    host.shell("systemd-run -q --unit=stubborn sh -c 'trap \"\" TERM; while :; do sleep 1; done'")

    host.kexec("7.3.4")

    assert "Waiting for process" not in host.guest.console()
    arrived(host, digest)
    host.guest.put("/etc/kho/producers.d/stubborn.toml", "")
    host.guest.put("/etc/kho/khod.toml.d/resume.toml", '[policy]\nafter_daemon_died = "resume"\n')
    host.guest.run(["systemctl", "restart", "kho-handover"])
    host.khoctl("activate")
    host.guest.run(["systemctl", "kill", "--signal=SIGKILL", "kho-handover"])
    host.guest.run(["systemctl", "start", "kho-handover"])
    assert host.status()["phase"] == "active"

    host.kexec("7.3.4")

    arrived(host, digest)


def arrived(host: Host, digest: str) -> None:
    """Hold that khod has verified it, and that the store says so too."""
    host.khoctl("verify")
    status = host.status()
    assert status["phase"] == "verified", status
    assert "kv-store" in status["verdict"]["arrived"]
    assert talk(host, "read") == digest


def test_a_kernel_without_luo_keeps_no_producer_s_files(online: Online) -> None:
    host = Host(online("6.18.15"))
    host.guest.wait_online()
    with_store(host)

    refused = host.khoctl("activate", code=4)

    assert "kv-store" in refused.stderr
    assert "was built without it" in refused.stderr
    assert host.status()["phase"] == "idle"
    assert host.word("/sys/kernel/debug/kho/out/finalize") == "0"
