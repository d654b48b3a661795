# SPDX-License-Identifier: LGPL-2.1-or-later
"""io.kho.Handover for one engine; `khod.server.rules` says who may call what."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from asyncvarlink import FileDescriptor, varlinkmethod

from khod import model
from khod.abi.procstat import read_login_user
from khod.engine import Engine
from khod.errors import UsageError
from khod.producers.cgroup import units_in
from khod.producers.configured import one_line
from khod.region import Region
from khod.server.access import CALLER
from khod.server.announcements import Announcements
from khod.server.history import HistoryCalls
from khod.server.interface import DetachedSignature, Handover, NextKernel, TreeReply
from khod.server.terms import check_terms
from khod.target.target import Given, Request
from khod.text import SHA256_REMEDY, normalize_sha256


class Service(HistoryCalls):
    """The interface for one engine; Monitor is served from `khod.server.monitors`."""

    render_interface_description = Handover.render_interface_description  # with the docstrings of the interface

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._engine = engine
        """For calls that need a right."""
        self._announcements = Announcements()

    @varlinkmethod(return_parameter="status")
    async def Status(self) -> model.Status:
        return await self._queries.status()

    @varlinkmethod(return_parameter="checks")
    async def Check(
        self, *, kernel: NextKernel | None = None, now: bool | None = None, terms: model.Terms | None = None
    ) -> list[model.Check]:
        return await self._queries.check(_build_request(kernel, now=now, terms=terms))

    @varlinkmethod(return_parameter="plan")
    async def Plan(
        self,
        *,
        kernel: NextKernel | None = None,
        now: bool | None = None,
        load_only: bool | None = None,
        terms: model.Terms | None = None,
    ) -> model.Plan:
        return await self._queries.plan(_build_request(kernel, now=now, load_only=load_only, terms=terms))

    @varlinkmethod(return_parameter="status")
    async def Activate(self) -> model.Status:
        await self._engine.activate(by=_describe_caller())
        return await self._queries.status()

    @varlinkmethod(return_parameter="status")
    async def Abort(self, *, force: bool | None = None) -> model.Status:
        await self._engine.abort(force=bool(force), by=_describe_caller())
        return await self._queries.status()

    @varlinkmethod(return_parameter="status")
    async def Kexec(
        self,
        *,
        kernel: NextKernel | None = None,
        now: bool | None = None,
        load_only: bool | None = None,
        hold: bool | None = None,
        terms: model.Terms | None = None,
    ) -> model.Status:
        request = _build_request(kernel, now=now, load_only=load_only, hold=hold, terms=terms)
        await self._engine.kexec(replace(request, units=_find_callers_units()), by=_describe_asker(terms))
        return await self._queries.status()

    @varlinkmethod
    async def Announce(self, *, profile: str, ignore_window: bool | None = None, sudo_user: int | None = None) -> None:
        self._announcements.announce_run(profile, _describe_caller(sudo_user), ignore_window=bool(ignore_window))

    @varlinkmethod(return_parameter="announcement")
    async def TakeAnnouncement(self, *, profile: str) -> model.Announcement:
        return self._announcements.take_announcement(profile)

    @varlinkmethod(return_parameter="producers")
    async def Producers(self) -> list[model.Producer]:
        return await self._queries.producers()

    @varlinkmethod(return_parameter="producers")
    async def Rehearse(self, *, name: str) -> list[model.Producer]:
        return await self._engine.rehearse_producer(name)

    @varlinkmethod
    async def Retry(self, *, name: str) -> None:
        await self._engine.retry_producer(name)

    @varlinkmethod
    async def Forget(self, *, name: str) -> None:
        await self._engine.forget_producer(name)

    @varlinkmethod(return_parameter="runs")
    async def Acknowledge(self, *, image: str) -> list[str]:
        return await self._history.acknowledge(image, _describe_caller())

    @varlinkmethod
    async def Tree(self, *, side: str) -> TreeReply:
        tree = await self._queries.tree(side)
        return {"names": ["", *tree.blobs], "blobs": [_write_memfd(blob) for blob in (tree.root, *tree.blobs.values())]}

    @varlinkmethod(return_parameter="snapshots")
    async def Snapshots(self) -> list[model.Snapshot]:
        return await self._queries.snapshots()

    @varlinkmethod(return_parameter="regions")
    async def Scratch(self) -> list[Region]:
        return await self._queries.scratch()


def _describe_caller(sudo_user: int | None = None) -> str:
    """Describe the caller for people, without a user name: the name service may hang.

    The user that has logged in is told by the kernel, which keeps it through sudo(8); without it root's word counts.
    """
    caller = CALLER.get()
    facts = []
    with suppress(OSError):
        facts.append(Path(f"/proc/{caller.pid}/comm").read_text(errors="replace").strip())
    facts.append(f"process {caller.pid}")
    if (login := read_login_user(caller.pid)) not in (None, caller.uid):
        facts.append(f"logged in as user {login}")
    elif login is None and sudo_user is not None and caller.uid == 0:
        facts.append(f"by sudo for user {sudo_user}")
    return one_line(f"{'root' if caller.uid == 0 else f'user {caller.uid}'} ({', '.join(facts)})")


def _describe_asker(terms: model.Terms | None) -> str:
    """Describe who began a handover: the caller and, if that runs a profile for somebody, whom it names."""
    caller = _describe_caller()
    if terms is None or terms.profile is None:
        return caller
    if terms.asked_by is None:
        return one_line(f"{caller}, by profile {terms.profile}")
    return one_line(f"{terms.asked_by}, by profile {terms.profile} that {caller} runs")


def _find_callers_units() -> tuple[str, ...]:
    """Return the units of systemd in which the caller runs, the outermost first; none where that is not known."""
    with suppress(OSError):
        return tuple(units_in(Path(f"/proc/{CALLER.get().pid}/cgroup").read_text()))
    return ()


def _build_request(
    kernel: NextKernel | None,
    *,
    now: bool | None = None,
    load_only: bool | None = None,
    hold: bool | None = None,
    terms: model.Terms | None = None,
) -> Request:
    """Build the engine's request, with the descriptors of this call; raise UsageError if it is not valid."""
    asked = kernel or NextKernel()
    files, names = asked.initrds or [], asked.initrd_names or []
    if names and len(names) != len(files):
        raise UsageError(
            f"{len(files)} initrds and {len(names)} names", where="initrd_names", remedy="Name each or none."
        )
    if asked.image is None and (files or asked != NextKernel()):
        raise UsageError(
            "An initrd or a command line without an image", where="kernel.image", remedy="Add `kernel.image`."
        )
    signed = asked.signatures or []
    if unknown := [one.initrd for one in signed if one.initrd is not None and not 0 <= one.initrd < len(files)]:
        raise UsageError(
            f"A signature of initrd number {unknown[0]}, where there are {len(files)}, counted from 0",
            where="`kernel.initrd_signature`",
            remedy="Give no more signatures than initrds.",
        )
    # The names are shown in checks and events, on the terminals of others.
    labels = [one_line(name) for name in names] or [f"initrd {at + 1}" for at in range(len(files))]
    initrds = [
        _with_signatures(Given(file.fileno(), label), [one for one in signed if one.initrd == at])
        for at, (file, label) in enumerate(zip(files, labels, strict=True))
    ]
    kernel_signatures = [one for one in signed if one.initrd is None]
    return Request(
        None
        if asked.image is None
        else _with_signatures(
            Given(asked.image.fileno(), one_line(asked.image_name or "the image")), kernel_signatures
        ),
        tuple(initrds),
        asked.cmdline,
        bool(asked.reuse_cmdline),
        asked.append,
        tuple(asked.remove or ()),
        tuple(map(_check_digest, asked.sha256 or ())),
        now=bool(now),
        load_only=bool(load_only),
        hold=bool(hold),
        terms=check_terms(terms or model.NO_TERMS),
    )


def _with_signatures(given: Given, signatures: list[DetachedSignature]) -> Given:
    """Return a file with its signatures."""
    return replace(
        given,
        signatures=tuple(
            Given(one.file.fileno(), one_line(one.name or f"the signature of {given.name}")) for one in signatures
        ),
        must_be_signed=any(one.required for one in signatures),
    )


def _check_digest(text: str) -> str:
    if (digest := normalize_sha256(text)) is None:
        raise UsageError(f"{one_line(text)!r} is not a SHA-256", where="`kernel.sha256`", remedy=SHA256_REMEDY)
    return digest


def _write_memfd(blob: bytes) -> FileDescriptor:
    fd = os.memfd_create("khod-tree", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(blob)
    return FileDescriptor(fd, should_close=True)
