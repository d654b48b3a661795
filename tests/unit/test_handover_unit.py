# SPDX-License-Identifier: LGPL-2.1-or-later
"""`khoctl handover`: a profile's unit with its hooks, on the simulated kernel, with a systemctl of our own."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from khoctl import profile, profile_hooks
from khod.errors import Exit
from khod.model import Phase
from tests.unit.images import CPIO, bzimage
from tests.unit.khods import REPOSITORY, Answer, Khod, until
from tests.unit.test_follow import JUMPS

SYSTEMCTL = """\
#!/bin/sh
# Runs what the unit runs, with its output kept for journalctl, as systemd does.
cd {repository}
unset COLUMNS
case $1 in
is-system-running) cat {here}/system 2>/dev/null || echo running; exit 0;;
show) echo "ExecMainStatus=$(cat {here}/status)"; echo "InvocationID=$(wc -l < {here}/started)"; exit 0;;
esac
for unit; do :; done
echo "$*" >> {here}/started
echo "$(readlink /proc/$$/fd/0) $(cut -d' ' -f6 /proc/$$/stat) $$" > {here}/terminal
profile=${{unit#kho-handover@}}
{python} -m khoctl run-profile "${{profile%.service}}" > /dev/null 2> {here}/journal
echo $? > {here}/status
[ "$(cat {here}/status)" = 0 ]
"""
PROFILE = """\
image = "{here}/vmlinuz"
initrd = "{here}/initrd"
now = true
{keys}
[hooks]
before = {before}
after = ["/bin/sh", "-c", "env | grep ^KHO_ | sort > {here}/after"]
{tables}
"""
RUN_BEFORE = '["/bin/sh", "-c", "echo before >> {here}/before; cat {here}/vmlinuz > /dev/null"]'


class Unit:
    """One host with a profile `next`, whose unit is run by a systemctl below its directory."""

    def __init__(self, khod: Khod) -> None:
        self.khod, self.here = khod, khod.directory

    def install_programs(self) -> None:
        program = self.here / "bin/systemctl"
        program.parent.mkdir(exist_ok=True)
        program.write_text(SYSTEMCTL.format(here=self.here, repository=REPOSITORY, python=sys.executable))
        program.chmod(0o755)
        journal = self.here / "bin/journalctl"
        journal.write_text(f"#!/bin/sh\ncat {self.here}/journal\n")
        journal.chmod(0o755)

    def write(self, *, keys: str = "", before: str = RUN_BEFORE, tables: str = "", name: str = "next") -> None:
        (self.here / "profiles").mkdir(exist_ok=True)
        text = PROFILE.format(here=self.here, keys=keys, tables=tables, before=before.format(here=self.here))
        (self.here / f"profiles/{name}.toml").write_text(text)

    def hand_over(self, *words: str) -> Answer:
        return self.khod.khoctl("handover", "next", *words)

    def finish(self) -> Answer:
        """What kho-after@next.service runs, or kho-after.service."""
        return self.khod.khoctl("finish-profile", "next")

    def hold_due(self, command: list[str] | None = None, *, boot_id: str = "", earlier_run: str = "") -> None:
        """Have a command due after a run whose khoctl was killed; "" stands for what khod says now."""
        status = self.khod.khoctl("status", "--json").json
        due: dict[str, Any] = {"profile": "next", "asked_by": "me", "arrived_run": ""}
        due |= {"boot_id": boot_id or status["boot_id"], "earlier_run": earlier_run or status["run"]}
        command = command or ["/bin/sh", "-c", f"env | grep ^KHO_ > {self.here}/after"]
        (self.here / "due").mkdir(exist_ok=True)
        (self.here / "due/next.json").write_text(json.dumps(due | {"commands": [command], "seconds": 5.0}))

    @property
    def due(self) -> list[str]:
        return sorted(path.name for path in (self.here / "due").glob("*"))

    @property
    def after(self) -> dict[str, str]:
        """The environment of the command after the handover; {} if it did not run."""
        path = self.here / "after"
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(line.partition("=")[::2] for line in lines)


def make_unit(directory: Path) -> Unit:
    (directory / "vmlinuz").write_bytes(bzimage())
    (directory / "initrd").write_bytes(CPIO)
    return Unit(Khod(directory))


def prepare_unit(made: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the usual profile, and have every khoctl find it, its systemctl and its khod."""
    made.write()
    monkeypatch.setenv("PATH", f"{made.here}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("KHOD_SOCKET", str(made.khod.socket))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(profile.ENVIRONMENT, str(made.here / "profiles"))
    monkeypatch.setenv(profile_hooks.ENVIRONMENT, str(made.here / "due"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    """A khod that the tests share which change nothing of it."""
    made = make_unit(tmp_path_factory.mktemp("unit"))
    yield made
    made.khod.close()


@pytest.fixture
def unit(host: Unit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unit]:
    host.install_programs()
    prepare_unit(host, monkeypatch)
    yield host
    if host.khod.record.phase is not Phase.idle:
        assert host.khod.khoctl("abort").code == Exit.done
    for name in ("after", "before", "started", "system", "due", "profiles"):
        path = host.here / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (host.here / "initrd").write_bytes(CPIO)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unit]:
    """A khod of the test's own, for what changes it."""
    made = make_unit(tmp_path)
    made.install_programs()
    prepare_unit(made, monkeypatch)
    yield made
    made.khod.close()


@pytest.mark.parametrize("outcome", JUMPS)
def test_the_command_after_the_jump_has_the_verdict(own: Unit, outcome: str) -> None:
    faults, code = JUMPS[outcome]
    for name, value in faults.items():
        own.khod.kernel.set_fault(name, value)
    ended = own.hand_over()
    assert (ended.code, "The host jumped" in ended.err) == (Exit.done, True), ended
    assert (own.here / "before").read_text() == "before\n"
    assert (own.due, own.after) == (["next.json"], {})
    own.khod.word("READY=1")
    finished = own.finish()
    assert finished.code == Exit.done, finished.err
    status = own.khod.khoctl("status", "--json").json
    found = own.after
    assert (found["KHO_NAME"], found["KHO_VERB"], found["KHO_VERDICT"]) == ("next", "after", outcome)
    assert (found["KHO_EXIT_CODE"], found["KHO_RUN"]) == (str(int(code)), status["arrived_run"])
    assert ("KHO_BLACKOUT_SECONDS" in found) == (outcome != "cold_boot")
    assert found["KHO_ASKED_BY"].startswith("root (")
    assert own.due == []
    (own.here / "after").unlink()
    assert (own.finish().code, own.after) == (Exit.done, {})  # once


def test_who_asked_stands_in_the_history_with_what_runs_it(unit: Unit) -> None:
    unit.write(keys="blackout_budget = 600.0\nrequire = []\nload_only = true", tables='[verify]\nmust_pass = ["kho"]')
    ended = unit.hand_over("--json")
    assert (ended.code, ended.json["phase"]) == (Exit.done, "loaded")
    by, terms = ended.json["begun"]["by"], ended.json["terms"]
    assert f"process {os.getpid()}" in by  # this process, which runs khoctl
    assert ", by profile next that root (" in by
    assert (terms["profile"], terms["blackout_budget"], terms["must_pass"]) == ("next", 600.0, ["kho"])
    assert unit.khod.record.begun.profile == "next"
    assert unit.khod.khoctl("abort").code == Exit.done
    assert unit.finish().code == Exit.done
    assert (unit.after["KHO_VERDICT"], unit.after["KHO_RUN"], unit.due) == ("rolled_back", ended.json["run"], [])
    shown = unit.khod.khoctl("history", "show")
    assert "profile     next" in shown.out
    assert "budget      600 s" in shown.out


def test_systemctl_has_neither_the_terminal_nor_the_session_of_khoctl(unit: Unit) -> None:
    unit.write(keys="load_only = true")
    assert unit.hand_over().code == Exit.done
    stdin, session, process = (unit.here / "terminal").read_text().split()
    assert (stdin, session) == ("/dev/null", process)


def test_a_unit_that_nobody_announced_is_of_an_unknown_user(unit: Unit) -> None:
    unit.write(keys="load_only = true")
    assert unit.khod.khoctl("run-profile", "next").code == Exit.done
    assert unit.khod.record.begun.by.startswith("an unknown user, by profile next that root (")


def test_who_gives_kexec_a_profile_asks_for_it(unit: Unit) -> None:
    text = (unit.here / "profiles/next.toml").read_text().partition("[hooks]")[0]
    (unit.here / "profiles/plain.toml").write_text(text)
    assert unit.khod.khoctl("kexec", "--profile", "plain", "--load-only").code == Exit.done
    by = unit.khod.record.begun.by
    assert (by.startswith("root ("), by.endswith("), by profile plain")) == (True, True)


def test_a_command_before_that_fails_refuses_the_handover_and_the_one_after_runs(unit: Unit) -> None:
    unit.write(before='[["true"], ["/bin/sh", "-c", "echo no seats >&2; exit 4"], ["touch", "{here}/never"]]')
    ended = unit.hand_over()
    assert ended.code == Exit.refused
    assert "/bin/sh, which profile next runs before its handover, exited with 4: no seats" in ended.err
    assert not (unit.here / "never").exists()
    assert (unit.after["KHO_VERDICT"], unit.after["KHO_EXIT_CODE"], unit.due) == ("refused", "3", [])
    assert unit.khod.record.phase is Phase.idle


def test_a_command_before_that_hangs_is_killed_at_its_deadline(unit: Unit) -> None:
    unit.write(before='["/bin/sh", "-c", "sleep 600"]\nbefore_timeout = 0.2')
    ended = unit.hand_over()
    assert (ended.code, "did not end within 0.2 s" in ended.err) == (Exit.refused, True)
    assert unit.after["KHO_VERDICT"] == "refused"


def test_a_command_that_floods_and_leaves_something_behind_costs_no_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "gate")
    script = f"cat {tmp_path}/gate & yes flood | head -c 1000000 >&2; echo >&2; echo last >&2; exit 3"
    hook = profile.HookCommands(seconds=20.0)
    with monkeypatch.context() as changed:
        changed.setattr(tempfile, "tempdir", "/nonexistent")
        why = profile_hooks.run_command(("/bin/sh", "-c", script), hook, {"KHO_VERB": "before"})
    assert why == "exited with 3: last"
    (tmp_path / "gate").write_text("")
    assert len(capfd.readouterr().err) < 1 << 17


def test_a_handover_that_is_rolled_back_has_the_command_after_it_run(own: Unit) -> None:
    own.khod.kernel.set_fault("veto", -12)
    ended = own.hand_over("--json")
    assert ended.code == Exit.failed, ended
    assert (own.after["KHO_VERDICT"], own.after["KHO_EXIT_CODE"], own.due) == ("rolled_back", "1", [])
    assert own.after["KHO_REASON"]
    assert ended.json["where"] == "kho-handover@next.service"


@pytest.mark.parametrize(
    ("boot_id", "earlier_run", "verdict"), [("", "", "refused"), ("", "another", "rolled_back"), ("x", "", "cold_boot")]
)
def test_what_a_killed_khoctl_left_due_is_run_behind_it(
    unit: Unit, boot_id: str, earlier_run: str, verdict: str
) -> None:
    """Also where the profile is gone by then; "" stands for what khod says now."""
    unit.hold_due(boot_id=boot_id, earlier_run=earlier_run)
    (unit.here / "profiles/next.toml").unlink()
    (unit.here / "system").write_text("stopping\n")
    assert (unit.finish().code, unit.due, unit.after) == (Exit.done, ["next.json"], {})
    (unit.here / "system").unlink()
    assert unit.khod.khoctl("finish-profile").code == Exit.done
    assert (unit.after["KHO_VERDICT"], unit.after["KHO_ASKED_BY"], unit.due) == (verdict, "me", [])


def test_a_command_after_that_fails_stays_due(unit: Unit) -> None:
    unit.write(keys="load_only = true")
    assert unit.hand_over().code == Exit.done
    (unit.here / "after").mkdir()
    assert unit.khod.khoctl("abort").code == Exit.done
    ended = unit.finish()
    assert (ended.code, unit.due) == (Exit.failed, ["next.json"])
    assert "systemctl start kho-after@next" in ended.err
    (unit.here / "after").rmdir()
    assert (unit.finish().code, unit.due) == (Exit.done, [])


def test_no_command_is_run_beside_another_handover(unit: Unit) -> None:
    assert unit.khod.khoctl("activate").code == Exit.done
    ended = unit.hand_over()
    assert (ended.code, "A handover is under way (active)" in ended.err) == (Exit.refused, True)
    assert unit.khod.khoctl("abort").code == Exit.done
    with profile_hooks.lock_runs():
        ended = unit.hand_over()
    assert (ended.code, "The run of a profile is under way" in ended.err) == (Exit.refused, True)
    assert (unit.due, (unit.here / "before").exists()) == ([], False)


def test_what_is_due_is_run_by_one_khoctl_at_a_time(unit: Unit) -> None:
    """The run that holds the lock has not begun its handover: it must not lose what is due after it."""
    unit.hold_due()
    with profile_hooks.lock_runs():
        finishing = subprocess.Popen([sys.executable, "-m", "khoctl", "finish-profile"], stderr=subprocess.PIPE)
        try:
            waiting = re.compile(rf"-> FLOCK .* {finishing.pid} ")
            until(lambda: bool(waiting.search(Path("/proc/locks").read_text())), finishing)
            assert (unit.due, unit.after) == (["next.json"], {})
            (unit.here / "due/next.json").unlink()
        except BaseException:
            finishing.kill()
            raise
    _output, errors = finishing.communicate()
    assert (errors, finishing.returncode, unit.after) == (b"", Exit.done, {})


def test_what_is_still_due_is_run_before_the_next_run(unit: Unit) -> None:
    unit.write(before='["/bin/false"]')
    unit.hold_due(["/bin/sh", "-c", "echo late: cannot >&2; exit 1"])
    ended = unit.hand_over()
    assert (ended.code, "late: cannot" in ended.err) == (Exit.refused, True)
    assert "systemctl start kho-after@next" in ended.err
    unit.hold_due(["/bin/sh", "-c", f"touch {unit.here}/before"])
    ended = unit.hand_over()
    assert (ended.code, "/bin/false" in ended.err) == (Exit.refused, True)
    assert ((unit.here / "before").exists(), unit.due, unit.after["KHO_VERDICT"]) == (True, [], "refused")


def test_an_operator_who_has_waited_long_enough_leaves_the_unit_alone(unit: Unit) -> None:
    os.mkfifo(unit.here / "gate")
    unit.write(before=f'["/bin/sh", "-c", "cat {unit.here}/gate; exit 1"]')
    ended = unit.hand_over("--timeout", "0.5")
    assert (ended.code, "It is not over within 0.5 s" in ended.err) == (Exit.unreachable, True)
    until(lambda: unit.due == ["next.json"], None)
    (unit.here / "gate").write_text("")
    until(lambda: not unit.due, None)
    (unit.here / "gate").unlink()


def test_damage_in_what_is_due_is_said(unit: Unit) -> None:
    (unit.here / "due").mkdir(exist_ok=True)
    (unit.here / "due/next.json").write_text("{")
    ended = unit.khod.khoctl("finish-profile")
    assert (ended.code, "next.json" in ended.err) == (Exit.failed, True)


def closed_window() -> str:
    """The table of a window that opens in two hours, for an hour."""
    begin = datetime.now(UTC) + timedelta(hours=2)
    return f'[window]\nfrom = "{begin:%H:%M}"\nto = "{begin + timedelta(hours=1):%H:%M}"\ntimezone = "UTC"\n'


def test_a_closed_window_refuses_before_anything_is_run(unit: Unit) -> None:
    unit.write(tables=closed_window())
    ended = unit.hand_over()
    assert (ended.code, "is closed; it opens next" in ended.err) == (Exit.refused, True)
    assert not (unit.here / "started").exists()
    assert unit.khod.khoctl("run-profile", "next").code == Exit.refused  # by systemctl start
    assert not (unit.here / "before").exists()
    planned = unit.khod.khoctl("plan", "next", "--json")
    (window,) = [check for check in planned.json["checks"] if check["name"] == "window"]
    assert (planned.code, window["result"]) == (Exit.refused, "fail")
    assert unit.khod.khoctl("check", "--profile", "next").code == Exit.refused
    ignored = unit.khod.khoctl("plan", "next", "--ignore-window")
    assert ignored.code == Exit.done, ignored.out


def test_a_window_is_ignored_on_the_record(unit: Unit) -> None:
    unit.write(tables=closed_window(), keys="load_only = true")
    ended = unit.hand_over("--ignore-window")
    assert (ended.code, "UTC) is ignored, as asked" in ended.err) == (Exit.done, True)
    terms = unit.khod.record.terms
    assert (terms.window_ignored, terms.begin_before) == (True, None)
    assert terms.window is not None
    assert "UTC" in terms.window


def test_a_window_that_is_open_ends_with_its_closing(unit: Unit) -> None:
    unit.write(
        tables='[window]\ndays = ["Mon-Sun"]\ntimezone = "UTC"\nfrom = "00:00"\nto = "23:59"', keys="load_only = true"
    )
    if datetime.now(UTC).strftime("%H:%M") == "23:59":
        unit.write(tables='[window]\ntimezone = "UTC"\nfrom = "23:00"\nto = "22:59"', keys="load_only = true")
    assert unit.hand_over().code == Exit.done
    ends = unit.khod.record.terms.begin_before
    assert ends is not None
    assert 0 < ends - datetime.now(UTC).timestamp() <= 86400


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [((), Exit.usage, "There is no profile"), (("b", "a"), Exit.usage, "There are: a, b."), (("next",), Exit.done, "")],
)
def test_without_a_name_it_is_the_only_profile(unit: Unit, names: tuple[str, ...], code: Exit, said: str) -> None:
    (unit.here / "profiles/next.toml").unlink()
    for name in names:
        unit.write(name=name, keys="load_only = true")
    ended = unit.khod.khoctl("handover")
    assert (ended.code, said in ended.err) == (code, True), ended


@pytest.mark.parametrize("command", ["handover", "plan"])
def test_an_empty_name_is_not_the_only_profile(unit: Unit, command: str) -> None:
    """As of a variable of a script that is not set."""
    ended = unit.khod.khoctl(command, "")
    assert (ended.code, "'' is not a valid name of a profile" in ended.err) == (Exit.usage, True)
    assert not (unit.here / "started").exists()


def test_a_plan_shows_what_the_profile_adds(unit: Unit) -> None:
    unit.write(keys="blackout_budget = 5.0", tables='[deadlines]\nfreeze = 2.5\n[verify]\ntolerate = ["log"]')
    planned = unit.khod.khoctl("plan", "next")
    assert planned.code == Exit.done, planned
    for said in (
        "profile     next (",
        "deadlines   freeze 2.5 s",
        "budget      5 s",
        "tolerates   log",
        "300 s at most",
    ):
        assert said in planned.out
    found: dict[str, Any] = unit.khod.khoctl("plan", "--profile", "next", "--json").json["profile"]
    assert found["terms"]["deadlines"] == {"freeze": 2.5}
    assert (found["name"], found["after"]["seconds"]) == ("next", 300.0)
    assert unit.khod.khoctl("plan", "next", "--profile", "other").code == Exit.usage


def test_kexec_does_not_leave_the_hooks_of_a_profile_out(unit: Unit) -> None:
    ended = unit.khod.khoctl("kexec", "--profile", "next")
    assert (ended.code, "khoctl handover next" in ended.err) == (Exit.usage, True)
    assert unit.khod.record.phase is Phase.idle


def test_a_profile_whose_files_are_gone_starts_no_unit(unit: Unit) -> None:
    (unit.here / "initrd").unlink()
    ended = unit.hand_over()
    assert (ended.code, "`initrd` of profile next names" in ended.err) == (Exit.usage, True)
    assert not (unit.here / "started").exists()


def test_a_unit_that_is_not_started_leaves_no_announcement(unit: Unit) -> None:
    (unit.here / "status").write_text("0")
    (unit.here / "bin/systemctl").write_text("#!/bin/sh\n[ $1 = show ] && echo ExecMainStatus=0\nexit 5\n")
    ended = unit.hand_over()
    assert (ended.code, "systemd has not started the unit" in ended.err) == (Exit.failed, True)
    assert unit.khod.ask("TakeAnnouncement", profile="next")["announcement"]["by"] == ""
    ended = unit.hand_over("--no-block")
    assert ended.code == Exit.failed


def test_the_end_of_an_earlier_run_is_not_that_of_one_that_did_not_begin(unit: Unit) -> None:
    (unit.here / "bin/systemctl").write_text(
        "#!/bin/sh\n[ $1 = show ] && printf 'ExecMainStatus=7\\nInvocationID=1\\n'\nexit 1\n"
    )
    ended = unit.hand_over()
    assert (ended.code, "systemd has not started the unit" in ended.err) == (Exit.failed, True)


def test_it_does_not_wait_where_it_is_not_to(unit: Unit) -> None:
    unit.write(keys="load_only = true")
    ended = unit.hand_over("--no-block", "--json")
    assert ended.json == {"unit": "kho-handover@next.service"}
    assert (unit.here / "started").read_text() == "start --no-block kho-handover@next.service\n"
