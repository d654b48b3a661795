# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl's options for the parameters of khod's interface; khod's messages name these parameters in backticks."""

import re

CALLS = {
    "Abort(force)": "khoctl abort --force",
    "Kexec(load_only)": "khoctl kexec --load-only",
    "Kexec(now)": "khoctl kexec --now",
}
PARAMETERS = {
    "format": "--format",
    "hold": "--hold",
    "kernel": "--kernel VERSION, --default, or --image FILE --initrd FILE",
    "kernel.append": "--append",
    "kernel.cmdline": "--cmdline",
    "kernel.image": "--image",
    "kernel.initrd_signature": "--initrd-signature",
    "kernel.initrds": "--initrd",
    "kernel.remove": "--remove",
    "kernel.reuse_cmdline": "--reuse-cmdline",
    "kernel.sha256": "--sha256",
    "kernel.signature": "--signature",
    "now": "--now",
}
WITH_VALUE = PARAMETERS | {"kernel": "--kernel"}
_NAMED = re.compile(rf"`({'|'.join(map(re.escape, CALLS))}|{'|'.join(map(re.escape, PARAMETERS))})(?:=([^`]*))?`")


def name_options(text: str) -> str:
    """Replace the interface's parameters, in backticks in a message from khod, with khoctl's options."""
    return _NAMED.sub(_option, text) if "`" in text else text


def _option(found: re.Match[str]) -> str:
    name, value = found.groups()
    if value is not None and name in WITH_VALUE:
        return f"{WITH_VALUE[name]} {value}"
    return CALLS.get(name) or PARAMETERS[name]
