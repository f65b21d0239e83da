"""What a session starts by itself, before and beside any command: its shell, its machinery, its service's hooks.

Each is allowed whatever the personas say, and everything that it starts is decided.
"""

import os

from persona_guest.gate.pending import Pending
from persona_guest.kernel.task import Task
from persona_guest.settings import Gate

_ANCESTORS_MAX = 32


def is_own(pending: Pending, gate: Gate, *, revoked: bool) -> bool:
    """Whether this exec is any of the three.  In a revoked session only the service still ends its own business."""
    if not revoked and (is_login_shell(pending) or _is_plumbing(pending, gate)):
        return True
    return _is_services_own(pending)


def is_login_shell(pending: Pending) -> bool:
    """Admission gives a shell: the user's login shell runs; what it starts is decided."""
    found, argv = pending.attempt.stages[0]
    if found.image not in pending.gated.shells or not found.trusted:
        return False
    name = os.path.basename(os.fsdecode(argv[0])).removeprefix("-") if argv else ""
    return not found.multicall or name == os.path.basename(pending.gated.session.shell)


def _is_plumbing(pending: Pending, gate: Gate) -> bool:
    found = pending.attempt.stages[0][0]
    return found.trusted and gate.is_plumbing(found.program.path)


def _is_services_own(pending: Pending) -> bool:
    """What sshd, cron or su itself starts as root (motd, sshrc): root all the way up to the monitor.

    A root process that the user got by sudo has the user's own processes above it; one that was
    orphaned hangs below init: neither reaches the monitor.
    """
    session = pending.gated.session
    if session.uid == 0:  # a trial by root: there, root is the user
        return False
    pid = pending.task.tid
    for _ in range(_ANCESTORS_MAX):
        try:
            credentials = Task(pid).credentials()
        except OSError:
            return False
        if any(credentials.uids):
            return False
        if credentials.tgid == session.monitor:
            return Task(credentials.tgid).started() == session.monitor_started
        pid = credentials.ppid
        if pid <= 1:
            return False
    return False
