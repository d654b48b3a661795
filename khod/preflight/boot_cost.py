# SPDX-License-Identifier: LGPL-2.1-or-later
"""What makes the next kernel's boot slow, which is part of the blackout: command line, build options, initrd, tree.

Each row says what it rests on. Figures are of a guest of 7.3.4 under emulation on a busy machine, three boots of each
kind in turn, by the kernel's own clock. There is no row for `lpj=`: a kernel that knows the frequency of its timer
calibrates no delay (init/calibrate.c and arch/x86/kernel/tsc.c of 7.3.4, also with `notsc`). There is none for
`driver_async_probe=`, because no command line shows which driver is slow.
"""

import re
from collections.abc import Callable, Iterator

from khod.dataclass import dataclass
from khod.history.model import BootCost, RowKind, Timeline
from khod.images.initrd import Initrd
from khod.kernel.kconfig import is_not_set, is_set
from khod.kernel.next_arg import Arg, boolean_value, kernel_args
from khod.preflight.facts import CheckFinding, Facts
from khod.preflight.image import format_mib, tree_size
from khod.target.target import Target
from khod.text import join_names, printable, shorten

MAX_SHOWN = 60
"""The number of characters of a word that a finding shows."""
LARGE_BYTES = 128 << 20
"""From so many bytes on an initrd, packed or unpacked, or a tree counts as large.

An initrd of 64 MiB was unpacked after 1.1 to 2.4 s where it was not compressed, after 2.1 to 5.0 s with zstd, and one
of a few bytes after 0.8 to 1.0 s. The time of the jump did not show the difference: with KHO on, 7.3.4 only copies what
is loaded. 6.19.11 hashes it in the jump, too (verify_sha256_digest() in arch/x86/purgatory).
"""
SLOW_METHODS = frozenset({"xz", "lzma", "bzip2"})
"""Formats that take several times as long to unpack as zstd.

The same 64 MiB in xz were unpacked after 7.7 to 14.0 s. In user space zstd took 0.1 s for them, gzip 0.3 s, xz 1.1 s
and bzip2 1.7 s.
"""

KERNEL, LOADED = [RowKind.kernel], [RowKind.jump, RowKind.kernel]
PROGRAMS = [RowKind.initrd, RowKind.userspace]
ALL = [RowKind.kernel, *PROGRAMS]

ON, OFF = "[yYtT1eE].*|[oO][nN].*", "[nNfF0dD].*|[oO][fF].*"
"""Values that kstrtobool() accepts."""
NUMBER = "[0-9]{1,9}"
NOT_ZERO = "(?:0x0*[1-9a-fA-F]|0*[1-9]).*"
DEBUG = "debug|7"


@dataclass(frozen=True)
class Boot:
    """What the boot of a next kernel is judged by.

    `line` is the command line that it boots with, `given` the part of it that is not built in. `config` is the
    configuration, None where the image does not show it. `initrd_bytes` are those that are loaded, `tree_bytes` those
    of a state tree that is copied into the image. `unpacks_itself` tells whether the kernel is loaded as it was
    compressed; khod unpacks others before.
    """

    line: str = ""
    given: str = ""
    config: str | None = None
    initrd_bytes: int = 0
    initrds: tuple[Initrd, ...] = ()
    tree_bytes: int = 0
    unpacks_itself: bool = False

    @classmethod
    def of_target(cls, target: Target, tree_bytes: int = 0) -> "Boot":
        """Return what `target` boots with."""
        about = target.apart.about if target.apart else None
        return cls(
            target.booted_line,
            target.cmdline,
            about.config if about else None,
            target.initrd.size if target.initrd else 0,
            tuple(target.initrds),
            tree_bytes,
            about is not None and about.format == "bzImage",
        )

    def may_have(self, option: str) -> bool:
        """Whether the kernel has `option`, or does not show whether it has."""
        return self.config is None or is_set(self.config, option)


@dataclass(frozen=True)
class SlowWord:
    """A word of the command line that makes the boot slow if `values`, a pattern, matches the last value it has.

    A word without a value has "". Without the option `needs` the kernel ignores it.
    """

    name: str
    values: str
    why: str
    parts: list[RowKind]
    needs: str = ""


SLOW_WORDS = (
    # mm/memtest.c: one pass over all free memory for each pattern, 17 of them without a number.
    SlowWord("memtest", f"|{NOT_ZERO}", "tests all free memory before it is used", KERNEL, "CONFIG_MEMTEST"),
    # mm/slub.c: both names since 6.8; `-` switches it off.
    SlowWord("slab_debug", "(?!-).*", "checks what is allocated, and fills it", ALL, "CONFIG_SLUB_DEBUG"),
    SlowWord("slub_debug", "(?!-).*", "checks what is allocated, and fills it", ALL, "CONFIG_SLUB_DEBUG"),
    SlowWord("debug_pagealloc", ON, "unmaps each page that is freed", ALL, "CONFIG_DEBUG_PAGEALLOC"),
    SlowWord("page_poison", ON, "fills each page that is freed, and compares it later", ALL, "CONFIG_PAGE_POISONING"),
    SlowWord("page_owner", ON, "notes for each page who allocated it", ALL, "CONFIG_PAGE_OWNER"),
    SlowWord("ftrace", "function|function_graph", "traces every function of the kernel", ALL, "CONFIG_FUNCTION_TRACER"),
    # init/main.c: 1,000 more messages on 7.3.4. /sbin/init ran after 1.6 to 2.6 s, without it after 1.1 to 1.5 s.
    SlowWord("initcall_debug", f"|{ON}", "writes two messages for each init function", KERNEL),
    # kernel/printk/printk.c, boot_delay_msec(): milliseconds before each message that a console prints.
    SlowWord("boot_delay", NOT_ZERO, "waits before each message", KERNEL, "CONFIG_BOOT_PRINTK_DELAY"),
    # drivers/base/dd.c: 10 seconds where the kernel has modules; a negative number never ends.
    SlowWord(
        "deferred_probe_timeout",
        "-.+|1[1-9]|[2-9][0-9]|[1-9][0-9]{2,}",
        "lets drivers wait so many seconds for suppliers that may never come",
        ALL,
    ),
    # init/initramfs.c: since 5.13 (e7cb072eb988) it is unpacked while drivers start.
    SlowWord("initramfs_async", OFF, "lets drivers wait until the initrd is unpacked", KERNEL),
    # systemd-fsck@.service(8)
    SlowWord("fsck.mode", "force", "checks file systems that were unmounted cleanly", PROGRAMS),
    # kernel-command-line(7); systemd takes `debug` for itself, too.
    SlowWord("systemd.log_level", DEBUG, "makes systemd log what it does in detail", PROGRAMS),
    SlowWord("debug", "", "makes systemd log what it does in detail", PROGRAMS),
    SlowWord("udev.log_level", DEBUG, "makes udev log each event in detail", PROGRAMS),
    SlowWord("rd.udev.log_level", DEBUG, "makes udev log each event in detail", [RowKind.initrd]),
    # dracut.cmdline(7): `set -x` in its scripts
    SlowWord("rd.debug", f"|{ON}", "prints each command of dracut's scripts", [RowKind.initrd]),
)

SLOW_OPTIONS = {
    "CONFIG_KASAN_GENERIC": "checks each access to memory",  # lib/Kconfig.kasan: "The performance slowdown is ~x3"
    "CONFIG_KASAN_SW_TAGS": "checks each access to memory",
    "CONFIG_KMSAN": "checks each access to memory",  # lib/Kconfig.kmsan: "slows down the whole system"
    "CONFIG_KCSAN": "checks each access to memory for races",
    "CONFIG_PROVE_LOCKING": "checks the order of all locks",
    "CONFIG_DEBUG_PAGEALLOC_ENABLE_DEFAULT": "unmaps each page that is freed",
    "CONFIG_SLUB_DEBUG_ON": "checks what is allocated, and fills it",
    "CONFIG_FTRACE_STARTUP_TEST": "tests each tracer at boot",  # a series of self-tests, kernel/trace/Kconfig
    "CONFIG_GCOV_PROFILE_ALL": "counts the runs of each line of code",
}
"""Build options that make every boot slow."""

SERIAL = re.compile(r"tty(?:[A-Z]+|mxc)[0-9]+|uart|pl011")
EARLY_SERIAL = re.compile(r"serial|ttyS|mmio|pciserial")
LINE_SPEED = re.compile(r"ttyS[0-9]+(?:,([0-9]{1,9}))?")
DEFAULT_LINE_SPEED = 9600  # baud: serial8250_console_setup() in drivers/tty/serial/8250/8250_port.c
BAUD_PER_CHARACTER = 10  # start, 8 bits, stop
INFO_LEVEL = 6  # include/linux/kern_levels.h; a console prints what is below its level
DEBUG_LEVEL = 10  # CONSOLE_LOGLEVEL_DEBUG in include/linux/printk.h


def find_boot_costs(boot: Boot) -> list[BootCost]:
    """Return what makes this boot slow, in the order in which it is shown."""
    return [cost for find in FINDERS for cost in find(boot)]


def _find_serial_console(boot: Boot) -> Iterator[BootCost]:
    """Find a serial console on which the kernel prints more than warnings: each character takes its time there.

    7.3.4 printed 27,600 characters until it was up, and 420 with quiet: on a real line 2.4 s with 115200 baud, 29 s
    with 9600. QEMU's line has no speed: /sbin/init ran after 1.2 to 1.6 s, and after 1.1 to 1.5 s with quiet.
    """
    args = list(kernel_args(boot.line))
    console = next((arg for arg in reversed(args) if _is_serial(arg)), None)
    if console is None:
        return
    ignoring = any(arg.is_parameter("ignore_loglevel") for arg in args)
    if not ignoring and _console_level(args, boot.config or "") <= INFO_LEVEL:
        return
    found, remedy = (
        f"{_show_word(console)} prints all messages of the boot",
        "Print warnings only: `kernel.append=quiet`",
    )
    if speed := LINE_SPEED.match(console.value or ""):
        baud = int(speed[1] or DEFAULT_LINE_SPEED)
        found += f", on a real line {baud // BAUD_PER_CHARACTER} characters a second"
        remedy += "" if speed[1] else f", and name the speed of the line: {_show_word(console)},115200"
    if ignoring:
        remedy = _leave_out(boot, "ignore_loglevel")
    yield BootCost(KERNEL, found, remedy)


def _is_serial(arg: Arg) -> bool:
    """Whether the word makes messages go to a serial line, at once or when its driver starts."""
    value = arg.value or ""
    if arg.is_parameter("console"):
        return SERIAL.match(value) is not None
    return arg.is_parameter("earlycon") or (arg.is_parameter("earlyprintk") and EARLY_SERIAL.match(value) is not None)


def _console_level(args: list[Arg], config: str) -> int:
    """Return console_loglevel: the last of quiet, debug and loglevel= counts (init/main.c)."""
    level = _configured_level(config, "DEFAULT", 7)
    for arg in args:
        if arg.param == "quiet":
            level = _configured_level(config, "QUIET", 4)
        elif arg.param == "debug":
            level = DEBUG_LEVEL
        elif arg.param == "loglevel" and (number := re.match(NUMBER, arg.value or "")):
            level = int(number[0])
    return level


def _configured_level(config: str, name: str, otherwise: int) -> int:
    found = re.search(rf"^CONFIG_CONSOLE_LOGLEVEL_{name}=({NUMBER})$", config, re.MULTILINE)
    return int(found[1]) if found else otherwise


def _find_slow_words(boot: Boot) -> Iterator[BootCost]:
    for word in SLOW_WORDS:
        last = next((arg for arg in reversed(list(kernel_args(boot.line))) if arg.is_parameter(word.name)), None)
        if last is None or not re.fullmatch(word.values, last.value or "", re.DOTALL):
            continue
        if not word.needs or boot.may_have(word.needs):
            yield BootCost(word.parts, f"{_show_word(last)} {word.why}", _leave_out(boot, word.name))


def _find_root_delay(boot: Boot) -> Iterator[BootCost]:
    """Find rootdelay= where the kernel mounts the root: prepare_namespace() sleeps. To an initrd it is a limit."""
    waits = [
        arg for arg in kernel_args(boot.line) if arg.param == "rootdelay" and re.fullmatch(NOT_ZERO, arg.value or "")
    ]
    if waits and not any(one.init for one in boot.initrds):
        yield BootCost(
            KERNEL,
            f"{_show_word(waits[-1])} waits so many seconds, also where the root is there",
            f"Wait only until it is there: `kernel.append=rootwait`. {_leave_out(boot, 'rootdelay')}",
        )


def _find_distrust(boot: Boot) -> Iterator[BootCost]:
    """Find a random number generator that trusts neither the seed of kexec nor the processor.

    kexec passes a seed on (x86 since 6.0, others in the device tree). Without trust in one of them the generator
    collects entropy first, which is about a second since 5.4 (drivers/char/random.c), and who asks it for keys waits.
    """
    trusted = any(
        value
        if (value := boolean_value(boot.line, f"random.trust_{source}")) is not None
        # Both options are gone since 6.2, and trust is the default.
        else not is_not_set(boot.config or "", f"CONFIG_RANDOM_TRUST_{source.upper()}")
        for source in ("cpu", "bootloader")
    )
    if not trusted:
        yield BootCost(
            ALL,
            "The random number generator trusts neither the seed from this kernel nor the processor's",
            "Trust the seed: `kernel.append=random.trust_bootloader=on`",
        )


def _find_slow_options(boot: Boot) -> Iterator[BootCost]:
    for option, why in SLOW_OPTIONS.items():
        if boot.config is not None and is_set(boot.config, option):
            yield BootCost(ALL, f"The kernel was built with {option}: it {why}", "Choose a kernel built without it.")


def _find_large_initrd(boot: Boot) -> Iterator[BootCost]:
    unpacked = sum(one.unpacked for one in boot.initrds)
    if max(unpacked, boot.initrd_bytes) < LARGE_BYTES:
        return
    yield BootCost(
        LOADED,
        f"The initrd is large: {format_mib(boot.initrd_bytes)} are copied in the jump"
        + (f", and {format_mib(unpacked)} unpacked after it" if unpacked else ""),  # 0 where it could not be inspected
        "Put only this host's drivers into it: MODULES=dep in initramfs.conf, hostonly=yes in dracut.conf.",
    )


def _find_slow_methods(boot: Boot) -> Iterator[BootCost]:
    """Find what is compressed in a format that takes long to unpack."""
    if slow := sorted(SLOW_METHODS.intersection(method for one in boot.initrds for method in one.formats)):
        yield BootCost(
            KERNEL,
            f"The initrd is compressed with {join_names(slow)}, which takes several times as long as zstd to unpack",
            "Pack it with zstd: COMPRESS=zstd in initramfs.conf, compress=zstd in dracut.conf.",
        )
    for method in sorted(SLOW_METHODS) if boot.unpacks_itself and boot.config else ():
        if is_set(boot.config or "", option := f"CONFIG_KERNEL_{method.upper()}"):
            yield BootCost(
                [RowKind.jump],  # before the kernel reads a clock
                f"The kernel was built with {option}: it unpacks itself several times slower than with zstd",
                "Choose a kernel built with CONFIG_KERNEL_ZSTD or CONFIG_KERNEL_LZ4.",
            )


def _find_large_tree(boot: Boot) -> Iterator[BootCost]:
    if boot.tree_bytes >= LARGE_BYTES:
        yield BootCost(
            LOADED,
            f"The state tree is large: {format_mib(boot.tree_bytes)} are copied in the jump",
            "Find out which producer needs so much: khoctl dt show",
        )


FINDERS: tuple[Callable[[Boot], Iterator[BootCost]], ...] = (
    _find_serial_console,
    _find_slow_words,
    _find_root_delay,
    _find_distrust,
    _find_slow_options,
    _find_large_initrd,
    _find_slow_methods,
    _find_large_tree,
)


def _leave_out(boot: Boot, name: str) -> str:
    """Return how to be rid of a word."""
    if any(arg.is_parameter(name) for arg in kernel_args(boot.given)):
        return f"Leave {name} out: `kernel.remove={name}`"
    return f"Choose a kernel without {name} in CONFIG_CMDLINE"


def _show_word(arg: Arg) -> str:
    return shorten(printable(arg.param if arg.value is None else f"{arg.param}={arg.value}"), MAX_SHOWN)


def check_boot_cost(facts: Facts) -> CheckFinding | None:
    """The next kernel's boot is not slowed down by what its command line and its files have."""
    if facts.target is None:
        return None
    boot = Boot.of_target(facts.target, tree_size(facts))
    costs = find_boot_costs(boot)
    timeline = facts.past.past.timeline if facts.past and facts.past.past else Timeline()
    unseen = "; not inspected: its build options, which the image does not show" if boot.config is None else ""
    if not costs:
        return CheckFinding.pass_with(f"Nothing is known to make its boot slow{unseen}")
    return CheckFinding.warn_with(
        "; ".join(f"{cost.found}{_describe_times(cost, timeline)}" for cost in costs) + unseen,
        " ".join(dict.fromkeys(f"{cost.remedy.rstrip('.')}." for cost in costs)),
    )


def _describe_times(cost: BootCost, timeline: Timeline) -> str:
    """Describe what the parts took that have this cost, in the last handover of this host; "" if that is not known."""
    rows = timeline.select_parts(cost)
    times = ", ".join(f"{row.name} {row.seconds:.1f} s" for row in rows)
    return f" (in the last handover: {times})" if times else ""
