"""What the agent asks the broker, and how its answers, or their absence, become decisions."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from persona.codec import MAX_BODY, CodecError, decode_decision, encode_request, encode_subject
from persona.decisions import Decision, Denied, Lease, PersonaRef, Request, Width
from persona.problems import Reason
from persona_guest.broker_client.http import BrokerError
from persona_guest.broker_client.link import Answer, Link, Outcome
from persona_guest.core.leases import LeaseBook
from persona_guest.core.sessions import Session

UNANSWERED = (Reason.BROKER_UNREACHABLE, Reason.BROKER_MISBEHAVED, Reason.AGENT_OVERLOADED)
_ARGV_MAX = MAX_BODY // 2
_AGAIN_MAX = 3  # answers older than the newest event that are asked again, before it is called a fault
# A refusal for want of an answer is reused this briefly, so that a loop of commands does not become
# a loop of timeouts, and recovery is still felt at once.
_NO_ANSWER = Lease(0.0, Width.ARGV)

_AGENT = ""  # on behalf of whom the agent asks for itself: no user has that name


class Admitted:
    """The login may go on; ``persona`` and ``policy`` are what would apply right now, if anything."""

    __slots__ = ("persona", "policy")

    def __init__(self, persona: PersonaRef | None, policy: str | None) -> None:
        self.persona = persona
        self.policy = policy


class Questions:
    """Asks through a ``Link``; every callback runs in the loop's thread, exactly once."""

    def __init__(self, link: Link, leases: LeaseBook) -> None:
        self._link = link
        self._leases = leases
        self.streaming = False  # whether a revocation would reach us now

    def decide(self, request: Request, done: Callable[[Decision], None], *, explain: bool = False) -> None:
        """The broker's decision on one program start; ``explain`` = nothing will be run."""
        body = {"request": encode_request(_bounded(request)), "explain": explain}
        self._decide(request.subject.user, body, done, 1)

    def _decide(self, who: str, body: dict[str, Any], done: Callable[[Decision], None], attempt: int) -> None:
        def received(outcome: Outcome) -> None:
            decision = _decision(outcome)
            if isinstance(outcome, Answer) and outcome.status == 200:
                if decision.generation < self._leases.generation:
                    if attempt < _AGAIN_MAX:
                        self._decide(who, body, done, attempt + 1)
                        return
                    decision = _misbehaved("its answers are older than its events")
                elif not self.streaming:
                    decision = _unleased(decision)
            done(decision)

        body = {**body, "min_generation": self._leases.generation}
        self._link.post(who, "POST", "/v1/decisions", body, received)

    def admit(
        self,
        session: Session,
        done: Callable[[Admitted | Denied], None],
        *,
        opening: bool,
    ) -> None:
        """May this user log in?  ``opening`` also tells the broker that the session exists from now on."""
        body = {
            "session": session.id,
            "subject": encode_subject(session.subject),
            "service": session.service,
            "remote": session.remote,
            "min_generation": self._leases.generation,
        }
        path = "/v1/sessions" if opening else "/v1/admissions"
        self._link.post(session.subject.user, "POST", path, body, lambda outcome: done(_admission(outcome)))

    def closed(self, session: Session) -> None:
        """Tells the broker that a session is over; lost where it is away: its sessions expire there."""
        who, path = session.subject.user, f"/v1/sessions/{session.id}"
        self._link.post(who, "DELETE", path, None, lambda _outcome: None, urgent=False)

    def persona(self, ref: PersonaRef, done: Callable[[Any | Denied], None]) -> None:
        """The document of one version of a persona, as the broker's JSON."""
        path = f"/v1/personas/{ref.name}/versions/{ref.version}"
        self._link.post(_AGENT, "GET", path, None, lambda outcome: done(_body(outcome)))

    def current(self, sessions: list[str], done: Callable[[Any | Denied], None]) -> None:
        """What applies to sessions now, as the broker's JSON."""
        body = {"sessions": sessions, "min_generation": self._leases.generation}
        self._link.post(_AGENT, "POST", "/v1/sessions/current", body, lambda outcome: done(_body(outcome)))

    def entries(self, session: Session, done: Callable[[list[Any] | Denied], None]) -> None:
        """Every policy that names this session's user, in order, with its persona and whether it holds."""

        def received(outcome: Outcome) -> None:
            if isinstance(outcome, BrokerError):
                done(_denied(outcome))
            elif outcome.status == 200 and isinstance(outcome.body, dict):
                entries = outcome.body.get("entries")
                done(entries if isinstance(entries, list) else _misbehaved("no entries in its answer"))
            else:
                done(_problem(outcome))

        self._link.post(session.subject.user, "GET", f"/v1/sessions/{session.id}/personas", None, received)


def _bounded(request: Request) -> Request:
    """A command line that is too long as JSON for the broker's bodies counts as one that is too long to read."""
    if sum(map(len, request.argv)) * 6 < _ARGV_MAX or len(json.dumps(request.argv)) < _ARGV_MAX:
        return request  # JSON takes at most six characters for one
    return replace(request, argv=(), argv_complete=False)


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
    return Denied(Reason.BROKER_MISBEHAVED, help=f"the broker's answer is no decision: {what}", lease=_NO_ANSWER)


def _unleased(decision: Decision) -> Decision:
    """The same for this once: without the event stream, no revocation could end the lease early."""
    return replace(decision, lease=Lease(0.0, decision.lease.width))
