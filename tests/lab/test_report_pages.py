# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report in a real browser: nothing overflows a small screen, labels keep apart, paper has everything."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

from khoctl.report.page import write_page
from khoctl.report.style import DARK, LIGHT
from khod.history.model import AttemptRecord
from tests.lab.browser import Seen, print_page, show_page
from tests.unit import attempts

ATTEMPTS = {
    "2 producers": attempts.orderly_attempt(2),
    "200 producers": attempts.orderly_attempt(200),
    "degraded": attempts.degraded_attempt(200),
    "cold boot": attempts.cold_boot_attempt(),
    "hostile": attempts.hostile_attempt(),
}
PHONE, DESK = 400, 1200
every_attempt = pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS.keys())


def colour(hexadecimal: str) -> str:
    """A colour as a browser computes it."""
    return f"rgb({', '.join(str(int(hexadecimal[at : at + 2], 16)) for at in (1, 3, 5))})"


def check_layout(seen: Seen, width: int) -> None:
    assert (seen.width, seen.client_width) == (width, width)
    assert seen.scroll_width <= width
    assert [box for box in seen.boxes if box.left < -0.5 or box.right > width + 0.5] == []
    (picture,) = seen.pictures  # the wide one or the narrow one
    assert [
        label
        for label in seen.labels
        if label.left < picture.left - 1
        or label.right > picture.right + 1
        or label.top < picture.top - 1
        or label.bottom > picture.bottom + 1
    ] == []
    assert [pair for pair in combinations(seen.labels, 2) if pair[0].covers(pair[1])] == []


@every_attempt
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_labels_keep_apart(
    attempt: AttemptRecord, width: int, scheme: str, tmp_path: Path
) -> None:
    seen = show_page(write_page(attempt), tmp_path, width=width, scheme=scheme)
    palette = {"light": LIGHT, "dark": DARK}[scheme]
    assert seen.is_dark is (scheme == "dark")
    assert (seen.paper, seen.ink) == (colour(palette["paper"]), colour(palette["ink"]))
    check_layout(seen, width)


def test_an_overflow_would_be_seen(tmp_path: Path) -> None:
    page = write_page(ATTEMPTS["2 producers"]).replace("<main>", f"<main><pre><code>{'x' * 300}</code></pre>")
    with pytest.raises(AssertionError):
        check_layout(
            show_page(
                page.replace("overflow-wrap: anywhere", "white-space: nowrap"), tmp_path, width=PHONE, scheme="dark"
            ),
            PHONE,
        )


def test_the_page_s_policy_runs_no_script(tmp_path: Path) -> None:
    """Even one that would stand in the page, had an escape been forgotten."""
    page = write_page(ATTEMPTS["2 producers"]).replace("<main>", "<main><script>scriptRan = true</script>")
    assert not show_page(page, tmp_path, width=DESK, scheme="light").script_ran
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert show_page(page, tmp_path, width=DESK, scheme="light").script_ran


def test_paper_has_what_is_folded(tmp_path: Path) -> None:
    sheets = print_page(write_page(ATTEMPTS["200 producers"]), tmp_path)
    said = "\n".join(sheets)
    names = {event.producer.name for event in ATTEMPTS["200 producers"].events if event.producer}
    assert len(names) == 200
    assert names <= set(re.findall(r"^ *(\S+) +(?:vm|peer) ", said, re.MULTILINE))
    assert re.search(r"passed +memory +412.0 MiB needed", said)
    assert len(sheets) <= 12
    assert all(sheet.strip() for sheet in sheets)
