# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which units of a host are stopped before the jump, for which reason others stay, and what is in the way."""

import pytest

from khod.quiesce.selection import Selection, UnitFacts, select_units

KHOD = UnitFacts("kho-handover.service", after=("dbus.service", "network.target"), needs=("kho-handover.socket",))
WANTED = {"kho-*": "it is khod's"}


def select(*units: UnitFacts, **wanted: str) -> Selection:
    return select_units([KHOD, UnitFacts("kho-handover.socket"), *units], WANTED | wanted)


def stopped(*units: UnitFacts) -> list[str]:
    return list(select(*units).stopped)


def test_triggers_are_stopped_before_services_and_started_after_them() -> None:
    units = [UnitFacts(name) for name in ("a.service", "a.socket", "a.timer", "a.path")]
    found = select(*units)
    assert found.stopped == ("a.timer", "a.path", "a.socket", "a.service")
    assert found.start_order == ("a.service", "a.socket", "a.path", "a.timer")


STAYS = {
    "what would end the host": UnitFacts("guard.service", ends_host="reboot"),
    "a timer that has elapsed": UnitFacts("once.timer", elapsed=True),
    "a timer that would fire at once": UnitFacts("boot.timer", fires_at_start=True),
    "what khod is ordered after": UnitFacts("dbus.service"),
    "a scope": UnitFacts("session-1.scope"),
    "a mount": UnitFacts("srv.mount"),
    "a getty": UnitFacts("getty@tty1.service"),
    "the way in by SSH": UnitFacts("ssh.service"),
    "the base of the system": UnitFacts("systemd-journald.service", early=True),
    "what carries the network": UnitFacts("NetworkManager.service", before=("network.target",)),
    "what has done its work": UnitFacts("once.service", type="oneshot"),
    "what has ended": UnitFacts("ended.service", active="inactive"),
    "what had failed before": UnitFacts("failed.service", active="failed"),
}


@pytest.mark.parametrize("unit", STAYS.values(), ids=STAYS)
def test_what_is_left_alone(unit: UnitFacts) -> None:
    found = select(unit, UnitFacts("a.service"))
    assert found.stopped == ("a.service",)
    assert not found.obstacles


def test_what_a_kept_unit_needs_stays_and_what_that_needs_too() -> None:
    units = [
        UnitFacts("store.service", needs=("db.service",), after=("cache.service", "basic.target")),
        UnitFacts("db.service", needs=("db.socket",)),
        UnitFacts("db.socket"),
        UnitFacts("cache.service"),
        UnitFacts("basic.target", after=("other.socket",)),
        UnitFacts("other.socket"),
    ]
    found = select(*units, **{"store.service": "producer store needs it"})
    assert found.stopped == ("other.socket",), "not through a target, which is ordered after half of the host"
    assert dict(found.kept)["store.service"] == "producer store needs it"
    assert dict(found.kept)["db.socket"] == "db.service needs it"


def test_a_unit_is_kept_by_its_other_name_too() -> None:
    nicked = UnitFacts("b.service", aliases=("b.service", "nick.service"))
    assert select(nicked, **{"nick.service": "quiesce.keep names it"}).stopped == ()


def test_what_would_take_a_kept_unit_with_it_stays() -> None:
    units = [
        UnitFacts("a.service", stops_too=("b.service",)),
        UnitFacts("b.service", stops_too=("once.service",)),
        UnitFacts("once.service", type="oneshot"),
        UnitFacts("c.service", stops_too=("vm.scope",)),
        UnitFacts("vm.scope"),
        UnitFacts("d.service", stops_too=("gone.mount",)),
    ]
    assert stopped(*units) == ["d.service"]


def test_what_a_kept_unit_stops_without_stays() -> None:
    """An active oneshot with StopWhenUnneeded= would be stopped by systemd, and lose its InvocationID."""
    units = [
        UnitFacts("a.service", needs=("once.service",)),
        UnitFacts("once.service", type="oneshot", stops_unneeded=True),
        UnitFacts("b.service", needs=("twice.service", "c.service")),
        UnitFacts("twice.service", type="oneshot"),
        UnitFacts("c.service", stops_unneeded=True),
        UnitFacts("d.service", needs=("data.mount",)),
        UnitFacts("data.mount", stops_unneeded=True),
    ]
    assert stopped(*units) == ["b.service", "c.service"]


def test_what_a_kept_unit_upholds_stays() -> None:
    """Systemd would start it again each time (Upholds=)."""
    units = [
        UnitFacts("a.service", upheld_by=("base.service",)),
        UnitFacts("base.service", early=True),
        UnitFacts("b.service", upheld_by=("c.service",)),
        UnitFacts("c.service"),
    ]
    assert stopped(*units) == ["b.service", "c.service"]


def test_a_trigger_of_a_kept_service_stays() -> None:
    kept = UnitFacts("dbus.service")
    assert stopped(kept, UnitFacts("dbus.socket", triggers=("dbus.service",)), UnitFacts("b.timer")) == ["b.timer"]


@pytest.mark.parametrize("state", ["active", "reloading", "activating"])
def test_whatever_has_not_ended_is_stopped(state: str) -> None:
    """A service with Restart=always is `activating` between two tries, without a job."""
    assert stopped(UnitFacts("a.service", active=state)) == ["a.service"]


OBSTACLES = {
    "transient": UnitFacts("a.service", transient=True),
    "thaw": UnitFacts("a.service", frozen=True),
    "manual stop": UnitFacts("a.service", can_stop=False),
    "manual start": UnitFacts("a.service", can_start=False),
    "masked": UnitFacts("a.service", file_state="masked-runtime"),
    "without a unit file": UnitFacts("a.service", load="not-found"),
}


@pytest.mark.parametrize(("word", "unit"), OBSTACLES.items(), ids=OBSTACLES)
def test_what_could_not_be_started_again_is_in_the_way(word: str, unit: UnitFacts) -> None:
    (obstacle,) = select(unit, UnitFacts("b.service")).obstacles
    assert obstacle.startswith("a.service: ")
    assert word in obstacle
    assert not select(unit, **{"a.*": "quiesce.keep names it"}).obstacles, "a pattern keeps it"


def test_what_serves_one_connection_is_in_the_way() -> None:
    """Its start job would be done, and the service fail: there is no connection any more."""
    units = [UnitFacts("a@1-2-0.service"), UnitFacts("a.socket", accepts=True, triggers=("a@1-2-0.service",))]
    (obstacle,) = select(*units).obstacles
    assert obstacle == "a@1-2-0.service: serves one connection, and cannot be started again"
    assert not select(*units, **{"a@*": "quiesce.keep names it"}).obstacles
    assert not select(UnitFacts("a.service"), UnitFacts("a.socket", triggers=("a.service",))).obstacles
