"""The agent's side of the kernel layer: writes an approval before each exec goes on, reads what was stopped.

It loads nothing and attaches nothing (lsm/loader.py does, before logins); it opens what is pinned.
Where nothing is, ``NoKernelLayer`` stands in its place, and the check after the exec has the last word.
"""

import grp
import logging
import os
import struct
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from persona_guest.kernel import bpf
from persona_guest.loop import READABLE, Loop
from persona_guest.lsm import abi
from persona_guest.lsm.abi import Event
from persona_guest.lsm.quota import Quota
from persona_guest.program.exec_request import ExecRequest
from persona_guest.settings import Mode, Settings

log = logging.getLogger("persona.kernel")

# From the approval to the exec's last step: a file system that answers slower refuses the exec.
_VALID_NS = 5_000_000_000
_PAGES_NS = 20_000_000_000  # and on to the comparison of its arguments
_COMPLAINT_NS = 1_000_000_000
_EVENTS_AT_ONCE = 64
_KEYS_MAX = 65536


class HangsOn(Enum):
    """What of a command line the kernel compares with what was decided."""

    NOTHING = 0
    NAME = 1  # argv[0] alone
    ARGUMENTS = 2  # all of it


class NoKernelLayer:
    """A machine whose kernel has no such layer, or whose operator did not load it."""

    active = False

    def __init__(self, why: str) -> None:
        self.why = why

    def approve(
        self,
        tid: int,
        uid: int,
        exec_request: ExecRequest,
        *,
        hangs_on: HangsOn = HangsOn.NOTHING,
        script: int | None = None,
    ) -> None:
        """Does nothing: without the layer, nothing in the kernel looks at approvals."""

    def withdraw(self, tid: int) -> None:
        """Does nothing, as ``approve``."""

    def counts(self) -> dict[str, int]:
        """Returns no counters: there is nothing that stops anything."""
        return {}


class AttachedLayer:
    """The pinned maps, opened."""

    active = True
    why = ""

    def __init__(self, directory: str) -> None:
        """Raises ``OSError`` where it is not there as a whole."""
        if not is_loaded(directory):
            raise FileNotFoundError(2, "not loaded", directory)
        self._directory = directory
        self._approvals = bpf.Map(_pinned(directory, "approvals"), 4, abi.APPROVAL.size)
        self._arguments = bpf.Map(_pinned(directory, "arguments"), abi.PAGE_KEY.size, abi.PAGE_BYTES)
        self._counters = bpf.Map(_pinned(directory, "counters"), 4, abi.COUNTER.size)
        self._events = bpf.RingBuffer(_pinned(directory, "events"), abi.EVENTS_BYTES)
        self._made = _made(directory)
        self._quota = Quota(self._is_used, self._forget)
        self._complained = -_COMPLAINT_NS
        self.fd = self._events.fd

    def approve(
        self,
        tid: int,
        uid: int,
        exec_request: ExecRequest,
        *,
        hangs_on: HangsOn = HangsOn.NOTHING,
        script: int | None = None,
    ) -> None:
        """Approves the exec of thread ``tid``, before it is let go on; where this fails the kernel refuses the exec.

        ``uid`` is the session's, whose share of the maps it is.  The kernel also holds the task to what the answer
        hangs on of its command line, and with ``script`` to the path of that stage.
        """
        chain = [stage.found.kernel for stage in exec_request.stages]
        loader = exec_request.loader.kernel if exec_request.loader is not None else abi.NO_IMAGE
        now = time.monotonic_ns()
        argc, flat = 0, b""
        try:
            if hangs_on is HangsOn.ARGUMENTS:
                argc, flat = _flat(exec_request)
            elif hangs_on is HangsOn.NAME:
                flat = _name(exec_request)
            pages = range(0, len(flat), abi.PAGE_BYTES)
            self._quota.take(uid, tid, len(pages), now + (_PAGES_NS if flat else _VALID_NS), now)
            for number, at in enumerate(pages):
                page = flat[at : at + abi.PAGE_BYTES].ljust(abi.PAGE_BYTES, b"\0")
                self._arguments.update(abi.PAGE_KEY.pack(tid, number), page)
            path = None if script is None else (script, exec_request.stages[script].path)
            value = abi.approval(now + _VALID_NS, chain, argc, len(flat), loader=loader, path=path)
            self._approvals.update(abi.TID.pack(tid), value)
        except (OSError, ValueError) as error:
            self._not_approved(tid, error, now)

    def _not_approved(self, tid: int, error: OSError | ValueError, now: int) -> None:
        if now - self._complained > _COMPLAINT_NS:
            self._complained = now
            log.error("no approval for thread %d: %s; the kernel refuses its exec", tid, error)
            if isinstance(error, OSError) and bpf.is_full(error):
                self.sweep()

    def _is_used(self, tid: int, pages: int) -> bool:
        if self._approvals.lookup(abi.TID.pack(tid)) is not None:
            return False
        return not pages or self._arguments.lookup(abi.PAGE_KEY.pack(tid, 0)) is None

    def _forget(self, tid: int, pages: int) -> None:
        self._approvals.delete(abi.TID.pack(tid))
        for number in range(pages):
            self._arguments.delete(abi.PAGE_KEY.pack(tid, number))

    def withdraw(self, tid: int) -> None:
        """Takes an approval back whose task was gone before it could go on: its number may soon be another's."""
        self._approvals.delete(abi.TID.pack(tid))

    def read_events(self, tell: Callable[[Event], None]) -> None:
        """Hands on what the kernel reports; to be called when ``fd`` is readable."""
        for raw in self._events.read(_EVENTS_AT_ONCE):
            tell(abi.event(raw))

    def counts(self) -> dict[str, int]:
        """How many starts were stopped, would have been (complain mode), were killed; and how many events were lost."""
        found = {}
        for number, name in enumerate(abi.COUNTERS):
            value = self._counters.lookup(abi.TID.pack(number))
            found[name] = abi.COUNTER.unpack(value)[0] if value else 0
        return found

    def sweep(self) -> None:
        """Removes approvals that nobody used and arguments that nobody compared: of tasks that were killed."""
        now = time.monotonic_ns()
        self._quota.tidy(now)
        for key in list(self._approvals.keys(_KEYS_MAX)):
            value = self._approvals.lookup(key)
            if value is not None and struct.unpack_from("=Q", value)[0] < now:
                self._approvals.delete(key)
        for key in list(self._arguments.keys(_KEYS_MAX)):
            tid, _ = abi.PAGE_KEY.unpack(key)
            if not os.path.exists(f"/proc/{tid}"):
                self._arguments.delete(key)

    def is_current(self) -> bool:
        """Whether what is loaded is still what this opened."""
        return is_loaded(self._directory) and _made(self._directory) == self._made

    def close(self) -> None:
        """Closes the maps; they stay pinned."""
        for table in (self._approvals, self._arguments, self._counters):
            table.close()
        self._events.close()


def _flat(exec_request: ExecRequest) -> tuple[int, bytes]:
    """Number of the arguments, and all of them; an empty argv reaches a program as one empty string (Linux 5.18)."""
    if not exec_request.complete:
        raise ValueError("longer than is read")
    argv = exec_request.final_argv or (b"",)
    flat = b"".join([argument + b"\0" for argument in argv])
    if len(flat) > abi.ARGV_MAX:
        raise ValueError("longer than is compared")
    return len(argv), flat


def _name(exec_request: ExecRequest) -> bytes:
    """The beginning of the command line that arrives: ``argv[0]``, by which a file that is several programs is called.

    How many arguments there are does not matter then: ``xargs git add`` may bring more than are read.
    """
    name = (exec_request.final_argv or (b"",))[0] + b"\0"
    if len(name) > abi.ARGV_MAX:
        raise ValueError("longer than is compared")
    return name


class KernelLayer:
    """Who has the last word on this machine now: ``layer`` is the kernel's, or stands in its place.

    ``check`` it now and then: an operator may load or unload the layer while the agent runs.
    """

    def __init__(self, settings: Settings, loop: Loop, tell: Callable[[Event], None]) -> None:
        self._settings = settings
        self._loop = loop
        self._tell = tell
        self.layer: AttachedLayer | NoKernelLayer = NoKernelLayer("not looked at")
        self._take()

    def check(self) -> None:
        """Takes up a layer that was loaded, lets go of one that is gone, and tidies."""
        if isinstance(self.layer, AttachedLayer):
            if self.layer.is_current():
                self.layer.sweep()
                return
            self._loop.remove_reader(self.layer.fd)
            self.layer.close()
            log.critical("the kernel layer is not what it was any more")
        elif not self._settings.paths.bpf_dir or not is_loaded(self._settings.paths.bpf_dir):
            return
        self._take()

    def _take(self) -> None:
        self.layer = attach(self._settings)
        if isinstance(self.layer, AttachedLayer):
            layer = self.layer
            self._loop.add_reader(layer.fd, READABLE, lambda _events: layer.read_events(self._tell))
            log.info("the kernel has the last word on program starts")
        else:
            log.warning("no kernel layer (%s): what starts is checked after the start", self.layer.why)


def attach(settings: Settings) -> AttachedLayer | NoKernelLayer:
    """The layer as it is loaded now, told the mode; or what stands in its place, saying why."""
    directory = settings.paths.bpf_dir
    if not directory:
        return NoKernelLayer("switched off")
    try:
        layer = AttachedLayer(directory)
        configure(settings)
    except OSError as error:
        return NoKernelLayer(f"{directory}: {error.strerror or error}")
    return layer


def home(directory: str) -> Path:
    """Where the maps of this version are pinned; the programs' links are in ``links`` below."""
    return Path(directory) / abi.LAYOUT


def is_loaded(directory: str) -> bool:
    """Whether every program of the layer is attached and pinned."""
    return all(os.path.exists(f"{directory}/{abi.LAYOUT}/links/{name}") for name in abi.PROGRAMS)


def configure(settings: Settings) -> None:
    """Writes mode and exemptions where the programs read them.  Raises ``OSError``."""
    table = bpf.Map(_pinned(settings.paths.bpf_dir, "settings"), 4, abi.SETTINGS.size)
    try:
        enforce = settings.mode is Mode.ENFORCE
        group = _gid(settings.gate.break_glass_group)
        table.update(bytes(4), abi.SETTINGS.pack(enforce, settings.gate.uid_min, group, 0))
    finally:
        table.close()


def _gid(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return abi.NO_ID


def _pinned(directory: str, name: str) -> int:
    return bpf.open_pinned(f"{home(directory)}/{name}")


def _made(directory: str) -> int:
    return os.stat(home(directory) / "approvals").st_ino
