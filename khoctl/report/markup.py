# SPDX-License-Identifier: LGPL-2.1-or-later
"""HTML and SVG from Python: what is markup has a type of its own, and every other text is escaped.

The markup is well-formed XML, too.
"""

import html
from typing import NewType

from khod.text import printable

Markup = NewType("Markup", str)
"""Text that is already markup. A plain `str` never becomes one except by `escape_text`."""

EMPTY = Markup("")
VOID = frozenset({"meta", "col"})
"""The elements of HTML that have no end tag."""


def escape_text(text: str) -> Markup:
    r"""Escape a text for an element or an attribute; what is not printable is shown escaped, as `\n` or `\u202e`."""
    return Markup(html.escape(printable(text)))


def escape_lines(text: str) -> Markup:
    """Escape a text of several lines for a `pre` element; its newlines stay."""
    return Markup("\n".join(escape_text(line) for line in text.split("\n")))


def join_markup(*parts: Markup) -> Markup:
    """Put pieces of markup one behind the other."""
    return Markup("".join(parts))


def text_element(name: str, text: str, /, **attributes: str | float) -> Markup:
    """Return an element that contains a text, which is escaped."""
    return element(name, escape_text(text), **attributes)


def element(name: str, /, *children: Markup, **attributes: str | float) -> Markup:
    """Return an element with these children.

    The values of attributes are escaped. In their names `_` stands for `-`, and one at the end is dropped (`class_`).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape_text(_attribute_text(value))}"'
        for key, value in attributes.items()
    )
    if name in VOID:
        return Markup(f"<{name}{given} />")
    return Markup(f"<{name}{given}>{''.join(children)}</{name}>")


def _attribute_text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
