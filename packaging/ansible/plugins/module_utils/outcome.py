# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a handover came to, from what kho_facts reads on the host. Functions only of their arguments.

No wall clock is compared: boots are told apart by their ids, and attempts by their runs and their order in the history.
"""

from __future__ import annotations

RESTING = ("idle", "verified", "degraded", "cold_boot", "failed", "foreign", "inconsistent")
"""The phases in which no handover is under way."""
GOOD = ("verified", "unchanged")
"""The host runs the target and this was verified."""
LEFT_AS_IT_WAS = ("refused", "rolled_back", "claimed", "drain_failed")
"""The host goes on in the kernel it ran."""
ARRIVED = ("verified", "unchanged", "degraded", "cold_boot", "over_budget")
"""The host is through: another run of the same roll-out does not touch it again."""
BY_EXIT_STATUS = {1: "rolled_back", 2: "refused", 3: "refused", 4: "no_kho", 6: "not_rolled_back"}
"""What the exit status of the unit says, where the host has not jumped; see EXIT STATUS in khoctl(8)."""


def is_under_way(facts):
    """Whether a handover, or the unit that runs a profile, is still at work in this boot."""
    return facts["phase"] not in RESTING or is_unit_busy(facts)


def is_unit_busy(facts):
    """Whether systemd has not finished with the unit that runs the profile."""
    unit = facts.get("unit") or {}
    return unit.get("job", 0) != 0 or unit.get("active") in ("activating", "active", "reloading", "deactivating")


def find_reason_to_begin(facts, attempt, plan):
    """Return why the host is not there yet, in one sentence; "" where it runs the target and was verified.

    `attempt` is the handover that led into this boot as `khoctl history show` has it, None where there is none.
    """
    if facts["outcome"] != "verified" or attempt is None:
        return "No verified handover led into this boot."
    if plan["release"] and plan["release"] != facts["kernel"]:
        return "The host runs %s, the target is %s." % (facts["kernel"], plan["release"])
    target = attempt.get("target") or {}
    if [image["digest"] for image in target.get("images", [])] != plan["digests"]:
        return "The kernel or the initrd of the target is another file than the one the host runs."
    if split_words(target["kernel"]["cmdline"]) != split_words(plan["cmdline"]):
        return "The command line of the target is another one."
    return ""


def split_words(cmdline):
    """Return the words of a command line but for the mark of its run; one that stands twice counts once."""
    return {word for word in cmdline.split() if not word.startswith("khod.run=")}


def judge_handover(facts, boot_id, known):
    """Return what the handover came to that began in boot `boot_id`, None while that is still open.

    `known` are the runs the history had before it. A handover has arrived if the host is in another boot, and its
    history has a run that began in `boot_id` and ended in a later boot: a host that is merely up proves nothing.
    """
    begun = [one for one in facts["history"] if one["run"] not in known and one["first_boot_id"] == boot_id]
    attempt = begun[0] if begun else None
    if facts["boot_id"] == boot_id:
        if is_under_way(facts):
            return None
        return describe_outcome(_judge_end_without_jump(facts, attempt), attempt, facts)
    if facts["phase"] not in RESTING:
        return None
    arrived = next((one for one in begun if one["last_boot_id"] not in ("", boot_id)), None)
    if arrived is not None and arrived["outcome"] in ("verified", "degraded", "cold_boot"):
        return describe_outcome(arrived["outcome"], arrived, facts)
    if facts["outcome"] in ("verified", "degraded"):
        return None  # the history is written a moment after the verdict
    return describe_outcome("cold_boot", attempt, facts)


def _judge_end_without_jump(facts, attempt):
    if attempt is not None and attempt["refused"]:
        return "refused"
    if facts["phase"] in ("failed", "inconsistent"):
        return "not_rolled_back"
    status = (facts.get("unit") or {}).get("exit_status", 0)
    return "rolled_back" if attempt is not None else BY_EXIT_STATUS.get(status, "refused")


def describe_outcome(outcome, attempt, facts):
    """Return an outcome with the figures of its attempt; `attempt` may be None."""
    attempt = attempt or {}
    return {
        "outcome": outcome,
        "run": attempt.get("run", ""),
        "reason": attempt.get("reason") or facts.get("last_error", "") or (facts.get("summary", "")),
        "kernel": facts["kernel"],
        "previous_kernel": attempt.get("from_release", ""),
        "boot_id": facts["boot_id"],
        "blackout_seconds": attempt.get("blackout_seconds"),
        "blackout_error_seconds": attempt.get("blackout_error_seconds"),
        "verdict": facts.get("verdict") if outcome in ("verified", "degraded", "cold_boot") else None,
    }


def list_past_blackouts(history, run):
    """Return the blackouts of the verified handovers before `run`, the newest first; of all where it is not there."""
    runs = [one["run"] for one in history]
    older = history[runs.index(run) + 1 :] if run in runs else history
    return [
        one["blackout_seconds"]
        for one in older
        if one["outcome"] == "verified" and one["blackout_seconds"] is not None
    ]
