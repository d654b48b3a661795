# SPDX-License-Identifier: LGPL-2.1-or-later
"""`io.systemd.Metrics`, as systemd-report(1) calls it on each socket below /run/systemd/report (systemd 260 and later).

systemd requires that a metric's name begins with the name of the socket.
"""

import enum
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypedDict, cast

from asyncvarlink import VarlinkInterface, varlinkmethod

from khod.metrics.table import METRICS, MetricFacts
from khod.wire import INTERFACE, METRICS_INTERFACE


class MetricFamilyType(enum.Enum):
    """The types of metrics that systemd knows; khod has counters and gauges only."""

    counter = "counter"
    gauge = "gauge"
    string = "string"
    object = "object"


class MetricValue(TypedDict):
    """One value; `object` is the producer that it is about, and `fields` tells the values of one metric apart."""

    name: str
    object: str | None
    fields: dict[str, str] | None
    value: Any


class MetricFamily(TypedDict):
    """One metric, without its values."""

    name: str
    description: str
    type: MetricFamilyType


class SystemdMetrics(VarlinkInterface, name=METRICS_INTERFACE):
    """The metrics of this host's handovers, as systemd's own services have theirs."""

    def __init__(self, facts: Callable[[], Awaitable[MetricFacts]]) -> None:
        self._facts = facts

    @varlinkmethod(allow_foreign=True)
    async def List(self) -> AsyncIterator[MetricValue]:
        """Return every value that is known; call it with `more`."""
        facts = await self._facts()
        for metric in METRICS:
            for sample in metric.read(facts):
                found: dict[str, Any] = {"name": f"{INTERFACE}.{metric.name}", "value": sample.value}
                fields = dict(sample.labels)
                if "producer" in fields:
                    found["object"] = fields.pop("producer")
                if fields:
                    found["fields"] = fields
                yield cast("MetricValue", found)  # what is not there is left out, as systemd does

    @varlinkmethod
    async def Describe(self) -> AsyncIterator[MetricFamily]:
        """Return every metric, with its type and what it means; call it with `more`."""
        for metric in METRICS:
            yield {
                "name": f"{INTERFACE}.{metric.name}",
                "description": metric.help,
                "type": MetricFamilyType[metric.type.value],
            }
