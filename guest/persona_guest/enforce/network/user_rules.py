"""What each user's network is under outside of every place: sshd's forwards, user services, what runs before a shell.

It is there before a login's first process, and goes with the user's last session.  Of several sessions
the one that was heard of last has the word: the same policies name the same user on the same machine.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.problems import PersonaError
from persona_guest import files
from persona_guest.core.reassignment import NOBODY, NOBODYS
from persona_guest.enforce import plan as plans
from persona_guest.enforce.plan import Plan
from persona_guest.session.model import Session

log = logging.getLogger("persona.enforce")


class UserRules:
    """``current`` is what the network facility reads; ``bind`` plans one user's change, ``spare`` that they are exempt.

    ``document`` has the personas' documents; it raises ``PersonaError`` for one that is not here.
    """

    def __init__(
        self,
        path: Path,
        document: Callable[[PersonaRef], Persona],
        bind: Callable[[int], Plan],
        spare: Callable[[int], Plan] = lambda _uid: (),
    ) -> None:
        self.current: dict[int, Persona] = {}
        self._path = path
        self._document = document
        self._bind = bind
        self._spare = spare
        self._sessions: dict[str, tuple[int, PersonaRef]] = {}
        self._released = False
        self._unsaved = False  # what is kept is older than what applies

    def opened(self, session: Session, ref: PersonaRef | None) -> None:
        """A session begins; afterwards it is bound.  Raises ``PersonaError``: then it must not begin."""
        if self._released:
            return
        self._sessions[session.id] = (session.uid, ref or NOBODY)
        try:
            self._save()
            self._settle(session.uid)
        except (PersonaError, OSError):
            self._forget(session.id)
            self._choose(session.uid)
            raise

    def rebased(self, session: str, ref: PersonaRef | None) -> None:
        """A session is under another persona, or version, from now on."""
        known = self._sessions.pop(session, None)
        if known is None:
            return
        self._sessions[session] = (known[0], ref or NOBODY)  # the last of them now
        self._try(known[0])

    def ended(self, session: str) -> None:
        """The last process of a session is gone, or it never had one."""
        if (known := self._forget(session)) is not None:
            self._try(known[0])

    def exempted(self, uid: int) -> None:
        """Somebody logs in who is not looked at, perhaps beside a session of theirs that is."""
        if self._released:
            return
        try:
            plans.apply(self._spare(uid))
        except (PersonaError, OSError) as error:
            log.error("uid %d: the user's network may stay bound when their other session ends: %s", uid, error)

    def alive(self, session: str) -> bool:
        """Whether it has not ended."""
        return session in self._sessions

    def restore(self, alive: Mapping[str, int]) -> None:
        """Takes up what the agent before this one kept of sessions that are still there; binds nothing yet.

        ``alive`` has the uid of each.  What was not kept (it is from before, or the file is torn) is nobody's.
        """
        kept: dict[str, PersonaRef] = {}
        try:
            for session, (_uid, name, version) in json.loads(self._path.read_text()).items():
                kept[session] = PersonaRef(str(name), int(version))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("%s: %s; users' own processes reach nothing until their next login", self._path, error)
        self._sessions = {session: (uid, kept.get(session, NOBODY)) for session, uid in alive.items()}
        for uid, ref in self._sessions.values():
            self.current[uid] = self._known(ref)

    def release(self) -> None:
        """Nobody is bound any more, now or later."""
        self._released = True
        self._sessions.clear()
        self.current.clear()
        self._path.unlink(missing_ok=True)

    def _forget(self, session: str) -> tuple[int, PersonaRef] | None:
        return self._sessions.pop(session, None)

    def _try(self, uid: int) -> None:
        """Binds first: a file that cannot be written must not leave a user what was taken away from them."""
        try:
            self._settle(uid)
        except (PersonaError, OSError) as error:  # what should be is known, and is tried again before long
            log.error("uid %d: its network does not follow: %s", uid, error)
        try:
            self._save()
        except OSError as error:
            self._unsaved = True
            log.error("cannot write %s: %s; an agent that starts now takes up what was written last", self._path, error)

    def save_again(self) -> None:
        """Call now and then: writes what could not be written."""
        if self._unsaved and not self._released:
            with contextlib.suppress(OSError):
                self._save()

    def _settle(self, uid: int) -> None:
        self._choose(uid)
        plans.apply(self._bind(uid))

    def _choose(self, uid: int) -> None:
        last = [ref for number, ref in self._sessions.values() if number == uid][-1:]
        if last:
            self.current[uid] = self._known(last[0])
        else:
            self.current.pop(uid, None)

    def _known(self, ref: PersonaRef) -> Persona:
        if ref == NOBODY:
            return NOBODYS
        try:
            return self._document(ref)
        except PersonaError as error:
            log.error("%s; its users' own processes reach nothing", error.message)
            return NOBODYS

    def _save(self) -> None:
        kept = {session: [uid, ref.name, ref.version] for session, (uid, ref) in self._sessions.items()}
        files.write(self._path, json.dumps(kept))
        self._unsaved = False
