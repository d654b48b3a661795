# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's archive, as the lab uses it: one mirror, signed, and never the host's own apt configuration."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tests.lab import cache
from tests.lab.errors import LabError
from tests.lab.process import call

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# A mirror may be a frozen copy whose index has run out; the signature still has to be right.
STALE_INDEX = 'Acquire::Check-Valid-Until "false"'
# Where kernel sources may be, the suite that keeps the most versions first.
SUITES = ("trixie-backports", "forky", "sid", "experimental", "trixie")

SOURCE_PACKAGE = "linux"

CONFIGURATION = f"""\
Dir "{{root}}/";
Dir::State "state";
Dir::State::status "/dev/null";
Dir::Cache "cache";
Dir::Etc "etc";
Dir::Log "log";
APT::Architecture "amd64";
APT::Architectures {{{{ "amd64"; }}}};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
{STALE_INDEX};
"""
FOLDERS = (
    "state/lists/partial",
    "cache/archives/partial",
    "log",
    "etc/apt.conf.d",
    "etc/preferences.d",
    "etc/sources.list.d",
    "etc/trusted.gpg.d",
)


# A mirror in sources.list, or in deb822 style.
CONFIGURED = re.compile(r"^(?:URIs:|deb(?:-src)?(?:\s+\[[^\]]*\])?)\s+(\S+/debian)/?(?:\s|$)", re.MULTILINE)


@functools.cache
def mirror() -> str:
    """Name the Debian mirror: KHO_LAB_MIRROR, else the one this machine itself uses; LabError where there is none."""
    if given := os.environ.get("KHO_LAB_MIRROR"):
        return given
    apt = Path("/etc/apt")
    for path in (
        apt / "sources.list",
        *sorted(apt.glob("sources.list.d/*.sources")),
        *sorted(apt.glob("sources.list.d/*.list")),
    ):
        if path.exists() and (found := CONFIGURED.search(path.read_text())):
            return found[1]
    raise LabError("no Debian mirror in this machine's apt sources: name one in KHO_LAB_MIRROR")


def source(kind: str, suite: str, components: str = "main") -> str:
    """One line of sources.list: `kind` is deb or deb-src."""
    return f"{kind} [signed-by={KEYRING}] {mirror()} {suite} {components}"


class KernelArchive:
    """The kernel sources of SUITES, through an apt whose every file lies below the lab's cache."""

    def __init__(self, suites: Sequence[str] = SUITES) -> None:
        """Set apt up and read the suites' indexes; LabError if the mirror does not answer."""
        self.suites = tuple(suites)
        root = cache.directory() / "apt"
        for folder in FOLDERS:
            (root / folder).mkdir(parents=True, exist_ok=True)
        lines = [source(kind, suite) for suite in suites for kind in ("deb", "deb-src")]
        (root / "etc/sources.list").write_text("\n".join([*lines, ""]))
        configuration = root / "apt.conf"
        configuration.write_text(CONFIGURATION.format(root=root))
        self._env = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"}
        with cache.locked(root):  # apt refuses to wait for another apt-get update
            call(["apt-get", "--error-on=any", "update"], env=self._env)

    def versions(self, package: str) -> list[str]:
        """Debian versions of a package, source or binary, each once, in the order of the suites; empty if unknown."""
        command = ["showsrc", "--only-source"] if package == SOURCE_PACKAGE else ["show", "--all-versions"]
        known = call(["apt-cache", "pkgnames", package], env=self._env).split()
        if package != SOURCE_PACKAGE and package not in known:
            return []
        said = call(["apt-cache", *command, package], env=self._env)
        return list(dict.fromkeys(re.findall(r"^Version: (\S+)$", said, re.MULTILINE)))

    def tarball(self, upstream: str, into: Path) -> Path:
        """Download the sources of an upstream version into a directory, checked against the signed index: the tarball.

        An index may still list what its pool has dropped, so there are two places: the source package's original
        tarball (Debian's own patches are not needed here), and the binary package linux-source-X.Y. LabError that says
        what either answered and which versions there are.
        """
        answers = []
        for fetch in (self._original, self._source_package):
            try:
                return fetch(upstream, into)
            except LabError as error:
                answers.append(str(error))
        seen = ", ".join(self.versions(SOURCE_PACKAGE)) or "none at all"
        raise LabError(
            f"{mirror()} has no kernel source {upstream} in {', '.join(self.suites)}. Listed there: {seen}.\n"
            + "\n".join(answers)
            + "\nTake a prebuilt kernel (KHO_LAB_KERNELS) or another mirror "
            "(KHO_LAB_MIRROR), for instance a snapshot of the archive."
        )

    def _original(self, upstream: str, into: Path) -> Path:
        """Download linux_VERSION.orig.tar.xz, and nothing else of the source package."""
        version = self._pick(SOURCE_PACKAGE, upstream)
        call(
            ["apt-get", "source", "--download-only", "--tar-only", f"{SOURCE_PACKAGE}={version}"],
            cwd=into,
            env=self._env,
        )
        return next(into.glob("*.orig.tar.*"))

    def _source_package(self, upstream: str, into: Path) -> Path:
        """Download the binary package linux-source-X.Y and take the tarball out of it."""
        series = ".".join(upstream.split(".")[:2])
        package = f"{SOURCE_PACKAGE}-source-{series}"
        call(["apt-get", "download", f"{package}={self._pick(package, upstream)}"], cwd=into, env=self._env)
        call(["dpkg-deb", "--extract", next(into.glob("*.deb")), into])
        return next(into.glob("usr/src/*.tar.*"))

    def _pick(self, package: str, upstream: str) -> str:
        """Find the Debian version of an upstream version; LabError if the index lists none."""
        for version in self.versions(package):
            if re.fullmatch(rf"(\d+:)?{re.escape(upstream)}-[^-]+", version):
                return version
        raise LabError(f"no {package} {upstream} in the index")
