# SPDX-License-Identifier: LGPL-2.1-or-later
"""The AppArmor profile that khod enters by itself, where it was started before the profile was loaded.

The kernel's promise (Documentation/admin-guide/LSM/apparmor, seen on 7.3.4): an unconfined task may change into any
profile, under no_new_privs too; no confined one leaves its own that way. The change is that of the calling thread, and
of what it starts later.
"""

import os

PROFILE_VARIABLE = "KHOD_APPARMOR_PROFILE"
"""The unit names the profile here: a khod that is started by hand stays unconfined."""
LABEL = "/proc/thread-self/attr/apparmor/current"
UNCONFINED = "unconfined"
PROFILES = "/sys/kernel/security/apparmor/profiles"
"""The loaded profiles, a line each: the name, and the mode in parentheses."""


def enter_profile() -> bool:
    """Confine the calling thread by the profile that the unit names; return False while that is not loaded.

    True too where there is nothing to do: no profile is named, AppArmor is off, or systemd has confined khod already.
    """
    profile = os.environ.get(PROFILE_VARIABLE)
    try:
        if not profile or _read_label() != UNCONFINED:
            return True
    except OSError:  # a kernel without AppArmor, or one that has it off
        return True
    if not _may_be_loaded(profile):  # a try would be two lines "DENIED" in the kernel's log
        return False
    try:
        _write_label(f"changeprofile {profile}")
    except OSError:
        return False
    return True


def _may_be_loaded(profile: str) -> bool:
    try:
        with open(PROFILES) as profiles:
            return any(line.rpartition(" (")[0] == profile for line in profiles)
    except OSError:  # without securityfs only a try shows it
        return True


def _read_label() -> str:
    with open(LABEL) as label:
        return label.read().strip()


def _write_label(text: str) -> None:
    with open(LABEL, "w") as label:
        label.write(text)
