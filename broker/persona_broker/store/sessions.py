"""Guests and their tokens, and the sessions that they opened."""

import hashlib
import json
import secrets
from collections.abc import Iterable
from typing import Any

from persona.decisions import Subject
from persona_broker.store.database import Database, raise_generation
from persona_broker.store.interface import NOBODY, Author, SessionRow
from persona_broker.store.pending import note

SESSIONS_KEPT = 4096  # of one guest: far more than are open, so the oldest is one that the guest forgot to end


class Sessions(Database):
    """The part of the database that says who may ask, and for whom."""

    def add_guest(self, name: str, token: str | None = None, author: Author = NOBODY) -> str:
        """Registers a guest, or gives it a new token; returns the token, which is kept only as a hash."""
        token = token or secrets.token_urlsafe(32)
        with self.writing() as db:
            before = db.execute("SELECT token_sha256 FROM guests WHERE name = ?", (name,)).fetchone()
            if before != (hash_token(token),):  # 'serve --guest' names the same at each start
                db.execute("INSERT OR REPLACE INTO guests VALUES (?, ?)", (name, hash_token(token)))
                note(db, "guest_added", author=author.name, vm=name, renewed=before is not None)
        return token

    def remove_guest(self, name: str, author: Author = NOBODY) -> bool:
        """Whether there was one; its event streams end."""
        with self.writing() as db:
            found = db.execute("DELETE FROM guests WHERE name = ?", (name,)).rowcount > 0
            if found:
                db.execute("DELETE FROM health WHERE guest = ?", (name,))
                db.execute("DELETE FROM sessions WHERE guest = ?", (name,))  # nobody is left to say that they ended
                note(db, "guest_removed", author=author.name, vm=name)
                raise_generation(db)
            return found

    def guests(self) -> list[str]:
        """The names of all guests."""
        return [name for (name,) in self.rows("SELECT name FROM guests ORDER BY name")]

    def quarantined(self) -> dict[str, float]:
        """Guests that are denied everything since a restore, and since when."""
        return dict(self.rows("SELECT guest, at FROM quarantine ORDER BY guest"))

    def readmit(self, names: Iterable[str], author: Author = NOBODY) -> list[str]:
        """Ends the quarantine of these guests; of which it was one."""
        with self.writing() as db:
            found = [
                name for name in names if db.execute("DELETE FROM quarantine WHERE guest = ?", (name,)).rowcount > 0
            ]
            for name in found:
                note(db, "guest_readmitted", author=author.name, vm=name)
            if found:
                raise_generation(db)
        return found

    def tokens(self) -> dict[str, str]:
        """Guests by the hash of their token."""
        return {key: name for name, key in self.rows("SELECT name, token_sha256 FROM guests")}

    def open_session(self, session: SessionRow) -> bool:
        """False where another guest has a session of that name."""
        with self.writing() as db:
            row = db.execute("SELECT guest FROM sessions WHERE id = ?", (session.id,)).fetchone()
            if row is not None and row[0] != session.guest:
                return False
            db.execute(
                "INSERT OR IGNORE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                (
                    session.id,
                    session.guest,
                    session.subject.user,
                    json.dumps(session.subject.groups),
                    session.service,
                    session.remote,
                    session.opened_at,
                ),
            )
            db.execute(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE guest = ?"
                " ORDER BY revoked DESC, opened_at DESC LIMIT -1 OFFSET ?)",
                (session.guest, SESSIONS_KEPT),
            )
            return True

    def session(self, ident: str) -> SessionRow | None:
        """One open session."""
        return next(iter(self._sessions("WHERE id = ?", ident)), None)

    def sessions(self) -> list[SessionRow]:
        """All open sessions, oldest first."""
        return self._sessions("ORDER BY opened_at")

    def _sessions(self, where: str, *values: Any) -> list[SessionRow]:
        columns = "id, guest, user, groups, service, remote, opened_at, revoked, id IN (SELECT id FROM ending)"
        rows = self.rows(f"SELECT {columns} FROM sessions {where}", *values)  # noqa: S608 - constants; values are bound
        found = []
        for i, g, u, names, s, r, at, revoked, ending in rows:
            try:
                groups = tuple(map(str, json.loads(names)))
            except (ValueError, TypeError, RecursionError) as error:
                self.skip(f"session {i}", error)  # its guest is answered as if there were none, and opens another
                continue
            found.append(SessionRow(i, g, Subject(u, groups, g), s, r, at, bool(revoked), bool(ending)))
        return found

    def end_session(self, ident: str, guest: str) -> bool:
        """Whether the guest had such a session."""
        with self.writing() as db:
            return db.execute("DELETE FROM sessions WHERE id = ? AND guest = ?", (ident, guest)).rowcount > 0

    def end_all_but(self, guest: str, alive: Iterable[str], opened_before: float) -> int:
        """Ends what a guest opened before a moment and does not have any more; how many those were."""
        with self.writing() as db:
            old = db.execute("SELECT id FROM sessions WHERE guest = ? AND opened_at < ?", (guest, opened_before))
            gone = {ident for (ident,) in old} - set(alive)
            db.executemany("DELETE FROM sessions WHERE id = ?", [(ident,) for ident in gone])
        return len(gone)

    def end_strays(self) -> int:
        """Ends the sessions of guests that are not registered; how many those were."""
        with self.writing() as db:
            return db.execute("DELETE FROM sessions WHERE guest NOT IN (SELECT name FROM guests)").rowcount

    def revoke(
        self, who: str, guest: str | None = None, *, end: bool = False, author: Author = NOBODY
    ) -> list[SessionRow]:
        """The session of this id, and all of a user of this name, are denied everything from now on; which those are.

        Only those of ``guest``, where it is given.  ``end``: what runs in them is asked to end, too.
        """
        where, values = "WHERE ? IN (id, user) AND guest = ifnull(?, guest)", (who, guest)
        with self.writing() as db:
            columns = "id, guest, user, service, remote, opened_at"
            rows = db.execute(f"SELECT {columns} FROM sessions {where} ORDER BY opened_at", values)  # noqa: S608 - as above
            # their groups matter to nobody now, and may be what cannot be read of them
            found = [SessionRow(i, g, Subject(u, (), g), s, r, at, True, end) for i, g, u, s, r, at in rows]
            db.execute(f"UPDATE sessions SET revoked = 1 {where}", values)  # noqa: S608 - as above
            if end:
                db.execute(f"INSERT OR IGNORE INTO ending SELECT id FROM sessions {where}", values)  # noqa: S608 - as above
            for row in found:
                said = {"session": row.id, "vm": row.guest, "user": row.subject.user}
                note(db, "session_revoked", author=author.name, end=end, **said)
            if found:
                raise_generation(db)
        return found

    def revoked(self) -> frozenset[str]:
        """The sessions that are denied everything."""
        return frozenset(ident for (ident,) in self.rows("SELECT id FROM sessions WHERE revoked = 1"))

    def ending(self) -> frozenset[str]:
        """Those of them in which what runs is asked to end."""
        return frozenset(ident for (ident,) in self.rows("SELECT id FROM ending"))


def hash_token(token: str) -> str:
    """What is kept of a token.  A look-up by hash gives timing nothing to tell of the token itself."""
    return hashlib.sha256(token.encode()).hexdigest()
