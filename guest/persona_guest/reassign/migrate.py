"""Running processes of one session go where they belong now, and what no persona allows is frozen or ends.

What a session's persona allows moves under it; with the rest happens what the old one's ``on_revoke``
says.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.problems import PersonaError
from persona_guest.core.file_id import Image
from persona_guest.core.persona_cgroups import MANAGED, PersonaCgroup, manager_of
from persona_guest.core.reassignment import NO_PERSONA, Applicable, Revocation, choose
from persona_guest.enforce.enforcer import Enforcer
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.loop import Loop
from persona_guest.program.identity import Identifier, images_of
from persona_guest.program.own_home import Owner
from persona_guest.program.process import Running, read_running
from persona_guest.reassign.terminate import NAMED_MAX, RecordProcess, TellUser, Termination, names_of, started
from persona_guest.session.model import Login
from persona_guest.session.placement import Placement
from persona_guest.session.registry import Registry
from persona_guest.settings import Settings

log = logging.getLogger("persona.enforce")

_PASSES = 8  # what is moved may have children meanwhile
_RUNNING = 3  # of the passes, so many before what is looked at is stopped for it
_STOPPED_S = 0.25  # of a session; that takes a millisecond, but what waits for the gate's own answer cannot be stopped
_CGROUPS_MAX = 2048  # of a service manager, which has a hundred, and so many processes
_PIDS_MAX = 65536

REVOKED = "persona: an operator revoked this session: every command is denied from now on"

Shells = tuple[Image, ...]
Pairs = Sequence[tuple[Applicable, Persona]]


class Migrator:
    """``tell`` tells a session's user, ``note`` records what becomes of one process."""

    def __init__(
        self,
        settings: Settings,
        loop: Loop,
        registry: Registry,
        enforcer: Enforcer,
        identifier: Identifier,
        hang_watchdog: HangWatchdog,
        tell: TellUser,
        note: RecordProcess,
        home_of: Callable[[int], str] = lambda _uid: "",
    ) -> None:
        self._home_of = home_of
        self._settings = settings
        self._enforcer = enforcer
        self._identifier = identifier
        self._hang_watchdog = hang_watchdog
        self._tell = tell
        self._note = note
        self._ending = Termination(loop, registry, enforcer, tell, note)
        self._patience_s = 0.0  # what is left of _STOPPED_S: the loop and the watchdog wait for all places together

    def follow(
        self, placement: Placement, login: Login, holding: tuple[Applicable, ...], revocation: Revocation
    ) -> bool:
        """Brings all that runs in a session to where it belongs; false where it could not be done yet."""
        placement.default_persona = holding[0].ref if holding else NO_PERSONA
        self._patience_s = _STOPPED_S
        placement.holding = None  # until all of it is done: from the middle, the way back is one to follow too
        outer = self._hang_watchdog.enter(login.session)  # what its processes call themselves is in their own memory
        try:
            if revocation is not Revocation.NONE and not placement.told:
                placement.told = True
                self._tell(placement, REVOKED)
            ends = revocation is Revocation.END
            pairs = [(held, self._enforcer.document(held.ref)) for held in holding]
            shells = () if revocation is not Revocation.NONE else (*login.shell_files, *images_of(login.shells))
            sorted_ = [
                self._sort(placement, key, pairs, shells, ends=ends) for key in list(placement.places) if key != MANAGED
            ]
            whole = all(sorted_)
            if not placement.places and manager_of(placement.found, placement.uid) is not None:
                self._enforcer.enter(placement, placement.default_persona, placement.found)
            if MANAGED in placement.places:
                self._manage(placement, pairs, shells, ends=ends)
            if whole:
                placement.holding = holding
        except (PersonaError, OSError) as error:
            log.error("session %s does not follow: %s", placement.session_id, error)
            return False
        except Exception:  # whatever a user's processes are: the agent answers the others, and tries all of this again
            log.exception("session %s does not follow", placement.session_id)
            return False
        finally:
            self._hang_watchdog.leave(outer)
        return whole

    def _sort(self, placement: Placement, key: str, pairs: Pairs, shells: Shells, *, ends: bool) -> bool:
        """Every process of a place goes to where it would be started now, or stays, or is withdrawn.

        What forks and ends faster than it can be looked at is frozen for it.  False where something is left even so.
        """
        place = here = placement.places[key]
        tree = self._enforcer.tree
        old = self._enforcer.document(place.persona)
        done: set[int] = set()  # what needs no further look: what was born of it is listed by itself
        withdrawn: dict[int, Running] = {}
        stays = returns = whole = False
        frozen = place.withdrawn and old.on_revoke == "freeze" and not ends and tree.freezes(place.cgroup)
        try:
            for number in range(_PASSES):
                here = placement.places[
                    key
                ]  # elsewhere, once a version has been entered whose limits are counted otherwise
                listed = [pid for pid in tree.processes(here.cgroup) if pid not in done]
                if not listed:
                    whole = True
                    break
                if number == _RUNNING:
                    self._stop(here.cgroup)
                    continue
                found = dict(self._read_all(listed, placement.uid))
                done.update(pid for pid in listed if pid not in found)
                for pid, running in found.items():
                    ref = self._target(running, placement, old, pairs, shells)
                    if ref is None:
                        target = self._enforcer.enter(placement, place.persona, withdrawn=True)
                        if not withdrawn and not tree.populated(target.cgroup):
                            self._ending.void(target.cgroup)
                        withdrawn[pid] = running
                    else:
                        target = self._enforcer.enter(placement, ref)
                    if target.cgroup == here.cgroup:
                        done.add(pid)
                        stays = True
                    else:
                        with contextlib.suppress(ProcessLookupError):
                            tree.move(target.cgroup, pid)
                        returns |= place.withdrawn
        finally:  # the next try finds what was moved where it is withdrawn already
            try:
                if not frozen:  # nor by an agent that ended before it could thaw it
                    tree.thaw(here.cgroup)
            finally:
                if withdrawn:
                    self._withdraw(placement, place, old, withdrawn, ends=ends)
        if not stays and not tree.populated(placement.places[key].cgroup):
            self._enforcer.leave(placement, key)
        if returns and old.on_revoke == "freeze":
            self._tell(placement, f"persona: {old.name} applies again; what was frozen goes on")
        return whole

    def _stop(self, cgroup: str) -> None:
        began = time.monotonic()
        self._enforcer.tree.freeze(cgroup, self._patience_s)
        self._patience_s = max(0.0, self._patience_s - (time.monotonic() - began))

    @staticmethod
    def _target(
        running: Running, placement: Placement, old: Persona, pairs: Pairs, shells: Shells
    ) -> PersonaRef | None:
        ref = choose(running.trusted, pairs)
        if ref is None and (
            running.image in shells or (old.on_revoke == "finish" and placement.default_persona != NO_PERSONA)
        ):
            return placement.default_persona  # the login shell is admission's, until the session itself is revoked
        return ref

    def _withdraw(
        self, placement: Placement, place: PersonaCgroup, old: Persona, rest: dict[int, Running], *, ends: bool
    ) -> None:
        """``place`` is where it was: perhaps withdrawn already, by an agent that ended before it ended this."""
        cgroup = self._enforcer.enter(placement, place.persona, withdrawn=True).cgroup
        if ends or old.on_revoke == "kill":
            if not place.withdrawn or not self._ending.under_way(cgroup):
                self._ending.all_of(placement, old, cgroup, rest)
        elif old.on_revoke == "freeze":
            if place.withdrawn and self._enforcer.tree.freezes(cgroup):
                return
            self._enforcer.tree.freeze(cgroup)
            self._tell(placement, f"persona: {old.name} no longer applies: {names_of(rest)} frozen until it does again")
            for running in list(rest.values())[:NAMED_MAX]:
                self._note(placement, old, "frozen", running)

    def _manage(self, placement: Placement, pairs: Pairs, shells: Shells, *, ends: bool) -> None:
        """The service manager keeps its place under whatever is the default persona now.

        Its parts cannot be frozen one by one (its user could thaw them): ``freeze`` lets them finish.
        """
        place = placement.places[MANAGED]
        if place.persona == placement.default_persona and not ends:
            return
        old = self._enforcer.document(place.persona)
        if not ends:  # what an operator revoked is not taken back
            self._ending.returned(place.cgroup, placement.default_persona.name)
        rest: dict[int, Running] = {}
        whole = True
        if (ends or old.on_revoke == "kill") and not self._ending.under_way(
            place.cgroup
        ):  # looked at before the default persona is another: what fails here is tried again
            pids, whole = self._below(place.cgroup)
            rest = {
                pid: running
                for pid, running in self._read_all(pids, placement.uid)
                if self._target(running, placement, old, pairs, shells) is None and not running.plumbing(self._settings)
            }
        asked = self._ending.asked(place.cgroup)
        began = {pid: at for pid, at in started(rest) if asked.get(pid) != at}
        rest = {pid: running for pid, running in rest.items() if pid in began}
        try:
            self._enforcer.enter(placement, placement.default_persona, place.cgroup)
        finally:  # one that cannot be kept on disk is the default all the same
            if placement.places[MANAGED].persona == placement.default_persona:
                if not whole:
                    self._ending.all_of(placement, old, place.cgroup, rest)
                elif rest:
                    self._ending.each(placement, old, place.cgroup, rest, began)

    def _below(self, cgroup: str) -> tuple[list[int], bool]:
        """The processes of a service manager, and whether these are all: its user may make many cgroups."""
        tree, waiting = self._enforcer.tree, [cgroup]
        found: list[int] = []
        whole = True
        for _ in range(_CGROUPS_MAX):
            if not waiting or len(found) >= _PIDS_MAX:
                break
            here = waiting.pop()
            try:
                found += tree.processes(here)
                waiting += [f"{here}/{name}" for name in tree.children(here)]
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:  # and as deep as no path leads
                    raise
                whole = False
        return found, whole and not waiting

    # --- processes --------------------------------------------------------------------------------

    def _read_all(self, pids: Iterable[int], uid: int) -> Iterator[tuple[int, Running]]:
        owner = Owner(uid, self._home_of)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                yield pid, read_running(pid, self._identifier, owner)
