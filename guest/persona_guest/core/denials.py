"""What was denied to each user lately, within bounds that no one of them can use up for the others."""

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from persona.decisions import Denied
from persona.json_fields import CodecError
from persona.json_fields import reason as read_reason
from persona.problems import AnyReason

USER_MAX = 50  # denials of one user, the newest
USER_BYTES = 16 * 1024  # that these take as JSON
USERS_MAX = 512  # with USER_BYTES 8 MiB in all
PROGRAM_MAX = 512
COMMAND_MAX = 400
HELP_MAX = 400


@dataclass(frozen=True, slots=True)
class Denial:
    """One command that was refused, stopped or killed, or the same one several times.

    ``program`` is the path of the file, empty where none is known; ``command`` the command line in printable
    words (``persona.shown.words``).  ``at`` and ``first_at`` are Unix seconds.  ``event`` is a record's.
    ``policy_origin`` is the decision's (``10-analysts.yaml:3``), empty where nobody said it.
    """

    at: float
    event: str
    program: str
    command: str
    reason: AnyReason
    policy: str | None = None
    persona: str | None = None
    help: str = ""
    session: str = ""
    first_at: float = 0.0
    count: int = 1
    policy_origin: str = ""


Key = tuple[object, ...]


@dataclass(slots=True)
class _Theirs:
    denials: OrderedDict[Key, tuple[Denial, int]] = field(default_factory=OrderedDict)  # with the size of each
    size: int = 0

    def add(self, denial: Denial) -> None:
        key = (denial.event, denial.program, denial.command, denial.reason, denial.policy, denial.persona)
        before = self.denials.pop(key, None)
        if before is not None:
            self.size -= before[1]
            denial = replace(denial, first_at=before[0].first_at, count=before[0].count + denial.count)
        size = len(json.dumps(_to_json(denial))) + 2
        self.denials[key] = denial, size
        self.size += size
        while len(self.denials) > USER_MAX or (self.size > USER_BYTES and len(self.denials) > 1):
            self.size -= self.denials.popitem(last=False)[1][1]


class Book:
    """The newest denials of each user, by uid; ``changed`` has the uids of those whose page is another by now."""

    def __init__(self) -> None:
        self._users: OrderedDict[int, _Theirs] = OrderedDict()  # who was denied something last is last
        self.changed: set[int] = set()

    def add(self, uid: int, denial: Denial) -> None:
        """The same command for the same reason is one denial, with the number of times."""
        theirs = self._users.setdefault(uid, _Theirs())
        self._users.move_to_end(uid)
        theirs.add(_cut(denial))
        self.changed.add(uid)
        while len(self._users) > USERS_MAX:
            self.changed.add(self._users.popitem(last=False)[0])

    def note(
        self, uid: int, at: float, event: str, program: str, command: str, denied: Denied, session_id: str = ""
    ) -> None:
        """Adds the denial that ``denied`` tells of."""
        reason, policy, origin, persona = denied.reason, denied.policy, denied.policy_origin, denied.persona
        denial = Denial(at, event, program, command, reason, policy, persona, denied.help, session_id, at, 1, origin)
        self.add(uid, denial)

    def of(self, uid: int) -> tuple[Denial, ...]:
        """What was denied to a user, the newest last."""
        theirs = self._users.get(uid)
        return tuple(denial for denial, _ in theirs.denials.values()) if theirs is not None else ()

    def since(self, uid: int, at: float) -> int:
        """How many commands were denied to a user from then on."""
        return sum(denial.at >= at for denial in self.of(uid))

    def page(self, uid: int) -> str:
        """A user's denials as text that ``restore`` reads; empty where there are none."""
        denials = self.of(uid)
        return json.dumps([_to_json(denial) for denial in denials]) if denials else ""

    def restore(self, pages: Iterable[tuple[int, str]]) -> list[int]:
        """Takes up the pages of the agent before this one; returns whose could not be read."""
        bad: list[int] = []
        found: list[tuple[float, int, list[Denial]]] = []
        for uid, text in pages:
            try:
                denials = [_from_json(value) for value in json.loads(text)]
                found.append((max(denial.at for denial in denials), uid, denials))
            except (CodecError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
                bad.append(uid)
        for _, uid, denials in sorted(found, key=lambda page: page[0]):
            for denial in denials:
                self.add(uid, denial)
        return bad


def _cut(denial: Denial) -> Denial:
    if len(denial.program) <= PROGRAM_MAX and len(denial.help) <= HELP_MAX and len(denial.command) <= COMMAND_MAX * 2:
        return denial
    program, help = _shortened(denial.program, PROGRAM_MAX), _shortened(denial.help, HELP_MAX)
    return replace(denial, program=program, help=help, command=_shortened(denial.command, COMMAND_MAX * 2))


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _to_json(denial: Denial) -> dict[str, Any]:
    return {**asdict(denial), "reason": str(denial.reason)}


_TYPES: dict[str, tuple[type, ...]] = {
    "at": (float, int), "event": (str,), "program": (str,), "command": (str,), "reason": (str,),
    "policy": (str, type(None)), "persona": (str, type(None)), "help": (str,), "session": (str,),
    "first_at": (float, int), "count": (int,), "policy_origin": (str,),
}  # fmt: skip


def _from_json(value: dict[str, Any]) -> Denial:
    """Raises ``CodecError``, ``KeyError``, ``TypeError`` or ``ValueError`` for anything but what ``_to_json`` wrote.

    An agent of before wrote no ``policy_origin``.
    """
    value = {"policy_origin": "", **value}
    if set(value) != {item.name for item in fields(Denial)}:
        raise ValueError("other fields")
    for name, kinds in _TYPES.items():
        if not isinstance(value[name], kinds):
            raise TypeError(name)
    return Denial(**{**value, "reason": read_reason(value["reason"], "reason")})
