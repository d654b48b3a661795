# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every malformed tree, image and boot entry ends in an error of ours: no traceback, no hang, memory bounded."""

import functools
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from khod.errors import Exit
from tests.budget import PROOF, repetitions
from tests.fuzz import corpus
from tests.fuzz.kept import ENDINGS
from tests.fuzz.run import QUOTED, Report, start
from tests.unit.khods import REPOSITORY

CASES = {
    "trees": repetitions(52_000, test=10_000),
    "images": repetitions(52_000, test=10_000),
    "entries": repetitions(5_000, test=2_000),
}
"""In `make proof` more than 100,000 trees and images; `python -m tests.fuzz` runs any number."""
TOGETHER = min(os.cpu_count() or 1, 4)
READ = 0.05
"""Of all cases: damage that is found at once, in all of them, would say nothing of what lies deep."""
# What no case says: it takes more nodes, bytes or layers than a case has. Each has a test in test_bombs.py, or is kept.
LARGE = (
    *(
        "The tree has more than ",
        "The names and paths of the tree",
        "There are more than ",
        "The initrd has more than ",
    ),
    "More than ",
)
# What only a file that grows, cannot be read, or finds no memory says: there is none among the cases.
NO_CASE = ("The {role} ", "There is no memory for it", "Its copy in memory ", "The image is a {header.format}")
FAILURES = {
    1: "IndexError: index out of range",
    2: "more than 0.2 s of processor time",
    3: "SIGSEGV",
    4: "MemoryError",
    5: "left a descriptor open",
    6: "memory was refused",
    7: "an error that says nothing",
    8: "RecursionError",
}


@functools.cache
def came_to(kind: str) -> Report:
    """The run of a kind, in processes side by side."""
    whole = Report(kind)
    for run in [start(kind, range(first, CASES[kind], TOGETHER)) for first in range(TOGETHER)]:
        whole.add(run.report())
    print(whole)
    return whole


@pytest.mark.parametrize("kind", CASES)
def test_every_case_ends_in_an_error_of_ours_or_is_read(kind: str) -> None:
    report = came_to(kind)
    assert not report.failures, "\n".join(report.failures)
    assert report.cases == CASES[kind]
    assert report.read + report.endings.total() == report.cases


def test_these_are_100_000_trees_and_images_in_make_proof() -> None:
    assert came_to("trees").cases + came_to("images").cases >= repetitions(100_000, test=20_000)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_damaged_is_looked_into_deep(kind: str) -> None:
    report = came_to(kind)
    assert report.read > READ * report.cases
    assert report.endings.most_common(1)[0][1] < report.cases / 2, "most of them end in the same way"


def refusals(path: Path, raised: str) -> Iterator[str]:
    """How each refusal in a module begins, up to what is put into it."""
    for text in re.findall(rf'(?:{raised})\(\s*f?"([^"]+)"', path.read_text()):
        yield text if text.startswith(NO_CASE) else text.partition("{")[0]


@pytest.mark.parametrize(
    ("kind", "path", "raised"),
    [
        ("trees", REPOSITORY / "khod/abi/fdt.py", "self.bad"),
        ("trees", REPOSITORY / "khod/trees/blobs.py", "MalformedTree"),
        *[("images", path, "Refused|truncated|damaged") for path in sorted((REPOSITORY / "khod/images").glob("*.py"))],
    ],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_every_refusal_is_the_end_of_some_case(kind: str, path: Path, raised: str) -> None:
    # What a kept file ends in is held by test_every_kept_file_ends_as_it_should.
    said = "\n".join([*came_to(kind).endings, *(QUOTED.sub("N", text) for text in ENDINGS[kind].values())])
    every = list(refusals(path, raised))
    wanted = [text for text in every if not text.startswith((*LARGE, *NO_CASE))]
    assert [text for text in wanted if QUOTED.sub("N", text) not in said] == []


@pytest.mark.parametrize("number", FAILURES)
def test_what_a_case_must_not_do_is_found(number: int) -> None:
    report = start("planted", [0, number], patience=0.2).report()
    (failure,) = report.failures
    assert f"case {number} of planted" in failure
    assert FAILURES[number] in failure


def test_what_a_case_may_do_is_counted() -> None:
    report = start("planted", [0, 9, 10]).report()
    assert (report.cases, report.read, report.failures) == (3, 2, [])
    assert report.endings == {"The tree is damaged at N": 1}


@pytest.mark.parametrize("kind", CASES)
def test_a_number_is_always_the_same_case(kind: str) -> None:
    target = importlib.import_module(f"tests.fuzz.{kind}")
    assert [target.made(number) for number in range(50)] == [target.made(number) for number in range(50)]
    assert len({str(target.made(number)) for number in range(50)}) > 40


@pytest.mark.parametrize("kind", ["trees", "images"])
def test_the_whole_files_are_whole(kind: str) -> None:
    target = importlib.import_module(f"tests.fuzz.{kind}")
    for name, data in corpus.seeds(kind).items():
        said = target.held(target.alone(name, data))
        assert not said or said.startswith(("an s390 Image does not say", "The image is a thin one")), name


def test_one_case_can_be_run_again() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "trees", "1"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert told.stdout.startswith("Case(blob=b'\\xd0\\r\\xfe\\xed")


def test_every_kept_file_ends_as_it_should() -> None:
    kept = {(kind, name) for kind in corpus.KINDS for name in corpus.kept(kind)}
    assert {(kind, name) for kind, names in ENDINGS.items() for name in names} == kept
    report = start("kept", range(len(kept))).report()
    assert not report.failures, "\n".join(report.failures)
    assert report.cases == len(kept)


def test_the_corpus_stays_small() -> None:
    assert sum(path.stat().st_size for path in corpus.PLACE.rglob("*") if path.is_file()) < 300 << 10


def khoctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "khoctl", "dt", *words],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )


def endings(name: str) -> list[str]:
    """What is wrong with how khoctl's commands for trees end with a kept file."""
    path, whole = str(corpus.PLACE / "kept/trees" / name), str(corpus.PLACE / "seeds/trees/v3.dtb")
    root = name.endswith(".dtb")
    read = root and not ENDINGS["trees"][name]
    wanted: dict[tuple[str, ...], set[int]] = {
        ("show", "--scratch", "0x40000000+4K", path): {Exit.done} if read else {Exit.failed},
        ("export", "--format", "dts", path): {Exit.done, Exit.usage} if read else {Exit.failed},
        ("validate", path): {Exit.done, Exit.refused},
        ("diff", whole, path): {Exit.failed},  # they differ
    }
    bad = []
    if name == "empty.dtb":
        wanted = {words: {Exit.usage} for words in wanted}
    for words, codes in wanted.items():
        told = khoctl(*words)
        if (
            told.returncode not in codes
            or "Traceback" in told.stderr
            or (told.returncode and not told.stderr + told.stdout)
        ):
            bad.append(f"{' '.join(words)}: {told.returncode}, not one of {codes}: {told.stderr}")
    return bad


def test_khoctl_ends_with_the_exit_code_of_an_error_of_ours() -> None:
    names = sorted(ENDINGS["trees"])[:: 1 if PROOF else 4]
    with ThreadPoolExecutor(TOGETHER) as pool:
        bad = [line for found in pool.map(endings, names) for line in found]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "text", ["010+5", "0x0+99999999999999999999", f"{'9' * 5000}+1", "0xffffffffffffffff+2", "1+2+3", ""]
)
def test_a_region_that_is_none_is_wrong_usage(text: str) -> None:
    told = khoctl("show", "--scratch", text, str(corpus.PLACE / "seeds/trees/v3.dtb"))
    assert told.returncode == Exit.usage
    assert "is not a region" in told.stderr
