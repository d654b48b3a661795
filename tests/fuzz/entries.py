# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boot entries, GRUB's environment block and loader.conf: damaged, and the loader's default looked for among them."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

from khoctl.boot import sources
from khod.errors import KhoError
from tests.fuzz import corpus
from tests.fuzz.damage import damaged
from tests.fuzz.spoken import spoken

PLACES = {
    "entry": "boot/loader/entries/{}.conf",
    "grubenv": "boot/grub2/grubenv",
    "loader": "boot/loader/loader.conf",
    "uki": "boot/EFI/Linux/{}.efi",
    "os-release": "etc/os-release",
}
"""Where a file of the corpus goes, by what its name begins with."""
INSTALLED = {"boot/vmlinuz-6.12": b"x", "boot/initramfs-6.12.img": b"x"}
NAMES = ("a", "b-6.10", "b-6.9+3-1", "c+0", "c+007-99999999", "ä", "+1", "x" * 200)
NAMES_IN = re.compile(r"(?<=entry )\S+|(?<=starts ).*|(?<=^\$)\w+|(?<=is for )[^,]*|(?<=profile )\S+")
"""What an error quotes of a file without quotation marks: two that differ in that alone are one ending."""


@dataclass(frozen=True)
class Case:
    """Files by their path below a root."""

    files: dict[str, bytes]


SEEDS = corpus.seeds("entries")


def made(number: int) -> Case:
    """The case of this number: one of each kind of file, each of them damaged or not, two entries."""
    chance = Random(number)
    files = dict(INSTALLED)
    for kind in ("entry", "entry", *PLACES):
        if chance.random() < 0.6:
            seed = chance.choice([name for name in sorted(SEEDS) if name.startswith(kind)])
            data = SEEDS[seed]
            if chance.random() < 0.7:
                data = damaged(data, (), SEEDS[chance.choice(sorted(SEEDS))], chance)
            files[PLACES[kind].format(chance.choice(NAMES))] = data
    return Case(files)


def alone(name: str, data: bytes) -> Case:
    """A file of the corpus alone, beside a kernel."""
    kind = next(kind for kind in PLACES if name.startswith(kind))
    return Case(INSTALLED | {PLACES["entry"].format("whole"): SEEDS["entry-debian"], PLACES[kind].format("a"): data})


def held(case: Case) -> str:
    """Look for the entry that would be booted; "" where there is one, else what is said instead."""
    said = []
    with tempfile.TemporaryDirectory(prefix="khod-fuzz-") as directory:
        root = Path(directory)
        for path, data in case.files.items():
            place = root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        for wanted in (None, "a"):
            try:
                sources.source_of_entry(wanted, root)
            except KhoError as error:
                said.append(NAMES_IN.sub("N", spoken(error)))
    return "; ".join(said)
