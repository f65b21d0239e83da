"""What each user's network is under outside of every place: sshd's forwards, user services, what runs before a shell.

It is there before a login's first process, and goes with the user's last session.  Of several sessions
the one that was heard of last has the word: the same policies name the same user on the same machine.
"""

import logging
from collections.abc import Callable, Iterable

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.problems import PersonaError
from persona_guest.core.reassignment import NO_PERSONA, NO_PERSONA_DOCUMENT
from persona_guest.enforce import plan as plans
from persona_guest.enforce.plan import Plan
from persona_guest.session.model import Login, Session

log = logging.getLogger("persona.enforce")


class UserRules:
    """The persona of each user outside of every place; ``current`` is what the network facility reads.

    ``bind`` plans one user's change, ``exempt`` that they are not gated.  ``document`` has the personas' documents; it
    raises ``PersonaError`` for one that is not here.
    """

    def __init__(
        self,
        document: Callable[[PersonaRef], Persona],
        bind: Callable[[int], Plan],
        exempt: Callable[[int], Plan] = lambda _uid: (),
    ) -> None:
        self.current: dict[int, Persona] = {}
        self._document = document
        self._bind = bind
        self._exempt = exempt
        self._sessions: dict[str, tuple[int, PersonaRef]] = {}
        self._released = False

    def opened(self, session: Session, ref: PersonaRef | None) -> None:
        """Binds the user of a session that begins.  Raises ``PersonaError``: then the session must not begin."""
        if self._released:
            return
        self._sessions[session.id] = (session.uid, ref or NO_PERSONA)
        try:
            self._settle(session.uid)
        except (PersonaError, OSError):
            self._sessions.pop(session.id)
            self._choose(session.uid)
            raise

    def default_changed(self, session_id: str, ref: PersonaRef | None) -> None:
        """Binds the user of a session whose default persona, or its version, is another from now on."""
        known = self._sessions.pop(session_id, None)
        if known is None:
            return
        self._sessions[session_id] = (known[0], ref or NO_PERSONA)  # the last of them now
        self._try(known[0])

    def ended(self, login: Login) -> None:
        """Binds the user of a session that is over by those that they still have, or lets them go."""
        if (known := self._sessions.pop(login.session.id, None)) is not None:
            self._try(known[0])

    def exempted(self, uid: int) -> None:
        """Leaves a user alone who logs in without being gated, perhaps beside a session of theirs that is."""
        if self._released:
            return
        try:
            plans.apply(self._exempt(uid))
        except (PersonaError, OSError) as error:
            log.error("uid %d: the user's network may stay bound when their other session ends: %s", uid, error)

    def restore(self, logins: Iterable[Login]) -> None:
        """Takes up the sessions that the agent before this one had; binds nothing yet."""
        for login in sorted(logins, key=lambda login: login.session.opened_at):
            self._sessions[login.session.id] = (login.session.uid, login.default_persona or NO_PERSONA)
            self._choose(login.session.uid)

    def release(self) -> None:
        """Binds nobody any more, now or later."""
        self._released = True
        self._sessions.clear()
        self.current.clear()

    def _try(self, uid: int) -> None:
        try:
            self._settle(uid)
        except (PersonaError, OSError) as error:  # what should be is known, and is tried again before long
            log.error("uid %d: its network does not follow: %s", uid, error)

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
        try:
            return self._document(ref)
        except PersonaError as error:
            log.error("%s; its users' own processes reach nothing", error.message)
            return NO_PERSONA_DOCUMENT


class NoUserRules:
    """Where personas bind nobody's network: in complain mode, and on a machine without nftables."""

    def opened(self, session: Session, ref: PersonaRef | None) -> None:
        """Binds nothing."""

    def default_changed(self, session_id: str, ref: PersonaRef | None) -> None:
        """Binds nothing."""

    def ended(self, login: Login) -> None:
        """Binds nothing."""

    def exempted(self, uid: int) -> None:
        """Binds nothing."""
