"""Which denials say nothing of the session, for the broker gave no answer that could be used."""

from persona.problems import Reason

UNANSWERED = (Reason.BROKER_UNREACHABLE, Reason.BROKER_MISBEHAVED, Reason.AGENT_OVERLOADED)
