# SPDX-License-Identifier: LGPL-2.1-or-later
"""A list of rules as text: what a counterexample is written as, and carried out again from."""

import ast
from pathlib import Path

from tests.model.ground import Setting
from tests.model.world import World


def written(setting: Setting, log: list[tuple[object, ...]]) -> str:
    """A list of rules, to be read again by `replay`."""
    lines = [f"{(setting.kernel, setting.files, setting.peers, setting.config, setting.chained)!r}"]
    return "\n".join([*lines, *(repr(entry).replace("inf", "1e999") for entry in log)]) + "\n"


def replay(path: Path, known: frozenset[str]) -> None:
    """Carry the rules of a file out and print what happens; Violation where an invariant does not hold."""
    setting, *rules = [ast.literal_eval(line) for line in path.read_text().splitlines() if line.strip()]
    world = World(Setting(*setting), known)
    heard = 0
    try:
        for name, *arguments in rules:
            try:
                world.do(name, *arguments)
            finally:
                khod = world.khod
                print(f"{world.clock.now:10.1f} {name}{tuple(arguments)}: {khod.phase.value if khod else 'no khod'}")
                for event in world.events[heard:]:
                    print(f"{'':14}{event.phase.value}: {event.message}")
                for operation in khod.operations if khod else ():
                    print(f"{'':14}{operation.kind}: {operation.outcome}")
                print(f"{'':14}{ {name: service.truth for name, service in world.services.items()} }")
                heard = len(world.events)
    finally:
        world.close()
