# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod's dataclasses behave as those of the standard library do."""

import dataclasses
import inspect
import re
from typing import Any

import pytest

from khod import dataclass


class Plain:
    one: int
    two: list[int] = dataclasses.field(default_factory=list)
    three: str = dataclasses.field(default="3", compare=False)
    four: str = dataclasses.field(default="4", repr=False)


class OnlyByName:
    one: int = 1
    two: int


class Trimmed:
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.text.strip())


def both(cls: type[Any], **options: Any) -> tuple[Any, Any]:
    """Return a class made by the standard library, and the same made by khod."""

    def copy() -> type[Any]:
        return type(cls.__name__, (), {**vars(cls), "__qualname__": cls.__qualname__})

    options = {"frozen": True} | options
    return dataclasses.dataclass(**options)(copy()), dataclass.dataclass(**options)(copy())


CALLS: list[tuple[type[Any], dict[str, Any], list[tuple[tuple[Any, ...], dict[str, Any]]]]] = [
    (Plain, {}, [((1,), {}), ((1, [2]), {"four": "x"}), ((1, [2], "x"), {}), ((), {}), ((1,), {"five": 5})]),
    (OnlyByName, {"kw_only": True}, [((), {"two": 2}), ((), {"two": 2, "one": 3}), ((1,), {}), ((), {})]),
    (Trimmed, {}, [((" text ",), {})]),
]


@pytest.mark.parametrize(("cls", "options", "calls"), CALLS, ids=lambda found: getattr(found, "__name__", ""))
def test_an_instance_is_what_the_standard_library_makes(
    cls: type[Any], options: dict[str, Any], calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    theirs, ours = both(cls, **options)
    with pytest.raises(TypeError, match="no_field"):
        ours(no_field=1)  # its `__init__` is compiled from now on, where that of a new class is not
    for args, keywords in calls:
        for made in (ours, both(cls, **options)[1]):
            try:
                expected = theirs(*args, **keywords)
            except TypeError as error:
                with pytest.raises(TypeError, match=re.escape(str(error).partition("__init__")[2])):
                    made(*args, **keywords)
                continue
            found = made(*args, **keywords)
            assert repr(found) == repr(expected)
            assert dataclasses.asdict(found) == dataclasses.asdict(expected)
            assert dataclasses.replace(found) == found
    assert ours.__match_args__ == theirs.__match_args__
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_two_are_equal_by_the_fields_that_are_compared() -> None:
    _, ours = both(Plain)
    _, other = both(Plain)
    assert ours(1, [2], "a") == ours(1, [2], "b") != ours(1, [3])
    assert ours(1) != ours(1, four="5")
    assert ours(1) != other(1)
    assert len({ours(1, (), "a"), ours(1, (), "b"), ours(2, ())}) == 2


def test_an_instance_shares_nothing_and_stays_as_it_is() -> None:
    _, ours = both(Plain)
    one = ours(1)
    assert one.two is not ours(1).two
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.one = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.other = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.one
    assert one == ours(1)


def test_one_that_is_not_frozen_can_be_changed() -> None:
    theirs, ours = both(Plain, frozen=False)
    one, other = ours(1), ours(2)
    assert one != other
    one.one = 2
    assert one == other
    assert repr(one) == repr(theirs(2))
    with pytest.raises(TypeError):
        hash(one)


def test_one_without_eq_is_equal_to_itself_alone() -> None:
    _, ours = both(Plain, frozen=False, eq=False)
    one, other = ours(1), ours(1)
    assert one == one != other  # noqa: PLR0124
    assert len({one, other}) == 2
