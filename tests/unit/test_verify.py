# SPDX-License-Identifier: LGPL-2.1-or-later
"""What arrived against what left: nothing but KHO's own word counts."""

import pytest

from khod.handover import verify
from khod.kernel.protocol import Tree
from khod.model import Generation, Verdict
from khod.simulated.kernel import build_tree

V3, MAINLINE = Generation.sysfs, Generation.stateless
LEFT = Tree(b"root", {"memblock": b"mm", "kho_test": b"tt", "LUO": b"l1", "kexec-metadata": b"c1"})


def compare(
    before: Tree | None, arrived: Tree | None, was: Generation = MAINLINE, now: Generation | None = None
) -> Verdict:
    return verify.compare_trees(before, arrived, was, now or was)


def test_all_that_left_arrived() -> None:
    verdict = compare(LEFT, LEFT)
    assert verdict.reason == ""
    assert (verdict.arrived, verdict.missing, verdict.changed) == (sorted(LEFT.blobs), [], [])


def test_a_v3_tree_is_held_byte_for_byte() -> None:
    tree = Tree(build_tree(4))
    assert compare(tree, tree, V3) == Verdict(["ftrace"], [], [], "")
    verdict = compare(tree, Tree(build_tree(3)), V3)
    assert verdict.reason
    assert (verdict.arrived, verdict.changed) == ([], ["ftrace"])


@pytest.mark.parametrize("generation", list(Generation))
@pytest.mark.parametrize("before", [LEFT, Tree(build_tree(2)), Tree(b""), None])
def test_nothing_handed_over_is_never_a_success(generation: Generation, before: Tree | None) -> None:
    """6.19.11 to 7.3.4 keeps old bytes in memory by luck, and KHO was refused."""
    verdict = compare(before, None, generation)
    assert verdict.reason
    assert verdict.arrived == []


def test_nothing_handed_over_names_what_is_missing() -> None:
    assert compare(LEFT, None).missing == sorted(LEFT.blobs)
    assert compare(Tree(build_tree(2)), None, V3).missing == ["ftrace"]


def test_one_producer_s_state_that_did_not_arrive_is_named() -> None:
    """After an abort on 6.18 kho_test's pages are forgotten, and no error anywhere."""
    verdict = compare(LEFT, Tree(b"root", {name: blob for name, blob in LEFT.blobs.items() if name != "kho_test"}))
    assert verdict.missing == ["kho_test"]
    assert "kho_test" in verdict.reason
    assert "kho_test" not in verdict.arrived


def test_one_producer_s_state_that_arrived_changed_is_named_and_did_not_arrive() -> None:
    verdict = compare(LEFT, Tree(b"root", LEFT.blobs | {"memblock": b"xx"}))
    assert (verdict.missing, verdict.changed) == ([], ["memblock"])
    assert "memblock" in verdict.reason
    assert "memblock" not in verdict.arrived


@pytest.mark.parametrize("name", ["kexec-metadata", "LUO"])
def test_what_the_kernel_itself_rewrites_may_change_and_must_arrive(name: str) -> None:
    assert compare(LEFT, Tree(b"root", LEFT.blobs | {name: b"2"})).reason == ""
    assert compare(LEFT, Tree(b"root", {key: blob for key, blob in LEFT.blobs.items() if key != name})).missing == [
        name
    ]


def test_more_than_left_is_no_fault() -> None:
    verdict = compare(LEFT, Tree(b"root", LEFT.blobs | {"new": b"n"}))
    assert verdict.reason == ""
    assert "new" in verdict.arrived


def test_the_root_of_mainline_kho_may_differ() -> None:
    """It holds physical addresses and grows while subtrees are added."""
    assert compare(LEFT, Tree(b"another root", LEFT.blobs)).reason == ""


def test_without_a_snapshot_nothing_is_proved() -> None:
    verdict = compare(None, LEFT)
    assert verdict.reason
    assert verdict.arrived == sorted(LEFT.blobs)


def test_another_layout_on_the_other_side_is_told() -> None:
    verdict = compare(LEFT, LEFT, Generation.sysfs, Generation.stateless)
    assert "sysfs" in verdict.reason
    assert "stateless" in verdict.reason


def test_another_way_to_drive_the_same_layout_is_no_finding() -> None:
    """6.18.15 to 6.19.11 and back, seen on the real kernels: the state arrives whole."""
    assert compare(LEFT, LEFT, Generation.finalize, Generation.finalize_no_abort).reason == ""


def test_a_v3_tree_that_arrived_damaged_is_not_taken_for_whole() -> None:
    tree = build_tree(4)
    verdict = compare(Tree(tree), Tree(tree[: len(tree) // 2]), V3)
    assert verdict.reason
    assert "ftrace" not in verdict.arrived
    assert verdict.missing == ["ftrace"]
