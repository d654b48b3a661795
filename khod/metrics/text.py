# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prometheus' text format, version 0.0.4, without timestamps: node_exporter's textfile collector refuses these."""

from collections.abc import Iterator

from khod.metrics.table import METRICS, Labels, MetricFacts
from khod.text import printable

PREFIX = "kho_"


def render_text(facts: MetricFacts) -> str:
    """Return every metric that is known, with its HELP and TYPE; the text ends with a newline."""
    return "".join(f"{line}\n" for line in _render_lines(facts))


def _render_lines(facts: MetricFacts) -> Iterator[str]:
    for metric in METRICS:
        # A collector refuses a whole file in which one series stands twice.
        values = {_render_labels(sample.labels): sample.value for sample in metric.read(facts)}
        if not values:
            continue
        yield f"# HELP {PREFIX}{metric.name} {metric.help}"
        yield f"# TYPE {PREFIX}{metric.name} {metric.type.value}"
        for labels, value in values.items():
            yield f"{PREFIX}{metric.name}{labels} {value!r}"


def _render_labels(labels: Labels) -> str:
    r"""Return the labels in braces.

    The format escapes a backslash, a quote and a newline. What is not printable is shown as everywhere in khod, `\n`
    with a backslash that is then escaped: the file is also read at a terminal.
    """
    pairs = (f'{name}="{_escape_value(value)}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}" if labels else ""


def _escape_value(value: str) -> str:
    return printable(value).replace("\\", "\\\\").replace('"', '\\"')
