# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every page (HTML) is in: a file that needs nothing else, without scripts, for screens and for paper.

Its policy (Content-Security-Policy) allows its own style sheet and nothing more, so that not even a mistake in the
escaping could load or run anything.
"""

import base64
import hashlib

from khoctl.report.markup import Markup, element, text_element
from khoctl.report.style import page_style
from khod import __version__


def frame_page(title: str, *content: Markup) -> str:
    """Return a page with this content; the same content always gives the same page."""
    style = page_style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        text_element("title", title),
        element("style", Markup(style)),
    )
    footer = text_element("footer", f"Written by khoctl {__version__}.")
    body = element("body", element("main", *content), footer)
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def section(title: str, *children: Markup) -> Markup:
    """Return a section of the page, with its title."""
    return element("section", text_element("h2", title), *children)
