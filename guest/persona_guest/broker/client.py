"""What the agent asks the broker, and how its answers, or their absence, become decisions."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from persona.codec import (
    MAX_BODY,
    GroupsInUse,
    decode_decision,
    decode_groups_in_use,
    encode_request,
    encode_subject,
    version_needed,
)
from persona.decisions import Decision, Denied, Lease, PersonaRef, Request, Subject, Width
from persona.json_fields import CodecError, integer
from persona.problems import Fault, Reason
from persona_guest.broker.current import Current
from persona_guest.broker.current import read as read_current
from persona_guest.broker.http import BrokerError, NotAsked
from persona_guest.broker.pool import Answer, Outcome, Pool
from persona_guest.core.leases import LeaseBook
from persona_guest.session.model import Admitted, Login, Session, State

_ARGV_MAX = MAX_BODY // 2
SESSIONS_A_CALL = 100  # that are asked about at once
_SESSIONS_TOLD_MAX = 4096  # a broker knows no more of one guest
_REST = 32 * 1024  # of a body: program, directory, names of fields
_GROUPS_OF_0_1_0 = 256  # that its broker takes of one user; it knows no list of those that matter
_AGAIN_MAX = 3  # how often a question is asked, where the answer is older than the newest event or wants other groups
# A refusal for want of an answer is never reused; what keeps a loop of commands from becoming a loop of timeouts is
# the pause of ``Pool`` after a failure.
_NO_ANSWER = Lease(0.0, Width.ARGV)

_AGENT = ""  # on behalf of whom the agent asks for itself: no user has that name


_Body = Callable[[GroupsInUse, int], dict[str, Any]]  # raises ``NotAsked`` or nothing


class BrokerClient:
    """Asks through a ``Pool``; every callback runs in the loop's thread, exactly once.

    ``subject_of`` says whose a session is that opens or is open.
    """

    def __init__(self, pool: Pool, leases: LeaseBook, subject_of: Callable[[str], Subject | None]) -> None:
        self._pool = pool
        self._leases = leases
        self._subject_of = subject_of
        self._groups = GroupsInUse()
        self.streaming = False  # whether a revocation would reach us now

    def decide(self, request: Request, done: Callable[[Decision], None], *, explain: bool = False) -> None:
        """The broker's decision on one program start; ``explain`` = nothing will be run."""
        self._decide(request, explain, done, 1)

    def _decide(self, request: Request, explain: bool, done: Callable[[Decision], None], tries: int) -> None:
        def received(outcome: Outcome) -> None:
            decision = _decision(outcome)
            if isinstance(outcome, Answer) and outcome.status == 200:
                if decision.generation < self._leases.generation:
                    if tries < _AGAIN_MAX:
                        self._decide(request, explain, done, tries + 1)
                        return
                    decision = _misbehaved("its answers are older than its events")
                elif not self.streaming:
                    decision = _unleased(decision)
            done(decision)

        def body(groups: GroupsInUse, version: int) -> dict[str, Any]:
            if version < version_needed(request.program):
                why = f"it is too old to know what kind of program {request.program.path} is; upgrade it"
                # what no older broker allows is no fault of this one: a program in a home is refused as ever
                raise NotAsked(Reason.PROGRAM_NOT_TRUSTED if request.program.home else Reason.BROKER_MISBEHAVED, why)
            told = replace(request, subject=_subject_for(request.subject, groups, version))
            return {"request": encode_request(_bounded(told)), "explain": explain}

        self._ask(request.subject.user, "/v1/decisions", body, received)

    def _ask(
        self,
        who: str,
        path: str,
        body: _Body,
        done: Callable[[Outcome], None],
        at_least: int = 0,
        tries: int = 1,
    ) -> None:
        """Asks what depends on users' groups: ``body`` names those of them that policies name, by the list that it
        is given, and for the version that it is given.  It is called in another thread.

        Where policies name others by now, the broker says which, and is asked again: a policy that was
        applied while a session runs is met by it.
        """

        def received(outcome: Outcome) -> None:
            try:
                changed = _groups_changed(outcome)
            except CodecError as error:
                done(BrokerError(Reason.BROKER_MISBEHAVED, error.message))
                return
            if changed is None:
                done(outcome)
                return
            self._groups, generation = changed
            if tries < _AGAIN_MAX:  # and not of a worker that is behind the one that said so
                self._ask(who, path, body, done, max(at_least, generation), tries + 1)
            else:
                done(BrokerError(Reason.BROKER_MISBEHAVED, "the groups that its policies name do not settle"))

        generation, groups = max(self._leases.generation, at_least), self._groups

        def value(version: int) -> dict[str, Any]:
            by = {"groups_in_use": groups.tag} if version >= 2 else {}
            return {**body(groups, version), "min_generation": generation, **by}

        self._pool.post(who, "POST", path, value, received)

    def admit(
        self,
        session: Session,
        done: Callable[[Admitted | Denied], None],
        *,
        opening: bool,
    ) -> None:
        """Asks whether this user may log in.  ``opening`` also tells the broker that the session exists from now on."""

        def body(groups: GroupsInUse, version: int) -> dict[str, Any]:
            return {
                "session": session.id,
                "subject": encode_subject(_subject_for(session.subject, groups, version)),
                "service": session.service,
                "remote": session.remote,
            }

        path = "/v1/sessions" if opening else "/v1/admissions"
        self._ask(session.subject.user, path, body, lambda outcome: done(_admission(outcome)))

    def closed(self, session: Session) -> None:
        """Tells the broker that a session is over.

        Nothing repeats it: sessions that it hears no more of expire there.
        """
        who, path = session.subject.user, f"/v1/sessions/{session.id}"
        self._pool.post(who, "DELETE", path, None, lambda _outcome: None, urgent=False)

    def ended(self, login: Login) -> None:
        """Calls ``closed`` for a login that is over, where the broker may know of its session."""
        if login.state is State.GATED or login.admitted is not None:
            self.closed(login.session)

    def have(self, sessions: list[str]) -> None:
        """Tells the broker all sessions that there are, so that it ends those whose end it was not told.

        A broker of before this call refuses it, and nothing comes of that.
        """
        if len(sessions) <= _SESSIONS_TOLD_MAX:
            body = {"sessions": sessions}
            self._pool.post(_AGENT, "POST", "/v1/sessions/open", body, lambda _outcome: None, urgent=False)

    def persona(self, ref: PersonaRef, done: Callable[[Any | Denied], None]) -> None:
        """The document of one version of a persona, as the broker's JSON."""
        path = f"/v1/personas/{ref.name}/versions/{ref.version}"
        self._pool.post(_AGENT, "GET", path, None, lambda outcome: done(_body(outcome)))

    def batches(self, sessions: list[str]) -> Iterator[list[str]]:
        """The sessions in parts, each of which fits into one question with the groups of its users."""
        part: list[str] = []
        size = 0
        for session_id in sessions:
            subject = self._subject_of(session_id)
            names = self._groups.narrowed(subject).groups if subject is not None else ()
            more = len(json.dumps([session_id, session_id, names]))
            if part and (size + more > MAX_BODY - _REST or len(part) >= SESSIONS_A_CALL):
                yield part
                part, size = [], 0
            part.append(session_id)
            size += more
        if part:
            yield part

    def current(self, sessions: list[str], done: Callable[[tuple[Current, ...] | Denied], None]) -> None:
        """Asks what applies to these sessions now; ``done`` gets it, or why it is not known."""

        subjects = {session_id: self._subject_of(session_id) for session_id in sessions}

        def body(groups: GroupsInUse, version: int) -> dict[str, Any]:
            if version < 2:
                return {"sessions": sessions}  # by the groups that it was told when they opened
            named = {
                session_id: groups.narrowed(subject).groups
                for session_id, subject in subjects.items()
                if subject is not None
            }
            return {"sessions": sessions, "groups": named}

        def received(outcome: Outcome) -> None:
            answer = _body(outcome)
            done(answer if isinstance(answer, Denied) else read_current(answer))

        self._ask(_AGENT, "/v1/sessions/current", body, received)

    def entries(self, session: Session, done: Callable[[list[Any] | Denied], None]) -> None:
        """Asks for every policy that names this session's user, in order, with its persona and whether it holds.

        The list is empty where no policy does: in complain mode they are let in, and the broker never heard of the
        session.
        """

        def unknown(admission: Admitted | Denied) -> None:
            if isinstance(admission, Admitted):
                help = "the broker does not know this session yet; try again in some seconds"
                done(Denied(Reason.SESSION_UNKNOWN, help=help))
            else:
                done([] if admission.reason is Reason.NO_MATCHING_POLICY else admission)

        path = f"/v1/sessions/{session.id}/personas"

        def received(outcome: Outcome) -> None:
            if isinstance(outcome, BrokerError):
                done(_denied(outcome))
            elif outcome.status == 405:  # 0.1.0: by the groups that it was told when the session opened
                self._pool.post(session.subject.user, "GET", path, None, answered)
            else:
                answered(outcome)

        def answered(outcome: Outcome) -> None:
            if isinstance(outcome, BrokerError):
                done(_denied(outcome))
            elif outcome.status == 200 and isinstance(outcome.body, dict):
                entries = outcome.body.get("entries")
                done(entries if isinstance(entries, list) else _misbehaved("no entries in its answer"))
            elif outcome.status == 404:
                self.admit(session, unknown, opening=False)
            else:
                done(_problem(outcome))

        def body(groups: GroupsInUse, version: int) -> dict[str, Any]:
            return {"groups": _subject_for(session.subject, groups, version).groups}

        self._ask(session.subject.user, path, body, received)


def _subject_for(subject: Subject, groups: GroupsInUse, version: int) -> Subject:
    """The subject with the groups that a broker of this version of the protocol is told.

    Raises ``NotAsked`` where they are more than it takes: without some of them another policy might match.
    """
    if version >= 2:
        return groups.narrowed(subject)
    if len(subject.groups) > _GROUPS_OF_0_1_0:
        why = f"it takes at most {_GROUPS_OF_0_1_0} groups of a user, {subject.user} is in more; upgrade it"
        raise NotAsked(Reason.BROKER_MISBEHAVED, why)
    return subject


def _bounded(request: Request) -> Request:
    """A command line that is too long as JSON for the broker's bodies counts as one that is too long to read."""
    groups = sum(map(len, request.subject.groups)) + len('"", ') * len(request.subject.groups)
    room = min(_ARGV_MAX, MAX_BODY - _REST - groups)
    if sum(map(len, request.argv)) * 6 < room or len(json.dumps(request.argv)) < room:
        return request  # JSON takes at most six characters for one
    return replace(request, argv=(), argv_complete=False)


def _groups_changed(outcome: Outcome) -> tuple[GroupsInUse, int] | None:
    """The groups that policies name by now, where the broker wants to be asked by them.  Raises ``CodecError``."""
    if isinstance(outcome, BrokerError) or outcome.status != 409 or not isinstance(outcome.body, dict):
        return None
    if outcome.body.get("code") != Fault.GROUPS_CHANGED:
        return None
    groups = decode_groups_in_use(outcome.body.get("groups_in_use"))
    return groups, integer(outcome.body.get("generation"), "generation")


def _decision(outcome: Outcome) -> Decision:
    if isinstance(outcome, BrokerError):
        return _denied(outcome)
    if outcome.status != 200:
        return _problem(outcome)
    try:
        return decode_decision(outcome.body)
    except CodecError as error:
        return _misbehaved(error.message)


def _body(outcome: Outcome) -> Any | Denied:
    if isinstance(outcome, BrokerError):
        return _denied(outcome)
    return outcome.body if outcome.status == 200 else _problem(outcome)


def _admission(outcome: Outcome) -> Admitted | Denied:
    if isinstance(outcome, BrokerError):
        return _denied(outcome)
    body = outcome.body
    try:
        if outcome.status not in (200, 201) or not isinstance(body, dict):
            return _problem(outcome)
        if body["admitted"] is True:
            ref = body["persona"]
            persona = PersonaRef(str(ref["name"]), int(ref["version"])) if ref is not None else None
            return Admitted(persona, body["policy"])
        denied = decode_decision(body["denied"])
    except (KeyError, TypeError, ValueError, CodecError) as error:
        return _misbehaved(f"an admission that cannot be read: {error}")
    return denied if isinstance(denied, Denied) else _misbehaved("an admission that is neither")


def _denied(error: BrokerError) -> Denied:
    reason = error.code if isinstance(error.code, Reason) else Reason.BROKER_UNREACHABLE
    return Denied(reason, help=f"the broker gave no answer ({error.message})", lease=_NO_ANSWER)


def _problem(answer: Answer) -> Denied:
    detail = answer.body.get("detail", "") if isinstance(answer.body, dict) else ""
    return _misbehaved(f"HTTP status {answer.status} {str(detail)[:200]}".rstrip())


def _misbehaved(what: str) -> Denied:
    return Denied(Reason.BROKER_MISBEHAVED, help=f"the broker's answer is not a decision: {what}", lease=_NO_ANSWER)


def _unleased(decision: Decision) -> Decision:
    """The same for this once: without the event stream, no revocation could end the lease early."""
    return replace(decision, lease=Lease(0.0, decision.lease.width))
