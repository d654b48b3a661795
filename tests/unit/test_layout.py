# SPDX-License-Identifier: LGPL-2.1-or-later
"""How pages fit a terminal: at any width no word is broken, and nothing is lost."""

import re

import click
import pytest
import typer

from khoctl import layout, render
from khoctl.status_page import render_status
from khod.model import Check, CheckResult, Phase
from tests.unit.test_render import CHECKS, EVENT, PLAN, status

WIDTHS = (40, 80, 200)
PAGES = {
    "status": render_status(status(Phase.degraded)),
    "checks": render.render_checks(CHECKS),
    "plan": render.render_plan(PLAN),
    "short plan": render.short_plan(PLAN),
    "event": render.render_event(EVENT),
    "error": "khoctl: The profile cannot be read: ENOENT (/etc/kho/handover.d/nightly.toml). There are: a, b and c.",
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_with_every_word_whole_and_in_its_order(name: str, width: int) -> None:
    page = layout.fit_page(PAGES[name], width)
    assert click.unstyle(page).split() == click.unstyle(PAGES[name]).split()
    assert all(len(line) <= width for line in click.unstyle(page).split("\n"))


@pytest.mark.parametrize("width", WIDTHS)
def test_what_a_line_goes_on_with_stands_below_its_own_text(width: int) -> None:
    text = " ".join(f"word{number}" for number in range(60))
    first, *more = layout.fit_page(f"  kernel    {text}", width).split("\n")
    assert first.startswith("  kernel    word0")
    assert more
    assert {line[:12] for line in more} == {" " * 12}
    assert all(line[12] == "w" for line in more)


def test_below_an_arrow_too() -> None:
    first, second = layout.fit_page("      name  -> one two three four five", 32).split("\n")
    assert first.index("one") == 15
    assert second.index("four") == 8, "a text has 24 columns at least"
    assert layout.fit_page("      name  -> one two three four five", 39).index("five") > 0


def test_a_word_longer_than_the_terminal_stays_whole_on_a_line_of_its_own() -> None:
    word = "/boot/" + "x" * 50
    lines = layout.fit_page(f"pass  image  It is {word} indeed", 40).split("\n")
    assert [line.strip() for line in lines] == ["pass  image  It is", word, "indeed"]


def test_colours_take_no_columns() -> None:
    line = f"{typer.style('pass', fg='green')}  scratch  {'x' * 20}"
    assert layout.fit_page(line, 35) == line


@pytest.mark.parametrize("width", [20, *WIDTHS, None])
def test_a_table_keeps_its_columns_aligned_or_folds_them_in_every_row_alike(width: int | None) -> None:
    rows = [("ID", "TAKEN", "KERNEL", "BLOBS"), ("1234", "2026-11-26", "6.19.11", "memblock, db"), ("5", "?", "7", "-")]
    lines = layout.align_table(rows, width)
    assert [word for line in lines for word in re.split(r"\s{2,}", line.strip())] == [
        word for row in rows for word in row
    ]
    height = len(lines) // len(rows)
    for column, name in enumerate(rows[0]):
        at = next((number, line.index(name)) for number, line in enumerate(lines) if name in line)
        for number, row in enumerate(rows):
            assert lines[number * height + at[0]][at[1] :].startswith(row[column])


def test_a_pipe_gets_records_and_columns_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert layout.page_width() is None
    monkeypatch.setenv("COLUMNS", "40")
    assert layout.page_width() == 40
    monkeypatch.setenv("COLUMNS", "0")
    assert layout.page_width() is None


def check(name: str, result: CheckResult) -> Check:
    return Check(name, result, f"What {name} found", "Do this.")


GOOD = [check("kho", CheckResult.passed), check("memory", CheckResult.skipped), check("uptime", CheckResult.warn)]


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (GOOD, "Ready: 1 passed, 1 warning (uptime), 1 skipped. The next kernel was not named, nor checked."),
        ([*GOOD, check("image", CheckResult.passed)], "Ready: 2 passed, 1 warning (uptime), 1 skipped."),
        (
            [*GOOD, check("image", CheckResult.fail), check("disk", CheckResult.unsupported)],
            "Refused: 2 failed (image, disk), 1 warning (uptime), 1 skipped. No handover can begin.",
        ),
    ],
)
def test_checks_end_with_what_they_come_to(found: list[Check], line: str) -> None:
    for quiet in (False, True):
        page = click.unstyle(render.render_checks(found, quiet=quiet))
        assert page.split("\n")[-1] == line
        assert ("What kho found" in page, "What memory found" in page) == (not quiet, not quiet)
        assert "What uptime found" in page
