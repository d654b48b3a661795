# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command that kured runs in place of a reboot: its exit codes say whether the node comes back by itself."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.khods import REPOSITORY
from tests.unit.rolled import write_program

SCRIPT = REPOSITORY / "packaging/examples/kured-reboot"
SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>{calls}
case $* in
start*) echo {invocation} >>{calls}.invocations; exit {start} ;;
*InvocationID*) tail -n 1 {calls}.invocations ;;
show*) echo {status} ;;
esac
"""


def reboot(directory: Path, *words: str, start: int, status: int, invocation: str) -> tuple[int, list[str]]:
    """Run the script for profile weekly, with a systemctl that answers so; its exit code and the calls of systemctl."""
    calls = directory / "calls"
    Path(f"{calls}.invocations").write_text("earlier\n")
    write_program(directory / "systemctl", SYSTEMCTL, calls=calls, start=start, status=status, invocation=invocation)
    ended = subprocess.run(
        [SCRIPT, "weekly", *words], env={"PATH": f"{directory}:{os.environ['PATH']}"}, timeout=20, check=False
    )
    return ended.returncode, calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("start", "status", "words", "code", "last"),
    [
        (0, 0, (), 0, "start kho-handover@weekly.service"),
        (1, 3, (), 3, "show --value --property=ExecMainStatus kho-handover@weekly.service"),
        (1, 1, ("--cold",), 1, "show --value --property=ExecMainStatus kho-handover@weekly.service"),
        (1, 4, (), 4, "show --value --property=ExecMainStatus kho-handover@weekly.service"),
        (1, 4, ("--cold",), 0, "reboot"),
        (1, 0, (), 1, "show --value --property=ExecMainStatus kho-handover@weekly.service"),
    ],
)
def test_kured_gets_the_exit_code_of_a_handover_that_did_not_jump(
    tmp_path: Path, start: int, status: int, words: tuple[str, ...], code: int, last: str
) -> None:
    ended, calls = reboot(tmp_path, *words, start=start, status=status, invocation="now")
    assert ended == code
    assert calls[-1] == last


def test_the_exit_code_of_an_earlier_run_reboots_nothing(tmp_path: Path) -> None:
    ended, calls = reboot(tmp_path, "--cold", start=1, status=4, invocation="earlier")
    assert ended == 1
    assert "reboot" not in calls


def test_without_a_profile_nothing_is_begun(tmp_path: Path) -> None:
    write_program(tmp_path / "systemctl", SYSTEMCTL, calls=tmp_path / "calls", start=0, status=0, invocation="now")
    ended = subprocess.run([SCRIPT], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=20, check=False)
    assert ended.returncode != 0
    assert not (tmp_path / "calls").exists()
