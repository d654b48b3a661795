"""What the operator is told at three in the morning: one sentence on where it stands, one on what to do."""

from khod.errors import Exit
from khod.model import Phase, Status

SAYS: dict[Phase, tuple[str, str]] = {
    Phase.idle: ("Nothing is under way.", ""),
    Phase.preparing: ("Producers are getting ready; they go on working.", "To stop: khoctl abort"),
    Phase.prepared: ("Every producer is ready.", "To stop: khoctl abort"),
    Phase.freezing: ("Producers are stopping their work.", "To stop: khoctl abort"),
    Phase.frozen: ("Every producer has stopped its work.", "To go back: khoctl abort"),
    Phase.activating: ("The kernel is serializing its state.", "To go back: khoctl abort"),
    Phase.active: ("The kernel's state is serialized; the host goes on running, its producers are frozen.",
                   "Next: khoctl kexec --image IMAGE --initrd INITRD. To go back: khoctl abort"),
    Phase.loading: ("The kernel is taking the next image.", "To go back: khoctl abort"),
    Phase.loaded: ("The next kernel is loaded.", "Next: khoctl kexec. To go back: khoctl abort"),
    Phase.executing: ("The jump is under way.", ""),
    Phase.verifying: ("This kernel was reached by a handover; what arrived is being checked.", ""),
    Phase.verified: ("The handover succeeded: all state arrived.", ""),
    Phase.degraded: ("This kernel was reached by the kexec, and the state did not arrive whole.",
                     "Producers must start from scratch; look for `KHO:` in the kernel log."),
    Phase.cold_boot: ("The handover failed: this host booted cold, nothing arrived.",
                      "Producers must start from scratch; look at the last boot: journalctl -b -1"),
    Phase.rolling_back: ("A handover is being put back.", ""),
    Phase.failed: ("A handover failed and could not be put back whole.", "Try again: khoctl abort"),
    Phase.foreign: ("Somebody drives the kernel without khod.",
                    "Find out who; khod touches nothing. To put it back: khoctl abort --force"),
    Phase.inconsistent: ("khod's record and the kernel contradict each other.",
                         "Look at both; to put the kernel back: khoctl abort --force"),
}

EXITS = {Phase.degraded: Exit.degraded, Phase.cold_boot: Exit.degraded, Phase.failed: Exit.not_rolled_back}


def exit_code(phase: Phase) -> Exit:
    """`khoctl status` exits with this."""
    return EXITS.get(phase, Exit.done)


def shown(status: Status) -> str:
    """One line for systemd's status text."""
    waiting = f" Waiting for {', '.join(status.waiting_for)}." if status.waiting_for else ""
    return f"{status.phase.value.replace('_', ' ')}: {status.summary}{waiting}"
