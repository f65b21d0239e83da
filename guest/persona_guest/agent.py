"""What the agent knows of itself: its broker's voice, the layers of its gate, its word for a login."""

import logging

from persona_guest.broker_client.events import Changed, Connected, Event, Lost
from persona_guest.core.leases import LeaseBook
from persona_guest.core.sessions import Session
from persona_guest.gate.fallback import Fallback
from persona_guest.gate.kernel_layer import LastWord
from persona_guest.gate.supervisor import Supervisor
from persona_guest.ipc.standby_socket import Keeping
from persona_guest.questions import Questions
from persona_guest.sessions import Sessions
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.agent")


class Agent:
    """The parts that ``persona status`` is about."""

    def __init__(
        self,
        settings: Settings,
        supervisor: Supervisor,
        sessions: Sessions,
        last_word: LastWord,
        fallback: Fallback,
        leases: LeaseBook,
        questions: Questions,
        keeping: Keeping,
    ) -> None:
        self.settings = settings
        self.supervisor = supervisor
        self.sessions = sessions
        self.last_word = last_word
        self._fallback = fallback
        self.leases = leases
        self.questions = questions
        self.keeping = keeping
        self.connection = "connecting"

    def event(self, event: Event) -> None:
        """The event stream came, went or said something."""
        if isinstance(event, Connected):
            self.questions.streaming = True
            self.connection = "connected"
            log.info("the broker's event stream is up")
        elif isinstance(event, Lost):
            if self.questions.streaming:
                log.warning("the broker's event stream is lost: %s; leases run out", event.detail)
            self.questions.streaming = False
            self.connection = "unreachable"
        elif isinstance(event, Changed):
            self.leases.advance(event.generation)

    def layers(self) -> dict[str, bool]:
        """The parts of the gate by name, and whether each is active.  Safe to call from any thread."""
        active = self.last_word.layer.active
        limits, network = self.supervisor.place is not None, self.sessions.bases is not None
        found = {"seccomp": True, "bpf": active, "verify": not active, "limits": limits, "network": network}
        return found | self._fallback.layers()

    def greeting(self, session: Session) -> str | None:
        """One line for an interactive login; ``None`` where the operator switched it off."""
        if not self.settings.gate.greeting:
            return None
        persona = self.sessions.base_of(session.id)
        now = f"{persona.name} v{persona.version}" if persona else "none right now"
        mode = "" if self.settings.mode is Mode.ENFORCE else " (complain mode: nothing is stopped)"
        return f"persona: {now} on {self.settings.vm.name}{mode}; 'persona list' shows what you may run"
