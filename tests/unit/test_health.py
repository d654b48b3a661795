# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's health checks: how their files are read, and what a command may do."""

from pathlib import Path

import pytest

from khod.errors import CheckFailed
from khod.model import Check, CheckResult, FindingSource, Phase, Verdict
from khod.producers.children import Children
from khod.producers.commands import Command
from khod.producers.health import DIRECTORY, MAX_HEALTH_CHECKS, UNIT_PREFIX, HealthCheck, HealthChecks, read_check
from khod.producers.transient import unit_name
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host
from tests.unit.khods import REPOSITORY
from tests.unit.test_hooks import gone

FINE = 'command = ["/bin/true"]\n'


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def lay(root: Path, **files: str) -> None:
    directory = root / "etc/kho/verify.d"
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.toml").write_text(text)


def read(root: Path, text: str) -> HealthCheck:
    lay(root, a=text)
    return read_check(root / "etc/kho/verify.d/a.toml")


def test_a_file_has_a_command_what_it_is_needed_for_and_a_time(tmp_path: Path) -> None:
    found = read(tmp_path, 'command = ["/bin/ls", "-l"]\nneed = "wanted"\ntimeout = 5\n')
    assert found == HealthCheck("a", ("/bin/ls", "-l"), is_required=False, timeout=5.0)
    assert read(tmp_path, FINE).is_required


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        (f"{FINE}comand = 1\n", 2, "`comand`"),
        (f'{FINE}need = "maybe"\n', 2, "`need`"),
        (f"{FINE}timeout = -1\n", 2, "`timeout`"),
        (f'{FINE}timeout = "1"\n', 2, "`timeout`"),
        (f"{FINE}need =\n", 2, "TOML"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, text: str, line: int, named: str) -> None:
    found = read(tmp_path, text)
    assert found.wrong is not None
    assert named in found.wrong.what
    assert found.wrong.where == f"{tmp_path}/etc/kho/verify.d/a.toml:{line}"


@pytest.mark.parametrize(
    "text", ["", "command = []\n", 'command = "ls"\n', 'command = ["a\\u0000b"]\n', 'need = "wanted"\n']
)
def test_a_file_without_a_command_is_wrong(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text).wrong is not None


def test_a_wrong_file_is_as_needed_as_it_says(tmp_path: Path) -> None:
    assert read(tmp_path, 'x = 1\nneed = "required"\n').is_required
    assert not read(tmp_path, 'x = 1\nneed = "wanted"\n').is_required
    assert read(tmp_path, "x = [\n").is_required


def test_too_many_files_are_not_run_and_said(tmp_path: Path) -> None:
    lay(tmp_path, **{f"c{number:03}": FINE for number in range(MAX_HEALTH_CHECKS + 1)})
    found = HealthChecks(tmp_path, Children()).load_checks()
    assert [check.wrong is None for check in found] == [True] * MAX_HEALTH_CHECKS + [False]


async def test_a_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(host: Host) -> None:
    path = host.directory / DIRECTORY
    with pytest.raises(Rebooted):
        await host.kexec(await host.started())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")
    engine = await host.started()
    verdict = host.record.verdict
    assert verdict is not None
    check = checks(verdict)["health"]
    assert check.result is CheckResult.skipped
    assert "cannot be read" in check.evidence
    with pytest.raises(CheckFailed, match="cannot be read"):
        await host.kexec(engine)


@pytest.mark.parametrize("name", ["a", "a@b", "khod", "verify"])
def test_no_unit_of_a_health_check_has_the_name_of_another_unit(name: str) -> None:
    command = Command(name, ["/bin/true"], {}, unit_prefix=UNIT_PREFIX)
    unit = unit_name(name, 0, command.unit_prefix)
    assert unit.startswith("kho-verify-")
    assert unit not in (unit_name(name), "kho-verify.service")


async def verified(host: Host) -> Verdict:
    """The verdict of the next boot; `host` has the files."""
    with pytest.raises(Rebooted):
        await host.kexec(await host.started())
    engine = await host.started()
    while engine.machine.phase not in (Phase.verified, Phase.degraded):
        await host.seen(lambda _event: True)
    assert host.record.verdict is not None
    return host.record.verdict


def checks(verdict: Verdict) -> dict[str, Check]:
    return {check.name: check for check in verdict.checks}


def script(text: str, rest: str = "") -> str:
    return f"command = ['/bin/sh', '-c', '{text}']\n{rest}"


async def test_health_checks_run_after_the_jump_and_are_shown(host: Host) -> None:
    lay(host.directory, fine=script('test "$KHO_NAME $KHO_VERB" = "fine verify"'))
    verdict = await verified(host)
    assert checks(verdict)["health fine"].result is CheckResult.passed
    assert verdict.reason == ""


async def test_health_checks_wait_for_the_services_of_the_host(host: Host) -> None:
    ran = host.directory / "ran"

    async def come_up() -> None:
        assert not ran.exists()
        (host.directory / "up").touch()

    host.host_up = come_up
    lay(host.directory, fine=script(f"touch {ran}; test -e {host.directory}/up"))
    verdict = await verified(host)
    assert checks(verdict)["health fine"].result is CheckResult.passed
    assert ran.exists()


async def test_a_required_one_that_fails_degrades_and_a_wanted_one_is_only_shown(host: Host) -> None:
    lay(
        host.directory,
        required=script("echo no database >&2; exit 1"),
        wanted=script("echo no cache >&2; exit 1", 'need = "wanted"\n'),
    )
    verdict = await verified(host)
    (finding,) = verdict.findings
    assert (finding.source, finding.subject) == (FindingSource.health, "required")
    assert "no database" in finding.text
    assert checks(verdict)["health required"].result is CheckResult.fail
    wanted = checks(verdict)["health wanted"]
    assert (wanted.result, wanted.evidence) == (CheckResult.warn, "no cache")


async def test_a_wrong_file_fails_by_its_name(host: Host) -> None:
    with pytest.raises(Rebooted):
        await host.kexec(await host.started())
    lay(host.directory, bad=f"{FINE}sneed = 1\n")
    engine = await host.started()
    while engine.machine.phase not in (Phase.verified, Phase.degraded):
        await host.seen(lambda _event: True)
    verdict = host.record.verdict
    assert verdict is not None
    assert engine.machine.phase is Phase.degraded
    assert "bad.toml:2" in checks(verdict)["health bad"].evidence


@pytest.mark.parametrize(
    "text",
    ["exec sleep 1000", "while :; do echo no end; done", "sleep 1000 & sleep 1000 & wait"],
    ids=["hangs", "prints without end", "forks and waits"],
)
async def test_a_command_that_does_not_end_is_ended_and_holds_up_no_other(host: Host, text: str) -> None:
    lay(host.directory, bad=script(text, "timeout = 0.5\n"), fine=FINE)
    verdict = await verified(host)
    assert "not done within 0.5 s" in checks(verdict)["health bad"].evidence
    assert checks(verdict)["health fine"].result is CheckResult.passed


async def test_what_a_command_leaves_behind_is_killed(host: Host) -> None:
    lay(host.directory, forks=script(f"sleep 1000 & echo $! > {host.directory}/pid; exit 0"))
    verdict = await verified(host)
    assert checks(verdict)["health forks"].result is CheckResult.passed
    assert gone(int((host.directory / "pid").read_text()))


async def test_the_check_before_a_handover_names_what_could_not_run(host: Host) -> None:
    engine = await host.started()

    async def health() -> Check | None:
        return {check.name: check for check in await engine.queries.check()}.get("health")

    assert await health() is None
    lay(host.directory, fine=FINE)
    found = await health()
    assert found is not None
    assert found.result is CheckResult.passed
    lay(host.directory, gone='command = ["/nonexistent/command"]\nneed = "wanted"\n')
    found = await health()
    assert found is not None
    assert (found.result, "/nonexistent/command (gone)" in found.evidence) == (CheckResult.warn, True)
    lay(host.directory, gone='command = ["/nonexistent/command"]\n')
    found = await health()
    assert found is not None
    assert found.result is CheckResult.fail
    lay(host.directory, gone="x = 1\n")
    found = await health()
    assert found is not None
    assert found.result is CheckResult.fail
    assert "gone.toml:1" in found.evidence


def test_the_sample_is_a_health_check_once_it_is_copied(tmp_path: Path) -> None:
    sample = REPOSITORY / "etc/kho/verify.d/example.toml.sample"
    lay(tmp_path, example=sample.read_text())
    (tmp_path / "etc/kho/verify.d/other.toml.sample").write_text("x = [")
    (found,) = HealthChecks(tmp_path, Children()).load_checks()
    assert (found.name, found.wrong, found.is_required, found.timeout) == ("example", None, True, 30.0)
