# SPDX-License-Identifier: LGPL-2.1-or-later
"""The metrics: what they say of a host, as text that any collector reads, as a file, and over Varlink."""

import asyncio
import errno
import fcntl
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.engine import journal
from khod.engine.history import HistoryPage
from khod.engine.journal_fields import Message
from khod.history.model import AttemptRecord
from khod.metrics import textfile
from khod.metrics.source import MetricSource
from khod.metrics.table import MAX_PRODUCERS, METRICS, MetricFacts, MetricType
from khod.metrics.text import render_text
from khod.metrics.textfile import TextFile
from khod.model import Phase, Status
from khod.server.metrics import SystemdMetrics
from tests.unit import attempts
from tests.unit.khods import DEADLINE, REPOSITORY, Khod, reply, until
from tests.unit.monitored import ARRIVED, COUNTS, LAST, STANDSTILLS, STATES

# The format's own grammar, https://prometheus.io/docs/instrumenting/exposition_formats/
NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
SERIES = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")
ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Key = tuple[str, frozenset[tuple[str, str]]]


def parse(text: str) -> dict[Key, float]:
    """Every series of a text, by the format's grammar; what is not of it, or stands twice, is an error."""
    assert text.endswith("\n")
    text.encode()  # UTF-8
    found: dict[Key, float] = {}
    helped: list[str] = []
    typed: list[str] = []
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            helped.append(line.split(" ", 3)[2])
        elif line.startswith("# TYPE "):
            assert line.split(" ")[3] in ("counter", "gauge")
            typed.append(line.split(" ")[2])
        else:
            match = SERIES.fullmatch(line)
            assert match, line
            assert match[1] == helped[-1] == typed[-1], "a series follows its own HELP and TYPE"
            labels = re.findall(LABEL, match[2] or "")
            values = {name: re.sub(r"\\.", lambda escape: ESCAPES[escape[0]], value) for name, value in labels}
            key = (match[1], frozenset(values.items()))
            assert len(values) == len(labels)
            assert key not in found
            found[key] = float(match[len(match.groups())])
    assert len(helped) == len(set(helped))
    assert helped == typed
    return found


def key(name: str, **labels: str) -> Key:
    return name, frozenset(labels.items())


# The table


def test_names_follow_prometheus_conventions_and_systemd_s_rules() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert (metric.type is MetricType.counter) == metric.name.endswith("_total")
        assert re.fullmatch("[a-z](_?[a-z0-9])*", metric.name), "a field's name in Varlink"
        assert re.fullmatch(r"[A-Z][^\\\n]*\.", metric.help), "one sentence that needs no escape"


@pytest.mark.parametrize("name", STATES)
def test_any_state_is_text_that_a_collector_reads(name: str) -> None:
    assert parse(render_text(STATES[name]))


def test_one_state_of_several_is_1() -> None:
    for phase in Phase:
        found = parse(render_text(STATES[phase.value]))
        assert found[key("kho_phase", phase=phase.value)] == 1
        assert sum(value for (name, _), value in found.items() if name == "kho_phase") == 1


def test_a_degraded_boot_is_told_with_its_numbers() -> None:
    found = parse(render_text(STATES["arrived"]))
    expected = {
        key("kho_kernel_info", release="7.3.4", generation="stateless"): 1,
        key("kho_handovers_total", outcome="verified"): 41,
        key("kho_handovers_total", outcome="degraded"): 2,
        key("kho_handovers_total", outcome="rolled_back"): 7,
        key("kho_handovers_total", outcome="failed"): 0,
        key("kho_handovers_total", outcome="cold_boot"): 0,
        key("kho_last_handover_timestamp_seconds"): 1790000012.5,
        key("kho_last_handover_outcome", outcome="degraded"): 1,
        key("kho_last_handover_outcome", outcome="rolled_back"): 0,
        key("kho_last_blackout_seconds"): 2.75,
        key("kho_last_blackout_error_seconds"): 0.001,
        key("kho_last_step_seconds", step="freeze"): 1.5,
        key("kho_boot_outcome", outcome="degraded"): 1,
        key("kho_boot_outcome", outcome="none"): 0,
        key("kho_handovers_since_cold_boot"): 3,
        key("kho_findings", source="producer", severity="lost"): 1,
        key("kho_findings", source="content", severity="lost"): 1,
        key("kho_findings", source="log", severity="lost"): 0,
        key("kho_producers", state="ready"): 1,
        key("kho_producers", state="refused"): 1,
        key("kho_producers", state="waiting"): 1,
        key("kho_producers", state="idle"): 1,
        key("kho_producer_answer_seconds", producer="cache", kind="hook", verb="restore"): 1.25,
        key("kho_last_producer_stopped_seconds", producer="guest", kind="vm", clock="host"): 2.25,
        key("kho_last_producer_stopped_seconds", producer="guest", kind="vm", clock="own"): 2.125,
        key("kho_last_producer_stopped_seconds", producer="cache", kind="hook", clock="host"): 2.0,
        key("kho_claims"): 1,
        key("kho_foreign"): 0,
        key("kho_status_stale"): 0,
    }
    assert expected == {name: found[name] for name in expected}


def test_what_is_not_known_has_no_series() -> None:
    names = {name for name, _ in parse(render_text(STATES["bare"]))}
    assert not names & {
        "kho_kernel_info",
        "kho_handovers_total",
        "kho_last_handover_timestamp_seconds",
        "kho_last_blackout_seconds",
        "kho_findings",
    }
    assert "kho_last_blackout_error_seconds" not in {name for name, _ in parse(render_text(STATES["not undone"]))}


def test_of_a_thousand_producers_the_slowest_have_a_series() -> None:
    found = parse(render_text(STATES["many"]))
    seconds = sorted(value for (name, _), value in found.items() if name == "kho_producer_answer_seconds")
    assert seconds == [float(number) for number in range(1000 - MAX_PRODUCERS, 1000)]
    assert found[key("kho_producers", state="refused")] == 1000


def test_a_hostile_name_stays_within_its_label() -> None:
    text = render_text(STATES["many"])
    assert all(line.isprintable() for line in text.split("\n"))
    assert {name for name, _ in parse(text)} == {name for name, _ in parse(render_text(STATES["arrived"]))}
    release = next(dict(labels)["release"] for name, labels in parse(text) if name == "kho_kernel_info")
    assert release.startswith('<script>alert("x")</script>\\n# TYPE kho_x gauge\\nkho_x{a="\\"} 1\\r\\x1b[2J')


class OldHistory:
    """A history that says the same each time, or nothing."""

    def __init__(self) -> None:
        self.asked = 0
        self.fails = False

    async def counts(self) -> dict[Phase, int] | None:
        self.asked += 1
        return None if self.fails else COUNTS

    async def page(self, before: str, limit: int) -> HistoryPage:
        assert (before, limit) == ("", 1)
        return HistoryPage() if self.fails else HistoryPage([LAST])

    async def attempt(self, name: str) -> AttemptRecord:
        assert name == LAST.run
        made = attempts.orderly_attempt()
        return replace(made, timeline=replace(made.timeline, standstills=STANDSTILLS))


async def test_the_history_is_not_asked_while_producers_are_stopped() -> None:
    history, phase = OldHistory(), Phase.frozen

    async def status() -> Status:
        return replace(ARRIVED, phase=phase)

    source = MetricSource(status, history)  # type: ignore[arg-type]
    assert (await source.read()).counts == {}
    assert history.asked == 0
    phase = Phase.idle
    assert (await source.read()) == MetricFacts(await status(), COUNTS, LAST, STANDSTILLS)
    history.fails = True
    assert (await source.read()).last == LAST, "what it said before"
    phase = Phase.frozen
    assert (await source.read()).counts == COUNTS
    assert history.asked == 2


# The file


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the journal is given."""
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(journal, "_send_record", lambda text, fields: found.append((text, fields)))
    return found


async def arrived() -> MetricFacts:
    return STATES["arrived"]


async def test_the_file_is_replaced_and_everyone_may_read_it(
    tmp_path: Path, complaints: list[tuple[str, dict[str, Any]]]
) -> None:
    (tmp_path / "kho.prom").write_text("old")
    (tmp_path / ".kho.prom.new").write_text("of a khod that was killed")
    before = (tmp_path / "kho.prom").stat().st_ino
    mask = os.umask(0o077)  # as in khod's unit
    try:
        await TextFile(lambda: str(tmp_path), arrived).update()
    finally:
        os.umask(mask)
    assert os.listdir(tmp_path) == ["kho.prom"]
    assert (tmp_path / "kho.prom").read_text() == render_text(STATES["arrived"])
    assert stat.S_IMODE((tmp_path / "kho.prom").stat().st_mode) == 0o644
    assert (tmp_path / "kho.prom").stat().st_ino != before, "it is renamed: nobody reads half of it"
    assert not complaints


async def test_a_link_in_the_directory_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept")
    place = tmp_path / "metrics"
    place.mkdir()
    (place / ".kho.prom.new").symlink_to(tmp_path / "victim")
    (place / "kho.prom").symlink_to(tmp_path / "victim")
    await TextFile(lambda: str(place), arrived).update()
    assert (tmp_path / "victim").read_text() == "kept"
    assert (place / "kho.prom").read_text().startswith("# HELP")
    assert not (place / "kho.prom").is_symlink()


async def test_without_a_directory_nothing_is_written(complaints: list[tuple[str, dict[str, Any]]]) -> None:
    async def never() -> MetricFacts:
        raise AssertionError("nobody needs them")

    await TextFile(lambda: "", never).update()
    assert not complaints


def missing(place: Path, _: pytest.MonkeyPatch) -> None:
    place.rmdir()


def not_a_directory(place: Path, _: pytest.MonkeyPatch) -> None:
    place.rmdir()
    place.write_text("a file")


def full(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fchmod", refuse)


def read_only(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize(
    ("trouble", "word"),
    [(missing, "ENOENT"), (not_a_directory, "ENOTDIR"), (full, "ENOSPC"), (read_only, "EROFS")],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_what_cannot_be_written_is_one_line_in_the_journal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complaints: list[tuple[str, dict[str, Any]]],
    trouble: Any,
    word: str,
) -> None:
    place = tmp_path / "metrics"
    place.mkdir()
    trouble(place, monkeypatch)
    await TextFile(lambda: str(place), arrived).update()
    ((text, fields),) = complaints
    assert word in text
    assert "ReadWritePaths=" in text
    assert (fields["MESSAGE_ID"], fields["PRIORITY"]) == (Message.metrics_unwritten.identifier, 4)
    assert fields["KHO_PATH"] == f"{place}/kho.prom"
    assert not place.is_dir() or os.listdir(place) == [], "nothing half written is left"


async def test_a_path_that_is_none_and_facts_that_fail_do_no_harm(
    complaints: list[tuple[str, dict[str, Any]]],
) -> None:
    async def broken() -> MetricFacts:
        raise RuntimeError("a bug")

    await TextFile(lambda: "/tmp/\0", arrived).update()
    await TextFile(lambda: "/tmp", broken).update()
    assert len(complaints) == 2


async def test_a_directory_that_hangs_delays_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaints: list[tuple[str, dict[str, Any]]]
) -> None:
    gate, entered = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        entered.set()
        gate.wait()

    monkeypatch.setattr(textfile, "replace_file", hang)
    monkeypatch.setattr(textfile, "WRITE_SECONDS", 0.01)
    file = TextFile(lambda: str(tmp_path), arrived)
    for _ in range(3):
        await file.update()
    assert await asyncio.to_thread(entered.wait, DEADLINE)
    gate.set()
    assert len(complaints) == 3


async def test_the_file_is_written_at_the_end_of_a_handover_and_never_during_one(tmp_path: Path) -> None:
    current, written = Phase.idle, list[Phase]()

    async def facts() -> MetricFacts:
        written.append(current)
        return STATES[current.value]

    file = TextFile(lambda: str(tmp_path), facts)
    path = (Phase.preparing, Phase.prepared, Phase.freezing, Phase.frozen, Phase.rolling_back, Phase.idle)
    for current in (*path, *path[:-1], Phase.failed, Phase.rolling_back, Phase.verified):
        file.note_phase(current)
        await file.wait_written()
    assert written == [Phase.idle, Phase.failed, Phase.verified]
    (tmp_path / "kho.prom").unlink()
    current = Phase.frozen  # a khod that was started again, within a handover
    await file.update()
    assert not (tmp_path / "kho.prom").exists()


# Varlink


async def collected(replies: AsyncIterator[Any]) -> list[tuple[dict[str, Any], bool]]:
    return [(found.parameters, found.continues) async for found in replies]


async def test_systemd_gets_the_same_table() -> None:
    metrics = SystemdMetrics(arrived)
    values = await collected(metrics.List())
    families = await collected(metrics.Describe())
    assert [more for _, more in values] == [True] * (len(values) - 1) + [False]
    assert [family["name"] for family, _ in families] == [f"io.kho.Handover.{metric.name}" for metric in METRICS]
    assert {value["name"] for value, _ in values} <= {family["name"] for family, _ in families}
    assert len(values) == len(parse(render_text(STATES["arrived"])))
    assert {
        "name": "io.kho.Handover.producer_answer_seconds",
        "object": "cache",
        "fields": {"kind": "hook", "verb": "restore"},
        "value": 1.25,
    } in [value for value, _ in values]


def test_the_interface_is_systemd_s() -> None:
    """The methods as `varlinkctl introspect` shows them for systemd 262, whose `any` was `object` before."""
    text = SystemdMetrics.render_interface_description()
    plain = " ".join(re.sub(r"#.*", "", text).split())
    assert "type MetricFamilyType (counter, gauge, string, object)" in plain
    assert "method List() -> (name: string, object: ?string, fields: ?[string]string, value: object)" in plain
    assert "method Describe() -> (name: string, description: string, type: MetricFamilyType)" in plain


def test_anyone_may_list_them_at_khod_s_socket(tmp_path: Path) -> None:
    khod = Khod(tmp_path)
    try:
        with khod.connect_as(65534) as client:
            client.sendall(b'{"method": "io.systemd.Metrics.List", "more": true}\0')
            found = [reply(client)]
            while found[-1].get("continues"):
                found.append(reply(client))
            client.sendall(b'{"method": "io.systemd.Metrics.List"}\0')
            assert reply(client)["error"] == "org.varlink.service.ExpectedMore"
        values = [one["parameters"] for one in found]
        assert {"name": "io.kho.Handover.phase", "fields": {"phase": "idle"}, "value": 1} in values
        assert len(values) > len(Phase)
    finally:
        khod.close()


AS_SYSTEMD = """
import os, sys
for number, fd in enumerate(sys.argv[1:3], 3):
    os.dup2(int(fd), number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "khod", *sys.argv[3:]])
"""


def test_khod_answers_at_the_socket_that_systemd_passes_for_metrics(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as main, socket.socket(socket.AF_UNIX) as metrics, ExitStack() as stack:
        for name, held in (("varlink", main), ("io.kho.Handover", metrics)):
            held.bind(str(tmp_path / name))
            held.listen()
            os.set_inheritable(held.fileno(), True)
        flags = [f"--{name}={tmp_path / name}" for name in ("root", "state", "simulate")]
        numbers = [str(fcntl.fcntl(held.fileno(), fcntl.F_DUPFD, 100)) for held in (main, metrics)]
        for number in numbers:
            stack.callback(os.close, int(number))
        process = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, *numbers, *flags],
            cwd=REPOSITORY,
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "varlink:metrics", "PYTHONPATH": str(REPOSITORY)},
            pass_fds=[int(number) for number in numbers],
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        for name, method in (
            ("io.kho.Handover", "io.systemd.Metrics.Describe"),
            ("varlink", "io.kho.Handover.Monitor"),
        ):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(DEADLINE)
            client.connect(str(tmp_path / name))
            client.sendall(json.dumps({"method": method, "more": True}).encode() + b"\0")
            assert reply(client)["continues"]


def test_a_khod_writes_the_file_at_its_start_and_after_a_handover(tmp_path: Path) -> None:
    place = tmp_path / "metrics"
    place.mkdir()
    (tmp_path / "root/etc/kho").mkdir(parents=True)
    (tmp_path / "root/etc/kho/khod.toml").write_text(f'[metrics]\ndirectory = "{place}"\n')
    khod = Khod(tmp_path)
    try:
        until((place / "kho.prom").exists, khod.process)
        assert parse((place / "kho.prom").read_text())[key("kho_phase", phase="idle")] == 1
        (place / "kho.prom").unlink()
        khod.ask("Activate")
        assert not (place / "kho.prom").exists(), "the producers stand still"
        khod.ask("Abort")
        until((place / "kho.prom").exists, khod.process)
        assert parse((place / "kho.prom").read_text())[key("kho_last_step_seconds", step="freeze")] > 0

        def counted() -> bool:
            found = parse((place / "kho.prom").read_text())
            return found.get(key("kho_handovers_total", outcome="rolled_back")) == 1

        until(counted, khod.process)
        found = parse((place / "kho.prom").read_text())
        assert found[key("kho_last_handover_outcome", outcome="rolled_back")] == 1
        assert found[key("kho_last_handover_timestamp_seconds")] > 0
    finally:
        khod.close()


def test_the_socket_has_the_name_that_every_metric_begins_with() -> None:
    unit = (REPOSITORY / "systemd/kho-metrics.socket").read_text()
    assert re.search(r"^ListenStream=/run/systemd/report/io\.kho\.Handover$", unit, re.MULTILINE)
    assert re.search(r"^Service=kho-handover\.service$", unit, re.MULTILINE)
    assert re.search(r"^FileDescriptorName=metrics$", unit, re.MULTILINE)
