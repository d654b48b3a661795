# SPDX-License-Identifier: LGPL-2.1-or-later
"""Errnos in words: complete against what the kernel's sources return, call by call.

The facts are read off Linux 7.3.4, 6.19.11, 6.18.15 and the v3 series, in the order the kernel checks.
"""

import ast
import errno
import os
import platform
import re
from pathlib import Path

import pytest

from khod.errors import error_sentence
from khod.kernel import errnos, luo
from khod.kernel.errnos import LOG, Errnos
from khod.kernel.explain import explain_errno, explain_undo, put_errno
from khod.kernel.luo import FINISH, PRESERVE, RETRIEVE, SESSION
from khod.model import Generation, Step

MACHINES = ("x86_64", "aarch64", "riscv64", "s390x", "ppc64le", "loongarch64")

# kexec_file_load(2), whatever the machine
LOAD = [
    (errno.ENOSYS, "kernel/sys_ni.c"),
    (errno.EPERM, "kernel/kexec_file.c kexec_file_load: kexec_load_permitted"),
    (errno.EINVAL, "kernel/kexec_file.c kexec_file_load: flags"),
    (errno.EBUSY, "kernel/kexec_file.c kexec_file_load: kexec_trylock"),
    (errno.ENOMEM, "kernel/kexec_file.c kimage_file_alloc_init"),
    (errno.EBADF, "fs/kernel_read_file.c kernel_read_file_from_fd"),
    (errno.EINVAL, "fs/kernel_read_file.c kernel_read_file: no regular file, or empty"),
    (errno.ETXTBSY, "fs/kernel_read_file.c kernel_read_file: deny_write_access"),
    (errno.EFBIG, "fs/kernel_read_file.c kernel_read_file: KEXEC_FILE_SIZE_MAX"),
    (errno.EPERM, "security/loadpin/loadpin.c loadpin_check"),
    (errno.EACCES, "security/integrity/ima/ima_main.c ima_post_read_file"),
    (errno.EIO, "fs/kernel_read_file.c kernel_read_file: pos != i_size"),
    (errno.EINTR, "mm/filemap.c filemap_read"),
    (errno.ENODATA, "crypto/asymmetric_keys/verify_pefile.c pefile_parse_binary"),
    (errno.ELIBBAD, "crypto/asymmetric_keys/verify_pefile.c pefile_parse_binary"),
    (524, "crypto/asymmetric_keys/verify_pefile.c pefile_strip_sig_wrapper: ENOTSUPP"),
    (errno.EMSGSIZE, "crypto/asymmetric_keys/verify_pefile.c pefile_strip_sig_wrapper"),
    (errno.EKEYREJECTED, "crypto/asymmetric_keys/verify_pefile.c pefile_digest_pe"),
    (errno.EBADMSG, "crypto/asymmetric_keys/mscode_parser.c, pkcs7_parser.c"),
    (errno.ENOPKG, "crypto/asymmetric_keys/pkcs7_verify.c pkcs7_digest"),
    (errno.ENOKEY, "crypto/asymmetric_keys/pkcs7_trust.c pkcs7_validate_trust_one"),
    (errno.EKEYEXPIRED, "security/keys/keyring.c keyring_search_iterator"),
    (errno.EKEYREVOKED, "security/keys/keyring.c keyring_search_iterator"),
    (errno.EKEYREJECTED, "kernel/kexec_file.c kexec_image_verify_sig: no verify_sig"),
    (errno.EPERM, "kernel/kexec_file.c kimage_validate_signature: security_locked_down"),
    (errno.EINVAL, "kernel/kexec_file.c kimage_file_prepare_segments: no NUL"),
    (errno.ENOEXEC, "kernel/kexec_file.c kexec_image_load_default"),
    (errno.EADDRNOTAVAIL, "kernel/liveupdate/kexec_handover.c kho_locate_mem_hole"),
    (errno.EINVAL, "kernel/kexec_core.c sanity_check_segment_list"),
    (errno.ENOENT, "kernel/kexec_file.c kexec_calculate_store_digests: crypto_alloc_shash, to 6.15"),
]
LOAD_ON = [
    ("x86_64", errno.ENOEXEC, "arch/x86/kernel/kexec-bzimage64.c bzImage64_probe"),
    ("x86_64", errno.EINVAL, "arch/x86/kernel/kexec-bzimage64.c bzImage64_load: cmdline_size"),
    ("x86_64", errno.EOPNOTSUPP, "arch/x86/kernel/machine_kexec_64.c machine_kexec_prepare, 6.18 and 6.19"),
    ("aarch64", errno.EINVAL, "arch/arm64/kernel/kexec_image.c image_probe, image_load"),
    ("aarch64", errno.EBUSY, "arch/arm64/kernel/machine_kexec.c machine_kexec_prepare"),
    ("aarch64", errno.EADDRNOTAVAIL, "arch/arm64/kernel/machine_kexec_file.c load_other_segments: SZ_1G * 32"),
    ("riscv64", errno.EINVAL, "arch/riscv/kernel/kexec_image.c image_probe, image_load"),
    ("riscv64", errno.ENOEXEC, "arch/riscv/kernel/machine_kexec_file.c arch_kexec_apply_relocations_add"),
    ("riscv64", errno.EKEYREJECTED, "arch/riscv/kernel/kexec_image.c image_kexec_ops: no verify_sig"),
    ("s390x", errno.EINVAL, "arch/s390/kernel/machine_kexec_file.c kexec_file_add_components"),
    ("s390x", errno.EKEYREJECTED, "arch/s390/kernel/machine_kexec_file.c s390_verify_sig"),
    ("ppc64le", errno.ENOEXEC, "kernel/kexec_elf.c kexec_elf_probe"),
    ("ppc64le", errno.ETXTBSY, "arch/powerpc/kexec/core_64.c machine_kexec_prepare"),
    ("ppc64le", errno.EINVAL, "arch/powerpc/kexec/elf_64.c elf64_load: of_kexec_alloc_and_setup_fdt"),
    ("ppc64le", errno.EKEYREJECTED, "arch/powerpc/kexec/elf_64.c kexec_elf64_ops: no verify_sig"),
    ("loongarch64", errno.ENOEXEC, "kernel/kexec_elf.c kexec_elf_probe, asked after efi_kexec_probe"),
    ("loongarch64", errno.EINVAL, "arch/loongarch/kernel/machine_kexec_file.c load_other_segments: COMMAND_LINE_SIZE"),
    ("loongarch64", errno.EKEYREJECTED, "arch/loongarch/kernel/kexec_efi.c kexec_efi_ops: no verify_sig"),
]
UNLOAD = [
    (errno.ENOSYS, "kernel/sys_ni.c"),
    (errno.EPERM, "kernel/kexec_file.c kexec_file_load: kexec_load_permitted, which comes before the flags"),
    (errno.EINVAL, "kernel/kexec_file.c kexec_file_load: flags"),
    (errno.EBUSY, "kernel/kexec_file.c kexec_file_load: kexec_trylock"),
]
# Opening what enters and leaves the active phase
DEBUGFS = (Generation.finalize, Generation.finalize_no_abort, Generation.stateless)
OPEN = [
    *((generation, errno.EACCES, "fs/namei.c may_open") for generation in (Generation.sysfs, *DEBUGFS)),
    *((generation, errno.EROFS, "fs/namei.c mnt_want_write") for generation in (Generation.sysfs, *DEBUGFS)),
    *((generation, errno.EPERM, "fs/debugfs/file.c debugfs_locked_down") for generation in DEBUGFS),
    *((generation, errno.ENOENT, "fs/namei.c: debugfs is not mounted") for generation in DEBUGFS),
]
ACTIVATE = [
    *OPEN,
    (Generation.sysfs, errno.EINVAL, "v3 kernel/kexec_kho_out.c active_store: kho_serialize"),
    (Generation.sysfs, errno.ENOMEM, "v3 kernel/kexec_kho_out.c active_store: kho_scratch_len"),
    (Generation.sysfs, errno.ENOENT, "v3 kernel/kexec_kho_out.c kho_abort: sysfs_remove_bin_file"),
    (Generation.finalize, errno.EEXIST, "6.18 kernel/kexec_handover.c kho_out_finalize_set"),
    (Generation.finalize, 3, "6.18 kernel/kexec_handover.c kho_finalize: fdt_*(), -FDT_ERR_NOSPACE"),
    (Generation.finalize, errno.EINVAL, "6.16 kernel/kexec_handover.c kho_preserve_phys"),
    (Generation.finalize, errno.EBUSY, "6.18 kernel/kexec_handover.c kho_finalize: KEXEC_KHO_FINALIZE"),
    (Generation.finalize, errno.ENOMEM, "6.18 kernel/kexec_handover.c kho_mem_serialize"),
    (Generation.finalize_no_abort, errno.EOPNOTSUPP, "6.19 kernel/liveupdate/kexec_handover.c kho_finalize"),
    (Generation.finalize_no_abort, errno.ENOMEM, "6.19 kernel/liveupdate/kexec_handover.c kho_mem_serialize"),
]
# 6.19 and later have no phase to leave: a 0 is EINVAL there, and khod writes none
DEACTIVATE = [
    *(fact for fact in OPEN if fact[0] in (Generation.sysfs, Generation.finalize)),
    (Generation.sysfs, errno.ENOENT, "fs/namei.c"),
    (Generation.sysfs, errno.ENOMEM, "v3 kernel/kexec_kho_out.c active_store: kho_scratch_len, even for a 0"),
    (Generation.finalize, errno.ENOENT, "6.18 kernel/kexec_handover.c kho_out_finalize_set"),
    (Generation.finalize, errno.EBUSY, "6.18 kernel/kexec_handover.c kho_abort: KEXEC_KHO_ABORT"),
    (Generation.finalize, errno.ENOMEM, "6.18 kernel/kexec_handover.c kho_abort: KEXEC_KHO_ABORT"),
    (Generation.finalize, errno.EINVAL, "6.18 kernel/kexec_handover.c kho_abort: KEXEC_KHO_ABORT"),
]
EXECUTE = [
    (errno.EPERM, "kernel/reboot.c reboot: CAP_SYS_BOOT"),
    (errno.EINVAL, "kernel/pid_namespace.c reboot_pid_ns; kernel/kexec_core.c kernel_kexec: no image"),
    (errno.EBUSY, "kernel/kexec_core.c kernel_kexec: kexec_trylock"),
    (errno.ENOSPC, "kernel/liveupdate/luo_session.c luo_session_serialize; luo_file.c luo_file_freeze"),
    (errno.EINVAL, "mm/memfd_luo.c memfd_luo_freeze"),
    (errno.EAGAIN, "6.19 kernel/liveupdate/luo_core.c liveupdate_reboot: kho_finalize"),
    (errno.ENOMEM, "kernel/kexec_core.c kernel_kexec: dpm_suspend_start, with preserve_context"),
]
# /dev/liveupdate
LUO = [
    ("SESSION", errno.EACCES, "fs/namei.c may_open"),
    ("SESSION", errno.EPERM, "fs/namei.c may_open"),
    ("SESSION", errno.EBUSY, "kernel/liveupdate/luo_core.c luo_open"),
    ("SESSION", errno.EIO, "kernel/liveupdate/luo_core.c luo_open: luo_session_deserialize"),
    ("SESSION", errno.ENOTTY, "kernel/liveupdate/luo_core.c luo_ioctl: ENOIOCTLCMD"),
    ("SESSION", errno.EMFILE, "kernel/liveupdate/luo_core.c luo_ioctl_create_session: get_unused_fd_flags"),
    ("SESSION", errno.ENFILE, "kernel/liveupdate/luo_session.c luo_session_getfile: anon_inode_getfile"),
    ("SESSION", errno.ENOMEM, "kernel/liveupdate/luo_session.c luo_session_alloc"),
    ("SESSION", errno.ENOSPC, "kernel/liveupdate/kho_block.c kho_block_add"),
    ("SESSION", errno.EEXIST, "kernel/liveupdate/luo_session.c luo_session_insert"),
    ("SESSION", errno.ENOENT, "kernel/liveupdate/luo_session.c luo_session_retrieve"),
    ("SESSION", errno.EINVAL, "kernel/liveupdate/luo_session.c luo_session_retrieve: retrieved"),
    ("SESSION", errno.ENAMETOOLONG, "khod/abi/liveupdate.py, as uapi/linux/liveupdate.h has room for 63 bytes"),
    ("PRESERVE", errno.ENOTTY, "fs/ioctl.c vfs_ioctl"),
    ("PRESERVE", errno.EINVAL, "kernel/liveupdate/luo_session.c luo_session_ioctl: luo_ioctl_type_valid"),
    ("PRESERVE", errno.EEXIST, "kernel/liveupdate/luo_file.c luo_preserve_file: luo_token_is_used"),
    ("PRESERVE", errno.ENOSPC, "6.19 kernel/liveupdate/luo_file.c luo_preserve_file: LUO_FILE_MAX"),
    ("PRESERVE", errno.EBADF, "kernel/liveupdate/luo_file.c luo_preserve_file: fget"),
    ("PRESERVE", errno.ENOENT, "kernel/liveupdate/luo_file.c luo_preserve_file: can_preserve"),
    ("PRESERVE", errno.EBUSY, "kernel/liveupdate/luo_file.c luo_preserve_file: xa_insert"),
    ("PRESERVE", errno.ENODEV, "kernel/liveupdate/luo_flb.c luo_flb_file_preserve_one"),
    ("PRESERVE", errno.ENOMEM, "kernel/liveupdate/luo_file.c luo_preserve_file"),
    ("PRESERVE", errno.EOPNOTSUPP, "mm/memfd_luo.c memfd_luo_preserve: MEMFD_LUO_ALL_SEALS"),
    ("PRESERVE", errno.EFBIG, "mm/memfd_luo.c memfd_luo_preserve: UINT_MAX"),
    ("RETRIEVE", errno.ENOTTY, "fs/ioctl.c vfs_ioctl"),
    ("RETRIEVE", errno.EMFILE, "kernel/liveupdate/luo_session.c luo_session_retrieve_fd: get_unused_fd_flags"),
    ("RETRIEVE", errno.ENOENT, "kernel/liveupdate/luo_file.c luo_retrieve_file"),
    ("RETRIEVE", errno.EINVAL, "mm/memfd_luo.c memfd_luo_retrieve: kho_restore_vmalloc"),
    ("RETRIEVE", errno.EOPNOTSUPP, "mm/memfd_luo.c memfd_luo_retrieve: MEMFD_LUO_ALL_SEALS"),
    ("RETRIEVE", errno.ENFILE, "mm/memfd_luo.c memfd_luo_retrieve: memfd_alloc_file"),
    ("RETRIEVE", errno.EIO, "mm/memfd_luo.c memfd_luo_retrieve_folios: kho_restore_folio"),
    ("RETRIEVE", errno.ENOMEM, "mm/memfd_luo.c memfd_luo_retrieve_folios: mem_cgroup_charge"),
    ("RETRIEVE", errno.EEXIST, "mm/memfd_luo.c memfd_luo_retrieve_folios: shmem_add_to_page_cache"),
    ("RETRIEVE", errno.ENOSPC, "mm/memfd_luo.c memfd_luo_retrieve_folios: shmem_inode_acct_blocks"),
    ("FINISH", errno.ENOTTY, "fs/ioctl.c vfs_ioctl"),
    ("FINISH", errno.EINVAL, "kernel/liveupdate/luo_session.c luo_session_ioctl: luo_ioctl_type_valid"),
    ("FINISH", errno.EBUSY, "kernel/liveupdate/luo_file.c luo_file_can_finish_one"),
]
LUO_TABLES = {"SESSION": SESSION, "PRESERVE": PRESERVE, "RETRIEVE": RETRIEVE, "FINISH": FINISH}


def refusal(number: int, call: str = "kexec_file_load(7, 8)") -> OSError:
    return OSError(number, os.strerror(number), call)


def own(what: str, remedy: str, number: int) -> None:
    """A sentence says what the errno means here, and what to do that is more than to look."""
    name = errno.errorcode.get(number, str(number))
    assert re.search(rf": {name} \({re.escape(os.strerror(number))}\), \w[^\n]{{10,}}", what), what
    assert remedy
    assert remedy != LOG
    assert not what.endswith("."), "what is a clause; sentence() ends it"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("number", "source"), LOAD)
def test_every_errno_of_a_load(machine: str, number: int, source: str) -> None:
    error = explain_errno(Step.load, refusal(number), machine=machine)
    own(error.what, error.remedy, number)
    assert error.where == "kexec_file_load(7, 8)", source


@pytest.mark.parametrize(("machine", "number", "source"), LOAD_ON)
def test_every_errno_of_a_load_that_an_architecture_has_for_itself(machine: str, number: int, source: str) -> None:
    error = explain_errno(Step.load, refusal(number), machine=machine)
    own(error.what, error.remedy, number)
    if (machine, number) != ("x86_64", errno.EINVAL):  # cmdline_size: the common sentence names it
        assert error.what != explain_errno(Step.load, refusal(number), machine="another").what, source


def test_without_a_machine_it_is_this_one() -> None:
    here = explain_errno(Step.load, refusal(errno.ENOEXEC))
    assert here.what == explain_errno(Step.load, refusal(errno.ENOEXEC), machine=platform.machine()).what


@pytest.mark.parametrize(("number", "source"), UNLOAD)
def test_every_errno_of_an_unload(number: int, source: str) -> None:
    error = explain_undo(Step.load, refusal(number))
    own(error.what, error.remedy, number)
    assert error.what.startswith("Unloading the image failed"), source


@pytest.mark.parametrize(("generation", "number", "source"), ACTIVATE)
def test_every_errno_of_an_activation(generation: Generation, number: int, source: str) -> None:
    for said in (generation, Generation.none):
        error = explain_errno(Step.activate, refusal(number), generation=said)
        own(error.what, error.remedy, number)
        assert error.what.startswith("The kernel did not enter the active phase"), source


@pytest.mark.parametrize(("generation", "number", "source"), DEACTIVATE)
def test_every_errno_of_a_deactivation(generation: Generation, number: int, source: str) -> None:
    for said in (generation, Generation.none):
        error = explain_undo(Step.activate, refusal(number), generation=said)
        own(error.what, error.remedy, number)
        assert error.what.startswith("Leaving the active phase failed"), source


@pytest.mark.parametrize(("number", "source"), EXECUTE)
def test_every_errno_of_the_jump(number: int, source: str) -> None:
    error = explain_errno(Step.execute, refusal(number, "reboot(0x45584543)"))
    own(error.what, error.remedy, number)
    assert error.where == "reboot(0x45584543)", source


@pytest.mark.parametrize(("table", "number", "source"), LUO)
def test_every_errno_of_luo(table: str, number: int, source: str) -> None:
    said = put_errno("It failed", LUO_TABLES[table], refusal(number, "ioctl"))
    own(said["what"], said["remedy"], number)
    assert said["where"] == "ioctl", source


def test_no_errno_is_explained_that_no_source_returns() -> None:
    def unknown(table: Errnos, facts: set[int]) -> set[int]:
        return table.keys() - facts

    assert not unknown(errnos.LOAD, {number for number, _ in LOAD})
    assert not unknown(errnos.UNLOAD, {number for number, _ in UNLOAD})
    assert not unknown(errnos.EXECUTE, {number for number, _ in EXECUTE})
    for machine, table in errnos.LOAD_ON.items():
        assert machine in MACHINES
        assert not unknown(table, {number for name, number, _ in LOAD_ON if name == machine}), machine
    for tables, facts in ((errnos.ACTIVATE, ACTIVATE), (errnos.DEACTIVATE, DEACTIVATE)):
        for generation, table in tables.items():
            known = {number for at, number, _ in facts if generation in (at, Generation.none)}
            assert not unknown(table, known), generation
    for name, table in LUO_TABLES.items():
        assert not unknown(table, {number for at, number, _ in LUO if at == name}), name


def test_one_errno_means_another_thing_in_each_generation() -> None:
    meanings = {
        explain_errno(Step.activate, refusal(errno.ENOMEM), generation=generation).what
        for generation in (Generation.sysfs, Generation.finalize, Generation.stateless)
    }
    assert len(meanings) == 3
    scratch = explain_errno(Step.activate, refusal(errno.ENOMEM), generation=Generation.sysfs)
    assert "scratch" in scratch.what
    assert "kho_scratch=" in scratch.remedy
    for machine in MACHINES:  # which generation is running the loader's errno does not say
        remedy = explain_errno(Step.load, refusal(errno.EADDRNOTAVAIL), machine=machine).remedy
        assert "kho_scratch=" in remedy
        assert "kho_bootmem=" in remedy


def test_v3_gives_one_errno_for_all_so_the_remedy_reads_the_log_s_number() -> None:
    remedy = explain_errno(Step.activate, refusal(errno.EINVAL), generation=Generation.sysfs).remedy
    for number in ("-1 ", "-12 ", "-3 "):
        assert number in remedy


@pytest.mark.parametrize("step", [Step.activate, Step.load, Step.execute])
def test_an_errno_nobody_foresaw_still_makes_a_sentence(step: Step) -> None:
    error = explain_errno(step, refusal(errno.EXDEV, "the call"))
    assert error_sentence(error) == f"{error.what} (the call). {LOG}"
    assert error.what.endswith(": EXDEV (Invalid cross-device link)")
    assert "journalctl" in LOG


@pytest.mark.parametrize("number", [4095, 0])
def test_a_number_that_is_no_errno_makes_a_sentence_too(number: int) -> None:
    assert str(number) in explain_undo(Step.load, OSError(number, "", None)).what


def test_the_kernel_s_own_line_is_quoted() -> None:
    quoted = "PEFILE: Digest mismatch"
    error = explain_errno(Step.load, refusal(errno.EKEYREJECTED), quoted, machine="x86_64")
    assert error.what.startswith("The kernel did not take the image: EKEYREJECTED (Key was rejected by service), ")
    assert error.what.endswith("; the kernel log says: PEFILE: Digest mismatch")


def test_a_quoted_line_s_full_stop_does_not_end_the_sentence_twice() -> None:
    error = explain_undo(Step.activate, refusal(errno.EBUSY), "KHO: it failed.", generation=Generation.finalize)
    assert error.what.endswith("says: KHO: it failed")
    assert ".." not in error_sentence(error)
    assert "says" in explain_errno(Step.execute, refusal(errno.EXDEV), "luo_file: Freeze failed").what


@pytest.mark.parametrize("module", [errnos, luo], ids=lambda module: module.__name__)
def test_no_table_has_an_errno_twice(module: object) -> None:
    """In a dict the later line replaces the earlier one without a word."""
    tables = [
        node
        for node in ast.walk(ast.parse(Path(str(vars(module)["__file__"])).read_text()))
        if isinstance(node, ast.Dict)
    ]
    assert tables
    for table in tables:
        keys = [ast.unparse(key) for key in table.keys if key is not None]
        assert len(set(keys)) == len(keys), [key for key in keys if keys.count(key) > 1]
