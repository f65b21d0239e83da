"""Whether a user may log in, and if not, why: exemptions first, then what this machine refuses, then the broker."""

import logging
import time
from collections.abc import Callable

from persona.decisions import Denied
from persona.problems import Reason
from persona_guest.audit.logins import Logins
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.documents import Personas
from persona_guest.core.denials import Book
from persona_guest.core.messages import admission_line, printable
from persona_guest.core.pam_protocol import Caller
from persona_guest.login.exemptions import Exemption, exemption
from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.lsm.layer import KernelLayer
from persona_guest.session.model import Admitted, Session
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.agent")


class Admission:
    """``exempted`` is told of who logs in without being gated; ``excluded_s`` tells for how long a uid is kept out."""

    def __init__(
        self,
        settings: Settings,
        kernel_layer: KernelLayer,
        fallback: Fallback,
        broker_client: BrokerClient,
        personas: Personas,
        denials: Book,
        note: Logins,
        excluded_s: Callable[[int], float],
        exempted: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._kernel_layer = kernel_layer
        self._fallback = fallback
        self._broker_client = broker_client
        self._personas = personas
        self._denials = denials
        self._note = note
        self._excluded_s = excluded_s
        self._exempted = exempted

    def exempt(self, caller: Caller, *, opens: bool) -> bool:
        """Whether this user is not gated at all; that a session ``opens`` by break-glass is recorded."""
        found = exemption(caller.uid, caller.groups, self._settings.gate)
        if found is Exemption.BREAK_GLASS and opens:
            log.critical("BREAK GLASS: %s logs in ungated by %s", printable(caller.user), caller.service)
            self._note("", caller.user, "break_glass")
            self._exempted(caller.uid)
        return found is not None

    def kept_out(self, uid: int) -> Denied | None:
        """Why no session of a user may open now, whatever the broker says; ``None`` where one may."""
        seconds = self._excluded_s(uid)
        if seconds:
            help = f"your processes made the gate wait for them; logins are refused for {seconds:.0f} s more"
            return Denied(Reason.AGENT_OVERLOADED, help=help)
        return self._unguarded()

    def _unguarded(self) -> Denied | None:
        """Why no session may open on a machine whose operator demands what its kernel has not."""
        layer = self._kernel_layer.layer
        if self._fallback.missing:
            help = "guest.toml has gate.landlock_execute, and this kernel neither Landlock nor the kernel layer"
            return Denied(Reason.KERNEL_LAYER_MISSING, help=help)
        if layer.active or not self._settings.gate.require_kernel_layer or self._settings.mode is Mode.COMPLAIN:
            return None
        help = f"guest.toml demands the kernel layer, which is not active: {layer.why}"
        return Denied(Reason.KERNEL_LAYER_MISSING, help=help)

    def ask(self, session: Session, done: Callable[[Admitted | Denied], None], *, opening: bool) -> None:
        """Asks the broker; ``done`` gets its answer once the document of its persona is here, without that a refusal.

        ``opening`` also tells the broker that the session exists from now on.
        """

        def answered(result: Admitted | Denied) -> None:
            if isinstance(result, Admitted) and result.persona is not None:
                self._personas.ensure(result.persona, lambda denied: backed(result, denied))
            else:
                done(result)

        def backed(admitted: Admitted, denied: Denied | None) -> None:
            if denied is not None and opening:
                self._broker_client.closed(session)
            done(denied or admitted)

        self._broker_client.admit(session, answered, opening=opening)

    def record(self, session: Session, result: Admitted | Denied) -> None:
        """Records the answer; a refusal in enforce mode also goes into the user's ``persona denials``."""
        denied = result if isinstance(result, Denied) else None
        self._note(session.id, session.subject.user, "admission", denied)
        if denied is not None and self._settings.mode is Mode.ENFORCE:
            command = f"a login by {session.service}"
            self._denials.note(session.uid, time.time(), "admission", "", command, denied, session.id)

    def line(self, caller: Caller, denied: Denied) -> str:
        """The line for a user who may not log in."""
        return admission_line(caller.user, self._settings.vm.name, denied)
