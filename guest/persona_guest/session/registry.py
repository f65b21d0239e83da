"""Every session of this machine: the one place that knows which there are, how far each is, and when it ends.

A session that is gated has a file that outlives the agent (``ID.json``); its listener outlives it elsewhere
(``ipc.standby``).  Everything here runs in the loop's thread, but for what says otherwise.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from persona.decisions import Subject
from persona_guest import files
from persona_guest.core.messages import printable
from persona_guest.kernel.task import Task, with_ancestors
from persona_guest.session import from_0_1
from persona_guest.session.model import Login, Session, State, from_json, to_json
from persona_guest.session.placement import Placement

log = logging.getLogger("persona.agent")

_PER_USER = 500  # each holds a descriptor here and in systemd's store
_ANCESTORS_MAX = 128

AtEnd = Callable[[Login], None]


class Registry:
    """All logins; ``directory`` holds the sessions' files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._logins: dict[str, Login] = {}
        self._unsaved: set[str] = set()  # whose files are not what they should be
        self._at_end: tuple[AtEnd, ...] = ()

    # --- who there is -------------------------------------------------------------------------------

    def get(self, session_id: str) -> Login | None:
        """The login of a session that opens or is open; ``None`` where there is none of that name."""
        return self._logins.get(session_id)

    def gated(self) -> list[Login]:
        """The logins whose program starts are decided.  Safe to call from any thread."""
        return [login for login in list(self._logins.values()) if login.state is State.GATED]

    def of_user(self, uid: int) -> list[Login]:
        """The gated logins of one user.  Safe to call from any thread."""
        return [login for login in self.gated() if login.session.uid == uid]

    def ids(self) -> list[str]:
        """The ids of all sessions that open or are open."""
        return list(self._logins)

    def unannounced(self) -> list[Login]:
        """The logins of which the broker has still to be told."""
        return [login for login in self._logins.values() if not login.announced]

    def placements(self) -> Iterator[Placement]:
        """Where processes of sessions live.  Safe to call from any thread."""
        for login in self.gated():
            placement = login.placement  # once: the loop's thread may take it away meanwhile
            if placement is not None:
                yield placement

    def placement(self, session_id: str) -> Placement | None:
        """Where the processes of one session live; ``None`` where none has started, or the session is over."""
        login = self._logins.get(session_id)
        return login.placement if login is not None else None

    def subject_of(self, session_id: str) -> Subject | None:
        """Whose session it is, with all their groups; ``None`` where none of that name opens or is open."""
        login = self._logins.get(session_id)
        return login.session.subject if login is not None else None

    def user_of(self, session_id: str) -> str:
        """The name of a session's user; empty where there is no such session."""
        subject = self.subject_of(session_id)
        return subject.user if subject is not None else ""

    def is_full(self, uid: int) -> bool:
        """Whether this user has as many gated sessions as they may."""
        return len(self.of_user(uid)) >= _PER_USER

    def find(self, pid: int) -> Login | None:
        """The session that a process belongs to, by audit session id or by descent; ``None`` = none."""
        try:
            audit = Task(pid).audit_session()
        except OSError:
            return None
        among = self.gated()
        if audit is not None and (of_login := [login for login in among if login.session.audit == audit]):
            if len(of_login) == 1:
                return of_login[0]
            among = of_login  # several su in one login of root's: which of them, descent tells
        monitors = {login.session.monitor: login for login in among}
        for ancestor, _credentials in with_ancestors(pid, _ANCESTORS_MAX):
            found = monitors.get(ancestor)
            if found is not None and Task(ancestor).started() == found.session.monitor_started:
                return found
        return None

    # --- from the first packet to the last process --------------------------------------------------

    def at_end(self, *subscribers: AtEnd) -> None:
        """Sets who is told of each end, in this order; each sees the login in the state that it ended in."""
        self._at_end = subscribers

    def open(self, session: Session) -> Login:
        """Adds a login that begins."""
        login = self._logins[session.id] = Login(session)
        return login

    def gate(self, login: Login) -> None:
        """Marks a login as gated: its filter and its listener are there, and it outlives this agent from now on."""
        login.state = State.GATED
        session = login.session
        log.info("session %s of %s gated (%s)", session.id, printable(session.subject.user), session.service)

    def end(self, login: Login) -> None:
        """Ends a login whose last process is gone, or that does not come to be gated; a second time does nothing."""
        if self._logins.get(login.session.id) is not login:
            return
        del self._logins[login.session.id]
        self._unsaved.discard(login.session.id)
        with contextlib.suppress(OSError):  # a restart finds a file without a listener, and removes it then
            self._path(login.session.id).unlink(missing_ok=True)
        for tell in self._at_end:
            try:
                tell(login)
            except Exception:  # whatever it is: what the others keep of the session must not stay for it
                log.exception("session %s has ended, and not every part could be told", login.session.id)
        login.state = State.ENDED

    # --- what outlives the agent ----------------------------------------------------------------------

    def save(self, login: Login) -> None:
        """Writes the login's file anew.  Raises ``OSError``; ``save_again`` then tries once more."""
        self._unsaved.add(login.session.id)
        files.write(self._path(login.session.id), json.dumps(to_json(login)))
        self._unsaved.discard(login.session.id)
        if login.placement is not None:
            login.placement.unsaved = False

    def try_to_save(self, login: Login) -> None:
        """As ``save``, for what has been done already, whatever the disk says; raises nothing."""
        try:
            self.save(login)
        except OSError as error:
            log.error(
                "%s; an agent that starts before this is mended knows less of session %s", error, login.session.id
            )

    def save_again(self) -> None:
        """Writes what could not be written.  Call it now and then."""
        for session_id in list(self._unsaved):
            login = self._logins.get(session_id)
            if login is not None:
                self.try_to_save(login)

    def restore(self, listeners: dict[str, int]) -> None:
        """Takes up the sessions of the agent before this one whose listener was kept, and removes those from there.

        A file that cannot be read stays, and its listener in ``listeners``: nothing may start there any more.
        """
        files.clear_unfinished(self._directory)
        for path in sorted(self._directory.glob("s-*.json")):
            listener = listeners.get(path.stem)
            if listener is None:
                path.unlink(missing_ok=True)
                continue
            try:
                value = json.loads(path.read_text())
                login = from_json(value) if "session" in value else from_0_1.login(value, self._directory.parent)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("%s: %s; its session is refused everything", path, error)
                continue
            del listeners[path.stem]
            login.listener, login.state = listener, State.GATED
            self._logins[login.session.id] = login
            if "session" not in value:
                self.try_to_save(login)
        if not self._unsaved:
            from_0_1.remove(self._directory.parent)

    def _path(self, session_id: str) -> Path:
        return self._directory / f"{session_id}.json"
