"""The agent from its first step to its last: takes over, restores, watches, listens, is ready, and serves.

The order matters.  Whoever asks while a step is not done waits.  Before anything that could fail gate.state is written,
by which the PAM module and the standby go while there is no agent.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from persona_guest.agent import state_file
from persona_guest.agent.build import CannotServeError, Parts, build
from persona_guest.agent.ends import Ends
from persona_guest.audit import without_agent
from persona_guest.broker.events import Connected, Event, Stream
from persona_guest.gate.hang_watchdog import INTERRUPT
from persona_guest.gate.inflight import InFlight
from persona_guest.health.report import Reporter, Watch
from persona_guest.ipc.pam import PamSocket
from persona_guest.ipc.standby import Keeping
from persona_guest.ipc.users import UserSocket
from persona_guest.loop import Loop
from persona_guest.settings import Settings
from persona_guest.system import runtime_dir, systemd
from persona_guest.system.accounts import caller_of
from persona_guest.system.start_progress import Start

_INFLIGHT = "inflight"
_RECONCILE_S = 30.0  # systemd may write its own values over the few that are not below a delegated cgroup

log = logging.getLogger("persona.agent")


def run(settings: Settings, start: Start | None = None, *, debug: bool = False) -> int:
    """Runs the agent until SIGTERM; returns its exit code.  A part that fails to end keeps no other from ending."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    if debug:
        logging.getLogger("persona").setLevel(logging.DEBUG)
    threading.excepthook = _die
    runtime = Path(settings.paths.runtime_dir)
    with Ends() as ends:
        try:
            state = runtime_dir.prepare(runtime)
            start = start or Start(state)
            ends.add("the lock", start.close)
            if settings.paths.bpf_dir and not runtime_dir.is_apart(state):
                log.warning(
                    "%s is not a separate file system: a user who fills it can keep others from logging in; see"
                    " 'systemctl status run-persona-state.mount'",
                    state,
                )
        except OSError as error:
            print(f"persona-agent: {error}", file=sys.stderr)
            return 1
        return _serve(settings, start, runtime, state, ends)


def _serve(settings: Settings, start: Start, runtime: Path, state: Path, ends: Ends) -> int:
    loop = Loop()
    released = threading.Event()
    # first: should this agent not come up, logins meet the mode that was asked for
    state_file.keep_writing(settings, loop.call_later, lambda: not released.is_set())
    runtime_dir.take_over(runtime, state)
    keeping = Keeping(loop, str(runtime / "standby.sock"))
    ends.add("the standby's connection", keeping.close)  # last: from then on the standby answers
    kept = keeping.take()
    inflight = take_inflight(kept, keeping)
    try:
        parts = build(settings, loop, state, ends, keeping, inflight, released, _hung)
    except CannotServeError as error:
        log.critical("%s", error)
        return 1
    restore(parts, kept)
    watch(parts)
    try:
        listen(parts)
    except OSError as error:
        log.critical("cannot listen in %s: %s", state, error)
        return 1
    runtime_dir.keep_linked(loop, runtime, "pam.sock", "agent.sock")
    ready(parts, start)
    loop.run()
    return 0


def take_inflight(kept: dict[str, int], keeping: Keeping) -> InFlight:
    """The table of notifications in flight that the agent before this one had, or a new one; removed from ``kept``."""
    fd = kept.pop(_INFLIGHT, None)
    if fd is not None:
        try:
            return InFlight(fd)
        except (OSError, ValueError) as error:
            log.error("what was in flight cannot be taken up: %s", error)
            keeping.forget(_INFLIGHT)
    table = InFlight()
    keeping.keep(_INFLIGHT, table.fd)
    return table


def restore(parts: Parts, kept: dict[str, int]) -> None:
    """Takes up the sessions of the agent before this one, answers what it left, and binds what should be bound.

    ``kept`` are their listeners by session; it is emptied.
    """
    registry, net = parts.registry, parts.net
    registry.restore(kept)
    for name, fd in kept.items():  # no copy may be left anywhere: then execs there fail with ENOSYS, else they hang
        os.close(fd)
        parts.keeping.forget(name)
    kept.clear()
    for login in registry.gated():
        parts.supervisor.answer_for(login)
    if parts.enforcing and net is not None:
        net.warm()
        net.resolvers.refresh()
        net.user_rules.restore(registry.gated())
        parts.enforcer.restore()
    elif parts.enforcer.binds:
        parts.release.unbind()  # what an enforcing agent before this one left
    take_notes(parts)
    parts.supervisor.answer_left_over()
    parts.keeping.repeat()


def watch(parts: Parts) -> None:
    """Begins to hear from the broker and the kernel, and starts what is done at intervals."""
    loop, ends = parts.loop, parts.ends
    if parts.enforcing and parts.net is not None:
        loop.call_every(_RECONCILE_S, parts.enforcer.reconcile)
        parts.net.watch(loop, parts.enforcer.reconcile, parts.notices.refused)
    stream = Stream(parts.settings.broker, lambda event: loop.call_soon_threadsafe(lambda: heard(parts, event)))
    ends.add("the broker's event stream", stream.close)
    health = Reporter(parts.settings.broker, Watch(parts.settings.gate.uid_min, parts.layers.active))
    ends.add("the reports of health", health.close)
    loop.call_every(1.0, lambda: parts.identifier.refresh(time.monotonic()))
    loop.call_every(5.0, parts.openings.announce_again)
    loop.call_every(5.0, parts.registry.save_again)
    loop.call_every(5.0, lambda: take_notes(parts))  # the standby's last come when this agent is there
    loop.call_every(10.0, parts.kernel_layer.check)
    loop.call_every(1.0, parts.dependencies.refresh)
    loop.call_every(0.25, lambda: parts.pool.sweep(time.monotonic()))
    interval = systemd.watchdog_interval()
    if interval is not None:
        loop.call_every(interval, _alive)
    signal.signal(INTERRUPT, lambda _number, _frame: None)  # a system call that waits ends by it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: loop.call_soon_threadsafe(loop.stop))


def take_notes(parts: Parts) -> None:
    """Records what the standby answered while there was no agent."""
    for record in without_agent.take(parts.state / without_agent.NAME, parts.registry.user_of):
        parts.recorder.add(record)


def heard(parts: Parts, event: Event) -> None:
    """The broker's event stream came, went, or said something; in the loop's thread."""
    if isinstance(event, Connected):
        parts.pool.reachable()
    before = parts.leases.generation
    parts.event_stream.heard(event)
    if isinstance(event, Connected) and not parts.supervisor.released:
        parts.broker_client.have(parts.registry.ids())
    if isinstance(event, Connected) or parts.leases.generation != before:
        parts.reevaluator.changed()


def listen(parts: Parts) -> None:
    """Opens the sockets for the PAM module and for users.  Raises ``OSError``.

    Not before all is there: who connects while nobody serves would wait in vain, root too.
    """
    pam = PamSocket(parts.loop, parts.state / "pam.sock", parts.openings, root=os.geteuid())
    parts.ends.add("the PAM module's socket", pam.close)
    socket = UserSocket(parts.loop, parts.state / "agent.sock", parts.users.handle, caller_of)
    parts.ends.add("the users' socket", socket.close)


def ready(parts: Parts, start: Start) -> None:
    """Tells systemd, the standby and whoever waits for this start that the agent answers from now on."""
    settings = parts.settings
    start.ready()
    parts.keeping.ready()
    systemd.notify(f"READY=1\nSTATUS={settings.mode} mode, VM {settings.vm.name}")
    log.info("ready: %s mode, %d sessions taken up", settings.mode, len(parts.registry.gated()))
    # what start-up made stays for good: the collector need not walk it again and again between two execs
    sys.setswitchinterval(0.0005)  # the recorder's thread must not keep a waiting exec for 5 ms
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    parts.ends.add("the word to systemd", lambda: systemd.notify("STOPPING=1"))


def _die(failure: threading.ExceptHookArgs) -> None:
    """A thread that ends by an error would leave an agent that looks alive: better a restart, which loses nothing."""
    thread = failure.thread.name if failure.thread else "a thread"
    log.critical("%s failed", thread, exc_info=failure.exc_value)
    os._exit(70)  # EX_SOFTWARE, sysexits.h


def _alive() -> None:
    systemd.notify("WATCHDOG=1")


def _hung() -> None:
    """The loop waits in the kernel for a user and cannot be called back: a new agent begins without that exec."""
    os._exit(70)
