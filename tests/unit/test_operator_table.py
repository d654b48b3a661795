# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each situation an operator may meet at khoctl, as a row: exit code, phase, sentence and what to do next.

A real khod on the simulated kernel is brought into the situation, khoctl is run, and khod is asked for the phase.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import pytest

import khod.client.handover
from khoctl import profile
from khoctl.boot import sources
from khoctl.commands.watching import CLEAR
from khod.simulated.kernel import build_image, build_initrd
from tests.unit.images import CPIO, bzimage, cpio
from tests.unit.khods import DEADLINE, REPOSITORY, Answer, Khod, Terminal, call, reply, until

KHO = "/sys/kernel/kho"
OF_A_PROCESS = {"NO_COLOR": "1", "PYTHONPATH": str(REPOSITORY)}


class Scene:
    """One host: its khod, and what stands around it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.khod: Khod | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        (directory / "root/etc/kho/producers.d").mkdir(parents=True)
        files = {
            "image": build_image(),  # what the simulated kernel is, so that the state arrives
            "initrd": build_initrd(),
            "other": bzimage(),  # 6.8.0-next
            "foreign": cpio({"init": CPIO, "lib/modules/6.18.15/modules.dep": b""}),
            "empty": b"",
            "truncated": bzimage()[:-0x1000],
        }
        for name, contents in files.items():
            (directory / name).write_bytes(contents)

    @property
    def running(self) -> Khod:
        """The khod that runs; started when it is first asked for."""
        if self.khod is None:
            self.khod = Khod(self.directory)
        return self.khod

    def hook(self, name: str, timeout: float = 30, **verbs: str) -> None:
        """Configure a producer whose verbs are shell commands."""
        lines = [f'{verb} = ["/bin/sh", "-c", {json.dumps(command)}]' for verb, command in verbs.items()]
        path = self.directory / f"root/etc/kho/producers.d/{name}.toml"
        path.write_text("\n".join([f"timeout = {timeout}", *lines]))

    def run(self, command: str, **run: "Run") -> Answer:
        """Run a khoctl; `{image}` and the like stand for files of this host."""
        return run.get("by", at_once)(self, self.words(command))

    def words(self, command: str) -> list[str]:
        return [word.format(d=self.directory) for word in shlex.split(command)]

    def begins(self, command: str) -> subprocess.Popen[bytes]:
        """Start a khoctl, which goes on beside what follows."""
        words = [sys.executable, "-m", "khoctl", f"--socket={self.running.socket}", *self.words(command)]
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(
            ["env", "--default-signal=INT", *words],
            cwd=REPOSITORY,
            env={**os.environ, **OF_A_PROCESS},
            stdin=nowhere,
            stdout=nowhere,
            stderr=nowhere,
        )
        self.processes.append(process)
        return process

    @property
    def phase(self) -> str:
        found: str = self.running.ask("Status")["status"]["phase"]
        return found

    def reaches(self, phase: str) -> None:
        """Wait until the handover is there."""
        until(lambda: self.phase == phase, self.running.process)

    def jump(self) -> None:
        """Take the host to the next kernel, and wait until what arrived is verified."""
        assert self.run("kexec --image {d}/image --initrd {d}/initrd").code == 0
        self.running.word("READY=1")
        self.run("verify")

    def restart(self, number: signal.Signals) -> None:
        """End khod, and start another."""
        self.running.end(number)
        self.running.close()
        self.khod = None
        assert self.running

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(DEADLINE)
        if self.khod is not None:
            self.khod.process.send_signal(signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired):
                self.khod.end(signal.SIGTERM)  # what it has started is ended, too
            self.khod.close()
        with suppress(OSError):  # nobody waits there; what a khod that was killed has left does
            os.close(os.open(self.directory / "fifo", os.O_WRONLY | os.O_NONBLOCK))


Given = Callable[[Scene], None]
Run = Callable[[Scene, list[str]], Answer]


# How a situation comes about


def nothing(_scene: Scene) -> None:
    """A host at rest, and no producer."""


def restore_refused(scene: Scene) -> None:
    """After a jump in which `db` did not take back what it left, and `cache` did."""
    trouble = scene.directory / "trouble"
    trouble.touch()
    scene.hook("db", restore=f"test ! -e {trouble} || {{ echo version mismatch >&2; exit 1; }}")
    scene.hook("cache", freeze="sleep 1", restore="true")
    scene.jump()


def repaired(scene: Scene) -> None:
    restore_refused(scene)
    (scene.directory / "trouble").unlink()


def given_up(scene: Scene) -> None:
    restore_refused(scene)
    assert scene.run("producers forget db").code == 0


def patient(scene: Scene) -> None:
    """Let a producer take longer than the rows that share it, on the slowest of machines."""
    os.mkfifo(scene.directory / "fifo")
    (scene.directory / "root/etc/kho/khod.toml").write_text("[deadlines]\nprepare = 600\nfreeze = 600\n")


def prepares(scene: Scene) -> None:
    """A handover whose producer prepares until somebody writes into the FIFO; and a colleague who began it."""
    patient(scene)
    scene.hook("db", timeout=600, prepare=f"cat {scene.directory}/fifo", cancel="true")


def preparing(scene: Scene) -> None:
    prepares(scene)
    scene.begins("kexec --image {d}/image --initrd {d}/initrd")
    scene.reaches("preparing")


def freezes(scene: Scene) -> None:
    patient(scene)
    scene.hook("db", timeout=600, freeze=f"cat {scene.directory}/fifo", thaw="true")


def frozen(scene: Scene) -> None:
    """Active, with one producer frozen."""
    scene.hook("db", freeze="true", thaw="true")
    assert scene.run("activate").code == 0


def loaded(scene: Scene) -> None:
    scene.hook("db", freeze="true", thaw="true")
    assert scene.run("kexec --image {d}/image --initrd {d}/initrd --load-only").code == 0


def no_load_left(scene: Scene) -> None:
    frozen(scene)
    scene.running.kernel.echo_to("/proc/sys/kernel/kexec_load_limit_reboot", "0")


def failed_twice(scene: Scene) -> None:
    """db vetoes, and lb cannot undo what it prepared."""
    scene.hook("lb", prepare="true", cancel="echo stuck >&2; exit 1")
    path = scene.directory / "root/etc/kho/producers.d/db.toml"
    scene.hook("db", prepare="echo no luck >&2; exit 1")
    path.write_text(f'after = ["lb"]\n{path.read_text()}')
    assert scene.run("activate").code == 6


def stopped_active(scene: Scene) -> None:
    frozen(scene)
    scene.restart(signal.SIGTERM)


def killed_preparing(scene: Scene) -> None:
    """Once the producer is told: what is not in the record by then was not done either."""
    preparing(scene)
    until(lambda: scene.running.ask("Status")["status"]["waiting_for"], scene.running.process)
    scene.restart(signal.SIGKILL)


def died_frozen(scene: Scene) -> None:
    """A producer that is connected ends while it is frozen, and takes its state with it."""
    vm = subprocess.Popen(
        [sys.executable, "-c", "from khod.producer import Producer; Producer('vm').run()"],
        cwd=REPOSITORY,
        env={**os.environ, **OF_A_PROCESS, "KHOD_SOCKET": str(scene.running.socket)},
        stderr=subprocess.DEVNULL,
    )
    scene.processes.append(vm)
    until(lambda: len(scene.running.ask("Status")["status"]["producers"]) == 1, scene.running.process)
    assert scene.run("activate").code == 0
    vm.kill()
    scene.reaches("idle")


def somebody_active(scene: Scene) -> None:
    scene.hook("db", freeze="true", thaw="true")
    scene.running.kernel.echo_to(f"{KHO}/active", "1")


def undone_behind(scene: Scene) -> None:
    frozen(scene)
    scene.running.kernel.echo_to(f"{KHO}/active", "0")


def damaged(scene: Scene) -> None:
    frozen(scene)
    scene.running.end(signal.SIGKILL)
    scene.running.close()
    (scene.directory / "state/handover.json").write_text('{"vers\x01')
    scene.khod = Khod(scene.directory)


def damaged_and_put_back(scene: Scene) -> None:
    damaged(scene)
    assert scene.run("abort --force").code == 0


def hung(scene: Scene) -> None:
    scene.running.process.send_signal(signal.SIGSTOP)


def chatty(scene: Scene) -> None:
    scene.hook("raid", prepare="echo resync is running >&2; exit 1")


def slow(scene: Scene) -> None:
    scene.hook("db", prepare="sleep 60", timeout=0.2)


def vetoes(scene: Scene) -> None:
    scene.hook("cache", prepare="true", cancel="true")
    scene.hook("db", prepare="echo no luck >&2; exit 1", cancel="true")


def freeze_no(scene: Scene) -> None:
    scene.hook("db", prepare="true", freeze="echo no luck >&2; exit 1", thaw="true")


def held(scene: Scene) -> None:
    freeze_no(scene)
    assert scene.run("kexec --image {d}/image --initrd {d}/initrd --hold").code == 6


def held_then_loaded(scene: Scene) -> None:
    """The load failed once and was held; then it was mended and succeeded."""
    scene.hook("db", freeze="true", thaw="true")
    scene.running.kernel.set_fault("load_errno", 12)
    assert scene.run("kexec --image {d}/image --initrd {d}/initrd --load-only --hold").code == 6
    scene.running.kernel.set_fault("load_errno", None)
    assert scene.run("kexec --image {d}/image --initrd {d}/initrd --load-only").code == 0


def kernel_vetoes(scene: Scene) -> None:
    scene.running.kernel.set_fault("veto", True)


def read_only(scene: Scene) -> None:
    """The state directory cannot be written any more."""
    assert scene.running
    (scene.directory / "state").rename(scene.directory / "gone")
    (scene.directory / "state").symlink_to("/proc/sys")


def no_such_command(scene: Scene) -> None:
    path = scene.directory / "root/etc/kho/producers.d/db.toml"
    path.write_text('prepare = ["/nonexistent/x"]')


def no_such_group(scene: Scene) -> None:
    (scene.directory / "root/etc/kho/khod.toml").write_text('[access]\ngroup = "nosuchgroup"\n')


def entries(scene: Scene) -> None:
    """A boot loader entry without an initrd line, and a kernel whose initrd is not there."""
    place = scene.directory / "root/boot/loader/entries"
    place.mkdir(parents=True)
    (place.parent.parent / "linux").write_bytes(build_image())
    (place.parent.parent / "vmlinuz-9.9.9-test").write_bytes(build_image())
    (place / "test-9.conf").write_text("linux /linux\noptions root=UUID=abcd ro\n")


# How khoctl is run


def at_once(scene: Scene, words: list[str]) -> Answer:
    return scene.running.khoctl(*words)


def impatient(scene: Scene, words: list[str]) -> Answer:
    """Without the two seconds before khoctl says whom it waits for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(khod.client.handover, "SLOW_SECONDS", 0.01)
        return at_once(scene, words)


def of_this_host(scene: Scene, words: list[str]) -> Answer:
    """With entries, kernels and profiles of the scene's root."""
    root = scene.directory / "root"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "source_of_entry", partial(sources.source_of_entry, root=root))
        patch.setattr(sources, "source_of_version", partial(sources.source_of_version, root=root))
        patch.setenv(profile.ENVIRONMENT, str(root / "etc/kho/handover.d"))
        return at_once(scene, words)


def interrupted(scene: Scene, words: list[str]) -> Answer:
    """Ctrl-C while the producer is waited for, which never answers."""
    terminal = Terminal(scene.running, *words, environment=OF_A_PROCESS)
    terminal.until("s of 600 s")
    terminal.send("\x03")
    terminal.until("[y/N]")
    terminal.send("\n")
    return ended(terminal)


def watched(scene: Scene, words: list[str]) -> Answer:
    """A page that is watched, until its clock has gone on."""
    terminal, clock = Terminal(scene.running, *words, environment=OF_A_PROCESS), re.compile(r"([0-9.]+) s of 600 s")
    painted = 1
    while len(set(clock.findall(terminal.said))) < 2:
        terminal.until(CLEAR, times=painted)
        painted += 1
    terminal.send("\x03")
    return ended(terminal)


def on_terminal(**environment: str) -> Run:
    def run(scene: Scene, words: list[str]) -> Answer:
        return ended(Terminal(scene.running, *words, environment=environment))

    return run


def ended(terminal: Terminal) -> Answer:
    code = terminal.end()
    return Answer(code, terminal.said, "")


def into_a_full_disk(scene: Scene, words: list[str]) -> Answer:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "khoctl", f"--socket={scene.running.socket}", *words],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    return Answer(done.returncode, "", done.stderr)


def with_the_journal(scene: Scene, words: list[str]) -> Answer:
    """And what khod writes of it."""
    scene.running.process.send_signal(signal.SIGHUP)
    scene.running.word("READY=1")
    done = at_once(scene, words)
    until(lambda: scene.running.errors.read_text() != "", scene.running.process)
    return Answer(done.code, done.out, done.err + scene.running.errors.read_text())


def by_hand(scene: Scene, words: list[str]) -> Answer:
    """No khoctl: a Varlink call of this method."""
    with scene.running.connect() as client:
        if words[0] == "{}":
            client.sendall(b'{"method":1}\0')
            return Answer(0, json.dumps(reply(client)), "")
        return Answer(0, json.dumps(call(client, words[0])), "")


@dataclass(frozen=True)
class Row:
    """What an operator meets: in this situation the command ends so. `says` and `next` are parts of what is printed.

    `shares` where the command changes nothing: then the host may be another row's, too. `never` must not be printed.
    """

    id: str
    about: str
    given: Given
    command: str
    code: int
    phase: str
    says: str
    next: str = ""
    never: str = ""
    run: Run = at_once
    shares: bool = field(default=True)


changes = partial(Row, shares=False)
"""A row whose command moves the handover."""


GO = "--image {d}/image --initrd {d}/initrd"
TABLE = [
    # A producer that would not take its state back: what is named as the way out works.
    Row("A1", "check names what waits", restore_refused, "check", 3, "degraded", "not taken back yet: db",
        "khoctl producers retry NAME"),
    Row("A1-retry", "still refused", restore_refused, "producers retry db", 3, "degraded", "version mismatch",
        "khoctl producers forget db"),
    changes("A1-repaired", "and repaired", repaired, "producers retry db", 0, "verified", "has taken its state back"),
    Row("A1-forget", "given up: then nothing is in the way", given_up, "check", 0, "degraded", "Ready", never="waits"),
    # Ctrl-C.
    changes("A2", "while it prepares", prepares, "activate", 130, "preparing", "continues in the background",
            "khoctl abort", run=interrupted),
    changes("A2-kexec", "while it freezes", freezes, f"kexec -y {GO}", 130, "freezing", "Abort it?",
            "khoctl abort", run=interrupted),
    # A next kernel that would find no root.
    Row("A3", "UUID= without an initrd", nothing, "check --image {d}/image --cmdline 'root=UUID=abcd ro'", 3, "idle",
        "only an initrd's programs find root=UUID=abcd: the next kernel would panic", "Give --initrd"),
    Row("A3-entry", "an entry without an initrd line", entries, "plan --entry test-9", 3, "idle",
        "root=UUID=abcd", "Give --initrd", run=of_this_host),
    Row("A3-version", "an installed kernel without its initrd", entries, "plan --kernel 9.9.9-test", 3, "idle",
        "9.9.9-test", "--initrd", run=of_this_host),
    Row("A3-root", "a root the kernel finds", nothing, "check --image {d}/image --cmdline root=PARTUUID=1", 0, "idle",
        "the kernel mounts root=PARTUUID=1 itself"),
    Row("A4", "an initrd made for another kernel", nothing, "check --image {d}/other --initrd {d}/foreign", 0, "idle",
        "modules for 6.18.15; the image is 6.8.0-next", "--kernel 6.8.0-next"),
    # Edits of the command line.
    Row("A5", "a quote without its end", nothing, f"plan {GO} --append 'foo=\"unbalanced'", 2, "idle",
        "a double quote without its end", "Close it"),
    Row("A5-remove", "a word that is not there", nothing, f"plan {GO} --remove typoo", 2, "idle",
        "typoo is not on the command line", "leave --remove out"),
    Row("A5-root", "the root removed", nothing, f"plan {GO} --remove root", 0, "idle", "without root=", "--append"),
    Row("A5-second", "a second root", nothing, f"plan {GO} --append root=/dev/sdb", 0, "idle",
        "root=/dev/sim no longer counts"),
    Row("A5-init", "another init", nothing, f"plan {GO} --append init=/bin/sh", 0, "idle", "khod does not start"),
    Row("A5-unit", "an emergency shell", nothing, f"plan {GO} --append systemd.unit=emergency.target", 0, "idle",
        "khod does not start"),
    # check and plan say what kexec would be answered.
    Row("A6", "failed", failed_twice, "check", 3, "failed", "stands at failed", "khoctl abort"),
    Row("A6-plan", "failed", failed_twice, f"plan {GO}", 3, "failed", "stands at failed", "khoctl abort"),
    Row("A6-loaded", "an image is loaded", loaded, f"plan {GO}", 3, "loaded", "has an image loaded already",
        "khoctl kexec"),
    Row("A6-busy", "a colleague's handover", preparing, "check", 3, "preparing", "under way (preparing, begun by",
        "khoctl abort"),
    # After the jump.
    Row("A7", "how long everyone stood still", restore_refused, "status", 7, "degraded",
        "from the first freeze to the last finish"),
    Row("A7-split", "and in what", restore_refused, "status", 7, "degraded", "what they left: freeze "),
    Row("A8", "degraded", restore_refused, "status", 7, "degraded", "not taken back: what db left. What arrived: cache",
        "khoctl producers retry NAME", never="scratch"),
    changes("A9", "gone while frozen", died_frozen, "status", 0, "idle", "Went away, and could not be told: vm",
            never="thawed"),
    # What is not khod's.
    changes("A10", "a foreign phase put back", somebody_active, "abort --force", 0, "idle", "1 cancelled",
            never="prepared"),
    Row("A11", "undone behind khod", undone_behind, "status", 6, "inconsistent",
        "khod left the host at active, and the kernel is inactive", "Still frozen: db. | khoctl abort --force"),
    Row("A11-record", "a damaged record", damaged, "status", 6, "inconsistent", "The record", "khoctl abort --force",
        never="JSONDecodeError"),
    Row("A11-kept", "which is kept", damaged_and_put_back, "status", 0, "idle", "handover.json.unreadable"),
    # While a handover is under way.
    Row("A12", "what is done", preparing, "status", 0, "preparing", "now prepare, ", never="done"),
    Row("A13", "who began it", preparing, "status", 0, "preparing", "by root (python"),  # as which khoctl runs here
    Row("A13-second", "the second operator", preparing, "activate", 3, "preparing", "begun by root (python",
        "if it is yours: khoctl abort"),
    Row("A13-loaded", "what is loaded", loaded, "status", 0, "loaded", "image (6.8.0-kho-v3-simulated) with"),
    Row("A14", "a refusal in the blackout", no_load_left, f"kexec {GO}", 3, "active",
        "The handover stays as it was: active, 1 producer frozen", "Try again, or: khoctl abort"),
    changes("A15", "khod hangs", hung, "status --timeout 0.3", 5, "", "Still waiting for khod (process",
            "--timeout", run=impatient),
    changes("A15-abort", "at abort, too", hung, "abort --timeout 0.3", 5, "", "not answered within 0.3 s",
            run=impatient),
    changes("A16", "a jump as JSON", nothing, f"kexec --json {GO}", 0, "", '"phase": "executing"',
            "khoctl status"),
    changes("A16-full", "the answer cannot be written", frozen, "status", 8, "active",
            "Standard output cannot be written: ENOSPC", "khoctl status", run=into_a_full_disk),
    # Two failures.
    Row("A17", "the first cause", failed_twice, "status", 6, "failed", "no luck", "Help lb"),
    Row("A17-second", "and the second", failed_twice, "status", 6, "failed", "stuck", "khoctl abort"),
    Row("A17-stopped", "khod was stopped", stopped_active, "status", 0, "idle", "khod was stopped",
        "rolled back"),
    Row("A17-killed", "khod was killed", killed_preparing, "status", 0, "idle",
        "khod stopped unexpectedly while the handover was preparing", "rolled back"),
    # Terminals.
    Row("A18", "a clock that goes on", preparing, "status --watch", 130, "preparing", "of 600 s", run=watched),
    Row("A19", "no colours", nothing, "check", 0, "idle", "pass", never="\x1b", run=on_terminal(NO_COLOR="1")),
    Row("A19-dumb", "a dumb terminal", nothing, "check", 0, "idle", "pass", never="\x1b",
        run=on_terminal(TERM="dumb")),
    Row("A19-locale", "ASCII", frozen, "dt show --summary", 0, "active", "scratch", never="█",
        run=on_terminal(LC_ALL="C")),
    changes("A20", "whose output it is", chatty, "activate", 3, "idle", "raid: prepare: resync is running",
            run=with_the_journal),
    # Smaller things.
    changes("A21-deadline", "no answer is no refusal", slow, "activate", 3, "idle",
            "did not answer prepare within 0.2 s", "producers test db", never="refuses"),
    changes("A21-veto", "the veto among the last lines", vetoes, "activate", 3, "idle",
            "! db (hook): prepare failed: no luck", "producers test db", run=on_terminal(NO_COLOR="1")),
    changes("A21-hold", "held", freeze_no, f"kexec --hold {GO}", 6, "prepared", "held at prepared", "khoctl abort"),
    Row("A21-held", "held, asked later", held, "status", 6, "prepared", "no luck", "khoctl abort"),
    Row("A21-mended", "an old cause", held_then_loaded, "status", 0, "loaded", "loaded", never="ENOMEM"),
    changes("A21-kernel", "the kernel's own no", kernel_vetoes, "activate", 1, "idle", "-1", never="-12"),
    Row("A21-disk", "no record can be written", read_only, "check", 3, "idle", "cannot be written"),
    Row("A21-command", "a command that is not there", no_such_command, "check", 3, "idle", "/nonexistent/x"),
    Row("A21-group", "a group that is not there", no_such_group, "check", 0, "idle", "nosuchgroup",
        run=with_the_journal),
    Row("A21-no-image", "no kernel given", nothing, "kexec", 2, "idle", "No kernel", "--kernel VERSION"),
    Row("A21-initrd", "an initrd alone", nothing, "kexec --initrd {d}/initrd", 2, "idle", "An initrd without an image",
        "--image"),
    Row("A21-empty", "an empty image", nothing, "check --image {d}/empty", 3, "idle", "FAIL image",
        "Refused: 1 failed"),
    Row("A21-truncated", "a truncated one", nothing, "check --image {d}/truncated --initrd {d}/initrd", 3, "idle",
        "FAIL image", "Refused: 1 failed"),
    Row("A21-profile", "no such profile", nothing, "kexec --profile nosuch", 2, "idle", "There is no profile 'nosuch'",
        "None is in", never="Errno", run=of_this_host),
    Row("A21-method", "no such method", nothing, "io.kho.Handover.Nope", 0, "idle", "io.kho.Handover.Nope",
        run=by_hand),
    Row("A21-message", "no call at all", nothing, "{{}}", 0, "idle", "org.varlink.service", run=by_hand),
    Row("A21-foreign", "status of a foreign phase", somebody_active, "status", 3, "foreign",
        "Another program is using KHO", "khoctl abort --force"),
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Row], Scene]]:
    """The host of a row; one that is shared is made when it is first asked for."""
    made: dict[object, Scene] = {}

    def scene(row: Row) -> Scene:
        key = row.given if row.shares else row
        if key not in made:
            made[key] = Scene(tmp_path_factory.mktemp(row.id))
            row.given(made[key])
        return made[key]

    yield scene
    for one in made.values():
        one.close()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_what_an_operator_is_told(scenes: Callable[[Row], Scene], row: Row) -> None:
    scene = scenes(row)
    ended = row.run(scene, scene.words(row.command))
    printed = ended.out + ended.err
    said = " ".join(click.unstyle(printed).split())
    assert ended.code == row.code, printed
    for words in (row.says, *row.next.split(" | ")):
        assert words in said
    assert not row.never or row.never not in printed
    if row.phase:
        assert scene.phase == row.phase
