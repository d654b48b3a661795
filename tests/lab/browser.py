# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a real browser makes of a page: where everything lies on a screen, and what is printed. Needs no guest."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.process import call

BROWSER = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
SCHEMES = {"dark": 0, "light": 1}
"""Blink's numbers of the colour schemes that a person prefers."""

# The page is in a frame, because a window is never less than 500 pixels wide; it is unchanged, with its policy. The
# frame has the origin of the script, which may look at it therefore.
FRAME = """<!DOCTYPE html>
<html><head><meta name="color-scheme" content="light dark" /></head><body>
<iframe id="page" style="width: {width}px; height: 3000px; border: 0" srcdoc="{page}"></iframe>
<script>
function box(found) {{
  const at = found.getBoundingClientRect();
  return {{ name: found.tagName, text: found.textContent.slice(0, 60),
            left: at.left, top: at.top, right: at.right, bottom: at.bottom }};
}}
onload = () => {{
  const view = document.getElementById("page").contentWindow, page = view.document, root = page.documentElement;
  page.querySelectorAll("details").forEach(found => {{ found.open = true }});
  const seen = [...page.body.querySelectorAll("*")].filter(found => found.getClientRects().length);
  document.body.dataset.seen = JSON.stringify({{
    width: view.innerWidth,
    client_width: root.clientWidth,
    scroll_width: root.scrollWidth,
    is_dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    paper: view.getComputedStyle(root).backgroundColor,
    ink: view.getComputedStyle(page.body).color,
    script_ran: view.scriptRan === true,
    boxes: seen.map(box),
    labels: seen.filter(found => found.matches("svg text")).map(box),
    pictures: seen.filter(found => found.tagName === "svg").map(box),
  }});
}};
</script></body></html>
"""


@dataclass(frozen=True)
class Box:
    """Where one element lies, in pixels of the page, with the beginning of its text."""

    name: str
    text: str
    left: float
    top: float
    right: float
    bottom: float

    def covers(self, other: Box) -> bool:
        """Whether two boxes overlap by more than the blank edge that every line of text has."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > 1 and down > 3


@dataclass(frozen=True)
class Seen:
    """A page on a screen, with everything that was folded opened."""

    width: int
    client_width: int
    scroll_width: int
    is_dark: bool
    paper: str
    ink: str
    script_ran: bool
    boxes: list[Box]
    labels: list[Box]
    pictures: list[Box]


def show_page(page: str, directory: Path, *, width: int, scheme: str) -> Seen:
    """Show a page in a frame of so many pixels, to a person who prefers this colour scheme."""
    frame = directory / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page)))
    argv = [
        *BROWSER,
        f"--user-data-dir={directory / 'profile'}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    ]
    said = call([*argv, "--window-size=1600,3000", "--dump-dom", frame.as_uri()])
    found = re.search(r'<body[^>]* data-seen="([^"]*)"', said)
    if not found:
        raise LabError(f"the browser did not measure the page:\n{said[-2000:]}")
    seen = json.loads(html.unescape(found[1]))
    boxes = {name: [Box(**box) for box in seen[name]] for name in ("boxes", "labels", "pictures")}
    return Seen(**{**seen, **boxes})


def print_page(page: str, directory: Path) -> list[str]:
    """Print a page; give the text of each sheet."""
    source, printed = directory / "page.html", directory / "page.pdf"
    source.write_text(page)
    profile = f"--user-data-dir={directory / 'profile'}"
    call([*BROWSER, profile, "--no-pdf-header-footer", f"--print-to-pdf={printed}", source.as_uri()])
    return call(["pdftotext", "-layout", printed, "-"]).split("\f")[:-1]
