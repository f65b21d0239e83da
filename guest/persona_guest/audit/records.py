"""The record of each event, built from what that event knows.  Pure: ``at`` is the caller's clock, in Unix seconds.

``session_id`` and ``user`` are empty where they are not known.  ``complain``: it was only written down, nothing was
stopped.
"""

from collections.abc import Sequence

from persona.decisions import Decision, Denied, Granted, PersonaRef
from persona.problems import AnyReason, Reason
from persona.record_codec import Lost, Record

UNKNOWN = "unknown"  # as a program: no path, as it begins with no '/'


def program_start(
    at: float,
    session_id: str,
    user: str,
    event: str,
    program: str,
    argv: Sequence[str],
    decision: Decision | None,
    *,
    leased: bool,
    complain: bool,
) -> Record:
    """A program start that was decided; ``decision`` is ``None`` for what a session starts by itself.

    ``event``: ``exec``, or ``killed`` where something else started in its place.  ``leased``: the broker was not asked.
    """
    granted = decision if isinstance(decision, Granted) else None
    denied = decision if isinstance(decision, Denied) else None
    return Record(
        at=at,
        session=session_id,
        user=user,
        program=program,
        argv=tuple(argv),
        decision="denied" if denied else "granted",
        reason=denied.reason if denied else None,
        persona=granted.persona.name if granted else denied.persona if denied else None,
        persona_version=granted.persona.version if granted else denied.persona_version if denied else None,
        policy=decision.policy if decision else None,
        policy_version=decision.policy_version if decision else None,
        event=event,
        leased=leased,
        complain=complain,
    )


def unjudged_start(at: float, session_id: str, user: str, reason: AnyReason, *, complain: bool) -> Record:
    """A program start of which nothing is known, because reading it failed."""
    return _denied(at, session_id, user, "exec", reason, program=UNKNOWN, complain=complain)


def standby_answers(at: float, session_id: str, user: str, count: int, *, denied: bool) -> Record:
    """``count`` program starts that the standby answered while there was no agent."""
    return _denied(
        at, session_id, user, "exec", Reason.AGENT_STOPPING,
        program=UNKNOWN, complain=not denied, extra=f'{{"count":{count}}}',
    )  # fmt: skip


def kernel_stop(
    at: float, session_id: str, user: str, program: str, path: str, reason: Reason, *, complain: bool
) -> Record:
    """A start that the kernel layer stopped; ``path`` is what its caller asked for, ``program`` the file itself."""
    event = "killed" if reason is Reason.OTHER_ARGUMENTS else "stopped"
    return _denied(at, session_id, user, event, reason, program=program, argv=(path,), complain=complain)


def login(at: float, session_id: str, user: str, event: str, denied: Denied | None, *, complain: bool) -> Record:
    """``event`` is ``admission``, ``break_glass`` or ``session_end``; ``denied`` why an admission was refused."""
    return Record(
        at=at,
        session=session_id,
        user=user,
        program="",
        argv=(),
        decision="denied" if denied else "granted",
        reason=denied.reason if denied else None,
        persona=None,
        persona_version=None,
        policy=denied.policy if denied else None,
        policy_version=denied.policy_version if denied else None,
        event=event,
        leased=False,
        complain=complain,
    )


def limit_met(at: float, session_id: str, user: str, persona: PersonaRef, reason: Reason) -> Record:
    """Processes under a persona ran into its memory or process limit."""
    return _denied(at, session_id, user, "limit", reason, persona=persona.name, persona_version=persona.version)


def process_withdrawn(
    at: float, session_id: str, user: str, event: str, persona: PersonaRef | None, program: str, argv: Sequence[str]
) -> Record:
    """A running process that its persona does not allow any more; ``event`` says what became of it (``frozen``, …).

    ``persona`` is ``None`` where the session has no place under it by now.
    """
    return _denied(
        at, session_id, user, event, Reason.PERSONA_WITHDRAWN, program=program, argv=argv,
        persona=persona.name if persona else None, persona_version=persona.version if persona else None,
    )  # fmt: skip


def connection_refused(at: float, session_id: str, user: str, persona: str, target: str) -> Record:
    """A packet that a persona's network rules refuse; ``target`` is in the words of those (``192.0.2.7:tcp/443``)."""
    return _denied(at, session_id, user, "network", Reason.NETWORK_REFUSED, argv=(target,), persona=persona)


def lost(at: float, first: int, last: int, why: str) -> Record:
    """A marker: the records from number ``first`` to ``last`` are lost.  Its own number is the next after them."""
    return Record(
        at=at,
        session="",
        user="",
        program="",
        argv=(),
        decision="granted",
        reason=None,
        persona=None,
        persona_version=None,
        policy=None,
        event="lost",
        leased=False,
        complain=False,
        number=last + 1,
        lost=Lost(first, last, why),
    )


def _denied(
    at: float,
    session_id: str,
    user: str,
    event: str,
    reason: AnyReason,
    *,
    program: str = "",
    argv: Sequence[str] = (),
    persona: str | None = None,
    persona_version: int | None = None,
    complain: bool = False,
    extra: str = "",
) -> Record:
    """What no lease and no policy decided."""
    return Record(
        at=at,
        session=session_id,
        user=user,
        program=program,
        argv=tuple(argv),
        decision="denied",
        reason=reason,
        persona=persona,
        persona_version=persona_version,
        policy=None,
        event=event,
        leased=False,
        complain=complain,
        extra=extra,
    )
