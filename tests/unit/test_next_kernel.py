# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking about the next kernel: khoctl and khod as processes, on the simulated kernel; nothing is touched."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.errors import Exit
from tests.unit.images import CPIO, bzimage, code, cpio
from tests.unit.khods import Khod


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[Khod]:
    """One khod, whose kernel is as untouched after the test as before it."""
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(CPIO)
    made = Khod(tmp_path)
    yield made
    assert not made.active
    assert not made.loaded
    made.close()


def results(khod: Khod, *words: str | Path, code: Exit) -> dict[str, dict[str, str]]:
    answer = khod.khoctl("check", "--json", *words)
    assert answer.code == code, answer.err
    return {check["name"]: check for check in json.loads(answer.out)}


def test_a_good_image_passes_every_check(khod: Khod) -> None:
    found = results(khod, "--image", khod.directory / "vmlinuz", "--initrd", khod.directory / "initrd", code=Exit.done)
    assert {"image", "initrd", "cmdline", "formats", "fit", "signature"} <= found.keys()
    assert {check["result"] for check in found.values()} <= {"passed", "skipped", "warn"}
    assert "6.8.0-next" in found["image"]["evidence"]
    assert "kho-v1" in found["formats"]["evidence"]


@pytest.mark.parametrize("extra", ["kho-v4", "kho-v1"])
def test_another_format_is_refused_and_named(khod: Khod, extra: str) -> None:
    """Of kho-v1 without dt_max: mainline's, which is another layout than v3's."""
    image = khod.directory / "other"
    image.write_bytes(bzimage(contents=code(formats=(extra,), marks=())))
    found = results(khod, "--image", image, code=Exit.refused)
    assert found["formats"]["result"] == "fail"
    assert extra in found["formats"]["evidence"]
    refused = khod.khoctl("kexec", "--image", image)
    assert refused.code == Exit.refused
    assert "check formats" in refused.err


def test_a_root_that_only_an_initrd_s_programs_find_is_refused_without_them(khod: Khod) -> None:
    """VFS: Cannot open root device "UUID=...": a panic, with no initrd and with one that has no init in it."""
    image, microcode = khod.directory / "vmlinuz", khod.directory / "microcode"
    microcode.write_bytes(cpio({"kernel/x86/microcode/GenuineIntel.bin": b"x"}))
    for words in ((), ("--initrd", microcode)):
        for root, result, exit_code in (("UUID=1", "fail", Exit.refused), ("/dev/vda1", "passed", Exit.done)):
            found = results(
                khod, "--image", image, *words, "--cmdline", f"root={root} kho_scratch=512M", code=exit_code
            )
            assert found["initrd"]["result"] == ("warn" if words and result == "passed" else result)
            assert (f"programs find root={root}" in found["initrd"]["evidence"]) is (result == "fail")


def test_a_refusal_can_be_overridden(khod: Khod) -> None:
    image = khod.directory / "other"
    image.write_bytes(bzimage(contents=code(formats=("kho-v4",))))
    (khod.directory / "root/etc/kho/khod.toml").write_text('[checks]\nformats = "warn"\nfit = "off"\n')
    khod.process.send_signal(signal.SIGHUP)
    khod.word("RELOADING=1")
    khod.word("READY=1")
    found = results(khod, "--image", image, code=Exit.done)
    assert found["formats"]["result"] == "warn"
    assert found["fit"]["result"] == "skipped"
    assert "checks.fit" in found["fit"]["evidence"]


def test_a_plan_has_each_step_with_its_undo(khod: Khod) -> None:
    answer = khod.khoctl(
        "plan", "--json", "--image", khod.directory / "vmlinuz", "--append", "single", "--remove", "rw"
    )
    assert answer.code == Exit.done, answer.err
    plan = json.loads(answer.out)
    assert [step["step"] for step in plan["steps"]] == ["prepare", "freeze", "activate", "load", "execute", "verify"]
    assert all(step["does"] and step["undo"] for step in plan["steps"])
    assert {word["text"]: word["fate"] for word in plan["words"] if word["fate"] != "kept"} == {
        "single": "added",
        "rw": "removed",
    }
    assert plan["steps"][2]["undo"] == "write 0 to /sys/kernel/kho/active"
    page = khod.khoctl("plan")
    assert "undo      KEXEC_FILE_UNLOAD" in page.out


def test_two_ways_to_name_a_kernel_are_one_too_many(khod: Khod) -> None:
    for words in (("--image", "x", "--kernel", "6.12"), ("--default", "--entry", "x")):
        answer = khod.khoctl("check", *words)
        assert answer.code == Exit.usage
        assert all(word in answer.err for word in words if word.startswith("--"))
