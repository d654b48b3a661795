# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel in memory is held to the one with files, call by call."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khod.kernel.kexec import LOAD_DISABLED, LOAD_LIMIT
from khod.kernel.sysfs import IN_DT, KHO
from khod.simulated.kernel import Rebooted, SimulatedKernel, build_image
from tests.model.kernel import CMDLINE, V3, MemoryKernel

FILES = (
    f"{KHO}/active",
    f"{KHO}/dt",
    f"{KHO}/dt_max",
    f"{KHO}/scratch_len",
    f"{KHO}/nothing",
    IN_DT,
    "/proc/cmdline",
    "/proc/sys/kernel/osrelease",
    "/sys/kernel/kexec_loaded",
    LOAD_DISABLED,
    LOAD_LIMIT,
)
DATA = (b"1\n", b"0\n", b"y", b"off", b"on\n", b"x", b"", b"0x100\n", b"010\n", b"5\n")
LINES = (b"root=/dev/sim\0", b"root=/dev/sim khod.run=abc\0", b"no end", b"x" * 3000 + b"\0")
LOADS = (("image", 4), ("image", 4), ("text", 4), ("empty", 4), ("", 1))

CALLS = st.one_of(
    st.tuples(st.just("read"), st.sampled_from(FILES)),
    st.tuples(st.just("exists"), st.sampled_from((*FILES, KHO, "/sys/kernel/debug"))),
    st.tuples(st.just("write"), st.sampled_from((*FILES[:3], LOAD_DISABLED, LOAD_LIMIT)), st.sampled_from(DATA)),
    st.tuples(st.just("write"), st.just(FILES[0]), st.sampled_from(DATA)),
    st.tuples(st.just("load"), st.sampled_from(LOADS), st.sampled_from(LINES)),
    st.tuples(st.just("reboot")),
)


def outcome(call: Callable[[], object]) -> object:
    """What a call gives, or its errno."""
    try:
        return call()
    except OSError as error:
        return f"errno {error.errno}"
    except ValueError:
        return "no number"


def jump(kernel: MemoryKernel) -> str:
    """What `SimulatedKernel.reboot_kexec` does; the errno where it comes back."""
    loaded = kernel.image
    if loaded is None:
        return "errno 22"
    kernel.boot(loaded.kind, loaded.cmdline, kernel.carried(loaded))
    return "rebooted"


def simulated_jump(kernel: SimulatedKernel) -> str:
    with suppress(Rebooted):
        return str(outcome(kernel.reboot_kexec))
    return "rebooted"


@given(st.lists(CALLS, max_size=25))
@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_every_call_has_the_outcome_it_has_in_the_simulated_kernel(calls: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name, content in (("image", build_image()), ("text", b"no kernel" * 100), ("empty", b"")):
            (root / name).write_bytes(content)
        files, memory = SimulatedKernel(root / "kernel"), MemoryKernel()
        files.host_path("/proc/cmdline").write_text(f"{CMDLINE[V3]}\n")  # the model's has LUO, which no real v3 has
        for call in calls:
            assert _one(files, memory, root, str(call[0]), list(call[1:])), call


def _one(files: SimulatedKernel, memory: MemoryKernel, root: Path, name: str, arguments: list[object]) -> bool:
    match name, arguments:
        case "read", [str(path)]:
            return outcome(lambda: files.read_file(path)) == outcome(lambda: memory.read(path))
        case "exists", [str(path)]:
            return files.path_exists(path) == memory.exists(path)
        case "write", [str(path), bytes(data)]:
            return outcome(lambda: files.write_file(path, data)) == outcome(lambda: memory.write(path, data))
        case "load", [(str(kernel), int(flags)), bytes(line)]:
            fd = os.open(root / kernel, os.O_RDONLY) if kernel else -1
            try:
                simulated = outcome(lambda: files.kexec_file_load(fd, -1, line, flags))
                return simulated == outcome(lambda: memory.load(fd, -1, line, flags))
            finally:
                if kernel:
                    os.close(fd)
        case _:
            return simulated_jump(files) == jump(memory)
