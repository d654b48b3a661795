# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever answers at the QMP socket that a kept machine's file names: this process here, which is no QEMU."""

import json
import os
from pathlib import Path

import pytest

from khod.vm.frozen import close_files
from khod.vm.kept import KeptProcess
from khod.vm.monitor import VmError
from khod.vm.process import create_memory, have_same_files
from khod.vm.settings import VmSettings
from tests.unit.test_qemu import vm

MIB = 1 << 20


def kept_process(path: Path) -> KeptProcess:
    return KeptProcess(VmSettings("one", (), 0, qmp=str(path), restart=("one.service",)))


def answer(memory: object) -> bytes:
    return json.dumps({"return": memory, "id": "NUMBER"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ([], "it has no memory backend"),
        (7, "it has no memory backend"),
        (["ram"], "it has no memory backend"),
        ([{"id": "ram"}], "names no size"),
        ([{"id": "ram", "size": "much"}], "names no size"),
        ([{"id": "ram", "size": 3 * MIB + 4096}], "the RAM ram is not a memfd"),
        ([{"id": "r\x1b[2J", "size": 3 * MIB + 4096}], "is not a memfd"),
        ([{"id": "a", "size": 5 * MIB}, {"id": "b", "size": 5 * MIB}], "2 files of QEMU's have"),
    ],
)
async def test_a_process_without_a_guest_s_memory_is_refused(tmp_path: Path, memory: object, words: str) -> None:
    file = create_memory(5 * MIB)
    try:
        async with vm(tmp_path) as server:
            server.instead["query-memdev"] = answer(memory)
            found = kept_process(server.path)
            with pytest.raises(VmError, match=words) as raised:
                await found.find()
            assert str(raised.value).isprintable()
    finally:
        os.close(file)


async def test_a_process_with_such_a_memory_is_taken_for_it(tmp_path: Path) -> None:
    """Its number is that of the process which listens; its command is not asked."""
    file = create_memory(5 * MIB)
    try:
        async with vm(tmp_path) as server:
            server.instead["query-memdev"] = answer([{"id": "ram", "size": 5 * MIB}])
            found = kept_process(server.path)
            assert await found.find()
            assert found.pid == os.getpid()
            assert have_same_files(found.memory, {"ram": file})
            close_files(found.memory)
    finally:
        os.close(file)


async def test_nothing_at_the_socket_is_a_machine_that_is_switched_off(tmp_path: Path) -> None:
    assert not await kept_process(tmp_path / "nowhere").find()
