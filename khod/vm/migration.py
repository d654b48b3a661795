# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way of a VM through the host's kexec: QEMU's device state into a file, and back into another QEMU.

The guest's RAM is a file that QEMU maps shared (a memfd), which the kernel carries. With the migration capability
`x-ignore-shared` QEMU's stream has everything else: about 150 KB for a small guest. The stream goes through a pipe,
given to QEMU by `getfd`: that works with every version (11.1 refuses a plain file at `fd:`, and 7.2 has no `file:`).
Seen with QEMU 7.2 and 11.1: after `migrate` the VM is `postmigrate`, from which `cont` takes it back.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from khod.text import join_names, one_line
from khod.vm.monitor import PAUSED_STATE, Monitor, VmError

T = TypeVar("T")
CAPABILITY = "x-ignore-shared"
STREAM = "khod-state"
"""The name of the pipe in QEMU."""
CHUNK_BYTES = 1 << 18
NAMED_FILES_ONLY = (8, 1)
"""The version of QEMU from which on CAPABILITY is about memory-backend-file alone."""
MAX_STATE_BYTES = 1 << 30
"""More than any device state has."""
PIPE_BYTES = 1 << 20
"""A small guest's state fits: QEMU need not wait for this process. Root may have a pipe of this size, see pipe(7)."""
STREAM_SECONDS = 0.1
"""Between two questions while the stream is under way."""
POLL_SECONDS = 0.001
"""Between two questions after the stream's end, which is at most a few milliseconds before that of the migration."""
ENDED_STATES = ("completed", "failed", "cancelled")
SAVED_STATE = "postmigrate"
INCOMING_STATE = "inmigrate"


async def check_portable(vm: Monitor) -> int:
    """Prepare the migration; raise VmError with every reason why it cannot be, as far as QEMU says them.

    Returns how many bytes of the guest's RAM will be in the stream: none where QEMU leaves it out. From 8.1 on it
    leaves out only what is in a named file (memory-backend-file): with memory-backend-memfd the stream has the RAM too,
    and both sides take longer (seen with 11.1: "block pc.ram should not be migrated").
    """
    memory = await _query_memory(vm)
    problems = [
        *_list_private_memory(memory),
        *await _list_block_jobs(vm),
        *_blocked_reasons(await vm.execute_command("query-migrate")),
    ]
    if problems:
        raise VmError(f"it cannot be handed over: {'; '.join(problems)}")
    is_apart = await _keeps_memory_apart(vm, memory)
    await _ignore_shared_memory(vm, wanted=is_apart)
    return 0 if is_apart else sum(int(each["size"]) for each in memory)


async def list_memory(vm: Monitor) -> dict[str, int]:
    """Return the memory backends of a VM: their size in bytes, by name."""
    return {str(each.get("id", "")): int(each["size"]) for each in await _query_memory(vm)}


async def list_disks(vm: Monitor) -> list[Path]:
    """Return the files of the disks that the VM writes to."""
    drives = [drive.get("inserted") for drive in _mappings(await vm.execute_command("query-block"))]
    files = [drive.get("file") for drive in drives if isinstance(drive, dict) and not drive.get("ro")]
    return [Path(file) for file in files if isinstance(file, str) and file.startswith("/")]


async def sync_disks(disks: Sequence[Path]) -> None:
    """Write what the host's page cache has of a VM's disks: the freeze then finds little to write.

    A disk that this process cannot open is left out; QEMU itself flushes every disk when it stops.
    """
    for disk in disks:
        await asyncio.to_thread(_sync_file, disk)


async def save_state(vm: Monitor, file: int, ram_bytes: int = 0) -> None:
    """Stop the VM and write its state to `file`, an empty memfd; `ram_bytes` is what `check_portable` returned.

    The VM is `postmigrate` after that, and `continue_guest` takes it back. After a VmError it may be stopped.
    """
    await _ignore_shared_memory(vm, wanted=not ram_bytes)  # once more: QEMU may have another client
    await vm.execute_command("stop")
    await _require_state(vm, {PAUSED_STATE, "suspended"}, "asked to pause")
    reader, writer = _open_pipe()
    copying = asyncio.ensure_future(_copy_stream(reader, file, MAX_STATE_BYTES + ram_bytes))
    try:
        await _give_stream(vm, writer)
        await vm.execute_command("migrate", uri=f"fd:{STREAM}")
        await _wait_migrated(vm, copying)
        await copying
    finally:
        copying.cancel()
    await _require_state(vm, {SAVED_STATE}, "asked to save its state")


async def load_state(vm: Monitor, file: int, *, is_memory_apart: bool = True) -> None:
    """Load the state in `file` into a QEMU that was started with `-incoming defer`; it is paused after that.

    QEMU announces the guest's network cards by itself then, for a second (RARP; seen with 7.2).
    `is_memory_apart` says that the RAM is not in the stream.
    """
    await _require_state(vm, {INCOMING_STATE}, "started to take a state")
    await _ignore_shared_memory(vm, wanted=is_memory_apart)
    reader, writer = _open_pipe()
    feeding = asyncio.ensure_future(_feed_stream(file, writer))
    try:
        await _give_stream(vm, reader)
        await vm.execute_command("migrate-incoming", uri=f"fd:{STREAM}")
        await _wait_migrated(vm, feeding)
    finally:
        feeding.cancel()
    await _require_state(vm, {PAUSED_STATE, "suspended"}, "given its state")


async def end_migration(vm: Monitor) -> None:
    """Have QEMU end a migration that was called off: until then it refuses to continue the guest."""
    asked = False
    while True:
        answer = await vm.execute_command("query-migrate")
        status = answer.get("status") if isinstance(answer, dict) else None
        if status is None or status in ("none", *ENDED_STATES):
            return
        if not asked:
            await vm.execute_command("migrate_cancel")
            asked = True
        await asyncio.sleep(POLL_SECONDS)


async def continue_guest(vm: Monitor) -> None:
    """Let the guest run on, from a pause, a saved state or a loaded one; VmError if it does not run then."""
    await vm.go_on(only_paused=False)


async def _query_memory(vm: Monitor) -> list[dict[str, Any]]:
    found = _mappings(await vm.execute_command("query-memdev"))
    if not found:
        raise VmError("it has no memory backend: its RAM is not a file (-object memory-backend-memfd,share=on)")
    if not all(isinstance(each.get("size"), int) for each in found):
        raise VmError("its answer to `query-memdev` names no size")
    return found


def _list_private_memory(memory: Sequence[Mapping[str, Any]]) -> list[str]:
    private = [str(each.get("id", "?")) for each in memory if each.get("share") is not True]
    return [f"the RAM in {join_names(private)} is not shared (share=on)"] if private else []


async def _list_block_jobs(vm: Monitor) -> list[str]:
    jobs = _mappings(await vm.execute_command("query-block-jobs"))
    return (
        [f"the block job {join_names([one_line(str(job.get('device'))) for job in jobs])} is under way"] if jobs else []
    )


def _blocked_reasons(answer: Any) -> list[str]:
    """Return what blocks a migration (`blocked-reasons`, from QEMU 6.0 on)."""
    reasons = answer.get("blocked-reasons", []) if isinstance(answer, dict) else []
    return [one_line(str(reason)).removesuffix(".") for reason in reasons]


async def _keeps_memory_apart(vm: Monitor, memory: Sequence[Mapping[str, Any]]) -> bool:
    answer = await vm.execute_command("query-version")
    version = answer.get("qemu", {}) if isinstance(answer, dict) else {}
    if (version.get("major", 0), version.get("minor", 0)) < NAMED_FILES_ONLY:
        return True
    paths = [f"/objects/{each['id']}" for each in memory]
    kinds = [await vm.execute_command("qom-get", path=path, property="type") for path in paths]
    return all(kind == "memory-backend-file" for kind in kinds)


async def _ignore_shared_memory(vm: Monitor, *, wanted: bool) -> None:
    capability = {"capability": CAPABILITY, "state": wanted}
    await vm.execute_command("migrate-set-capabilities", capabilities=[capability])


async def _require_state(vm: Monitor, wanted: set[str], what: str) -> None:
    if (state := await vm.run_state()) not in wanted:
        raise VmError(f"{what}, it is `{state}`")


async def _give_stream(vm: Monitor, fd: int) -> None:
    try:
        await vm.give_fd(fd, STREAM)
    finally:
        os.close(fd)


async def _wait_migrated(vm: Monitor, stream: "asyncio.Future[Any]") -> None:
    """Return when QEMU has finished; it is asked at the stream's end, which comes also when the migration fails."""
    while True:
        await asyncio.wait({stream}, timeout=STREAM_SECONDS)
        answer = await vm.execute_command("query-migrate")
        found = answer if isinstance(answer, dict) else {}
        status = found.get("status")
        if status == "completed":
            return
        if status in ENDED_STATES:
            raise VmError(
                f"QEMU's migration ended as `{status}`: {one_line(str(found.get('error-desc', 'no reason')))}"
            )
        if stream.done():
            await asyncio.sleep(POLL_SECONDS)


def _open_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    with suppress(OSError):  # the limit of pipes is reached: a smaller one does it too
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


async def _copy_stream(reader: int, file: int, most: int) -> None:
    """Copy until every writer has closed the pipe, `most` bytes at most."""
    loop, size = asyncio.get_running_loop(), 0
    os.set_blocking(reader, False)
    try:
        while chunk := await _when_ready(
            loop.add_reader, loop.remove_reader, reader, lambda: os.read(reader, CHUNK_BYTES)
        ):
            size += len(chunk)
            if size > most:
                raise VmError(f"its state has more than {most} bytes")
            view = memoryview(chunk)
            while view:
                view = view[os.write(file, view) :]
    finally:
        os.close(reader)


async def _feed_stream(file: int, writer: int) -> None:
    loop, offset = asyncio.get_running_loop(), 0
    os.set_blocking(writer, False)
    try:
        while chunk := os.pread(file, CHUNK_BYTES, offset):
            write = partial(os.write, writer, chunk)
            offset += await _when_ready(loop.add_writer, loop.remove_writer, writer, write)
    except BrokenPipeError:  # QEMU has read enough, or refuses: its answer says which
        return
    finally:
        os.close(writer)


async def _when_ready(
    add: Callable[[int, Callable[[], None]], object], remove: Callable[[int], bool], fd: int, function: Callable[[], T]
) -> T:
    """Return what `function` does with a descriptor, once it no longer blocks."""
    while True:
        try:
            return function()
        except BlockingIOError:
            ready = asyncio.Event()
            add(fd, ready.set)
            try:
                await ready.wait()
            finally:
                remove(fd)


def _sync_file(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return
    try:
        os.fdatasync(fd)
    except OSError:
        return  # a character device
    finally:
        os.close(fd)


def _mappings(answer: Any) -> list[dict[str, Any]]:
    return [each for each in answer if isinstance(each, dict)] if isinstance(answer, list) else []
