# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod has imported while producers wait for what they left: nothing that only checks, images or reports need."""

import ast
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.arrived import NEXT, READY, STARTER, call_early, jump_with_producer, listen_at, start_khod
from tests.unit.khods import DEADLINE, reply, until
from tests.unit.test_layering import MODULES, name

LATER = {
    "jeepney",
    "khod.history.database",
    "khod.images",
    "khod.metrics.table",
    "khod.preflight",
    "khod.provenance",
    "khod.server.handover",
    "khod.server.interface",
    "khod.server.metrics",
    "khod.systemd.dbus",
    "khod.target",
    "khod.vm",
    "pyudev",
    "sqlite3",
}
"""What is imported once the producers have what they left, with everything below."""
NEVER = {"khod.trees", "ssl"}
TELLING = """\
import json, os, signal, sys
def tell(*_):
    with open("{path}.new", "w") as file:
        json.dump(sorted(sys.modules), file)
    os.rename("{path}.new", "{path}")
signal.signal(signal.SIGUSR1, tell)
"""


def loaded_modules(khod: "subprocess.Popen[bytes]", path: Path) -> set[str]:
    """Return the modules that khod has imported by now, with the packages that they belong to."""
    path.unlink(missing_ok=True)
    khod.send_signal(signal.SIGUSR1)
    until(path.exists, khod)
    return set(json.loads(path.read_text()))


def test_a_producer_is_given_back_what_it_left_before_the_rest_is_imported(tmp_path: Path) -> None:
    jump_with_producer(tmp_path)
    (tmp_path / "root/etc/kho/producers.d").mkdir(parents=True)
    (tmp_path / "root/etc/kho/producers.d/hook.toml").write_text('prepare = ["true"]\n')
    told = tmp_path / "modules"
    with (
        listen_at(tmp_path / "activated") as listening,
        call_early(tmp_path / "activated") as producer,
        start_khod(tmp_path, listening, TELLING.format(path=told) + STARTER) as khod,
    ):
        assert "run" in reply(producer)["parameters"]
        producer.sendall(NEXT)
        command = reply(producer)["parameters"]
        assert command["verb"] == "restore"
        assert not loaded_modules(khod, told) & (LATER | NEVER)
        producer.sendall(READY % command["serial"])
        command = reply(producer)["parameters"]
        assert command["verb"] == "finish"
        producer.sendall(READY % command["serial"])
        until(lambda: loaded_modules(khod, told) >= LATER, khod)
        assert not loaded_modules(khod, told) & NEVER


def test_khod_is_ready_before_what_serves_clients_and_drives_handovers_is_imported(tmp_path: Path) -> None:
    told, starter = tmp_path / "modules", "import khod.deferred; khod.deferred.load_deferred = lambda: None\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(DEADLINE)
        manager.bind(str(tmp_path / "notify"))
        with (
            listen_at(tmp_path / "activated") as listening,
            start_khod(tmp_path, listening, starter + TELLING.format(path=told) + STARTER) as khod,
        ):
            while b"READY=1" not in manager.recv(4096):
                pass
            loaded = loaded_modules(khod, told)
            assert not loaded & (LATER | NEVER | {"asyncvarlink", "khod.engine.attempt", "khod.server.server"})
            with call_early(tmp_path / "activated") as producer:
                assert reply(producer)["parameters"]["told"] == ""


def test_the_sources_of_a_real_host_import_nothing_before_they_are_asked() -> None:
    asked = """
import sys
from khod.abi.calls import HostCalls
from khod.engine.sources import host_sources
host_sources(HostCalls())
print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", asked], stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    assert not {*loaded} & (LATER | {"khod.history.model", "khod.kernel.clocks"})


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_deferred_module_is_the_one_that_is_checked(path: Path) -> None:
    """What `defer_module` stands for has the same name in the imports that mypy reads."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if (
            not isinstance(node, ast.If)
            or ast.unparse(node.test) != "TYPE_CHECKING"
            or "defer_module" not in ast.unparse(node)
        ):
            continue
        checked: dict[str, str] = {}
        for imported in node.body:
            assert isinstance(imported, (ast.Import, ast.ImportFrom))
            base = f"{imported.module}." if isinstance(imported, ast.ImportFrom) else ""
            checked |= {alias.asname or alias.name: base + alias.name for alias in imported.names}
        for line in node.orelse:
            assert isinstance(line, ast.Assign)
            assert isinstance(line.value, ast.Call)
            assert checked[ast.unparse(line.targets[0])] == ast.literal_eval(line.value.args[0])
