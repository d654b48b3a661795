# Copyright: the khod authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The results of a roll-out, one line a host, and what of a batch stops it."""

from __future__ import annotations

from statistics import median

from ansible_collections.khod.kho.plugins.module_utils.outcome import GOOD
from ansible_collections.khod.kho.plugins.module_utils.rank_test import judge_batch

COUNTED_APART = ("no_kho",)
HEADINGS = ("HOST", "OUTCOME", "KERNEL", "BLACKOUT", "MEDIAN BEFORE")
NOT_REACHED = {"outcome": "not_touched", "reason": ""}


def find_reasons_to_stop(results, go_on_after=()):
    """Return a sentence for each host that stops the roll-out."""
    fine = (*GOOD, "planned", *COUNTED_APART, *go_on_after)
    return [
        "%s: %s. %s" % (host, result["outcome"], make_printable(result.get("reason")))
        for host, result in sorted(results.items())
        if result["outcome"] not in fine
    ]


def judge_blackouts(results, share, alpha, margin):
    """Return the judgement of a batch's blackouts; `share` is what the batch is of all hosts of the roll-out.

    A batch gets its share of `alpha`, so that over all batches the probability of a false stop is at most `alpha`.
    """
    strata = {}
    for host, result in results.items():
        if result["outcome"] == "verified" and result.get("blackout_seconds") is not None:
            new, old = strata.setdefault(result.get("stratum") or host, ([], []))
            new.append(result["blackout_seconds"])
            old.extend(result.get("past_blackouts") or [])
    used = [pair for pair in strata.values() if pair[1]]
    judged = judge_batch(used, alpha * share, margin)
    return judged | {"hosts": sum(len(new) for new, dummy in used), "old": sum(len(old) for dummy, old in used)}


def describe_judgement(judged):
    """Return the judgement in a sentence."""
    if judged["worse"] is None:
        return (
            "The blackouts of this batch are not judged: with %(hosts)d hosts that have a history, and %(old)d past "
            "blackouts, even the longest could not be told from chance (p %(least_p).2g, level %(alpha).2g)." % judged
        )
    found = "longer than" if judged["worse"] else "not longer than"
    return (
        "The blackouts of this batch are %s those of the history (rank test, %d hosts, %d past blackouts: p %.2g, "
        "level %.2g)." % (found, judged["hosts"], judged["old"], judged["p"], judged["alpha"])
    )


def draw_table(results):
    """Return the lines of the table, and of the counts below."""
    rows = [HEADINGS]
    for host, result in results.items():
        past = result.get("past_blackouts") or []
        rows.append(
            (
                make_printable(host),
                result["outcome"],
                _describe_kernels(result),
                _describe_blackout(result),
                "%.3f s" % median(past) if past else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    counts = {}
    for result in results.values():
        counts[result["outcome"]] = counts.get(result["outcome"], 0) + 1
    lines += ["", "%d hosts: %s" % (len(results), ", ".join("%d %s" % (n, name) for name, n in counts.items()))]
    return lines


def _describe_kernels(result):
    now, before = make_printable(result.get("kernel")), make_printable(result.get("previous_kernel"))
    return "%s -> %s" % (before, now) if before and before != now else now


def _describe_blackout(result):
    if result.get("blackout_seconds") is None:
        return "unknown" if result["outcome"] == "verified" else ""
    error = result.get("blackout_error_seconds")
    return "%.3f s" % result["blackout_seconds"] + ("" if error is None else " ± %.3f s" % error)


def make_printable(text):
    """Return what a host said in one line, without what would steer a terminal."""
    return "".join(one if one.isprintable() else " " for one in str(text or ""))[:500]
