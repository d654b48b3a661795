# SPDX-License-Identifier: LGPL-2.1-or-later
"""Configuration in three stages: files are read, merged, and validated into a frozen `Config`.

/etc/kho/khod.toml is read first, then /etc/kho/khod.toml.d/*.toml in order of name; a later value wins. An unknown key
is an error with file and line, because a misspelled policy must not silently become the default.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from khod.dataclass import dataclass
from khod.errors import ConfigError
from khod.files import Fragment, list_toml, read_toml, require_type, unknown_key_error
from khod.model import Terms
from khod.text import SHA256_REMEDY, normalize_sha256

MAIN = "etc/kho/khod.toml"
JUDGEMENTS = ("default", "warn", "fail", "off")


@dataclass(frozen=True)
class Access:
    """Who may change the handover: root, and the members of `group` ("" for root only).

    Members of `producers` may register as producers.
    """

    group: str = "kho"
    producers: str = "kho-producers"
    max_connections_per_user: int = 64


@dataclass(frozen=True)
class Policy:
    """What to do where the kernel leaves a choice; etc/kho/khod.toml describes each key."""

    after_daemon_died: str = "roll-back"  # or "resume"
    after_forgetful_abort: str = "refuse"  # or "warn"
    require_state: bool = False
    max_failed_activations: int = 3
    unknown_format: str = "refuse"  # or "warn"


@dataclass(frozen=True)
class ProducersSettings:
    """Which producers must take part, how many may register, and how many bytes they may hand over together."""

    require: tuple[str, ...] = ()
    require_kernel: tuple[str, ...] = ()
    max_per_user: int = 2048
    max_bytes: int = 1 << 46


@dataclass(frozen=True)
class GuardSettings:
    """Subsystems whose device events abort a handover, or are recorded in it."""

    abort: tuple[str, ...] = ("memory", "cpu", "vfio", "vfio-dev", "iommu", "pci")
    record: tuple[str, ...] = ("net",)


@dataclass(frozen=True)
class Deadlines:
    """Seconds a step may take before it counts as failed."""

    prepare: float = 60.0
    quiesce: float = 90.0
    freeze: float = 10.0
    activate: float = 60.0
    load: float = 60.0
    execute: float = 90.0
    rollback: float = 60.0
    restore: float = 120.0
    observe: float = 1.0

    @property
    def quiesce_undo(self) -> float:
        """Maximum seconds to start again what was stopped: a unit that is late to stop must stop before it starts."""
        return 2 * self.quiesce


@dataclass(frozen=True)
class Images:
    """Size limits for a client's images, in bytes, and what must be known of who made them.

    `require` is for the kernel, `require_initrd` for each initrd; etc/kho/khod.toml describes the values.
    """

    max_size: int = 2 << 30
    max_unpacked: int = 1 << 30
    require: str = "none"
    require_initrd: str = "same"
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True)
class SnapshotsSettings:
    """How many state trees are kept, and how many bytes of them; the last one is always kept."""

    keep: int = 16
    max_bytes: int = 256 << 20


@dataclass(frozen=True)
class VerifySettings:
    """How much of each preserved file is compared after the jump: N pages at random, or all of a small file."""

    pages: int = 64
    whole_bytes: int = 1 << 20


@dataclass(frozen=True)
class TrialSettings:
    """After how many failed handovers into it an image is barred."""

    failures: int = 1


@dataclass(frozen=True)
class WatchdogSettings:
    """The hardware watchdog that is armed before the jump ("" for none), and the seconds it gives the next khod."""

    device: str = ""
    seconds: int = 300


@dataclass(frozen=True)
class HistorySettings:
    """How many attempts are remembered, for how long, and in how many bytes."""

    keep: int = 10_000
    days: int = 730
    max_bytes: int = 256 << 20


@dataclass(frozen=True)
class MetricsSettings:
    """Where the metrics are written for node_exporter's textfile collector; "" for nowhere."""

    directory: str = ""


@dataclass(frozen=True)
class QuiesceSettings:
    """Whether the rest of the host is stopped before an orderly jump, and which units stay (names or patterns)."""

    enabled: bool = True
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checks:
    """The result of each check that finds something; "default" is the check's own, see `khod.preflight`."""

    kho: str = "default"
    scratch: str = "default"
    capability: str = "default"
    namespaces: str = "default"
    processors: str = "default"
    kexec: str = "default"
    lockdown: str = "default"
    foreign: str = "default"
    state: str = "default"
    activations: str = "default"
    crash: str = "default"
    memory: str = "default"
    watchdog: str = "default"
    inhibitors: str = "default"
    quiesce: str = "default"
    uptime: str = "default"
    disk: str = "default"
    record: str = "default"
    producers: str = "default"
    kernel_producers: str = "default"
    health: str = "default"
    claims: str = "default"
    sessions: str = "default"
    provenance: str = "default"
    image: str = "default"
    initrd: str = "default"
    cmdline: str = "default"
    formats: str = "default"
    fit: str = "default"
    signature: str = "default"
    trial: str = "default"
    boot_cost: str = "default"


CHECKS = tuple(f.name for f in dataclasses.fields(Checks))


@dataclass(frozen=True)
class Config:
    """All of khod's settings."""

    access: Access = field(default_factory=Access)
    policy: Policy = field(default_factory=Policy)
    producers: ProducersSettings = field(default_factory=ProducersSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    deadlines: Deadlines = field(default_factory=Deadlines)
    images: Images = field(default_factory=Images)
    snapshots: SnapshotsSettings = field(default_factory=SnapshotsSettings)
    verify: VerifySettings = field(default_factory=VerifySettings)
    trial: TrialSettings = field(default_factory=TrialSettings)
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)
    history: HistorySettings = field(default_factory=HistorySettings)
    quiesce: QuiesceSettings = field(default_factory=QuiesceSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    checks: Checks = field(default_factory=Checks)


def apply_terms(config: Config, terms: Terms) -> Config:
    """Return the configuration that holds for a handover with these terms."""
    if terms.require:
        require = tuple(dict.fromkeys((*config.producers.require, *terms.require)))
        config = dataclasses.replace(config, producers=dataclasses.replace(config.producers, require=require))
    if terms.deadlines is not None:
        names = [one.name for one in dataclasses.fields(terms.deadlines)]
        given = {name: seconds for name in names if (seconds := getattr(terms.deadlines, name)) is not None}
        config = dataclasses.replace(config, deadlines=dataclasses.replace(config.deadlines, **given))
    return config


class Settings:
    """The current configuration, by reference: users read `current` each time, and so see a reload.

    `error` says why `current` holds the defaults; no handover begins then.
    """

    def __init__(self, current: Config | None = None, error: ConfigError | None = None) -> None:
        self.current = current or Config()
        self.error = error

    @classmethod
    def load(cls, root: Path) -> "Settings":
        """Read the configuration below `root`; if it is not valid, return the defaults and the error."""
        try:
            return cls(load_config(root))
        except ConfigError as error:
            return cls(error=error)

    def under(self, terms: Terms) -> Config:
        """Return the current configuration for a handover with these terms."""
        return apply_terms(self.current, terms)

    def reload(self, root: Path) -> None:
        """Read the configuration again; raise ConfigError, and keep the old one, if it is not valid."""
        self.current, self.error = load_config(root), None


REQUIREMENTS = ("none", "digest", "signature", "either", "both")
CHOICES = {
    "images.require": REQUIREMENTS,
    "images.require_initrd": ("same", *REQUIREMENTS),
    "policy.after_daemon_died": ("roll-back", "resume"),
    "policy.after_forgetful_abort": ("refuse", "warn"),
    "policy.unknown_format": ("refuse", "warn"),
    **{f"checks.{name}": JUDGEMENTS for name in CHECKS},
}


@dataclass(frozen=True)
class ReadConfig:
    """The contents of the configuration files: `config` is what holds where there are no `errors`.

    `sources` has, for each key that a file sets, the file that counts.
    """

    config: Config
    paths: tuple[Path, ...]
    sources: Mapping[str, Fragment]
    errors: tuple[ConfigError, ...]

    def locate_key(self, key: str) -> str:
        """Return FILE:LINE of the value that counts, or "" where no file sets the key."""
        return self.sources[key].locate_key(key) if key in self.sources else ""


def load_config(root: Path = Path("/")) -> Config:
    """Read, merge and validate the configuration; return the defaults if there is no file. Raises ConfigError."""
    found = read_config(root)
    if found.errors:
        raise found.errors[0]
    return found.config


def read_config(root: Path = Path("/")) -> ReadConfig:
    """Read and merge the configuration below `root`; the errors are all there are, not only the first."""
    try:
        fragments = list_toml(root / f"{MAIN}.d", "configuration file")
    except ConfigError as error:
        return ReadConfig(Config(), (), {}, (error,))
    # A link that leads nowhere is there: the defaults in its place would be without the policy that was meant.
    return merge_files([path for path in (root / MAIN, *fragments) if os.path.lexists(path)])


def merge_files(paths: Sequence[Path]) -> ReadConfig:
    """Merge these files over the defaults; the last one wins. Every key and type is checked."""
    fragments: list[Fragment] = []
    errors: list[ConfigError] = []
    for path in paths:
        try:
            fragments.append(Fragment(path, *read_toml(path, "configuration")))
        except ConfigError as error:
            errors.append(error)
    config = Config()
    sources: dict[str, Fragment] = {}
    for fragment in fragments:
        for name, values in fragment.values.items():
            try:
                keys = _require_section(fragment, name, values)
            except ConfigError as error:
                errors.append(error)
                continue
            valid: dict[str, Any] = {}
            section = getattr(config, name)
            for key, value in keys.items():
                try:
                    valid[key] = _check_value(fragment, section, name, key, value)
                    sources[f"{name}.{key}"] = fragment
                except ConfigError as error:
                    errors.append(error)
            config = dataclasses.replace(config, **{name: dataclasses.replace(section, **valid)})
    return ReadConfig(config, tuple(paths), sources, tuple(errors))


def list_settings(config: Config) -> dict[str, Any]:
    """Return every key of the configuration as `TABLE.KEY`, in the order of khod.toml, with its value."""
    return {
        f"{table.name}.{key.name}": getattr(getattr(config, table.name), key.name)
        for table in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(config, table.name))
    }


def _require_section(source: Fragment, name: str, values: Any) -> dict[str, Any]:
    """Return the keys of a table; raise ConfigError where it is not a table of the configuration."""
    sections = sorted(one.name for one in dataclasses.fields(Config))
    if name not in sections:
        raise unknown_key_error(source.locate_key(name), name, sections)
    if not isinstance(values, dict):
        raise ConfigError(
            f"`{name}` is a table", where=source.locate_key(name), remedy=f"Write [{name}] on a line of its own."
        )
    return values


def _check_value(source: Fragment, section: Any, name: str, key: str, value: Any) -> Any:
    known = {f.name: f.type for f in dataclasses.fields(section)}
    dotted = f"{name}.{key}"
    if key not in known:
        raise unknown_key_error(source.locate_key(dotted), dotted, sorted(known))
    value = require_type(value, known[key], dotted, source.locate_key(dotted))
    if value not in CHOICES.get(dotted, (value,)):
        raise ConfigError(
            f"`{dotted}` is {value!r}",
            where=source.locate_key(dotted),
            remedy=f"It takes one of: {', '.join(CHOICES[dotted])}.",
        )
    if dotted == "images.sha256":
        return _check_digests(value, source.locate_key(dotted))
    if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
        raise ConfigError(
            f"`{dotted}` is {value}", where=source.locate_key(dotted), remedy="It must be a positive number."
        )
    return value


def _check_digests(values: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return the pinned digests in lower case, or raise ConfigError for the first that is not a SHA-256."""
    digests = []
    for value in values:
        if (digest := normalize_sha256(value)) is None:
            raise ConfigError(f"`images.sha256` has {value!r}", where=where, remedy=SHA256_REMEDY)
        digests.append(digest)
    return tuple(digests)
