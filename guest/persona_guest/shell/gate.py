"""Puts the gate on this very process where PAM did not: no_new_privs, the agent's filter, the listener handed over."""

import base64
import os
from typing import NamedTuple

from persona_guest.kernel import landlock, seccomp
from persona_guest.shell.client import AgentError, Client


class Gated(NamedTuple):
    """How it went: the greeting to show, and whether the filter was installed here."""

    greeting: str | None
    installed: bool


def install(path: str, shell: str) -> Gated:
    """Asks the agent at ``path`` and does what it says.

    Raises ``AgentError`` where the login is refused or the gate cannot be put up: then nothing may run.
    """
    with Client(path) as client:
        answer = client.call("gate", shell=shell)
        greeting = answer.get("greeting")
        text = greeting if isinstance(greeting, str) else None
        if answer.get("verdict") != "install":
            return Gated(text, installed=False)
        try:
            seccomp.set_no_new_privs()
            _bind(answer.get("landlock"))
            listener = seccomp.install_listener(base64.b64decode(str(answer["filter"]), validate=True))
        except (OSError, ValueError) as error:
            raise AgentError("gate_failed", f"the gate cannot be put up: {error}") from None
        try:
            client.call("listener", fd=listener)
        except AgentError as error:  # the filter is there, and nobody answers for it
            raise AgentError("gate_failed", f"the gate cannot be handed over: {error.message}") from None
        finally:
            os.close(listener)  # a copy left here would let the session answer itself
        return Gated(text, installed=True)


def _bind(directories: object) -> None:
    """To programs below these.  Raises ``OSError`` or ``ValueError``."""
    if directories is None:
        return
    if not isinstance(directories, list):
        raise ValueError("landlock: expected a list of directories")
    ruleset = landlock.starting_below(map(str, directories))
    try:
        landlock.restrict_self(ruleset)
    finally:
        os.close(ruleset)
