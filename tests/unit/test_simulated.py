# SPDX-License-Identifier: LGPL-2.1-or-later
"""The embedded kernel against kho-abi.md, "v3, exactly": the order of errnos, the silences, the traps."""

import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from khod.abi.proc import BOOT_ID
from khod.kernel.kexec import LOAD_DISABLED, LOAD_LIMIT
from khod.simulated.kernel import Rebooted, SimulatedKernel
from tests.unit.images import CPIO, bzimage

KHO = "/sys/kernel/kho"
ACTIVE, DT, DT_MAX, IN_DT = f"{KHO}/active", f"{KHO}/dt", f"{KHO}/dt_max", "/sys/firmware/kho/dt"
LOADED = "/sys/kernel/kexec_loaded"
UNLOAD, NO_INITRAMFS = 1, 4


class Machine(SimulatedKernel):
    def load(self, cmdline: bytes = b"root=/dev/sim\0", kernel: bytes | None = None, initrd: bytes = CPIO) -> None:
        """kexec_file_load of an image and an initrd."""
        fds = []
        for contents in (bzimage() if kernel is None else kernel, initrd):
            fds.append(os.memfd_create("image"))
            os.write(fds[-1], contents)
        try:
            self.kexec_file_load(fds[0], fds[1], cmdline, 0)
        finally:
            for fd in fds:
                os.close(fd)

    def unload(self) -> None:
        self.kexec_file_load(-1, -1, b"", UNLOAD)

    def put(self, path: str, text: str) -> None:
        """Make the kernel another one than it was booted as."""
        self.host_path(path).chmod(0o600)
        self.host_path(path).write_text(text)


@pytest.fixture
def kernel(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def refusal(kernel: Machine, text: bytes, path: str = ACTIVE) -> int | None:
    """The errno a write ends in; None where it succeeds."""
    try:
        kernel.write_file(path, text)
    except OSError as error:
        return error.errno
    return None


def test_the_files_are_there_whenever_the_option_is_compiled_in(kernel: Machine) -> None:
    assert kernel.read_file(ACTIVE) == b"0\n"
    assert kernel.read_file(DT_MAX) == b"0xa00000\n"
    for name in ("scratch_phys", "scratch_len"):
        assert kernel.read_file(f"{KHO}/{name}").startswith(b"0x")
    assert not kernel.path_exists(DT)
    assert not kernel.path_exists(IN_DT)
    modes = dict.fromkeys(("active", "dt_max"), 384) | dict.fromkeys(("scratch_phys", "scratch_len"), 256)
    for name, mode in modes.items():
        assert stat.S_IMODE(kernel.host_path(f"{KHO}/{name}").stat().st_mode) == mode


@pytest.mark.parametrize("text", [b"1", b"1\n", b"y", b"Y\n", b"on", b"ON\n", b"1234", b"yes"])
def test_what_kstrtobool_takes_for_true_activates(kernel: Machine, text: bytes) -> None:
    assert refusal(kernel, text) is None
    assert kernel.read_file(ACTIVE) == b"1\n"


@pytest.mark.parametrize("text", [b"0", b"n", b"N\n", b"off", b"OFF\n", b"no"])
def test_what_kstrtobool_takes_for_false_deactivates(kernel: Machine, text: bytes) -> None:
    kernel.write_file(ACTIVE, b"1\n")
    assert refusal(kernel, text) is None
    assert kernel.read_file(ACTIVE) == b"0\n"


@pytest.mark.parametrize("text", [b"", b"\n", b"2", b"x", b"o", b"ox", b" 1", b"-1", b"\xff"])
def test_what_cannot_be_parsed_is_einval_and_changes_nothing(kernel: Machine, text: bytes) -> None:
    assert refusal(kernel, text) == errno.EINVAL
    assert kernel.read_file(ACTIVE) == b"0\n"


@pytest.mark.parametrize("text", [b"1", b"0"])
def test_without_scratch_it_is_enomem_even_for_a_0(kernel: Machine, text: bytes) -> None:
    kernel.put(f"{KHO}/scratch_len", "0x0\n")
    kernel.put(f"{KHO}/scratch_phys", "0x0\n")
    assert refusal(kernel, text) == errno.ENOMEM
    assert refusal(kernel, b"x") == errno.EINVAL, "parsing comes first"


def test_a_redundant_write_succeeds_and_does_nothing(kernel: Machine) -> None:
    assert refusal(kernel, b"0") is None
    kernel.write_file(ACTIVE, b"1\n")
    before = kernel.read_file(DT)
    kernel.set_fault("veto", 1)
    assert refusal(kernel, b"1") is None, "the abort section's `echo 1`: no error, no abort"
    assert kernel.read_file(ACTIVE) == b"1\n"
    assert kernel.read_file(DT) == before


def test_dt_is_there_only_while_active_and_as_long_as_it_says(kernel: Machine) -> None:
    kernel.write_file(ACTIVE, b"1\n")
    tree = kernel.read_file(DT)
    assert struct.unpack(">II", tree[:8]) == (0xD00DFEED, len(tree)), "its file size is fdt_totalsize"
    assert stat.S_IMODE(kernel.host_path(DT).stat().st_mode) == 0o400
    kernel.write_file(ACTIVE, b"0\n")
    assert not kernel.path_exists(DT)
    with pytest.raises(FileNotFoundError):
        kernel.read_file(DT)


@pytest.mark.parametrize(
    ("fault", "value", "logged"), [("veto", 1, -1), ("serialize_errno", 12, -12), ("serialize_errno", 3, -3)]
)
def test_a_failure_to_serialize_is_einval_whatever_the_cause_and_one_log_line(
    kernel: Machine, fault: str, value: int, logged: int
) -> None:
    kernel.set_fault(fault, value)
    assert refusal(kernel, b"1") == errno.EINVAL
    assert kernel.kernel_log.count(f"kho failed to serialize state: {logged}\n") == 1
    assert kernel.read_file(ACTIVE) == b"0\n"
    assert not kernel.path_exists(DT)
    assert kernel.leaked_bytes == 0xA00000, "up to dt_max"
    refusal(kernel, b"1")
    assert kernel.leaked_bytes == 2 * 0xA00000


DT_MAXES = [
    (b"4096\n", b"0x1000\n"),
    (b"0x2000", b"0x2000\n"),
    (b"0X2000", b"0x2000\n"),
    (b"010\n", b"0x8\n"),  # base 0: a leading 0 is octal
    (b"0", b"0x0\n"),
]


@pytest.mark.parametrize(("text", "shown"), DT_MAXES)
def test_dt_max_takes_what_kstrtoull_takes(kernel: Machine, text: bytes, shown: bytes) -> None:
    assert refusal(kernel, text, DT_MAX) is None
    assert kernel.read_file(DT_MAX) == shown


@pytest.mark.parametrize("text", [b"10M", b"4K\n", b"", b"-1", b"ten", b"0xZ", b"1_000", b"0b1", b"08", b" 5"])
def test_dt_max_takes_no_suffix_and_nothing_else(kernel: Machine, text: bytes) -> None:
    assert refusal(kernel, text, DT_MAX) == errno.EINVAL
    assert kernel.read_file(DT_MAX) == b"0xa00000\n"


def test_a_tree_that_outgrows_dt_max_is_einval_with_3_in_the_log(kernel: Machine) -> None:
    kernel.write_file(DT_MAX, b"64\n")
    assert refusal(kernel, b"1") == errno.EINVAL
    assert "kho failed to serialize state: -3\n" in kernel.kernel_log
    kernel.write_file(DT_MAX, b"0xa00000\n")
    assert refusal(kernel, b"1") is None
    kernel.write_file(DT_MAX, b"64\n")
    assert kernel.read_file(ACTIVE) == b"1\n", "a change while active acts at the next activation"
    kernel.write_file(ACTIVE, b"0\n")
    assert refusal(kernel, b"1") == errno.EINVAL


def jump(kernel: Machine) -> None:
    with pytest.raises(Rebooted):
        kernel.reboot_kexec()


def test_the_tree_arrives_byte_for_byte_in_another_boot(kernel: Machine) -> None:
    boot = kernel.read_file(BOOT_ID)
    kernel.write_file(ACTIVE, b"1\n")
    kernel.write_file(DT_MAX, b"0x500000\n")
    tree = kernel.read_file(DT)
    kernel.load(b"root=/dev/sim marker=1\0")
    assert kernel.read_file(LOADED) == b"1\n"
    jump(kernel)
    assert kernel.read_file(IN_DT) == tree
    assert kernel.read_file(BOOT_ID) != boot
    assert kernel.read_file("/proc/cmdline") == b"root=/dev/sim marker=1\n"
    assert (kernel.read_file(ACTIVE), kernel.read_file(LOADED), kernel.read_file(DT_MAX)) == (
        b"0\n",
        b"0\n",
        b"0xa00000\n",
    )
    assert not kernel.path_exists(DT)


def test_what_arrived_is_gone_after_the_next_boot(kernel: Machine) -> None:
    kernel.write_file(ACTIVE, b"1\n")
    kernel.load()
    jump(kernel)
    kernel.load()
    jump(kernel)
    assert not kernel.path_exists(IN_DT)


def test_an_image_that_outlives_an_abort_hands_the_stale_tree_over(kernel: Machine) -> None:
    kernel.write_file(ACTIVE, b"1\n")
    tree = kernel.read_file(DT)
    kernel.load()
    kernel.write_file(ACTIVE, b"0\n")
    assert kernel.read_file(LOADED) == b"1\n"
    jump(kernel)
    assert kernel.read_file(IN_DT) == tree


def test_a_load_before_activation_carries_nothing(kernel: Machine) -> None:
    kernel.load()
    kernel.write_file(ACTIVE, b"1\n")
    jump(kernel)
    assert not kernel.path_exists(IN_DT)


def load_errno(machine: Machine, **arguments: bytes) -> int | None:
    try:
        machine.load(**arguments)
    except OSError as error:
        return error.errno
    return None


def test_a_range_that_overlaps_scratch_is_einval_and_only_while_active(kernel: Machine) -> None:
    kernel.put(f"{KHO}/scratch_phys", "0x40000000\n")
    assert load_errno(kernel) is None, "no tree goes with it"
    kernel.write_file(ACTIVE, b"1\n")
    assert load_errno(kernel) == errno.EINVAL


def test_no_room_in_scratch_is_eaddrnotavail(kernel: Machine) -> None:
    kernel.put(f"{KHO}/scratch_len", "0x4000\n")
    kernel.write_file(ACTIVE, b"1\n")
    assert load_errno(kernel) == errno.EADDRNOTAVAIL


def test_a_load_that_fails_keeps_the_image_that_was_there(kernel: Machine) -> None:
    kernel.load(b"first\0")
    kernel.set_fault("load_errno", errno.ENOMEM)
    assert load_errno(kernel) == errno.ENOMEM
    assert kernel.read_file(LOADED) == b"1\n"
    jump(kernel)
    assert kernel.read_file("/proc/cmdline") == b"first\n"


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"kernel": b"\x7fELF" + bytes(0x1000)}, errno.ENOEXEC),
        ({"kernel": b""}, errno.EINVAL),
        ({"cmdline": b"no NUL at its end"}, errno.EINVAL),
        ({"cmdline": b"x" * 2048 + b"\0"}, errno.EINVAL),
    ],
)
def test_what_the_loader_refuses(kernel: Machine, arguments: dict[str, bytes], number: int) -> None:
    assert load_errno(kernel, **arguments) == number
    assert kernel.read_file(LOADED) == b"0\n"


def test_kexec_load_disabled_refuses_the_unload_too(kernel: Machine) -> None:
    kernel.load()
    kernel.write_file(LOAD_DISABLED, b"1\n")
    assert load_errno(kernel) == errno.EPERM
    with pytest.raises(PermissionError):
        kernel.unload()
    assert kernel.read_file(LOADED) == b"1\n"


def test_the_limit_counts_loads_and_unloads(kernel: Machine) -> None:
    assert kernel.read_file(LOAD_LIMIT) == b"-1\n"
    kernel.write_file(LOAD_LIMIT, b"2\n")
    kernel.load()
    kernel.unload()
    assert kernel.read_file(LOAD_LIMIT) == b"0\n"
    assert load_errno(kernel) == errno.EPERM


def test_reboot_with_nothing_loaded_is_einval_and_the_system_goes_on(kernel: Machine) -> None:
    boot = kernel.read_file(BOOT_ID)
    with pytest.raises(OSError, match="reboot") as raised:
        kernel.reboot_kexec()
    assert raised.value.errno == errno.EINVAL
    assert kernel.read_file(BOOT_ID) == boot


def test_the_kernel_outlives_the_process_that_drives_it(kernel: Machine) -> None:
    kernel.write_file(ACTIVE, b"1\n")
    kernel.load()
    another = Machine(kernel.root)
    assert another.read_file(ACTIVE) == b"1\n"
    another.unload()
    assert kernel.read_file(LOADED) == b"0\n"


def test_without_initramfs_its_descriptor_is_not_looked_at(kernel: Machine) -> None:
    fd = os.memfd_create("image")
    os.write(fd, bzimage())
    kernel.kexec_file_load(fd, -1, b"root=/dev/sim\0", NO_INITRAMFS)
    os.close(fd)
    assert kernel.read_file(LOADED) == b"1\n"
