# SPDX-License-Identifier: LGPL-2.1-or-later
"""The timeline as a picture (SVG): a lane for each row, children below their parent, one axis of seconds.

On a wide picture a row's name stands left of its bar and its time on the right; on a narrow one both stand above it.
"""

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from khoctl.figures import format_seconds
from khoctl.report.markup import EMPTY, Markup, element, join_markup, text_element
from khoctl.report.style import picture_style
from khoctl.timeline_rows import DrawnRow, known_rows, select_rows
from khod.history.model import RowKind, Timeline, TimelineRow
from khod.text import printable

WIDE, NARROW = 880, 360
"""The widths of the picture, in pixels."""
BELOW_WIDE = 560
"""A picture with fewer pixels than this has its texts above the bars."""
NAME_PIXELS, TIME_PIXELS = 220, 140
CHAR_PIXELS = 7.0
"""The width of a character, for which the widest font of the style sheet is assumed; wide ones count twice."""
TICK_PIXELS = 76
INDENT = 14
HEAD, TICKS, LEGEND, MARGIN = 52, 24, 30, 16
BEFORE_SHARE = 0.5
"""What came before the first `freeze` gets at most this share of the width of what follows; the rest is cut off.

Without a blackout nothing is: then what came before it may be all there is."""
HATCHED_SHARE = 0.1
"""From this share of its time on, the error of a row is large, and its bar is hatched."""
MIN_BAR, MIN_ERROR = 1.5, 1.5
MIN_SPAN_SECONDS = 0.01
"""The axis is at least as long: times are written in milliseconds."""

FAMILY = {
    RowKind.step: "khod",
    RowKind.wait: "wait",
    RowKind.shutdown: "down",
    RowKind.unit: "down",
    RowKind.final: "down",
    RowKind.sleep: "wait",
    RowKind.jump: "jump",
    RowKind.kernel: "up",
    RowKind.initrd: "up",
    RowKind.userspace: "up",
    RowKind.khod: "khod",
    RowKind.restore: "khod",
    RowKind.producer: "khod",
}


@dataclass(frozen=True)
class TimeScale:
    """Converts seconds since the first `freeze` to pixels; what is before `first` is cut off."""

    first: float
    last: float
    left: float
    right: float

    def place(self, seconds: float) -> float:
        """Return the pixel of a time; a time off the axis is put on its end."""
        share = (seconds - self.first) / (self.last - self.first)
        return self.left + (self.right - self.left) * min(1.0, max(0.0, share))

    def place_ticks(self) -> Iterator[tuple[float, str]]:
        """Yield the pixel and the text of each tick: at 0, and at multiples of 1, 2 or 5 times a power of ten."""
        room = (self.last - self.first) * TICK_PIXELS / (self.right - self.left)
        power = 10.0 ** math.floor(math.log10(room))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= room)
        for number in range(math.ceil(self.first / step), math.floor(self.last / step) + 1):
            yield self.place(number * step), f"{number * step:.{max(0, -math.floor(math.log10(step)))}f} s"


def draw_file(timeline: Timeline) -> str:
    """Return the picture as a file of its own."""
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{draw_picture(timeline, WIDE, standalone=True)}\n'


def draw_picture(timeline: Timeline, width: int, *, standalone: bool = False) -> Markup:
    """Return the `svg` element; only with `standalone` it brings its namespace, its style and a background."""
    shown = select_rows(known_rows(timeline))
    rows = [item.row for item in shown]
    scale = _choose_scale(rows, timeline.blackout_seconds, width)
    drawn, bottom, hatch = [], float(HEAD), f"hatch-{width}"
    for item in shown:
        markup, taken = _draw_row(item, scale, width, bottom, hatch)
        drawn.append(markup)
        bottom += taken
    errors = any(_error_shows(row, scale) for row in rows)
    margin = MARGIN if standalone else 0
    top = (TICKS if timeline.blackout_seconds is None else 0) - margin
    height = math.ceil(bottom) + (LEGEND if errors else 0) + margin - top
    box: dict[str, str | float] = {"width": width + 2 * margin, "height": height}
    frame: dict[str, str | float] = {"xmlns": "http://www.w3.org/2000/svg", **box} if standalone else {}
    return element(
        "svg",
        text_element("title", "Timeline of the handover"),
        element("style", Markup(picture_style())) if standalone else EMPTY,
        _define_hatch(hatch) if errors else EMPTY,
        element("rect", class_="t-paper", x=-margin, y=top, **box) if standalone else EMPTY,
        *(_draw_tick(at, text, width, bottom) for at, text in scale.place_ticks()),
        _draw_blackout(timeline, scale, width, bottom),
        *drawn,
        _draw_legend(bottom, hatch) if errors else EMPTY,
        viewBox=f"{-margin} {top} {box['width']} {height}",
        role="img",
        **frame,
    )


def _choose_scale(rows: list[TimelineRow], blackout: float | None, width: int) -> TimeScale:
    first = min((row.begin for row in rows), default=0.0)
    last = max((row.begin + row.seconds for row in rows), default=0.0)
    if blackout is not None:
        last = max(last, blackout)
        first = max(first, -BEFORE_SHARE * last)
    last = max(last, first + MIN_SPAN_SECONDS)
    sides = (NAME_PIXELS, width - TIME_PIXELS) if width >= BELOW_WIDE else (6, width - 6)
    return TimeScale(first, last, *sides)


def _draw_row(item: DrawnRow, scale: TimeScale, width: int, top: float, hatch: str) -> tuple[Markup, float]:
    """Return a row at this height of the picture, and the height of the row."""
    row = item.row
    is_child, is_wide = bool(row.parent), width >= BELOW_WIDE
    thick, indent = (7, INDENT) if is_child else (13, 0)
    if is_wide:
        height, name_room = (17.0 if is_child else 24.0), NAME_PIXELS - 12.0
        base, bar = top + height / 2 + 4, top + (height - thick) / 2
    else:
        height, name_room = (29.0 if is_child else 38.0), width - _text_pixels(item.time) - 12
        base, bar = top + 13, top + 18
    kind = "t-text t-small" if is_child else "t-text"
    markup = element(
        "g",
        text_element("title", _describe_row(item)),
        _draw_bar(row, scale, bar, thick, hatch),
        text_element("text", _fit_text(_name_row(row), name_room - indent), class_=kind, x=indent, y=base),
        text_element("text", item.time, class_=f"{kind} t-value", x=width, y=base),
    )
    return markup, height


def _draw_bar(row: TimelineRow, scale: TimeScale, top: float, thick: float, hatch: str) -> Markup:
    begin, end = scale.place(row.begin), scale.place(row.begin + row.seconds)
    begin = max(scale.left, min(begin, scale.right - MIN_BAR))
    box = {"x": begin, "y": top, "width": max(MIN_BAR, end - begin), "height": thick}
    bar = element("rect", class_=f"t-{FAMILY[row.kind]}", opacity=0.6 if row.parent else 1, **box)
    parts = [bar] if row.begin + row.seconds >= scale.first else []
    if _error_shows(row, scale):
        middle = top + thick / 2
        low, high = (scale.place(row.begin + row.seconds + way * row.error_seconds) for way in (-1, 1))
        if row.error_seconds >= HATCHED_SHARE * row.seconds:
            parts.append(element("rect", fill=f"url(#{hatch})", **box))
        caps = f"M{low:.2f} {middle - 3:.2f}v6m0-3H{high:.2f}m0-3v6"
        parts += [element("path", class_=f"t-line{halo}", d=caps) for halo in (" t-halo", "")]
    if row.begin < scale.first:  # it began before the axis does
        parts.append(element("path", class_="t-mark", d=f"M{scale.left - 2:.2f} {top:.2f}v{thick}l-4-{thick / 2}z"))
    return join_markup(*parts)


def _error_shows(row: TimelineRow, scale: TimeScale) -> bool:
    """Whether the error of a row is wide enough to be seen."""
    end = row.begin + row.seconds
    return scale.place(end + row.error_seconds) - scale.place(end - row.error_seconds) >= 2 * MIN_ERROR


def _name_row(row: TimelineRow) -> str:
    return f"{row.name}: {row.detail}" if row.detail else row.name


def _describe_row(item: DrawnRow) -> str:
    row = item.row
    place = f" in {row.parent}" if row.parent else ""
    return f"{_name_row(row)}{place}: {item.time}, from {row.begin:.3f} s"


def _draw_tick(at: float, text: str, width: int, bottom: float) -> Markup:
    half = _text_pixels(text) / 2
    middle = min(max(at, half), width - half)
    return join_markup(
        element("path", class_="t-grid", d=f"M{at:.2f} {HEAD - 8}V{bottom:.2f}"),
        text_element("text", text, class_="t-text t-small t-middle", x=middle, y=HEAD - 14),
    )


def _draw_blackout(timeline: Timeline, scale: TimeScale, width: int, bottom: float) -> Markup:
    """Draw the first `freeze`, and over the axis how far the blackout reaches."""
    if timeline.blackout_seconds is None:
        return EMPTY
    begin, end = scale.place(0.0), scale.place(timeline.blackout_seconds)
    text = f"blackout {format_seconds(timeline.blackout_seconds, timeline.error_seconds)}"
    half = _text_pixels(text) / 2
    middle = min(max((begin + end) / 2, half), width - half)
    return join_markup(
        text_element("text", text, class_="t-text t-middle", x=middle, y=12),
        element("path", class_="t-line", d=f"M{begin:.2f} 24v-6H{end:.2f}v6"),
        *(
            element("path", class_="t-line", stroke_dasharray="1 3", d=f"M{at:.2f} {HEAD - 8}V{bottom:.2f}")
            for at in (begin, end)
        ),
    )


def _define_hatch(name: str) -> Markup:
    line = element("path", class_="t-hatch", d="M0 0V6")
    hatch = element(
        "pattern", line, id=name, width=6, height=6, patternUnits="userSpaceOnUse", patternTransform="rotate(45)"
    )
    return element("defs", hatch)


def _draw_legend(top: float, hatch: str) -> Markup:
    base = top + 20
    return join_markup(
        element("path", class_="t-line", d=f"M1 {base - 7:.2f}v6m0-3h18m0-3v6"),
        text_element("text", "largest error", class_="t-text t-small", x=28, y=base),
        element("rect", class_="t-wait", x=122, y=base - 9, width=18, height=9),
        element("rect", fill=f"url(#{hatch})", x=122, y=base - 9, width=18, height=9),
        text_element("text", "error over a tenth of the time", class_="t-text t-small", x=146, y=base),
    )


def _text_pixels(text: str) -> float:
    """Return at least the width of a text in pixels."""
    return CHAR_PIXELS * sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _fit_text(text: str, room: float) -> str:
    """Return a printable text cut to so many pixels; the last character of a cut one is `…`."""
    text = printable(text)
    if _text_pixels(text) <= room:
        return text
    while text and _text_pixels(text) > room - CHAR_PIXELS:
        text = text[:-1]
    return f"{text}…"
