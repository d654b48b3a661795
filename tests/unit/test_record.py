# SPDX-License-Identifier: LGPL-2.1-or-later
"""The durable record: what goes in comes out, a crash leaves the old or the new one whole, damage has a sentence."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.errors import RecordError
from khod.handover.directory import VERSION
from khod.handover.record import Owner, Process, ProducerRecord, Record, Store, decode_record, encode_record
from khod.model import (
    Begun,
    ColdBoot,
    Finding,
    Generation,
    Kept,
    LuoSession,
    NotUndone,
    Phase,
    SessionFate,
    Step,
    StepTiming,
    Terms,
    TermsDeadlines,
    Verdict,
)
from tests.unit.khods import REPOSITORY

FULL = Record(
    phase=Phase.loaded,
    done=(Step.prepare, Step.freeze, Step.activate, Step.load),
    run="0123456789ab",
    boot_id="6fd2b6c4-2c0c-4a0e-8a4e-6e4b5e1d7a11",
    release="6.18.15",
    generation=Generation.finalize,
    handovers=3,
    previous_release="6.17.8",
    window_began_at=1763843000.25,
    blackout_seconds=1.5,
    blackout_error_seconds=0.25,
    timings=(StepTiming("prepare", 12.0, 0.5),),
    last_error="Der Müller sagt nein",
    verdict=Verdict(
        ["ftrace"], ["memblock"], ["LUO"], "did not arrive", [Finding("", "did not arrive")], ["session x"]
    ),
    suspect="an abort",
    producers=(
        ProducerRecord(
            "kv",
            "varlink",
            "freeze",
            "a note",
            30.0,
            ("net",),
            ("disk",),
            ("/dev/vfio/1",),
            Owner(1000, "kv.service"),
            Process(77, 123456),
            (Kept("table", (1 << 64) - 1),),
            restores=True,
            shown_kind="vm",
        ),
    ),
    failed_activations=2,
    not_undone=(NotUndone("freeze", "kv", "it sleeps", "Look."),),
    interrupted="a handover was at freezing",
    outcome=Phase.degraded,
    arrived_run="ba9876543210",
    sessions=(LuoSession("test-session", "luo_kexec_simpl (process 77)", SessionFate.lost, "it is killed"),),
    sessions_unseen="khod may not look",
    at_once=True,
    claims=(ProducerRecord("kv", "varlink", owner=Owner(1000, "kv.service")),),
    doubt="the host jumped into an image that khod had not loaded",
    begun=Begun(1795661761.5, "root (khoctl, process 4711)", "Image (7.3.4)"),
    cold_boot=ColdBoot(
        "it panicked",
        Phase.executing,
        "cut off",
        ["Kernel panic"],
        watchdog=True,
        boot_id="before",
        is_image_suspect=True,
    ),
    watchdog="/dev/watchdog0",
    quiesced=("cron.service",),
    terms=Terms("nightly", require=["db"], deadlines=TermsDeadlines(freeze=2.5), blackout_budget=5.0),
    arrived_terms=Terms("weekly", must_pass=["log"], tolerate=["health"], begin_before=1763843000.5),
)

text = st.text(st.characters(exclude_categories=["Cs"]))
number = st.floats(allow_nan=False, allow_infinity=False)
timing = st.builds(StepTiming, text, number, number)
finding = st.builds(Finding, text, text)
verdict = st.none() | st.builds(
    Verdict, st.lists(text), st.lists(text), st.lists(text), text, st.lists(finding), st.lists(text)
)
texts = st.lists(text, max_size=2).map(tuple)
owner = st.none() | st.builds(Owner, st.integers(0, 1 << 32), text)
process = st.none() | st.builds(Process, st.integers(1, 1 << 22), st.integers(0, 1 << 60))
kept = st.lists(st.builds(Kept, text, st.integers(0, (1 << 64) - 1)), max_size=2).map(tuple)
holder = st.builds(
    ProducerRecord, text, text, text, text, number, texts, texts, texts, owner, process, kept, st.booleans()
)
records = st.builds(
    Record,
    version=st.just(VERSION),
    phase=st.sampled_from(Phase),
    done=st.lists(st.sampled_from(Step)).map(tuple),
    run=text,
    boot_id=text,
    generation=st.sampled_from(Generation),
    handovers=st.integers(0, 1 << 40),
    window_began_at=number,
    blackout_seconds=st.none() | number,
    timings=st.lists(timing, max_size=3).map(tuple),
    last_error=text,
    verdict=verdict,
    producers=st.lists(holder, max_size=2).map(tuple),
    failed_activations=st.integers(0, 100),
    not_undone=st.lists(st.builds(NotUndone, text, text, text, text), max_size=2).map(tuple),
    interrupted=text,
    outcome=st.sampled_from(Phase),
    arrived_run=text,
    sessions=st.lists(st.builds(LuoSession, text, text, st.sampled_from(SessionFate), text), max_size=2).map(tuple),
    sessions_unseen=text,
    at_once=st.booleans(),
    claims=st.lists(holder, max_size=2).map(tuple),
    doubt=text,
    begun=st.builds(Begun, number, st.text(), st.text()),
    cold_boot=st.none() | st.builds(ColdBoot, text, st.sampled_from(Phase), text, st.lists(text), st.none()),
    watchdog=text,
    quiesced=st.lists(text, max_size=2).map(tuple),
)


@given(records)
def test_what_goes_in_comes_out(record: Record) -> None:
    assert decode_record(encode_record(record)) == record


def test_the_example_sets_every_field_apart_from_its_default() -> None:
    same = {field.name for field in fields(Record) if getattr(FULL, field.name) == getattr(Record(), field.name)}
    assert same == {"version"}
    assert decode_record(encode_record(FULL)) == FULL


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_record_error(raw: bytes) -> None:
    found: Record | RecordError
    try:
        found = decode_record(raw, "/var/lib/khod/handover.json")
    except RecordError as error:
        found = error
    assert isinstance(found, Record) or (found.where == "/var/lib/khod/handover.json" and found.what and found.remedy)


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([field.name for field in fields(Record)]), json_value)
def test_any_value_in_any_field_is_a_record_that_can_be_written_or_a_record_error(name: str, value: object) -> None:
    values = json.loads(encode_record(FULL)) | {name: value}
    try:
        found = decode_record(json.dumps(values).encode())
    except RecordError:
        return
    assert decode_record(encode_record(found)) is not None


@given(st.integers(0, len(encode_record(FULL)) - 3))
def test_a_truncated_record_is_never_taken_for_another(length: int) -> None:
    with pytest.raises(RecordError):
        decode_record(encode_record(FULL)[:length])


WRONG = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"version": "1"}',
]


@pytest.mark.parametrize("raw", WRONG)
def test_a_damaged_record_says_so(raw: bytes) -> None:
    with pytest.raises(RecordError, match="cannot be understood"):
        decode_record(raw)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("phase", "loaded too", "phase"),
        ("phase", ["loaded"], "phase"),
        ("boot_id", 5, "boot_id"),
        ("handovers", "3", "handovers"),
        ("handovers", True, "handovers"),
        ("timings", {}, "timings"),
        ("timings", [{"step": "freeze", "began_monotonic": "12", "seconds": 1.0}], "timings[0].began_monotonic"),
        (
            "producers",
            [{"name": "kv", "kind": "varlink", "told": "", "note": "", "timeout": 1, "after": ["a", 1]}],
            "producers[0].after[1]",
        ),
        ("producers", [{"name": "kv"}], "producers[0].kind"),
        ("verdict", {"ok": True}, "verdict.arrived"),
    ],
)
def test_a_damaged_field_is_named_by_its_path(key: str, value: object, named: str) -> None:
    values = json.loads(encode_record(FULL))
    with pytest.raises(RecordError, match=f"cannot be understood: `{re.escape(named)}` is "):
        decode_record(json.dumps(values | {key: value}).encode())


def test_a_newer_record_names_both_versions() -> None:
    with pytest.raises(RecordError) as raised:
        decode_record(encode_record(replace(FULL, version=VERSION + 1)))
    assert str(VERSION) in raised.value.what
    assert str(VERSION + 1) in raised.value.what


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda values: values.update(sealed={"by": "key"}), "sealed"),
        (lambda values: values["producers"][0].update(lease=5), "producers[0].lease"),
        (lambda values: values["verdict"].update(signed=True), "verdict.signed"),
    ],
)
def test_what_only_a_newer_khod_records_is_not_dropped(change: Callable[[dict[str, Any]], None], named: str) -> None:
    values = json.loads(encode_record(FULL))
    change(values)
    with pytest.raises(RecordError, match=rf"A newer khod wrote the record: `{re.escape(named)}` is not known"):
        decode_record(json.dumps(values).encode())


@pytest.mark.parametrize("nothing", ["", 0, 0.0, False, None, [], {}])
def test_a_newer_field_that_says_nothing_is_no_reason_to_refuse_the_record(nothing: object) -> None:
    values = json.loads(encode_record(FULL)) | {"sealed": nothing}
    assert decode_record(json.dumps(values).encode()) == FULL


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_no_record_is_none_and_no_error(store: Store) -> None:
    assert store.read() is None
    assert store.snapshots.last_tree() is None


def test_a_write_replaces_the_record_and_leaves_nothing_else(store: Store) -> None:
    store.write(FULL)
    store.write(replace(FULL, phase=Phase.idle))
    found = store.read()
    assert found == replace(FULL, phase=Phase.idle)
    assert [path.name for path in store.directory.iterdir()] == ["handover.json"]


CRASHER = """
import dataclasses, sys
from pathlib import Path
from typing import Any
from khod.handover.record import Owner, Process, Record, Store
store = Store(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    store.write(Record(run="x" * (number % 5000), handovers=number % 5000))
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_one_whole_record(store: Store) -> None:
    """Whatever of open, write, fsync and rename the SIGKILL falls into."""
    for after in (1, 2, 5, 9, 14):
        writer = subprocess.Popen(
            [sys.executable, "-c", CRASHER, str(store.directory)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _line in range(after):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        writer.stdout.close()
        written = int(rest[-1]) if rest else last
        found = store.read()
        assert found is not None
        assert found.handovers in (written % 5000, (written + 1) % 5000), "the last that was reported, or the next"
        assert len(found.run) == found.handovers


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Store]:
    """A store on a file system of 64 KiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "khod-test", str(tmp_path)], check=True)
    yield Store(tmp_path)
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_keeps_the_old_record(tiny: Store) -> None:
    tiny.write(FULL)
    with pytest.raises(RecordError) as raised:
        tiny.write(replace(FULL, last_error="x" * (100 << 10)))
    assert "ENOSPC" in raised.value.what
    assert raised.value.where == str(tiny.record_path)
    assert raised.value.remedy
    assert tiny.read() == FULL
    tiny.write(replace(FULL, handovers=4))


def test_free_is_what_may_still_be_written(tiny: Store) -> None:
    assert tiny.free_bytes() == 64 << 10
    (tiny.directory / "filler").write_bytes(bytes(60 << 10))
    assert tiny.free_bytes() == 4 << 10


def test_a_read_only_file_system_is_a_record_error_and_the_record_can_be_read(tiny: Store) -> None:
    tiny.write(FULL)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny.directory)], check=True)
    with pytest.raises(RecordError, match="EROFS"):
        tiny.write(replace(FULL, handovers=4))
    assert tiny.read() == FULL


def test_a_missing_directory_is_a_record_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "nowhere")
    assert store.read() is None
    for write in (lambda: store.write(FULL), store.free_bytes):
        with pytest.raises(RecordError) as raised:
            write()
        assert str(tmp_path / "nowhere") in raised.value.where


def test_a_directory_where_the_record_should_be(store: Store) -> None:
    (store.record_path / "below").mkdir(parents=True)
    with pytest.raises(RecordError, match="EISDIR"):
        store.read()
    with pytest.raises(RecordError):
        store.write(FULL)


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no directory")
    with pytest.raises(RecordError, match="ENOTDIR"):
        Store(tmp_path / "state").write(FULL)


def test_a_record_of_before_producers_were_in_it_is_still_one() -> None:
    values = json.loads(encode_record(FULL))
    del values["producers"]
    assert decode_record(json.dumps(values).encode()) == replace(FULL, producers=())


def test_what_spoke_against_a_handover_stays_where_an_earlier_khod_recorded_its_sentence_alone() -> None:
    """Nobody who takes his state back later makes such a handover verified."""
    lost = Verdict(missing=["memblock"], reason="did not arrive: memblock")
    values = json.loads(encode_record(replace(FULL, verdict=lost)))
    del values["verdict"]["findings"]
    verdict = decode_record(json.dumps(values).encode()).verdict
    assert verdict is not None
    late = verdict.with_findings(finding for finding in verdict.findings if finding.producer != "kv")
    assert late.reason == "did not arrive: memblock"
