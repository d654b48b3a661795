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
case $1 in
start) exit {start} ;;
show) echo {status} ;;
esac
"""


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
    calls = tmp_path / "calls"
    write_program(tmp_path / "systemctl", SYSTEMCTL, calls=calls, start=start, status=status)
    ended = subprocess.run(
        [SCRIPT, "weekly", *words],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout=20,
        check=False,
    )
    assert ended.returncode == code
    assert calls.read_text().splitlines()[-1] == last


def test_without_a_profile_nothing_is_begun(tmp_path: Path) -> None:
    write_program(tmp_path / "systemctl", SYSTEMCTL, calls=tmp_path / "calls", start=0, status=0)
    ended = subprocess.run([SCRIPT], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=20, check=False)
    assert ended.returncode != 0
    assert not (tmp_path / "calls").exists()
