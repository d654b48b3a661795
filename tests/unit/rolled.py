# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts on the simulated kernel as Ansible reaches them, and a controller with the collection installed."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from khod.engine.history import HISTORY_FILE
from tests.unit.collection import install_collection
from tests.unit.histories import attempt, fill
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import REPOSITORY, Answer, Khod

PROFILE = "weekly"
PLAYBOOK_SECONDS = 240.0
"""How long a playbook may take; no test takes nearly as long."""

# What the host's programs are: khoctl, and as much of systemctl as runs a profile.
KHOCTL = """\
#!/bin/sh
exec {python} -m khoctl "$@"
"""
SYSTEMCTL = """\
#!/bin/sh
set -eu
state={state}
case "$1 $2" in
"start --no-block")
    profile=${{3#kho-handover@}}
    echo "$profile" >>"$state/starts"
    : >"$state/running"
    : >"$state/away"
    setsid sh -c 'code=0; khoctl run-profile "$2" >"$1/log" 2>&1 || code=$?
        echo "$code" >"$1/status"
        rm "$1/running" "$1/away"' sh "$state" "${{profile%.service}}" >/dev/null 2>&1 </dev/null &
    ;;
show*)
    if [ -e "$state/running" ]; then echo ActiveState=activating; else echo ActiveState=inactive; fi
    echo "ExecMainStatus=$(cat "$state/status" 2>/dev/null || echo 0)"
    echo Job=
    ;;
*) exit 1 ;;
esac
"""
# Ansible runs modules with this; the host's own programs come first, and its own khod is asked.
PYTHON = """\
#!/bin/sh
export PATH={bin}:$PATH KHOD_SOCKET={socket} PYTHONPATH={repository} KHO_PROFILES={profiles}
exec {python} "$@"
"""
# What Ansible takes for ssh: a connection to this host, which is lost while the host is in a handover.
SSH = """\
#!/bin/sh
for word do
    [ "$word" != -O ] || exit 0
done
if [ -e {state}/away ]; then
    echo "ssh: connect to host {name}: Connection refused" >&2
    exit 255
fi
exec sh -c "$word"
"""


class RolledHost(Khod):
    """One host on the simulated kernel, with a profile that leads to another one."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.name = directory.name
        (directory / "image").write_bytes(bzimage())
        (directory / "initrd").write_bytes(CPIO)
        for name in ("bin", "profiles", "unit"):
            (directory / name).mkdir(exist_ok=True)
        words = f'image = "{directory}/image"\ninitrd = ["{directory}/initrd"]\nappend = "next=1"\n'
        (directory / "profiles" / f"{PROFILE}.toml").write_text(words)
        write_program(directory / "bin/khoctl", KHOCTL, python=sys.executable)
        write_program(directory / "bin/systemctl", SYSTEMCTL, state=shlex.quote(str(directory / "unit")))
        write_program(directory / "bin/ssh", SSH, state=shlex.quote(str(directory / "unit")), name=self.name)
        super().__init__(directory)
        write_program(
            directory / "bin/python",
            PYTHON,
            bin=directory / "bin",
            socket=self.socket,
            repository=REPOSITORY,
            profiles=directory / "profiles",
            python=sys.executable,
        )

    @property
    def starts(self) -> int:
        """How often the profile was started."""
        path = self.directory / "unit/starts"
        return len(path.read_text().split()) if path.exists() else 0

    @property
    def remote(self) -> dict[str, Any]:
        """The host's variables, for a connection that its handover cuts."""
        return self.inventory | {"ansible_connection": "ssh", "ansible_ssh_executable": str(self.directory / "bin/ssh")}

    @property
    def inventory(self) -> dict[str, Any]:
        """The host's variables."""
        return {
            "ansible_connection": "local",
            "ansible_python_interpreter": str(self.directory / "bin/python"),
            "rolling_directory": str(self.directory / "claim"),
        }


class Controller:
    """A controller with the collection, its files below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        install_collection(directory / "collections")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "ANSIBLE_COLLECTIONS_PATH": str(directory / "collections"),
            "ANSIBLE_HOME": str(directory / "home"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_STDOUT_CALLBACK": "default",
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_DEPRECATION_WARNINGS": "false",
            "ANSIBLE_INTERPRETER_PYTHON": "auto_silent",
            "LC_ALL": "C.UTF-8",
        }

    def command(self, hosts: Mapping[str, Mapping[str, Any]], playbook: str, **variables: object) -> list[str]:
        """The command that plays a playbook on these hosts, given as the inventory has them."""
        inventory = self.directory / "inventory.json"
        inventory.write_text(json.dumps({"all": {"hosts": hosts}}))
        program = [sys.executable, str(Path(sys.executable).with_name("ansible-playbook"))]
        given = {"rolling_profile": PROFILE, "rolling_id": "first", **variables}
        return [*program, playbook, "-i", str(inventory), "-e", json.dumps(given)]

    def start(
        self, hosts: Mapping[str, Mapping[str, Any]], playbook: str = "khod.kho.roll"
    ) -> "subprocess.Popen[bytes]":
        """Begin to play it, in a process group of its own that a test can kill."""
        return subprocess.Popen(
            self.command(hosts, playbook),
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def play(
        self,
        hosts: Mapping[str, Mapping[str, Any]],
        playbook: str = "khod.kho.roll",
        options: Sequence[str] = (),
        seconds: float = PLAYBOOK_SECONDS,
        **variables: object,
    ) -> Answer:
        """Play it to its end."""
        ended = subprocess.run(
            [*self.command(hosts, playbook, **variables), *options],
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Answer(ended.returncode, ended.stdout, ended.stderr)


def give_past(directory: Path, *, blackout: float, attempts: int) -> None:
    """Give a host that is still to be made a history of verified handovers, each with this blackout in seconds."""
    (directory / "state").mkdir(parents=True)
    made = [attempt(number + 1) for number in range(attempts)]
    past = [replace(one, summary=replace(one.summary, blackout_seconds=blackout)) for one in made]
    fill(directory / "state" / HISTORY_FILE, *past)


def write_program(path: Path, text: str, **values: object) -> None:
    """Write an executable file."""
    path.write_text(text.format(**values))
    path.chmod(0o755)
