# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the model by hand: `python -m tests.model RULES [SEED]`, or `--replay FILE`.

Prints what was run, how many states were reached, and the smallest list of rules that breaks an invariant.
"""

import argparse
import random
import sys
import time
from pathlib import Path

from tests.model import bugs
from tests.model.invariants import INVARIANTS, Violation
from tests.model.machine import STEPS, Count, example, explore, quiet
from tests.model.reduce import reduced
from tests.model.rules import RULES
from tests.model.script import replay, written

CHUNK = 500
"""Examples between two lines of progress; hypothesis remembers each of them for as long."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.model")
    parser.add_argument("rules", type=int, nargs="?", default=100_000)
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument("--hypothesis", action="store_true", help="have hypothesis draw the rules: half as fast")
    parser.add_argument("--known", default="", help="names of invariants that are not held, by commas")
    parser.add_argument("--without", default="", help="names of rules to leave out, by commas")
    parser.add_argument("--steps", type=int, default=STEPS, help="rules of one example, at most")
    parser.add_argument("--findings", type=int, default=1, help="go on until so many were found")
    parser.add_argument("--replay", type=Path, help="carry out the rules in this file")
    parser.add_argument("--bugs", action="store_true", help="plant each bug, and see that it is found")
    parser.add_argument("--save", type=Path, help="write each counterexample here, with its number")
    return parser.parse_args()


def chunk(number: int, chosen: argparse.Namespace) -> None:
    """So many examples; Violation from the first that fails."""
    if chosen.hypothesis:
        explore(CHUNK, steps=chosen.steps, shrink=False, number=number)
        return
    generator, left_out = random.Random(number), chosen.without.split(",")
    rules = [one for one in RULES if one.name not in left_out]
    for _ in range(CHUNK):
        example(generator, chosen.steps, rules)


def main() -> int:
    chosen = options()
    known = frozenset(name for name in chosen.known.split(",") if name)
    assert known <= INVARIANTS.keys(), f"unknown: {known - INVARIANTS.keys()}"
    if chosen.bugs:
        return 0 if bugs.find_all() else 1
    if chosen.replay is not None:
        try:
            replay(chosen.replay, known)
        except Violation as violation:
            print(f"VIOLATION {violation}")
            return 1
        return 0
    Count.known = known
    began, number, findings = time.perf_counter(), chosen.seed, 0
    while Count.rules < chosen.rules and findings < chosen.findings:
        try:
            chunk(number, chosen)
        except Violation as error:
            findings += 1
            text = written(*reduced(Count.setting, Count.log, known))
            print(f"seed {number}: {error}\n{text}", flush=True)
            if chosen.save is not None:
                Path(f"{chosen.save}-{findings}").write_text(text)
        except BaseException:
            print(written(Count.setting, Count.log))
            raise
        number += 1
        report(began)
    return 1 if findings else 0


def report(began: float) -> None:
    took = time.perf_counter() - began
    rate = took / max(Count.rules, 1) * 1e3
    print(f"{Count.rules} rules, {len(Count.states)} states, {took:.0f} s, {rate:.2f} ms a rule", flush=True)


if __name__ == "__main__":
    with quiet():
        code = main()
    sys.exit(code)
