# SPDX-License-Identifier: LGPL-2.1-or-later
"""The clocks of one kernel, read from files of the test's own; the TSC of a tracefs that behaves as the kernel's."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from khod.abi.calls import HostCalls
from khod.abi.clock_device import read_clock_device
from khod.history.model import Moment
from khod.kernel.clocks import read_clocks
from khod.kernel.tracing import INSTANCE, MARKERS, read_tsc

HEAD = "# tracer: nop\n#\n#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n"
CLOCKS = "[local] global counter uptime perf mono mono_raw boot tai x86-tsc\n"
BOOT_ID = "11111111-2222-3333-4444-555555555555"


class Traced(HostCalls):
    """A kernel with tracefs: markers get the time stamps of `cycles` where the instance's clock is x86-tsc."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.cycles = itertools.count(100).__next__
        self.touched: list[str] = []
        self.refused: dict[str, int] = {}
        self.lay("/sys/kernel/tracing/trace_clock", CLOCKS)
        self.host_path(f"{INSTANCE}/..").resolve().mkdir()
        self.lay("/proc/sys/kernel/random/boot_id", f"{BOOT_ID}\n")

    def lay(self, path: str, text: str) -> None:
        self.host_path(path).parent.mkdir(parents=True, exist_ok=True)
        self.host_path(path).write_text(text)

    @contextmanager
    def temporary_directory(self, path: str) -> Iterator[None]:
        self._note(path)
        for name in ("trace_clock", "trace_marker"):
            self.lay(f"{path}/{name}", "")
        self.lay(f"{path}/trace", HEAD)
        with super().temporary_directory(path):
            try:
                yield
            finally:
                for file in self.host_path(path).iterdir():
                    file.unlink()

    def write_file(self, path: str, data: bytes) -> None:
        self._note(path)
        super().write_file(path, data)
        if path == f"{INSTANCE}/trace_marker":
            assert self.read_file(f"{INSTANCE}/trace_clock") == b"x86-tsc"
            with self.host_path(f"{INSTANCE}/trace").open("a") as trace:
                trace.write(f"    khod worker-77  [001] ..... {self.cycles()}: tracing_mark_write: {data.decode()}")

    def _note(self, path: str) -> None:
        self.touched.append(path)
        if number := self.refused.get(path):
            raise OSError(number, os.strerror(number), path)


def test_the_quickest_marker_counts(tmp_path: Path) -> None:
    """Between the third marker's two readings of the clock passed least."""
    kernel = Traced(tmp_path)
    moments = [10.0, 11.0, 20.0, 21.0, 30.0, 30.5, 40.0, 41.0, 50.0, 51.0]
    found = read_tsc(kernel, iter(moments).__next__)
    assert found is not None
    assert (found.cycles, found.monotonic, found.span_seconds) == (102, 30.25, 0.5)
    assert kernel.touched.count(f"{INSTANCE}/trace_marker") == MARKERS
    assert not kernel.path_exists(INSTANCE)


def test_two_readings_at_once_do_not_share_the_instance(tmp_path: Path) -> None:
    """Each waits until the other's instance is gone: one of them would find the files removed under its hands."""
    kernel = Traced(tmp_path)
    start = threading.Barrier(4)

    def read(_number: int) -> bool:
        start.wait()
        return read_tsc(kernel) is not None

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == [True] * 4


@pytest.mark.parametrize("text", ["[local] global counter\n", ""])
def test_without_such_a_trace_clock_no_instance_is_made(tmp_path: Path, text: str) -> None:
    kernel = Traced(tmp_path)
    kernel.lay("/sys/kernel/tracing/trace_clock", text)
    assert read_tsc(kernel) is None
    assert kernel.touched == []


def test_tracefs_is_not_touched_in_v3_s_active_phase(tmp_path: Path) -> None:
    kernel = Traced(tmp_path)
    kernel.lay("/sys/kernel/kho/active", "1\n")
    assert read_tsc(kernel) is None
    assert kernel.touched == []
    kernel.lay("/sys/kernel/kho/active", "0\n")
    assert read_tsc(kernel) is not None


@pytest.mark.parametrize("refused", [INSTANCE, f"{INSTANCE}/trace_clock", f"{INSTANCE}/trace_marker"])
def test_a_kernel_that_refuses_has_no_tsc(tmp_path: Path, refused: str) -> None:
    """As under lockdown=confidentiality, or in a sandbox; the instance is gone all the same."""
    kernel = Traced(tmp_path)
    kernel.refused[refused] = errno.EPERM
    assert read_tsc(kernel) is None
    assert not kernel.path_exists(INSTANCE)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "CPU:1 [LOST 3 EVENTS]\n",
        "  khod-7  [000] ..... 12.345678: tracing_mark_write: khod 0\n",
        "  khod-7  [000] ..... 1234: tracing_mark_write: khod 99\n",
        "  khod-7  [000] ..... 1234: tracing_mark_write: somebody else\n",
        "\x00\xff garbage\n",
    ],
)
def test_a_bad_trace_has_no_tsc(tmp_path: Path, line: str) -> None:
    class Bad(Traced):
        def read_file(self, path: str) -> bytes:
            return f"{HEAD}{line}".encode("latin-1") if path == f"{INSTANCE}/trace" else super().read_file(path)

    assert read_tsc(Bad(tmp_path)) is None


def test_a_reading_has_every_clock_of_one_instant(tmp_path: Path) -> None:
    kernel = Traced(tmp_path)
    kernel.lay("/sys/class/rtc/rtc0/hctosys", "0\n")
    kernel.lay("/sys/class/rtc/rtc1/hctosys", "1\n")
    kernel.lay("/sys/class/rtc/rtc1/since_epoch", "1800000000\n")
    before = time.monotonic()
    found = read_clocks(kernel, Moment.end)
    after = time.monotonic()
    assert (found.moment, found.boot_id) == (Moment.end, BOOT_ID)
    assert before <= found.monotonic <= after
    assert found.span_seconds <= after - before
    assert abs(found.realtime - found.monotonic - (time.time() - time.monotonic())) < after - before + 0.1
    assert found.boottime >= found.monotonic - found.span_seconds
    assert found.tsc is not None
    assert found.rtc is not None
    assert abs(found.rtc - 1_800_000_000) <= after - before
    assert (found.ptp, found.ptp_name) == (None, "")


def test_a_host_with_none_of_it_has_the_system_clocks(tmp_path: Path) -> None:
    kernel = HostCalls(tmp_path)
    (tmp_path / "proc/sys/kernel/random").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text(BOOT_ID)
    found = read_clocks(kernel, Moment.begin)
    assert (found.tsc, found.ptp, found.rtc) == (None, None, None)
    assert found.realtime > 0


@pytest.mark.parametrize(
    ("name", "used"),
    [("KVM virtual PTP", True), ("vmclock0", True), ("hyperv", True), ("igb-0000:01:00.0", False), ("", False)],
)
def test_only_the_hypervisor_s_clock_counts(tmp_path: Path, name: str, used: bool) -> None:
    def read_device(path: str) -> float:
        assert path == "/run/kho-devices/ptp1"
        return 1_800_000_037.5

    kernel = Traced(tmp_path)
    kernel.lay("/sys/class/ptp/ptp0/clock_name", "e1000e\n")
    kernel.lay("/sys/class/ptp/ptp1/clock_name", f"{name}\n")
    kernel.lay("/run/kho-devices/ptp1", "")
    found = read_clocks(kernel, Moment.begin, read_device=read_device)
    assert found.ptp_name == (name if used else "")
    assert (found.ptp is not None) is used
    if found.ptp is not None:
        assert abs(found.ptp - 1_800_000_037.5) < 1


def test_a_file_that_is_no_clock_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ptp0").touch()
    with pytest.raises(OSError, match="Invalid argument") as raised:
        read_clock_device(str(tmp_path / "ptp0"))
    assert raised.value.filename == f"clock_gettime({tmp_path / 'ptp0'})"
