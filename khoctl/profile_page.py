# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a profile adds to a handover, for people and as JSON."""

import dataclasses
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from khoctl.profile import HookCommands, Profile
from khoctl.render import list_rows, terms_rows
from khod.model import Check, CheckResult, Plan, Terms
from khod.text import printable
from khod.values import ANY_FIELD, decode_value


def check_window(profile: Profile, *, ignored: bool) -> list[Check]:
    """Return the check of the profile's window, none without a window."""
    window = profile.window
    if window is None:
        return []
    now = datetime.now(UTC)
    evidence = f"{window.describe()}: {window.describe_state(now)}"
    if window.is_open(now):
        return [Check("window", CheckResult.passed, evidence, "")]
    if ignored:
        return [Check("window", CheckResult.off, evidence, "It is ignored, as asked.")]
    return [Check("window", CheckResult.fail, evidence, "Wait until it opens, or have it ignored: --ignore-window")]


def list_profile_rows(profile: Profile) -> list[tuple[str, str]]:
    """Return rows for what the profile adds to the options of kexec."""
    rows = [("profile", f"{profile.name} ({profile.path})")]
    window = profile.window
    if window is not None:
        rows.append(("window", f"{window.describe()}: {window.describe_state(datetime.now(UTC))}"))
    terms = decode_value(Terms, profile.make_terms(enforce=False), may_lack=ANY_FIELD)
    rows += terms_rows(replace(terms, profile=None, window=None))
    rows += list_rows("before", _describe_hook(profile.before))
    rows += list_rows("after", _describe_hook(profile.after))
    return [(key, printable(text)) for key, text in rows]


def _describe_hook(hook: HookCommands) -> list[str]:
    return [f"{shlex.join(command)}, {hook.seconds:g} s at most" for command in hook.commands]


def join_plan(plan: Plan, profile: Profile) -> dict[str, Any]:
    """Return a plan with what its profile adds, for JSON."""
    window = profile.window and {
        "window": profile.window.describe(),
        "state": profile.window.describe_state(datetime.now(UTC)),
    }
    added = {
        "name": profile.name,
        "path": str(profile.path),
        "window": window,
        "terms": profile.terms,
        "before": dataclasses.asdict(profile.before),
        "after": dataclasses.asdict(profile.after),
    }
    return {one.name: getattr(plan, one.name) for one in dataclasses.fields(plan)} | {"profile": added}
