# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the page and the picture look: two palettes, and the style sheets made of them.

Paper has the light palette. The picture's rules have literal colours, since programs that convert SVG know no
variables; its class names begin with `t-`, for the picture also stands in the page.
"""

from string import Template

LIGHT = {
    "paper": "#fdfdfb",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "rule": "#d9dce0",
    "good": "#2a6a48",
    "warn": "#8a5a00",
    "bad": "#a52a38",
    "khod": "#2f5f98",
    "down": "#b5772a",
    "jump": "#8f3140",
    "up": "#3f7a5c",
    "wait": "#9ba4ae",
}
"""`khod` to `wait` are what rows of the timeline are about: khod, the way down, the jump, the way up, nothing."""
DARK = {
    "paper": "#15181c",
    "ink": "#e3e6ea",
    "muted": "#9aa4af",
    "rule": "#30363d",
    "good": "#7dc7a0",
    "warn": "#e0b062",
    "bad": "#f08d98",
    "khod": "#78aae2",
    "down": "#d8a35a",
    "jump": "#e07c88",
    "up": "#74b894",
    "wait": "#66707b",
}
FAMILIES = ("khod", "down", "jump", "up", "wait")
IN_THE_DARK = "@media screen and (prefers-color-scheme: dark)"

_PICTURE = Template("""
.t-paper { fill: $paper }
.t-text { fill: $ink; stroke: $paper; stroke-width: 3; paint-order: stroke;
  font: 12px "Helvetica Neue", Helvetica, Arial, "DejaVu Sans", sans-serif }
.t-small { fill: $muted; font-size: 11px }
.t-value { font-variant-numeric: tabular-nums; text-anchor: end }
.t-middle { text-anchor: middle }
.t-grid { stroke: $rule; stroke-width: 1 }
.t-line { stroke: $ink; stroke-width: 1; fill: none }
.t-halo { stroke: $paper; stroke-width: 3 }
.t-mark { fill: $ink }
.t-hatch { stroke: $paper; stroke-width: 2 }
""")


def picture_style() -> str:
    """Return the style sheet of the picture, for light and dark."""
    return f"{_picture_rules(LIGHT)}{IN_THE_DARK} {{{_picture_rules(DARK)}}}\n"


def _picture_rules(palette: dict[str, str]) -> str:
    families = "".join(f".t-{name} {{ fill: {palette[name]} }}\n" for name in FAMILIES)
    return _PICTURE.substitute(palette) + families


def page_style() -> str:
    """Return the style sheet of the page, with the picture's."""
    root = f":root {{{_variables(LIGHT)}}}\n{IN_THE_DARK} {{ :root {{{_variables(DARK)}}} }}\n"
    return root + _PAGE + picture_style()


def _variables(palette: dict[str, str]) -> str:
    return "".join(f" --{name}: {colour};" for name, colour in palette.items())


_PAGE = """
:root { color-scheme: light dark }
* { box-sizing: border-box }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body {
  font: 15px/1.5 "Helvetica Neue", Helvetica, Arial, "DejaVu Sans", sans-serif;
  max-width: 58rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; overflow-wrap: anywhere;
}
h1 { font-size: 2.1rem; line-height: 1.15; font-weight: 600; letter-spacing: -.02em; margin: .2rem 0 .7rem }
h2 { font-size: 1.05rem; line-height: 1.3; font-weight: 600; margin: 0 0 .9rem; padding-top: .7rem;
  border-top: 1px solid var(--ink) }
h3 { font-size: .8rem; font-weight: 600; color: var(--muted); margin: 1.4rem 0 .4rem }
p { margin: 0 0 .8rem; max-width: 44rem }
section { margin-top: 2.8rem }
code, pre, .mono { font: .84em/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace }
pre { white-space: pre-wrap; margin: 0 0 .8rem; padding-left: .8rem; border-left: 2px solid var(--rule) }
.eyebrow { color: var(--muted); font-size: .85rem; margin: 0 }
.lede { font-size: 1.12rem; line-height: 1.45 }
.muted { color: var(--muted) }
.good { color: var(--good) } .warn { color: var(--warn) } .bad { color: var(--bad) }
h1 .kernels { font-weight: 400; margin-left: .25em }
dl { margin: 0 0 .8rem }
dt { color: var(--muted) }
dd { margin: 0 }
.facts div { display: flex; padding: .15rem 0 }
.facts dt { flex: 0 0 7.5rem }
.across { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; margin-top: 1.8rem }
.across dt { font-size: .8rem }
table { width: 100%; border-collapse: collapse; table-layout: fixed; margin: 0 0 1.2rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule) }
th { font-size: .8rem; font-weight: 600; color: var(--muted) }
th:last-child, td:last-child { padding-right: 0 }
.number { text-align: right; font-variant-numeric: tabular-nums }
td.number { white-space: nowrap }
.mark { width: 7.5rem; font-weight: 600 } .name { width: 11rem } .verb { width: 6.4rem }
.remedy, .problem { display: block }
.remedy { color: var(--muted) }
.removed { color: var(--bad) } .added { color: var(--good) }
ul.plain { list-style: none; margin: 0 0 .8rem; padding: 0 }
ul.plain li { padding: .15rem 0 }
details { margin: .6rem 0 }
summary { cursor: pointer; color: var(--muted); padding: .3rem 0 }
summary:hover, summary:focus-visible { color: var(--ink) }
figure { margin: 0 0 1rem }
figure svg { display: block; width: 100%; height: auto }
.narrow { display: none }
footer { margin-top: 3.5rem; padding-top: .7rem; border-top: 1px solid var(--rule); color: var(--muted);
  font-size: .85rem }
@media screen and (max-width: 42rem) {
  body { padding: 1.4rem 1rem 3rem }
  h1 { font-size: 1.7rem }
  .wide { display: none } .narrow { display: block }
  .across { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .8rem 1rem }
  table, tbody, tr, td { display: block }
  thead { display: none }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--rule) }
  td { padding: 0; border: 0 }
  td.mark, td.name, td.verb { width: auto }
  td.mark, td.mark + td.name { display: inline }
  td.mark + td.name { margin-left: .6rem }
  td.number { display: flex; justify-content: space-between; gap: 1rem; white-space: normal }
  td.number:empty { display: none }
  td[data-label]::before { content: attr(data-label); color: var(--muted); text-align: left }
}
@media print {
  @page { margin: 16mm 15mm }
  html { background: none }
  body { font-size: 9.5pt; max-width: none; padding: 0 }
  th, td { padding-top: .2rem; padding-bottom: .2rem }
  section { margin-top: 1.6rem }
  h2, h3, summary { break-after: avoid }
  tr, figure, dd, li { break-inside: avoid }
  thead { display: table-header-group }
  details::details-content { content-visibility: visible; block-size: auto }
  summary { list-style: none }
}
"""
