"""``persona-agent``: the root daemon that answers the gate.  Wiring only; it alone reads the environment.

Exit codes: 0 ended as asked, 1 could not start, 2 usage.
"""

import argparse
import fcntl
import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from persona.decisions import Decision, Request
from persona.problems import PersonaError
from persona_guest import commands, gate_state
from persona_guest import settings as configuration
from persona_guest.accounts import caller_of
from persona_guest.agent import Agent
from persona_guest.bounds import Bounds
from persona_guest.broker_client.events import Connected, Event, Stream
from persona_guest.broker_client.link import Link
from persona_guest.broker_client.recorder import Recorder
from persona_guest.core.leases import LeaseBook
from persona_guest.core.sessions import Session
from persona_guest.dependencies import Again, Dependencies, Done, Looker
from persona_guest.door import Door
from persona_guest.enforce.alarms import Alarms
from persona_guest.enforce.cgroups import Cgroups
from persona_guest.enforce.interface import Facility
from persona_guest.enforcer import Enforcer
from persona_guest.follower import Follower
from persona_guest.gate.fallback import Fallback
from persona_guest.gate.guard import Guard
from persona_guest.gate.identity import Identifier
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.kernel_layer import LastWord
from persona_guest.gate.supervisor import Supervisor
from persona_guest.health import Reporter, Watch
from persona_guest.installer.client import Installation
from persona_guest.ipc.pam_socket import PamSocket
from persona_guest.ipc.standby_socket import Keeping
from persona_guest.ipc.user_socket import UserSocket
from persona_guest.journal import Journal
from persona_guest.kernel import systemd
from persona_guest.kernel.cgroup import Hierarchy
from persona_guest.kernel.dpkg import Dpkg
from persona_guest.kernel.units import Units
from persona_guest.lacking import Look
from persona_guest.loop import Loop
from persona_guest.net import Net
from persona_guest.notices import Notices
from persona_guest.personas import Personas
from persona_guest.questions import Questions
from persona_guest.records import Logins, Stops
from persona_guest.sessions import Sessions
from persona_guest.settings import Mode, Settings
from persona_guest.sorter import Sorter
from persona_guest.users import Users

CONFIG = "/etc/persona/guest.toml"
_INFLIGHT = "inflight"
_LOOK_AFTER_S = 30.0  # systemd may write its own values over the few that are not below a delegated cgroup

log = logging.getLogger("persona.agent")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="persona-agent", description="answers the exec gate of this machine")
    parser.add_argument("--config", default=CONFIG, help=f"settings, TOML (default {CONFIG})")
    parser.add_argument(
        "command",
        nargs="?",
        choices=["run", "check-config", "release", "plan", "load-kernel", "unload-kernel"],
        default="run",
        help="release: let every gated session go on ungated and unbound, before the package is removed; "
        "plan: what would be changed now so that what is found is what should be; "
        "load-kernel: put the kernel layer in place or replace it; unload-kernel: take it away",
    )
    parser.add_argument("--json", action="store_true", help="plan: machine-readable")
    arguments = parser.parse_args(argv)
    if arguments.config != CONFIG and not Path(arguments.config).exists():
        print(f"persona-agent: {arguments.config}: No such file or directory", file=sys.stderr)
        return 1
    try:
        settings = configuration.load(Path(arguments.config))
    except PersonaError as error:
        if arguments.command != "release" or arguments.config != CONFIG:
            print(f"persona-agent: {error.message}", file=sys.stderr)
            return 1
        # the package goes: what is bound must not stay for want of a file that can be read
        print(f"persona-agent: {error.message}; the default paths are taken", file=sys.stderr)
        settings = Settings()
    if arguments.command == "check-config":
        return commands.check_config(arguments.config, settings)
    if arguments.command == "release":
        return commands.release(settings)
    if arguments.command == "plan":
        return commands.plan(settings, as_json=arguments.json)
    if arguments.command.endswith("-kernel"):
        from persona_guest.gate import kernel_loader  # only these two pay for it

        return kernel_loader.main(arguments.command, settings)
    return run(settings)


def run(settings: Settings) -> int:
    """Serves until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    threading.excepthook = _die
    runtime = Path(settings.paths.runtime_dir)
    try:
        runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = _alone(runtime)
    except OSError as error:
        print(f"persona-agent: {error}", file=sys.stderr)
        return 1
    gate_state.write(settings)  # first: should this agent not come up, logins meet the mode that was asked for
    loop = Loop()
    keeping = Keeping(loop, str(runtime / "standby.sock"), lambda: [(_INFLIGHT, inflight.fd), *sessions.listeners()])
    kept = _take_kept(keeping)
    inflight = _take_inflight(kept, keeping)
    leases = LeaseBook(settings.broker.grace_s)
    identifier = Identifier(settings.gate)
    link = Link(settings.broker, loop.deliver)
    questions = Questions(link, leases)
    guard = Guard(_hung, cgroups=lambda uid: enforcer.cgroups_of(uid))
    journal = Journal(systemd.journal)
    recorder = Recorder(settings.broker, journal.add)
    personas = Personas(Path(settings.paths.state_dir) / "personas", questions.persona)
    dpkg = Dpkg()
    dependencies = Dependencies(
        loop,
        settings.dependencies,
        lambda ref: personas.get(ref).dependencies,
        Looker(Look(dpkg, Units()), loop.deliver),
        Installation(f"{settings.paths.runtime_dir}/installer.sock", loop.deliver),
        dpkg.stamp,
        lambda request, line: supervisor.tell_waiting(request.session, line),
        leases.drop,
        install=settings.mode is Mode.ENFORCE,
    )

    def backed(decision: Decision, done: Done, request: Request | None = None, again: Again | None = None) -> None:
        personas.backed(decision, lambda found: dependencies.backed(found, done, request, again))

    def ask(request: Request, done: Done) -> None:
        def again() -> None:  # after an installation, which took its time; not a second one
            questions.decide(request, lambda decision: backed(decision, done, request))

        # what comes before any terminal waits for no installation: it is the session's own, whatever the persona says
        waits = None if settings.gate.is_plumbing(request.program.path) else again
        questions.decide(request, lambda decision: backed(decision, done, request, waits))

    def ended(session: Session) -> None:
        door.ended(session)
        sessions.ended(session)
        enforcer.ended(session)

    last_word = LastWord(settings, loop, lambda event: stops(event))
    supervisor = Supervisor(settings, loop, identifier, leases, inflight, guard, last_word, ask, recorder.add, ended)
    stops = Stops(recorder.add, supervisor)
    note = Logins(recorder.add, complain=settings.mode is Mode.COMPLAIN)
    sessions = Sessions(runtime / "sessions", supervisor, keeping, questions.closed, note)
    fallback = Fallback(settings, last_word)
    agent = Agent(settings, supervisor, sessions, last_word, fallback, leases, questions, keeping)
    door = Door(settings, supervisor, sessions, last_word, fallback, leases, questions, personas, note, agent.greeting)
    tree = Hierarchy(settings.paths.cgroup_root)
    net = None
    try:
        net = Net(runtime, tree.root, personas.get) if tree.root else None
    except OSError as error:
        if settings.mode is Mode.ENFORCE:
            log.critical("no nftables to bind anybody's network with: %s; is nf_tables in this kernel?", error)
            return 1  # and the standby refuses every command
        log.warning("no nftables (%s): enforce mode would not start", error)
    # everything that binds a persona, in the order in which it is applied
    facilities: list[Facility] = [Cgroups(tree)] if tree.root else []
    facilities += net.facilities if net is not None else ()
    enforcer = Enforcer(
        loop, tree, facilities, personas, runtime / "places", sessions.base_of, lambda place: alarms.watch(place)
    )
    notices = Notices(loop, enforcer, supervisor, guard, recorder.add)
    alarms = Alarms(loop, tree, notices.alarm)
    sorter = Sorter(settings, loop, enforcer, identifier, guard, notices.tell, notices.note)
    follower = Follower(loop, enforcer, supervisor, questions, personas, sorter, sessions.rebase)
    enforcing = bool(facilities) and settings.mode is Mode.ENFORCE
    if enforcing:
        supervisor.place = enforcer.place
        door.began = follower.began

    def unbind() -> None:
        if net is not None:
            net.bases.release()
        enforcer.release()

    def release() -> None:
        log.warning("released: %d sessions go on ungated", len(supervisor.sessions))
        supervisor.released = True
        unbind()
        gate_state.remove(settings)
        loop.call_every(1.0, lambda: None if supervisor.sessions else loop.stop())

    users = Users(agent, door, identifier, guard, release, Bounds(loop, enforcer), backed)
    pam = PamSocket(loop, runtime / "pam.sock", door, root=os.geteuid())
    socket = UserSocket(loop, runtime / "agent.sock", users.handle, caller_of)
    sessions.restore(kept)
    if enforcing and net is not None:
        net.warm()
        net.resolvers.refresh()
        net.bases.restore({name: gated.session.uid for name, gated in supervisor.sessions.items()})
        sessions.bases = net.bases
        enforcer.restore(supervisor.sessions)
        loop.call_every(_LOOK_AFTER_S, enforcer.reconcile)
        net.watch(loop, enforcer.reconcile, notices.refused)
    elif facilities:
        unbind()  # what an enforcing agent before this one left
    supervisor.answer_left_over()
    keeping.repeat()

    def heard(event: Event) -> None:
        if isinstance(event, Connected):
            link.reachable()
        before = leases.generation
        agent.event(event)
        if isinstance(event, Connected) or leases.generation != before:
            follower.changed()

    stream = Stream(settings.broker, lambda event: loop.deliver(lambda: heard(event)))
    health = Reporter(settings.broker, Watch(settings.gate.uid_min, agent.layers))
    loop.call_every(1.0, lambda: identifier.refresh(time.monotonic()))
    loop.call_every(5.0, door.announce_again)
    loop.call_every(10.0, last_word.check)
    loop.call_every(1.0, dependencies.refresh)
    loop.call_every(0.25, lambda: link.sweep(time.monotonic()))
    interval = systemd.watchdog_interval()
    if interval is not None:
        loop.call_every(interval, lambda: _alive())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: loop.deliver(loop.stop))
    systemd.notify(f"READY=1\nSTATUS={settings.mode} mode, VM {settings.vm.name}")
    log.info("ready: %s mode, %d sessions taken up", settings.mode, len(supervisor.sessions))
    # what start-up made stays for good: the collector need not walk it again and again between two execs
    sys.setswitchinterval(0.0005)  # the recorder's thread must not keep a waiting exec for 5 ms
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    loop.run()
    systemd.notify("STOPPING=1")
    pam.close()
    socket.close()
    stream.close()
    link.close()
    supervisor.notes.flush()
    health.close()
    recorder.close()
    journal.flush()
    keeping.close()  # last: from here on the standby answers
    os.close(lock)
    return 0


def _alone(runtime: Path) -> int:
    """Locks the directory for as long as the descriptor is open.  Raises ``OSError``, also where an agent has it."""
    lock = os.open(runtime / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OSError(f"an agent runs already with {runtime}; 'persona status' asks it") from None
    return lock


def _die(failure: threading.ExceptHookArgs) -> None:
    """A thread that ends by an error would leave an agent that looks alive: better a restart, which loses nothing."""
    thread = failure.thread.name if failure.thread else "a thread"
    log.critical("%s failed", thread, exc_info=failure.exc_value)
    os._exit(70)  # EX_SOFTWARE, sysexits.h


def _hung() -> None:
    """The loop waits in the kernel for a user and cannot be called back: a new agent begins without that exec."""
    os._exit(70)


def _alive() -> None:
    systemd.notify("WATCHDOG=1")


def _take_kept(keeping: Keeping) -> dict[str, int]:
    """What systemd kept over a restart, and what the standby has: over a stop, systemd keeps nothing."""
    kept = systemd.inherited()
    for name, fd in keeping.take().items():
        if name in kept:
            os.close(fd)
        else:
            kept[name] = fd
            systemd.store(name, fd)
    return kept


def _take_inflight(kept: dict[str, int], keeping: Keeping) -> InFlight:
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


if __name__ == "__main__":
    sys.exit(main())
