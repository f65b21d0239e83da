"""``persona-installer``: takes the agent's wishes one after the other, does what guest.toml allows, and ends when idle.

Started by its socket, as root without the agent's sandbox: maintainer scripts may do anything.  It trusts
the agent for nothing: the wish is parsed, guest.toml is read by itself, and what is there is looked at anew.
"""

import logging
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from persona.dependencies import Dependency, Package, Service
from persona.problems import PersonaError
from persona_guest import settings as configuration
from persona_guest.dependencies.check import DependencyCheck
from persona_guest.dependencies.dpkg import Dpkg, DpkgError
from persona_guest.dependencies.installer.apt import Apt, AptError
from persona_guest.dependencies.rules import (
    MESSAGE_MAX,
    Message,
    Outcome,
    Progress,
    decode_wish,
    encode_message,
    named,
    not_allowed,
)
from persona_guest.settings import Settings
from persona_guest.system import systemd
from persona_guest.system.units import Units, UnitsError

log = logging.getLogger("persona.installer")

CONFIG = "/etc/persona/guest.toml"
HOME = "/var/lib/persona-installer"
IDLE_S = 60.0
_WISH_S = 5.0  # the agent sends it at once
_START_S = 90.0
_SETTLE_S = 1.0
_UNUSABLE = ("not-found", "masked", "error", "bad-setting")  # LoadState

Say = Callable[[str], None]


class Installer:
    """Meets one wish at a time."""

    def __init__(
        self, settings: Settings, dependencies: DependencyCheck, units: Units, apt: Callable[[Say], Apt]
    ) -> None:
        self._settings = settings.dependencies
        self._dependencies = dependencies
        self._units = units
        self._apt = apt

    def meet(self, wish: tuple[Dependency, ...], say: Say) -> str:
        """Why it could not be met, in words for the operator; empty = everything is there."""
        try:
            lacking = self._dependencies.lacking(wish)
            refused = not_allowed(lacking, self._settings.install, self._settings.start)
            if refused:
                return f"guest.toml does not allow it: {named(refused)}"
            packages = [item.dependency for item in lacking if isinstance(item.dependency, Package)]
            if packages:
                log.info("installing %s", ", ".join(map(str, packages)))
                self._apt(say).install(packages)
            for service in (item for item in wish if isinstance(item, Service)):
                self._start(service, say)
            left = self._dependencies.lacking(wish)
        except (AptError, DpkgError, UnitsError) as error:
            return str(error)
        return f"still missing afterwards: {named(left)}" if left else ""

    def _start(self, service: Service, say: Say) -> None:
        """Raises ``UnitsError`` where it does not run, or not for long."""
        state = self._units.state(service.name)
        if state == "active":
            return
        if state not in _UNUSABLE:
            say(f"starting {service.name}")
            self._units.start(service.name)
        deadline, settled = time.monotonic() + _START_S, None
        while settled is None or time.monotonic() < settled:  # a simple service is active before it has done anything
            state = self._units.state(service.name)
            if state in ("failed", *_UNUSABLE) or time.monotonic() > deadline:
                raise UnitsError(f"{service} does not run, it is {state}; 'systemctl status {service.name}' says why")
            if state == "active":
                settled = settled or time.monotonic() + _SETTLE_S
            time.sleep(0.2)


def serve(listener: socket.socket, installer: Installer, ended: Callable[[], bool], idle_s: float = IDLE_S) -> None:
    """Until nobody has come for ``idle_s``, or ``ended`` says so between two wishes."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        since = time.monotonic()
        while not ended() and time.monotonic() - since < idle_s:
            if selector.select(1.0):
                connection, _ = listener.accept()
                with connection:
                    _talk(connection, installer)
                since = time.monotonic()


def _talk(connection: socket.socket, installer: Installer) -> None:
    connection.settimeout(_WISH_S)
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid():
        log.error("uid %d asked for an installation; only the agent may", uid)
        return

    def send(message: Message) -> None:
        try:
            connection.send(encode_message(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:  # whoever asked is gone or does not read: the work is finished all the same
            log.debug("%s", error)

    try:
        wish = decode_wish(connection.recv(MESSAGE_MAX))
    except (OSError, ValueError) as error:
        send(Outcome(f"a wish that cannot be read: {error}"))
        return
    what = ", ".join(map(str, wish))
    why = installer.meet(wish, lambda line: send(Progress(line)))
    if why:
        log.error("%s: %s", what, why)
    else:
        log.info("%s: there now", what)
    send(Outcome(why))


def main() -> int:
    """Serves the socket that systemd hands over; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    listeners = list(systemd.inherited().values())
    if len(listeners) != 1:
        print("persona-installer: started by persona-installer.socket only", file=sys.stderr)
        return 1
    try:
        settings = configuration.load(Path(CONFIG))
    except PersonaError as error:
        print(f"persona-installer: {error.message}", file=sys.stderr)
        return 1
    asked: list[int] = []
    # not in the middle of dpkg's work: the unit gives it time
    signal.signal(signal.SIGTERM, lambda number, _frame: asked.append(number))
    dpkg, units = Dpkg(), Units()

    def apt(say: Say) -> Apt:
        return Apt(say, dpkg, Path(HOME))

    try:
        apt(log.info).recover()
    except AptError as error:
        log.error("%s", error)
    with socket.socket(fileno=listeners[0]) as listener:
        serve(listener, Installer(settings, DependencyCheck(dpkg, units), units, apt), lambda: bool(asked))
    return 0
