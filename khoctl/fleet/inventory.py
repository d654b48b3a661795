# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hosts of an inventory: a list, Ansible's INI, or the JSON of `ansible-inventory --list`."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from khoctl.remote import require_host
from khod.dataclass import dataclass
from khod.errors import UsageError, errno_text

MAX_INVENTORY_BYTES = 16 << 20
MAX_HOSTS = 20_000
RANGE = re.compile(r"\[(\d+):(\d+)(?::(\d+))?\]")
"""Ansible's range of numbers in a name: `web[01:20]`."""
SECTION = re.compile(r"\[([^\]:]+)(?::(\w+))?\]")
YAML_NAMES = (".yml", ".yaml")
YAML_SECONDS = 60.0
REMEDY = "Give a file of one USER@HOST a line, an INI inventory, or what `ansible-inventory --list` prints."


@dataclass(frozen=True)
class FleetMember:
    """A host by its name in the inventory, and the destination by which ssh reaches it."""

    name: str
    destination: str


def read_inventory(path: str) -> list[FleetMember]:
    """Return the hosts of an inventory file, `-` for standard input; each once, in the order of the file.

    A YAML inventory is read by ansible-inventory. Raises UsageError if the file cannot be read or names no host.
    """
    text = _list_by_ansible(path) if path.endswith(YAML_NAMES) else _read_text(path)
    try:
        members = join_members(_parse_json(text) if text.lstrip().startswith("{") else _parse_lines(text, path))
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise UsageError("The inventory is not valid JSON of ansible-inventory", where=path, remedy=REMEDY) from None
    if not members:
        raise UsageError("The inventory names no host", where=path, remedy=REMEDY)
    return members


def join_members(found: Iterable[FleetMember]) -> list[FleetMember]:
    """Return each host once, by its name; raise UsageError for more than MAX_HOSTS or for what is no host."""
    members: dict[str, FleetMember] = {}
    for number, member in enumerate(found):
        members.setdefault(member.name, member)
        require_host(member.destination)
        if number >= MAX_HOSTS:
            raise UsageError(f"More than {MAX_HOSTS} hosts", where="inventory", remedy="Split the inventory.")
    return list(members.values())


def name_member(destination: str) -> FleetMember:
    """Return a host that is named by its destination alone."""
    return FleetMember(destination, destination)


def _read_text(path: str) -> str:
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_INVENTORY_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MAX_INVENTORY_BYTES + 1)
    except (OSError, ValueError) as error:
        why = errno_text(error) if isinstance(error, OSError) else str(error)
        raise UsageError(f"The inventory cannot be read: {why}", where=path, remedy=REMEDY) from None
    if len(data) > MAX_INVENTORY_BYTES:
        raise UsageError("The inventory is too large", where=path, remedy=f"At most {MAX_INVENTORY_BYTES >> 20} MiB.")
    return data.decode(errors="backslashreplace")


def _list_by_ansible(path: str) -> str:
    command = ["ansible-inventory", "-i", path, "--list"]
    try:
        ended = subprocess.run(  # noqa: S603 - no shell
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=YAML_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        raise UsageError(
            "A YAML inventory is read by ansible-inventory, which cannot be run here",
            where=path,
            remedy="Where it is: ansible-inventory -i FILE --list, and give its output with `--inventory -`.",
        ) from None
    if ended.returncode:
        last = ended.stderr.decode(errors="backslashreplace").strip().rpartition("\n")[2]
        raise UsageError(f"ansible-inventory cannot read it: {last}", where=path, remedy=REMEDY)
    return ended.stdout.decode(errors="backslashreplace")


def _parse_json(text: str) -> Iterator[FleetMember]:
    """Yield the hosts of `ansible-inventory --list`: those of each group, with their variables."""
    found: dict[str, Any] = json.loads(text)
    variables = found.get("_meta", {}).get("hostvars", {})
    names = [name for group, about in found.items() if group != "_meta" for name in about.get("hosts", ())]
    for name in dict.fromkeys([*names, *variables]):
        yield _make_member(str(name), _as_texts(variables.get(name, {})))


def _as_texts(variables: dict[Any, Any]) -> dict[str, str]:
    """Return the variables that have a value; Ansible writes null for one that has none."""
    return {str(key): str(value) for key, value in variables.items() if value is not None}


def _parse_lines(text: str, path: str) -> Iterator[FleetMember]:
    """Yield the hosts of a list or of an INI inventory; a group's variables apply to the hosts listed in it."""
    kept: list[tuple[str, str, dict[str, str]]] = []
    groups: dict[str, dict[str, str]] = {}
    group, kind = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = [] if line.lstrip().startswith(";") else shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"The line cannot be read: {error}", where=f"{path}:{number}", remedy=REMEDY) from None
        if not words:
            continue
        if section := SECTION.fullmatch(words[0]):
            group, kind = section[1], section[2] or ""
        elif words[0].startswith("["):
            raise UsageError("A section is [GROUP], or [GROUP:vars]", where=f"{path}:{number}", remedy=REMEDY)
        elif kind == "vars":
            key, _, value = " ".join(words).partition("=")
            groups.setdefault(group, {})[key.strip()] = value.strip()
        elif not kind:
            given = dict(word.split("=", 1) for word in words[1:] if "=" in word)
            if len(given) < len(words) - 1:
                raise UsageError("A line has one host, and KEY=VALUE after it", where=f"{path}:{number}", remedy=REMEDY)
            kept.append((words[0], group, given))
    for pattern, of_group, given in kept:
        for name in expand_range(pattern):
            yield _make_member(name, {**groups.get("all", {}), **groups.get(of_group, {}), **given})


def expand_range(pattern: str) -> Iterator[str]:
    """Yield the names of a pattern with ranges of numbers, as `web[01:20]`; a name without one as it is."""
    found = RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last, step = int(found[1]), int(found[2]), int(found[3] or 1)
    if step < 1 or last - first > MAX_HOSTS:
        raise UsageError(f"The range {found[0]} is not usable", where=pattern, remedy=f"At most {MAX_HOSTS} hosts.")
    for number in range(first, last + 1, step):
        yield from expand_range(f"{pattern[: found.start()]}{number:0{len(found[1])}}{pattern[found.end() :]}")


def _make_member(name: str, variables: dict[str, str]) -> FleetMember:
    """Return a host with the destination that Ansible's variables say."""
    address = variables.get("ansible_host") or variables.get("ansible_ssh_host") or name
    user = variables.get("ansible_user") or variables.get("ansible_ssh_user")
    port = variables.get("ansible_port") or variables.get("ansible_ssh_port")
    place = f"{user}@{address}" if user else address
    return FleetMember(name, f"ssh://{place}:{port}" if port else place)
