# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options that several commands have, as one dataclass: a field has the name and the annotation of its option."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Concatenate, TypeVar

T = TypeVar("T")


def spread_options(command: Callable[Concatenate[T, ...], None]) -> Callable[..., None]:
    """Return a command for typer in which the fields of the first parameter's dataclass replace this parameter.

    `command` receives these options as one object, and its other parameters by name.
    """
    first, *others = inspect.signature(command).parameters.values()
    options = fields(first.annotation)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(first.annotation(**{field.name: given.pop(field.name) for field in options}), **given)

    spread = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in options
    ]
    spread += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in others]
    vars(run)["__signature__"] = inspect.Signature(spread, return_annotation=None)
    return run
