# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check the files below /etc/kho that khod and khod-vm read, with the parsers that these use, and without a khod."""

from __future__ import annotations

import grp
import os
from dataclasses import field
from pathlib import Path

from khod import config
from khod.dataclass import dataclass
from khod.errors import ConfigError, UsageError
from khod.files import list_toml
from khod.fleetlock import FILE as FLEETLOCK_FILE
from khod.fleetlock import settings as fleetlock_settings
from khod.producers import directory, health
from khod.producers.barrier import Participant
from khod.producers.configured import check_name
from khod.producers.hooks import Hook
from khod.producers.order import Ordered, order_in_ranks
from khod.producers.transient import TransientUnits
from khod.provenance import keys
from khod.vm import settings as vm_settings

INSTALL = "Correct the file, or install what it names."


@dataclass(frozen=True)
class CheckedFiles:
    """The files that were read, what is wrong with them, and what is only suspicious."""

    paths: list[Path] = field(default_factory=list)
    errors: list[ConfigError] = field(default_factory=list)
    warnings: list[ConfigError] = field(default_factory=list)


def check_files(root: Path = Path("/")) -> CheckedFiles:
    """Read every file below `root` as a khod with --root does on a host that systemd has booted."""
    found = CheckedFiles()
    read = config.read_config(root)
    _add_config(found, read, host=root == Path("/"))
    _add_keys(found, root, read)
    _add_producers(found, root)
    _add_health(found, root)
    return found


def check_file(path: Path) -> CheckedFiles:
    """Read one file as what the name of its directory says: a key, a producer, a virtual machine, a health check.

    Any other file is read as khod.toml, or as FleetLock's if that is its name.
    """
    found = CheckedFiles()
    directories = {
        Path(name).name for name in (keys.DIRECTORY, directory.DIRECTORY, vm_settings.DIRECTORY, health.DIRECTORY)
    }
    kind = path.absolute().parent.name
    if kind not in directories and path.name.removesuffix(".sample") != Path(FLEETLOCK_FILE).name:
        _add_config(found, config.merge_files([path]), host=True)
        return found
    found.paths.append(path)
    try:
        if kind == Path(directory.DIRECTORY).name:
            _warn_unstartable(found, path, directory.read_producer(path, TransientUnits()))
        elif kind == Path(vm_settings.DIRECTORY).name:
            _read_vm(path)
        elif kind == Path(keys.DIRECTORY).name:
            keys.check_key(path)
        elif kind == Path(health.DIRECTORY).name:
            _add_health_check(found, path, health.read_check(path))
        else:
            fleetlock_settings.read_settings(path)
    except ConfigError as error:
        found.errors.append(error)
    return found


def _add_config(found: CheckedFiles, read: config.ReadConfig, *, host: bool) -> None:
    """Add khod.toml and its fragments; the groups are looked up where these are the files of this host."""
    found.paths.extend(read.paths)
    found.errors.extend(read.errors)
    for key in ("access.group", "access.producers") if host else ():
        name = config.list_settings(read.config)[key]
        if key in read.sources and name and not _is_group(name):
            found.warnings.append(
                ConfigError(
                    f"`{key}` names {name!r}, which is not a group of this host",
                    where=read.locate_key(key),
                    remedy="Create it, or name another one: until then only root has the right.",
                )
            )


def _is_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _add_keys(found: CheckedFiles, root: Path, read: config.ReadConfig) -> None:
    """Add the keys of signatures, and say so where policy requires one and there are none."""
    try:
        paths = keys.list_keys(root)
    except ConfigError as error:
        found.errors.append(error)
        return
    for path in paths:
        found.paths.append(path)
        try:
            keys.check_key(path)
        except ConfigError as error:
            found.errors.append(error)
    for key in ("images.require", "images.require_initrd"):
        value = config.list_settings(read.config)[key]
        if not paths and value in ("signature", "both"):
            found.warnings.append(
                ConfigError(
                    f"`{key}` is {value!r}, and there are no keys in /{keys.DIRECTORY}",
                    where=read.locate_key(key),
                    remedy="Put the public keys that you trust there: until then khod takes no file.",
                )
            )


def _add_producers(found: CheckedFiles, root: Path) -> None:
    """Add the producers' files, those of virtual machines, and the order of all of them."""
    ordered: list[Ordered] = []
    try:
        found.paths.extend(list_toml(root / directory.DIRECTORY, "producer"))
        producers, errors = directory.read_directory(root, TransientUnits())
        found.errors.extend(errors)
        for producer in producers:
            _warn_unstartable(found, root / directory.DIRECTORY / f"{producer.name}.toml", producer)
        ordered += producers
    except ConfigError as error:
        found.errors.append(error)
    if os.path.lexists(root / FLEETLOCK_FILE):
        found.paths.append(root / FLEETLOCK_FILE)
    try:
        machines = list_toml(root / vm_settings.DIRECTORY, "virtual machine")
    except ConfigError as error:
        machines = []
        found.errors.append(error)
    for path in machines:
        found.paths.append(path)
        try:
            ordered.append(_read_vm(path))
        except ConfigError as error:
            found.errors.append(error)
    try:
        order_in_ranks(ordered)
    except ConfigError as error:
        found.errors.append(error)


def _read_vm(path: Path) -> vm_settings.VmSettings:
    try:
        check_name(path.stem)
    except UsageError as error:
        raise ConfigError(error.what, where=str(path), remedy=error.remedy) from None
    return vm_settings.read_own(path)


def _warn_unstartable(found: CheckedFiles, path: Path, producer: Participant) -> None:
    for text in producer.unstartable_commands() if isinstance(producer, Hook) else ():
        found.warnings.append(ConfigError(f"A command cannot be started: {text}", where=str(path), remedy=INSTALL))


def _add_health(found: CheckedFiles, root: Path) -> None:
    try:
        checks = health.HealthChecks(root, TransientUnits()).load_checks()
    except ConfigError as error:
        found.errors.append(error)
        return
    for check in checks:
        _add_health_check(found, root / health.DIRECTORY / f"{check.name}.toml", check)


def _add_health_check(found: CheckedFiles, path: Path, check: health.HealthCheck) -> None:
    if path not in found.paths:
        found.paths.append(path)
    if check.wrong is not None:
        found.errors.append(check.wrong)
    elif check.unstartable:
        found.warnings.append(
            ConfigError(f"The command cannot be started: {check.unstartable}", where=str(path), remedy=INSTALL)
        )
