"""What a session starts by itself, before and beside any command: its shell, its machinery, its service's hooks.

Each is allowed whatever the personas say, and everything that it starts is decided.
"""

import os
from enum import StrEnum

from persona.called_names import called_name
from persona.decisions import Denied
from persona.problems import Reason
from persona_guest.kernel.cgroup import cgroup_of
from persona_guest.kernel.task import Task, with_ancestors
from persona_guest.program.exec_request import ExecRequest
from persona_guest.program.identity import Identifier
from persona_guest.session.model import Login, Session
from persona_guest.settings import Gate

_ANCESTORS_MAX = 32


class Own(StrEnum):
    """Why a session may start a program by itself."""

    LOGIN_SHELL = "login_shell"
    MACHINERY = "machinery"  # ``gate.plumbing`` of guest.toml, and the user's own command
    SERVICE = "service"  # what sshd, cron or su starts as root


def rule_for(
    exec_request: ExecRequest, login: Login, task: Task, gate: Gate, identifier: Identifier, denials: tuple[Denied, ...]
) -> Own | None:
    """The rule that lets ``task`` start this whatever the personas say, or ``None``.

    In a revoked session only the service still ends its own business.  ``denials`` are the answers to this request,
    which may be the first to tell of that.
    """
    revoked = login.revoked is not None or any(denied.reason is Reason.SESSION_REVOKED for denied in denials)
    if not revoked and is_login_shell(exec_request, login, identifier):
        return Own.LOGIN_SHELL
    if not revoked and _is_plumbing(exec_request, gate):
        return Own.MACHINERY
    return Own.SERVICE if _is_services_own(exec_request, login.session, task) else None


def is_login_shell(exec_request: ExecRequest, login: Login, identifier: Identifier) -> bool:
    """Admission gives a shell: the user's login shell runs; what it starts is decided.

    It is the file that lies at the shell's path now: an upgrade replaces it, and its inode number may become another
    file's.
    """
    found, argv, _ = exec_request.stages[0]
    if exec_request.obstacles[0] is not None or not found.trusted:
        return False
    if not any(identifier.is_at(os.fsencode(path), found.image) for path in login.shells):
        return False
    if not found.multicall:
        return True
    name = called_name(os.fsdecode(argv[0])) if argv else ""
    return any(
        name == os.path.basename(shell) and identifier.is_at(os.fsencode(shell), found.image) for shell in login.shells
    )


def is_users_command(exec_request: ExecRequest, gate: Gate) -> bool:
    """``persona``, which tells a user what is denied and why: it is never denied, and waits for nobody."""
    found = exec_request.stages[0].found
    return exec_request.obstacles[0] is None and found.trusted and found.program.path == gate.user_command


def _is_plumbing(exec_request: ExecRequest, gate: Gate) -> bool:
    found = exec_request.stages[0].found
    return exec_request.obstacles[0] is None and found.trusted and gate.is_plumbing(found.program.path)


def _is_services_own(exec_request: ExecRequest, session: Session, task: Task) -> bool:
    """What sshd, cron or su itself starts as root (motd, sshrc): root all the way up to the monitor.

    A root process that the user got by sudo has the user's own processes above it; one that was
    orphaned hangs below init: neither reaches the monitor.  But the session's first process is the monitor's child,
    may become root as a whole (pkexec), and may have siblings (CLONE_PARENT, clone(2)): what the session's are is told
    by the cgroup, which none of them can leave for the monitor's.
    """
    if session.uid == 0 or exec_request.foreign is not None:  # in a trial by root, root is the user
        return False
    cgroup = _cgroup(session.monitor)
    for pid, credentials in with_ancestors(task.tid, _ANCESTORS_MAX):
        if any(credentials.uids) or _cgroup(pid) != cgroup:
            return False
        if credentials.tgid == session.monitor:
            return Task(credentials.tgid).started() == session.monitor_started
    return False


def _cgroup(pid: int) -> str | None:
    """The cgroup of a process; ``None`` on a machine without the second version of them, where nobody is moved."""
    try:
        return cgroup_of(pid)
    except OSError:
        return None
