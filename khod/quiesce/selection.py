# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which units are stopped before the producers are frozen: a decision about facts, without any call.

Only services, sockets, timers and paths are stopped, and of these none that khod, a producer or an operator needs, nor
one that belongs to the base of the system. Scopes (sessions, virtual machines), mounts and slices stay as they are.
"""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from khod.dataclass import dataclass
from khod.text import join_names

TRIGGERS = (".timer", ".path", ".socket")
"""What may start a service, in the order in which they are stopped; they are started again after the services."""
STOPPABLE = (*TRIGGERS, ".service")
NOT_RUNNING = frozenset({"inactive", "failed", "deactivating"})
"""ActiveState of a unit that needs no stop job, and that the undo does not start."""
KHOD_UNITS = ("kho-*", "khod-*")
WAYS_IN = (
    *("getty@*.service", "serial-getty@*.service", "console-getty.service", "container-getty@*.service"),
    *("ssh.*", "ssh@*.service", "sshd.*", "sshd@*.service", "sshd-*", "user@*.service"),
)
"""An operator's ways in: to stop them would save nothing, and a stop that hangs must not lock the operator out."""
NETWORK_TARGETS = frozenset({"network-pre.target", "network.target"})
"""A service ordered before one of these sets the network up: an operator may have come over it."""
FILES_FOR_NEXT_KERNEL = ("/memfd:", "anon_inode:[luo_session]")
"""What systemd hands over of a unit's descriptor store; sockets and other files it does not."""


@dataclass(frozen=True)
class UnitFacts:
    """What is known of one active unit; each field is from a property of org.freedesktop.systemd1.

    `needs` are the units without which it would be stopped too, or does not work; `after` those that it is ordered
    after. `stops_too` are units that systemd stops together with it, `upheld_by` those for which systemd would start it
    again. `main_pid` is 0 without a main process.
    """

    name: str
    active: str = "active"
    aliases: tuple[str, ...] = ()
    load: str = "loaded"
    file_state: str = "enabled"
    type: str = ""
    main_pid: int = 0
    transient: bool = False
    early: bool = False
    """Whether it has DefaultDependencies=no: it belongs to the base of the system."""
    can_start: bool = True
    can_stop: bool = True
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    stops_too: tuple[str, ...] = ()
    upheld_by: tuple[str, ...] = ()
    stops_unneeded: bool = False
    """Whether systemd stops it together with the last unit that needs it (StopWhenUnneeded=)."""
    triggers: tuple[str, ...] = ()
    ends_host: str = ""
    """What systemd does with the whole host when the unit ends or fails, such as `reboot`; "" for nothing."""
    frozen: bool = False
    """Whether its cgroup is frozen: systemd queues no stop job then."""
    elapsed: bool = False
    """Whether it is a timer that has nothing left to start."""
    fires_at_start: bool = False
    """Whether it is a timer that would fire at once if it were started again, and does not for long by itself."""
    accepts: bool = False
    """Whether it is a socket with Accept=yes: each of the services that it triggers serves one connection."""
    preserves_store: bool = False
    """Whether `systemctl kexec` hands over what it has in its descriptor store."""
    stored_files: int = 0
    """How many files for the next kernel it has there."""


@dataclass(frozen=True)
class Selection:
    """The units to stop, in the order of their stop jobs; why others stay; and what is in the way, a sentence each."""

    stopped: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    obstacles: tuple[str, ...] = ()

    @property
    def running(self) -> tuple[str, ...]:
        """Every service, socket, timer and path that runs, whether it is stopped or stays."""
        return (*self.stopped, *(name for name, _ in self.kept))

    @property
    def start_order(self) -> tuple[str, ...]:
        """The same units, services first: a socket or a timer would start its service by itself."""
        return tuple(reversed(self.stopped))


def select_units(
    units: Iterable[UnitFacts], wanted: Mapping[str, str], holders: Mapping[str, str] | None = None
) -> Selection:
    """Select among the active units of a host.

    `wanted` has the units, or patterns of names, that must stay, with the reason; what they need stays too, and what
    they are ordered after. `holders` has single units that stay, with the reason, and nothing that they need.
    """
    known = {unit.name: unit for unit in units if unit.active not in NOT_RUNNING}
    kept = _find_kept(known, wanted) | {name: why for name, why in (holders or {}).items() if name in known}
    unneeded = {unit.name for unit in known.values() if unit.stops_unneeded}
    before = -1
    while len(kept) != before:  # a unit that stays may be a reason for others
        before = len(kept)
        for unit in known.values():
            if unit.name not in kept and (why := _find_reason(unit, kept, unneeded)):
                kept[unit.name] = why
    stopped = tuple(sorted(known.keys() - kept.keys(), key=lambda name: (_stop_rank(name), name)))
    shown = tuple((name, why) for name, why in sorted(kept.items()) if name.endswith(STOPPABLE))
    return Selection(stopped, shown, tuple(_find_obstacles(known, stopped)))


def find_ended(staying: Collection[str], running: Collection[str]) -> list[str]:
    """Return which of the units that are to stay do not run, but for those that come and go with a login or a call."""
    passing = (*KHOD_UNITS, *WAYS_IN, "user-runtime-dir@*.service")
    ended = sorted({*staying} - {*running})
    return [name for name in ended if not any(fnmatchcase(name, pattern) for pattern in passing)]


def _find_kept(known: Mapping[str, UnitFacts], wanted: Mapping[str, str]) -> dict[str, str]:
    """Return the wanted units, and what they need and are ordered after, with the reasons."""
    kept: dict[str, str] = {}
    for name in known:
        for pattern, why in wanted.items():
            if any(fnmatchcase(named, pattern) for named in (name, *known[name].aliases)):
                kept.setdefault(name, why)
    waiting = list(kept)
    while waiting:
        unit = known[waiting.pop()]
        for other in (*unit.needs, *unit.after):
            # Not through targets: network.target or basic.target is ordered after half of the host.
            if other in known and other not in kept and other.endswith(STOPPABLE):
                kept[other] = f"{unit.name} needs it"
                waiting.append(other)
    return kept


def _find_reason(unit: UnitFacts, kept: Mapping[str, str], unneeded: Collection[str]) -> str:
    """Return why a unit stays, "" if it does not; `unneeded` are the units with `stops_unneeded`."""
    if not unit.name.endswith(STOPPABLE):
        return "not a service, socket, timer or path"
    if any(fnmatchcase(unit.name, pattern) for pattern in WAYS_IN):
        return "an operator's way in"
    if unit.early:
        return "part of the system's base (DefaultDependencies=no)"
    if not NETWORK_TARGETS.isdisjoint(unit.before):
        return "it carries the network"
    if unit.ends_host:
        return f"its end would be the end of the host ({unit.ends_host})"
    if unit.elapsed:
        return "it has elapsed"
    if unit.fires_at_start:
        return "it would fire at once if it were started again"
    if unit.type == "oneshot":
        return "it has done its work (Type=oneshot)"
    if with_it := [name for name in unit.stops_too if name in kept]:
        return f"{with_it[0]} would stop with it"
    if without := [name for name in unit.needs if name in kept and name in unneeded]:
        return f"{without[0]} would stop without it"
    if upholding := [name for name in unit.upheld_by if name in kept]:
        return f"{upholding[0]} upholds it"
    triggered = [name for name in unit.triggers if name in kept]
    return f"it starts {triggered[0]}, which is kept" if triggered else ""


def _stop_rank(name: str) -> int:
    return next(rank for rank, suffix in enumerate(STOPPABLE) if name.endswith(suffix))


def _find_obstacles(known: Mapping[str, UnitFacts], stopped: Iterable[str]) -> Iterable[str]:
    """Return what would make an undo impossible, or a stop."""
    units = [known[name] for name in stopped]
    serving = {name for unit in known.values() if unit.accepts for name in unit.triggers}
    groups = (
        ([unit for unit in units if unit.transient], "transient, and cannot be started again"),
        ([unit for unit in units if unit.name in serving], "serves one connection, and cannot be started again"),
        ([unit for unit in units if unit.frozen], "frozen, and cannot be stopped before systemctl thaw"),
        ([unit for unit in units if not unit.can_stop], "refuses a manual stop"),
        ([unit for unit in units if unit.can_stop and not unit.can_start], "refuses a manual start"),
        ([unit for unit in units if unit.file_state.startswith("masked")], "masked, and could not be started again"),
        ([unit for unit in units if unit.load != "loaded"], "without a unit file that can be loaded"),
    )
    for group, why in groups:
        if group:
            yield f"{join_names(unit.name for unit in group)}: {why}"
