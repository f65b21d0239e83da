"""Where the processes of one persona of one session live: places, and how their cgroups are called.

======================================  ====================================================
what the session is                     cgroup of its processes under persona P
======================================  ====================================================
a login with a scope of its own         user.slice/user-UID.slice/session-N.scope/P
cron, at, su from another's login,      user.slice/persona-sessions.service/user-UID/SESSION:P
sshd without PAM
P's limits are ``per: persona``         user.slice/persona-sessions.service/shared-P/SESSION
what P was withdrawn from               as the first or second, with -P for P
the user's service manager              user.slice/user-UID.slice/user@UID.service, as it is
======================================  ====================================================

Beside P, ``login`` holds what opened the session (sshd's two processes).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from persona.decisions import PersonaRef

LOGIN = "login"
MANAGED = ""  # the key of the place that a user's service manager is: no persona has that name
_WITHDRAWN = "-"  # no persona's name begins like that either
FALLBACK_ROOT = "user.slice/persona-sessions.service"
_SHARED = "shared-"  # no file of the kernel and no session begins like that
_SCOPE = re.compile(r"(user\.slice/user-(\d+)\.slice/session-[A-Za-z0-9]+\.scope)(?:/.*)?", re.ASCII | re.DOTALL)
_MANAGER = re.compile(r"(user\.slice/user-(\d+)\.slice/user@(\d+)\.service)(?:/.*)?", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class PersonaCgroup:
    """A place: the cgroup of one persona of one session, relative to the cgroup root, without a leading slash.

    ``origin`` is the cgroup in which the session was found, where its processes go back to.  ``withdrawn``: here lives
    what the persona does not allow any more, apart from what it does.
    """

    session_id: str
    persona: PersonaRef
    cgroup: str
    uid: int
    origin: str = ""
    withdrawn: bool = False

    @property
    def key(self) -> str:
        """Its name among the places of its session."""
        return MANAGED if self.managed else _WITHDRAWN * self.withdrawn + self.persona.name

    @property
    def level(self) -> int:
        """The number of path components: what ``socket cgroupv2 level`` of nftables(8) counts."""
        return level_of(self.cgroup)

    @property
    def parent(self) -> str:
        """The cgroup above: a scope, the user's, or what all sessions under the persona share."""
        return self.cgroup.rpartition("/")[0]

    @property
    def above(self) -> str | None:
        """The cgroup of all that is its user's, in which their memory is bounded; ``None`` where others share it."""
        return None if self.shared else fallback_slice_of(self.uid) if self.outside else slice_of(self.uid)

    @property
    def shared(self) -> bool:
        """Whether the limits are those of the parent, for all sessions under this persona."""
        return self.parent.startswith(f"{FALLBACK_ROOT}/{_SHARED}")

    @property
    def outside(self) -> bool:
        """Whether it lies outside of its user's slice: once it is gone, nothing above tells whose its sockets are."""
        return not self.cgroup.startswith(slice_of(self.uid) + "/")

    @property
    def managed(self) -> bool:
        """Whether systemd owns the cgroup (a user's service manager): nothing is made or moved there."""
        return manager_of(self.cgroup, self.uid) == self.cgroup


def directory_name(persona: str) -> str:
    """A persona's cgroup below a scope: its name, or '_' and its name.

    The kernel's own files there have a dot in their names (``cpu.max``), as have systemd's units, and
    ``login`` is taken.  Names of personas begin with a letter, so '_' makes no two alike.
    """
    return "_" + persona if "." in persona or persona == LOGIN else persona


def place_of(
    session_id: str, uid: int, persona: PersonaRef, found: str, *, shared: bool = False, withdrawn: bool = False
) -> PersonaCgroup:
    """Where processes of a session that was found in the cgroup ``found`` live under a persona."""
    manager = manager_of(found, uid)
    if manager is not None:
        return PersonaCgroup(session_id, persona, manager, uid, manager)
    scope = scope_of(found, uid)
    if withdrawn:
        name = f"{_WITHDRAWN}{persona.name}"
        cgroup = f"{scope}/{name}" if scope else f"{fallback_slice_of(uid)}/{session_id}:{name}"
    elif shared:
        cgroup = f"{FALLBACK_ROOT}/{_SHARED}{persona.name}/{session_id}"
    else:
        below = f"{fallback_slice_of(uid)}/{session_id}:{persona.name}"
        cgroup = f"{scope}/{directory_name(persona.name)}" if scope else below
    return PersonaCgroup(session_id, persona, cgroup, uid, scope or found, withdrawn)


def level_of(cgroup: str) -> int:
    """The number of path components of a cgroup."""
    return cgroup.count("/") + 1


def slice_of(uid: int) -> str:
    """The cgroup of all that logind starts for a user."""
    return f"user.slice/user-{uid}.slice"


def fallback_slice_of(uid: int) -> str:
    """The cgroup of all of a user's sessions that have no scope."""
    return f"{FALLBACK_ROOT}/user-{uid}"


def is_kept(cgroup: str) -> bool:
    """Whether a cgroup directly below ``FALLBACK_ROOT`` stays when empty: what was left in memory counts there."""
    return cgroup.startswith((f"{FALLBACK_ROOT}/user-", f"{FALLBACK_ROOT}/{_SHARED}"))


def renamed(cgroup: str, known: Iterable[str]) -> str | None:
    """What a place is called now that 0.1.0 called ``FALLBACK_ROOT/SESSION/P``; ``None`` = it is not known."""
    session_id, _, name = cgroup.removeprefix(f"{FALLBACK_ROOT}/").partition("/")
    end = f"/{session_id}:{name.removeprefix('_')}"
    return next((place for place in known if place.startswith(f"{FALLBACK_ROOT}/user-") and place.endswith(end)), None)


def scope_of(cgroup: str, uid: int) -> str | None:
    """The session scope that a process is in, where it is a login of this very user; else ``None``."""
    match = _SCOPE.fullmatch(cgroup)
    return match[1] if match is not None and int(match[2]) == uid else None


def manager_of(cgroup: str, uid: int) -> str | None:
    """The user's own service manager, where a process is below it; else ``None``."""
    match = _MANAGER.fullmatch(cgroup)
    return match[1] if match is not None and int(match[2]) == int(match[3]) == uid else None
