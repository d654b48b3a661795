# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run what takes too long for `make test`: every repetition, every scenario, a million rules of the model.

`python -m tests.proof [PART...]` writes what each part printed below dist/proof, and its line of the summary, with the
commit it ran on, to tests/proof.txt, which is committed. Exits with 1 where a part failed.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LOGS = REPOSITORY / "dist/proof"
SUMMARY = REPOSITORY / "tests/proof.txt"
PYTEST = ("-m", "pytest", "-n", "2", "--dist", "loadfile")
PARTS = {
    "unit": (*PYTEST, "tests/unit"),
    "bugs": ("-m", "tests.model", "--bugs"),
    "model": ("-m", "tests.model", "1000000", "1"),
    "lab": (*PYTEST, "-m", "proof", "tests/lab"),
}
"""The scenarios of `make test` are not run again."""


def git(*words: str) -> str:
    """Give what git prints."""
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()


def run(name: str) -> tuple[bool, str]:
    """Run a part; whether it passed, and its line of the summary."""
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no", ".", ":!tests/proof.txt") else ""
    commit = f"{git('rev-parse', '--short=12', 'HEAD')}{changed}"
    log, began = LOGS / f"{name}.log", time.monotonic()
    with log.open("wb") as output:
        code = subprocess.run(
            [sys.executable, *PARTS[name]],
            cwd=REPOSITORY,
            env=os.environ | {"KHO_PROOF": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    printed = log.read_text(errors="replace").split("\n")
    last = next((line.strip("= ") for line in reversed(printed) if line.strip("= ")), "nothing was printed")
    took = time.monotonic() - began
    end = "passed" if code == 0 else f"FAILED ({code})"
    return code == 0, f"{name:6} {commit} {time.strftime('%Y-%m-%d')} {end} in {took:.0f} s: {last}"


def main() -> int:
    """Run the parts that are named, or all of them."""
    names = sys.argv[1:] or [*PARTS]
    if unknown := sorted({*names} - PARTS.keys()):
        print(f"No such part: {', '.join(unknown)}. There are: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    lines = {line.split()[0]: line for line in SUMMARY.read_text().splitlines()} if SUMMARY.exists() else {}
    passed = True
    for name in names:
        good, lines[name] = run(name)
        passed &= good
        print(lines[name], flush=True)
        SUMMARY.write_text("".join(f"{lines[part]}\n" for part in PARTS if part in lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
