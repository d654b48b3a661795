# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules, as a table: what each does to the host, when it can be done, and the values it is done with.

Hypothesis draws from it (`tests.model.machine`), and so does a plain generator of random numbers, which is faster.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.model.faults import ASYNC_SITES, EXCEPTIONS, FOREVER, SITES, SYNC_SITES
from tests.model.ground import CONFIGS, FILES, NAMES, PEERS, VERBS, Setting
from tests.model.kernel import OTHER, STATELESS, V3
from tests.model.world import World

THEN = ("end",) * 6 + (0, 0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 0.0, 1.5, 12.0, 70.0)
"""How long to go on afterwards, see `World.run`."""
IMAGES = (V3, STATELESS, OTHER, "same", "same", "same", "same", "same")
SECONDS = (0.5, 3.0, 11.0, 35.0, 130.0, 5000.0, FOREVER)
NTH = (1, 1, 1, 2, 2, 3, 5, 8)
QUERIES = ("kernel.read", "disk.read", "disk.space")
LONG = ("hang", "late", "not_yet")
BOTH = (False, True)
SELDOM = (False, False, True)


def always(_world: World) -> bool:
    return True


def has_khod(world: World) -> bool:
    return world.khod is not None


def has_none(world: World) -> bool:
    return world.khod is None


def is_loaded(world: World) -> bool:
    return world.kernel.loaded


def has_job(world: World) -> bool:
    return world.systemd.job is not None


@dataclass(frozen=True)
class Rule:
    """One rule; `does` is the name of the World's method without `do_`, `values` what each argument is chosen from."""

    name: str
    does: str
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    when: Callable[[World], bool] = always
    weight: int = 1
    """How often it is chosen, against the others."""

    def arguments(self, chosen: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the World's method is given."""
        if self.name == "behave":
            if chosen["kind"] not in LONG:
                chosen = {**chosen, "seconds": 0.0, "stubborn": 0.0}
        elif self.name == "call_fails":
            chosen = {**chosen, "seconds": 0.0}
        elif self.name == "call_hangs":
            chosen = {**chosen, "error": ""}
        names = ORDERS.get(self.does, tuple(self.values))
        return tuple(chosen[name] for name in names)


ORDERS = {"fault": ("site", "when", "error", "seconds", "nth")}
"""The order of arguments where it is not that of the values."""

RULES = (
    # What an operator asks
    Rule("activate", "activate", {"then": THEN}, has_khod, weight=3),
    Rule("kexec", "kexec", {"image": IMAGES, "now": BOTH, "hold": SELDOM, "then": THEN}, has_khod, weight=4),
    Rule("kexec_loaded", "kexec", {"image": (None,), "now": BOTH, "hold": SELDOM, "then": THEN}, has_khod, weight=2),
    Rule("load_only", "load", {"image": IMAGES, "hold": SELDOM, "then": THEN}, has_khod, weight=2),
    Rule("abort", "abort", {"force": SELDOM, "then": THEN}, has_khod, weight=2),
    Rule("forget", "forget", {"name": NAMES, "then": THEN}, has_khod),
    Rule("rehearse", "rehearse", {"name": NAMES, "then": THEN}, has_khod),
    Rule("check", "check", {"then": THEN}, has_khod),
    Rule("status", "status", {"then": THEN}, has_khod),
    Rule("reload", "reload", {"number": range(len(CONFIGS))}),
    Rule("go_on", "run", {"then": THEN}, weight=3),
    # What producers do
    Rule(
        "behave",
        "behave",
        {
            "name": NAMES,
            "verb": VERBS + VERBS[:4],
            "kind": ("veto", "hang", "hang", "die", "late", "leave", "not_yet", "garbage", "broken"),
            "seconds": SECONDS,
            "first": BOTH,
            "stubborn": (0.0, 0.0, 40.0, 5000.0),
        },
        weight=3,
    ),
    Rule("die", "die", {"name": NAMES}),
    Rule("leave", "leave", {"name": PEERS}),
    Rule("come", "come", {"name": NAMES}),
    Rule("add_file", "add_file", {"name": (*FILES, PEERS[0])}),
    Rule("remove_file", "remove_file", {"name": (*FILES, PEERS[0])}),
    Rule("break_files", "break_files", {"broken": SELDOM}),
    # What the host does
    Rule("device", "device", {"action": ("add", "remove"), "subsystem": ("memory", "pci", "net")}, has_khod),
    Rule("foreign_load", "foreign_load", {"image": (V3, STATELESS)}),
    Rule("foreign_unload", "foreign_unload", {}, is_loaded),
    Rule("foreign_write", "foreign_write", {"active": BOTH}),
    Rule("foreign_jump", "foreign_jump", {}, is_loaded),
    Rule("disk", "disk", {"trouble": ("", "", "full", "read-only")}),
    Rule(
        "call_fails",
        "fault",
        {"site": SITES, "when": ("before", "after"), "error": tuple(EXCEPTIONS), "nth": NTH},
        weight=2,
    ),
    Rule(
        "call_hangs",
        "fault",
        {"site": (*SYNC_SITES, *ASYNC_SITES), "when": ("before", "after"), "seconds": SECONDS, "nth": NTH},
        weight=2,
    ),
    Rule("next_jump", "next_jump", {"what": ("lose", "cold", "change")}),
    Rule("systemd", "systemd", {"what": ("carries", "answers"), "value": BOTH}),
    Rule("damage", "damage", {"how": ("cut", "newer", "removed")}),
    # How it ends
    Rule(
        "kill_at",
        "kill_at",
        {
            "site": ("", *(site for site in SITES if site not in QUERIES)),
            "when": ("before", "after"),
            "nth": (1, 1, 2, 3, 5, 8, 13, 21, 34),
        },
        has_khod,
        weight=2,
    ),
    Rule("kill", "kill", {"completes": BOTH}, has_khod),
    Rule("start", "start", {"then": THEN}, has_none, weight=3),
    Rule("sigterm", "sigterm", {"then": THEN}, has_khod),
    Rule("shutdown", "shutdown", {"kexec": BOTH}),
    Rule("shutdown_ends", "shutdown_ends", {}, has_job),
    Rule("shutdown_goes_on", "shutdown_goes_on", {}, has_job, weight=4),
    Rule("power_loss", "power_loss", {"choice": range(81)}),
)

SETTINGS: Mapping[str, Sequence[Any]] = {
    "kernel": (V3, STATELESS),
    "files": (FILES[:1], FILES[:2], FILES, ()),
    "peers": ((), PEERS[:1], PEERS),
    "config": range(len(CONFIGS)),
    "chained": BOTH,
}
"""What hosts there are."""


def setting_of(chosen: Mapping[str, Any]) -> Setting:
    return Setting(**chosen)
