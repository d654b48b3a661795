# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's command line: what of the operator's cannot go through a kexec, and what khod-vm adds to it.

The guest's RAM is a memfd of khod-vm's, and the machine type a versioned one: the QEMU that takes the guest back in the
next kernel may be a newer one, and its `q35` another machine.
"""

import re
from collections.abc import Iterator, Sequence

from khod.errors import UsageError

MEMORY_NAME = "khod-ram"
QMP_NAME = "khod-qmp"
UNITS = {"": 1 << 20, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
"""Of a size in -m: without a letter it is in MiB."""
SIZE = re.compile(r"(?:size=)?(?P<number>\d+)(?P<unit>[bkmgtBKMGT]?)")
ALIAS = re.compile(r"\(alias of (?P<machine>[^)\s]+)\)")
MACHINE_OPTIONS = ("machine", "M")
REFUSED_OPTIONS = {
    "daemonize": "khod-vm must see QEMU's end",
    "incoming": "khod-vm decides when the guest arrives",
    "mem-path": "the guest's RAM is a memfd of khod-vm's",
    "mem-prealloc": "the guest's RAM is a memfd of khod-vm's",
    "loadvm": "a snapshot would replace the state that was handed over",
    "snapshot": "what the guest writes would be lost in the jump",
    "readconfig": "khod-vm must see all of QEMU's options",
    "numa": "the guest's RAM is one memfd",
    "add-fd": "a descriptor does not survive the jump",
}
"""Options that cannot go through a kexec, with the reason."""
REFUSED_VALUES = (
    ("object", re.compile(r"memory-backend-"), "the guest's RAM is a memfd of khod-vm's: give its size with -m"),
    ("machine", re.compile(r"\bmemory-backend="), "the guest's RAM is a memfd of khod-vm's: give its size with -m"),
    ("m", re.compile(r"\b(?:slots|maxmem)="), "memory that is plugged in later would have no file"),
    ("device", re.compile(r"vfio-|vhost-user-|vhost-scsi|vhost-vsock"), "a device of the host cannot be handed over"),
    ("netdev", re.compile(r"(?:^|,)(?:fd|fds|vhostfd|vhostfds|sock)="), "a descriptor does not survive the jump"),
    ("netdev", re.compile(r"vhost-user|vhost-vdpa"), "a device of the host cannot be handed over"),
    ("chardev", re.compile(r"(?:^|,)fd="), "a descriptor does not survive the jump"),
    ("drive", re.compile(r"\bsnapshot=on"), "what the guest writes would be lost in the jump"),
)
"""Values that cannot, by option: a pattern and the reason. `fd:` in any value is refused besides."""
INHERITED = re.compile(r"(?:^|[,=])(?:fd:|/dev/fd/|/proc/self/fd/)")


def check_command(command: Sequence[str]) -> int:
    """Return the bytes of RAM of the operator's command line; UsageError for what cannot go through a kexec."""
    size = 0
    for option, value in list_options(command[1:]):
        if why := REFUSED_OPTIONS.get(option):
            raise _refuse(option, why)
        name = "machine" if option in MACHINE_OPTIONS else option
        for refused, pattern, why in REFUSED_VALUES:
            if name == refused and pattern.search(value):
                raise _refuse(f"{option} {value}", why)
        if INHERITED.search(value):
            raise _refuse(f"{option} {value}", "a descriptor does not survive the jump")
        if option == "m":
            size = _parse_size(value)
    if not size:
        raise UsageError("The command has no -m", where="command", remedy="Give the size of the guest's RAM: -m 1G")
    return size


def pin_machine(command: Sequence[str], listed: str) -> list[str]:
    """Return the command with a versioned machine type; `listed` is what QEMU prints for `-machine help`."""
    aliases: dict[str, str] = {}
    default = ""
    for line in listed.splitlines():
        name, _, text = line.partition(" ")
        if found := ALIAS.search(text):
            aliases[name] = found["machine"]
        if "(default)" in text:
            default = name
    pinned, has_type = [command[0]], False
    words = iter(command[1:])
    for word in words:
        pinned.append(word)
        if word.lstrip("-") in MACHINE_OPTIONS and word.startswith("-"):
            kind, comma, rest = next(words, "").partition(",")
            prefix = "type=" if kind.startswith("type=") else ""
            kind = kind.removeprefix("type=")
            has_type = has_type or "=" not in kind
            pinned.append(f"{prefix}{aliases.get(kind, kind)}{comma}{rest}")
    if not has_type:
        if not default:
            raise UsageError("QEMU has no default machine", where="command", remedy="Name one: -machine q35")
        pinned += ["-machine", default]
    return pinned


def complete_command(command: Sequence[str], memory: int, size: int, qmp: int, *, incoming: bool) -> list[str]:
    """Return the command line to execute, with two descriptors of khod-vm's: the RAM, and a listening QMP socket."""
    backend = f"memory-backend-file,id={MEMORY_NAME},size={size},mem-path=/proc/self/fd/{memory},share=on"
    added = ["-object", backend, "-machine", f"memory-backend={MEMORY_NAME}"]
    added += ["-chardev", f"socket,id={QMP_NAME},fd={qmp},server=on,wait=off"]
    added += ["-mon", f"chardev={QMP_NAME},mode=control"]
    return [*command, *added, *(["-incoming", "defer"] if incoming else [])]


def list_options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each option without its dashes, and its value ("" for one without)."""
    for at, word in enumerate(words):
        if word.startswith("-") and len(word) > 1:
            following = words[at + 1] if at + 1 < len(words) else ""
            yield word.lstrip("-"), "" if following.startswith("-") else following


def _parse_size(value: str) -> int:
    found = SIZE.fullmatch(value.partition(",")[0])
    if found is None or not int(found["number"]):
        raise UsageError(f"-m {value} is not a size", where="command", remedy="For example: -m 1G")
    return int(found["number"]) * UNITS[found["unit"].lower()]


def _refuse(option: str, why: str) -> UsageError:
    return UsageError(f"-{option} cannot go through a kexec: {why}", where="command", remedy="Leave it out.")
