# SPDX-License-Identifier: LGPL-2.1-or-later
"""What makes the boot of a next kernel slow is named, with the time it had, and nothing else is."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from khod.history.model import RowKind, Timeline, TimelineRow
from khod.history.trial import ImageTrial, Past
from khod.images.initrd import Initrd
from khod.model import CheckResult
from khod.preflight.boot_cost import (
    LARGE_BYTES,
    SLOW_METHODS,
    SLOW_OPTIONS,
    SLOW_WORDS,
    Boot,
    SlowWord,
    check_boot_cost,
    find_boot_costs,
)
from khod.preflight.facts import CheckFinding, PastFact
from khod.simulated.kernel import Rebooted
from tests.unit.harness import Host
from tests.unit.images import CPIO, PACK, bzimage, code
from tests.unit.test_preflight import Site, site

__all__ = ["site"]

SERIAL = "console=ttyS0,115200 root=/dev/vda"
NONE = Initrd(("cpio",), 0, 0, init=False)
UNTRUSTED = "random.trust_cpu=off random.trust_bootloader=off"
ROWS = [
    TimelineRow(RowKind.jump, "jump", 1.0, 0.3),
    TimelineRow(RowKind.kernel, "kernel", 1.3, 2.6),
    TimelineRow(RowKind.userspace, "userspace before khod", 3.9, 4.3),
    TimelineRow(RowKind.khod, "khod", 8.2, 0.5),
]
WITH_INITRD = [*ROWS[:2], TimelineRow(RowKind.initrd, "initrd", 3.9, 1.1), *ROWS[2:]]


def costs(line: str = "", **facts: Any) -> list[str]:
    """What is found in such a boot."""
    return [cost.found for cost in find_boot_costs(replace(Boot(line, line), **facts))]


@pytest.mark.parametrize(
    ("line", "config", "slow"),
    [
        (SERIAL, "", True),
        (f"{SERIAL} quiet", "", False),
        (f"quiet {SERIAL} loglevel=7", "", True),  # the last one counts
        (f"loglevel=7 {SERIAL} quiet", "", False),
        (f"{SERIAL} loglevel=4", "", False),
        (f"{SERIAL} quiet ignore_loglevel", "", True),
        (f"{SERIAL} -- quiet", "", True),  # init's
        (SERIAL, "CONFIG_CONSOLE_LOGLEVEL_DEFAULT=4\n", False),
        (f"{SERIAL} quiet", "CONFIG_CONSOLE_LOGLEVEL_QUIET=7\n", True),
        ("console=tty0", "", False),
        ("console=hvc0", "", False),  # a hypervisor's, which takes a line at once
        ("console=tty0 console=ttyAMA0", "", True),
        ("console=ttyS0 console=tty0", "", True),  # messages go to all consoles
        ("console=uart8250,io,0x3f8", "", True),
        ("earlycon", "", True),
        ("earlyprintk=ttyS0,115200", "", True),
        ("earlyprintk=efi", "", False),
        ("quiet=console=ttyS0", "", False),
    ],
)
def test_a_serial_console_is_slow_unless_it_is_quiet(line: str, config: str, *, slow: bool) -> None:
    assert [found.endswith("a second") or "prints all" in found for found in costs(line, config=config)] == [
        True
    ] * slow


@pytest.mark.parametrize(
    ("line", "found", "remedy"),
    [
        (SERIAL, "11520 characters", "kernel.append=quiet"),
        ("console=ttyS1", "960 characters", "console=ttyS1,115200"),  # 9600 baud where none is given
        (f"{SERIAL} quiet ignore_loglevel", "11520", "kernel.remove=ignore_loglevel"),
    ],
)
def test_a_serial_console_comes_with_its_speed(line: str, found: str, remedy: str) -> None:
    (cost,) = find_boot_costs(Boot(line, line))
    assert found in cost.found
    assert remedy in cost.remedy
    assert cost.parts == [RowKind.kernel]


SLOW = [
    "memtest",
    "memtest=4",
    "slab_debug",
    "slub_debug=FZ",
    "slub-debug=FZ,kmalloc-64",
    "debug_pagealloc=on",
    "page_poison=1",
    "page_owner=on",
    "ftrace=function_graph",
    "initcall_debug",
    "boot_delay=10",
    "deferred_probe_timeout=30",
    "deferred_probe_timeout=-1",
    "initramfs_async=0",
    "fsck.mode=force",
    "systemd.log_level=debug",
    "debug",
    "udev.log_level=7",
    "rd.udev.log_level=debug",
    "rd.debug",
    "rd.debug=1",
    "rootdelay=5",
    UNTRUSTED,
    "random.trust_cpu=0 random.trust-bootloader=n",
]
HARMLESS = [
    "memtest=0",
    "memtest=4 memtest=0",
    "slab_debug=-",
    "debug_pagealloc=off",
    "page_poison=0",
    "ftrace=nop",
    "boot_delay=0",
    "deferred_probe_timeout=10",
    "deferred_probe_timeout=0",
    "initramfs_async=1",
    "fsck.mode=auto",
    "systemd.log_level=info",
    "rd.debug=0",
    "rootdelay=0",
    "lpj=4194304",
    "notsc",
    "initcall_debug=0",
    "random.trust_cpu=off",
    "random.trust_bootloader=off",
    "-- memtest=4",
    "",
]


@pytest.mark.parametrize("line", SLOW)
def test_a_slow_word_is_named(line: str) -> None:
    (found,) = costs(f"root=/dev/vda quiet {line}")
    assert line == UNTRUSTED or "random" in found or found.startswith(line)


@pytest.mark.parametrize("line", HARMLESS)
def test_a_word_that_costs_nothing_is_not_named(line: str) -> None:
    assert costs(f"root=/dev/vda quiet {line}") == []


def test_a_word_that_is_built_in_cannot_be_left_out(site: Site) -> None:
    config = 'CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="fsck.mode=force"\n'
    boot = Boot.of_target(site.image(bzimage(contents=code(config=config)), "quiet"))
    assert ["CONFIG_CMDLINE" in cost.remedy for cost in find_boot_costs(boot)] == [True]


def test_each_slow_word_has_a_case_here() -> None:
    assert {word.name for word in SLOW_WORDS} <= {word.partition("=")[0] for word in SLOW}


@pytest.mark.parametrize("word", [word for word in SLOW_WORDS if word.needs], ids=lambda word: word.name)
def test_a_word_that_the_kernel_was_built_to_ignore_costs_nothing(word: SlowWord) -> None:
    line = next(one for one in SLOW if one.partition("=")[0] == word.name)
    assert costs(line, config="CONFIG_KEXEC=y\n") == []
    assert len(costs(line, config=f"{word.needs}=y\n")) == 1


def test_an_initrd_waits_no_longer_than_it_must_with_rootdelay() -> None:
    assert costs("rootdelay=5", initrds=(replace(NONE, init=True),)) == []


@pytest.mark.parametrize("option", SLOW_OPTIONS)
def test_a_debugging_kernel_is_named(option: str) -> None:
    assert [option in found for found in costs(config=f"{option}=y\n")] == [True]
    assert costs(config=f"# {option} is not set\n") == []


@pytest.mark.parametrize(
    ("trust", "line", "count"),
    [
        ("# CONFIG_RANDOM_TRUST_CPU is not set\n# CONFIG_RANDOM_TRUST_BOOTLOADER is not set\n", "", 1),
        ("# CONFIG_RANDOM_TRUST_CPU is not set\nCONFIG_RANDOM_TRUST_BOOTLOADER=y\n", "", 0),
        ("# CONFIG_RANDOM_TRUST_CPU is not set\n", "random.trust_bootloader=off", 1),
        ("# CONFIG_RANDOM_TRUST_CPU is not set\n", "random.trust_cpu=on random.trust_bootloader=off", 0),
    ],
)
def test_the_kernel_is_built_to_trust_its_seed(trust: str, line: str, count: int) -> None:
    assert len(costs(line, config=trust)) == count


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"initrd_bytes": LARGE_BYTES}, "initrd is large"),
        ({"initrds": (replace(NONE, unpacked=LARGE_BYTES),)}, "initrd is large"),
        ({"initrds": (replace(NONE, unpacked=LARGE_BYTES // 2),) * 2}, "initrd is large"),
        ({"initrd_bytes": LARGE_BYTES - 1, "initrds": (replace(NONE, unpacked=LARGE_BYTES - 1),)}, ""),
        ({"tree_bytes": LARGE_BYTES}, "state tree is large"),
        ({"tree_bytes": LARGE_BYTES - 1}, ""),
        ({"config": "CONFIG_KERNEL_XZ=y\n", "unpacks_itself": True}, "CONFIG_KERNEL_XZ"),
        ({"config": "CONFIG_KERNEL_XZ=y\n"}, ""),
        ({"config": "CONFIG_KERNEL_ZSTD=y\n", "unpacks_itself": True}, ""),
    ],
)
def test_what_is_large_or_slow_to_unpack_is_named(facts: dict[str, Any], words: str) -> None:
    assert [words in found for found in costs(**facts)] == [True] * bool(words)


@pytest.mark.parametrize("method", PACK)
def test_an_initrd_in_a_slow_format_is_named(site: Site, method: str) -> None:
    boot = Boot.of_target(site.image(bzimage(), "quiet", [PACK[method](CPIO)]))
    assert [method in cost.found for cost in find_boot_costs(boot)] == [True] * (method in SLOW_METHODS)


@pytest.fixture
def judge(site: Site) -> Callable[..., CheckFinding]:
    """Returns what the check says of a command line, with the rows of the last handover."""

    def judge_line(
        line: str, rows: Sequence[TimelineRow] = (), config: str | None = "CONFIG_KEXEC=y\n"
    ) -> CheckFinding:
        target = site.image(bzimage(contents=code(config=config)), line)
        past = PastFact(Past(ImageTrial(""), Timeline(list(rows))))
        found = check_boot_cost(replace(site.facts(target), past=past))
        assert found is not None
        return found

    return judge_line


@pytest.mark.parametrize(
    ("rows", "times"),
    [
        (ROWS, ["kernel 2.6 s", "kernel 2.6 s"]),  # an initrd without systemd has no row of its own
        (WITH_INITRD, ["kernel 2.6 s", "initrd 1.1 s"]),
        ([], []),
        ([replace(ROWS[1], parent="boot")], []),
    ],
)
def test_each_finding_has_the_time_of_its_part(
    judge: Callable[..., CheckFinding], rows: list[TimelineRow], times: list[str]
) -> None:
    found = judge("console=ttyS0 rd.debug", rows)
    assert found.result is CheckResult.warn
    assert re.findall(r"\(in the last handover: (.*?)\)", found.evidence) == times
    assert "`kernel.append=quiet`" in found.remedy
    assert "`kernel.remove=rd.debug`" in found.remedy


def test_a_cost_of_several_parts_has_each_time(judge: Callable[..., CheckFinding]) -> None:
    found = judge("quiet fsck.mode=force", WITH_INITRD)
    assert "initrd 1.1 s, userspace before khod 4.3 s" in found.evidence


def test_a_boot_without_a_cost_passes(judge: Callable[..., CheckFinding]) -> None:
    found = judge("quiet root=/dev/vda", ROWS)
    assert (found.result, "not inspected" in found.evidence) == (CheckResult.passed, False)


@pytest.mark.parametrize("line", ["quiet", "quiet memtest"])
def test_what_was_not_inspected_is_said(judge: Callable[..., CheckFinding], line: str) -> None:
    assert "not inspected: its build options" in judge(line, ROWS, config=None).evidence


async def test_a_slow_boot_refuses_nothing_and_is_remembered(host: Host) -> None:
    """The check shows the times of the handover before this one, and the report those of this one."""
    host.past = answer(Past(ImageTrial(""), Timeline(ROWS)))
    engine = await host.started()
    with host.request() as plain:
        request = replace(plain, append="fsck.mode=force")
        (found,) = [check for check in await engine.queries.check(request) if check.name == "boot_cost"]
        with pytest.raises(Rebooted):
            await engine.kexec(request)
    assert (found.result, "userspace before khod 4.3 s" in found.evidence) == (CheckResult.warn, True)
    await host.started()
    target = (await host.remembered()).target
    assert target is not None
    assert [cost.found.partition(" ")[0] for cost in target.costs] == ["fsck.mode=force"]


def answer(past: Past) -> Callable[[str], Awaitable[Past]]:
    async def read(_digest: str) -> Past:
        return past

    return read
