"""What the kernel layer stopped by itself, for the record and for the user it happened to."""

import dataclasses
import os
import time
from collections.abc import Callable

from persona.decisions import Denied
from persona.problems import Reason
from persona.record_codec import Record
from persona.shown import words
from persona_guest.audit import records
from persona_guest.audit.upload import Recordable
from persona_guest.core.denials import COMMAND_MAX, Book
from persona_guest.core.file_id import Image
from persona_guest.lsm.abi import Event
from persona_guest.session.registry import Registry
from persona_guest.system.accounts import Names

Add = Callable[[Recordable], None]
# what the kernel alone decides has no other word for its user
_STOPPED = {
    Reason.NOT_APPROVED: "the agent did not allow this start; is this process from before the gate? then log in again",
    Reason.OTHER_FILE: "the file was replaced, or a link on its path changed, while it was being started; try again",
    Reason.OTHER_ARGUMENTS: "its arguments were changed by another thread while it was being started, so it was killed",
}


class Stops:
    """Records what the kernel stopped, killed or would have stopped: execs that nobody had approved.

    ``where`` names a file by its number: the path that the kernel reports is its caller's text.
    """

    def __init__(self, record: Add, registry: Registry, denials: Book, where: Callable[[Image], str]) -> None:
        self._record = record
        self._registry = registry
        self._denials = denials
        self._where = where
        self._names = Names()  # for the recorder's thread

    def __call__(self, event: Event) -> None:
        """Under the session that it happened in; outside of any, under its user's name."""
        of_login = [one for one in self._registry.gated() if one.session.audit == event.audit_session is not None]
        login = of_login[0] if len(of_login) == 1 else self._registry.find(event.tgid)
        program = self._where(Image(os.makedev(event.device >> 20, event.device & 0xFFFFF), event.inode))
        if login is not None:
            record, uid = _of_stop(event, program, login.session.id, login.session.subject.user), login.session.uid
            self._record(record)
        else:
            record, uid = _of_stop(event, program, "", ""), event.uid if event.login is None else event.login
            self._record(lambda: dataclasses.replace(record, user=self._names.of(uid)))
        if event.enforced and (login is not None or event.login is not None):  # a login uid cannot be chosen
            denied = Denied(event.reason, help=_STOPPED[event.reason])
            command = words(record.argv, COMMAND_MAX)
            self._denials.note(uid, record.at, record.event, program, command, denied, record.session)


def _of_stop(event: Event, program: str, session_id: str, user: str) -> Record:
    return records.kernel_stop(
        time.time(), session_id, user, program, event.path, event.reason, complain=not event.enforced
    )
