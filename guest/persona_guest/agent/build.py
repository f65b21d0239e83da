"""Makes every part of the agent, in the order in which they depend on each other, and serves until SIGTERM."""

import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from persona_guest.agent import state_file
from persona_guest.agent.agent import Agent
from persona_guest.agent.ends import Ends
from persona_guest.agent.requests import Users
from persona_guest.agent.resource_status import ResourceStatus
from persona_guest.audit.denials import Kept
from persona_guest.audit.journal import Journal
from persona_guest.audit.logins import Logins
from persona_guest.audit.upload import Recorder
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.documents import Personas
from persona_guest.broker.events import Connected, Event, Stream
from persona_guest.broker.pool import Pool
from persona_guest.core.leases import LeaseBook
from persona_guest.dependencies.check import DependencyCheck
from persona_guest.dependencies.dpkg import Dpkg
from persona_guest.dependencies.installer.client import Installation
from persona_guest.dependencies.resolve import Dependencies, DependencyChecker
from persona_guest.enforce.cgroups.facility import Cgroups
from persona_guest.enforce.cgroups.limit_events import Alarms
from persona_guest.enforce.enforcer import Enforcer
from persona_guest.enforce.facility import Facility
from persona_guest.enforce.network.build import Net
from persona_guest.gate.decider import Decider
from persona_guest.gate.hang_watchdog import INTERRUPT, HangWatchdog
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.kernel_stops import Stops
from persona_guest.gate.supervisor import Supervisor
from persona_guest.health.report import Reporter, Watch
from persona_guest.ipc.pam import PamSocket
from persona_guest.ipc.standby import Keeping
from persona_guest.ipc.users import UserSocket
from persona_guest.kernel.cgroup import Hierarchy
from persona_guest.login.admission import Admissions
from persona_guest.login.sessions import Sessions
from persona_guest.loop import Loop
from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.lsm.layer import KernelLayer
from persona_guest.program.identity import Identifier
from persona_guest.reassign.migrate import Migrator
from persona_guest.reassign.reevaluate import Reevaluator
from persona_guest.reassign.user_notices import Notices
from persona_guest.session.model import Session
from persona_guest.settings import Mode, Settings
from persona_guest.system import runtime_dir, systemd
from persona_guest.system.accounts import caller_of
from persona_guest.system.homes import Homes
from persona_guest.system.start_progress import Start
from persona_guest.system.units import Units

_INFLIGHT = "inflight"
_LOOK_AFTER_S = 30.0  # systemd may write its own values over the few that are not below a delegated cgroup

log = logging.getLogger("persona.agent")


def run(settings: Settings, start: Start | None = None, *, debug: bool = False) -> int:
    """Serves until SIGTERM; what goes wrong with one part of its end keeps no other from its own."""
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
    keeping = Keeping(loop, str(runtime / "standby.sock"), lambda: [(_INFLIGHT, inflight.fd), *sessions.listeners()])
    ends.add("the standby's connection", keeping.close)  # last: from then on the standby answers
    kept = _take_kept(keeping)
    inflight = _take_inflight(kept, keeping)
    leases = LeaseBook(settings.broker.grace_s)
    identifier = Identifier(settings.gate)
    pool = Pool(settings.broker, loop.call_soon_threadsafe)
    ends.add("the link to the broker", pool.close)
    broker_client = BrokerClient(pool, leases)
    hang_watchdog = HangWatchdog(_hung, cgroups=lambda uid: enforcer.cgroups_of(uid))
    journal = Journal(systemd.journal)
    ends.add("the journal", journal.flush)
    recorder = Recorder(settings.broker, journal.add)
    ends.add("the recorder", recorder.close)
    personas = Personas(Path(settings.paths.state_dir) / "personas", broker_client.persona)
    dpkg = Dpkg()
    dependencies = Dependencies(
        loop,
        settings.dependencies,
        lambda ref: personas.get(ref).dependencies,
        DependencyChecker(DependencyCheck(dpkg, Units()), loop.call_soon_threadsafe),
        Installation(f"{settings.paths.runtime_dir}/installer.sock", loop.call_soon_threadsafe),
        dpkg.stamp,
        lambda request, line: supervisor.tell_waiting(request.session, line),
        leases.drop,
        install=settings.mode is Mode.ENFORCE,
    )

    decider = Decider(broker_client, personas, dependencies, settings.gate)

    def ended(session: Session) -> None:
        admissions.ended(session)
        sessions.ended(session)
        enforcer.ended(session)

    kernel_layer = KernelLayer(settings, loop, lambda event: stops(event))
    supervisor = Supervisor(
        settings, loop, identifier, leases, inflight, hang_watchdog, kernel_layer, decider.decide, recorder.add, ended
    )
    kept_denials = Kept(loop, state / "denials", supervisor.denials)
    ends.add("what was denied to users", kept_denials.write)
    homes = Homes(loop.call_soon_threadsafe)
    supervisor.home_of = homes.of
    ends.add("what was allowed since the last record", supervisor.notes.flush)
    stops = Stops(recorder.add, supervisor, identifier.where)
    note = Logins(recorder.add, complain=settings.mode is Mode.COMPLAIN)
    sessions = Sessions(state / "sessions", supervisor, keeping, broker_client.closed, note)
    fallback = Fallback(settings, kernel_layer)
    agent = Agent(settings, supervisor, sessions, kernel_layer, fallback, leases, broker_client, keeping)
    admissions = Admissions(
        settings,
        supervisor,
        sessions,
        kernel_layer,
        fallback,
        leases,
        broker_client,
        personas,
        note,
        agent.greeting,
        hang_watchdog.excluded_s,
    )
    broker_client.subject_of = admissions.subject_of
    tree = Hierarchy(settings.paths.cgroup_root)
    net = None
    try:
        net = Net(state, tree.root, personas.get) if tree.root else None
    except OSError as error:
        if settings.mode is Mode.ENFORCE:
            log.critical("no nftables to bind anybody's network with: %s; is nf_tables in this kernel?", error)
            return 1  # and the standby refuses every command
        log.warning("no nftables (%s): enforce mode would not start", error)
    # everything that binds a persona, in the order in which it is applied
    cgroups = Cgroups(tree)
    facilities: list[Facility] = [cgroups] if tree.root else []
    facilities += net.facilities if net is not None else ()
    enforcer = Enforcer(
        loop, tree, facilities, personas, state / "places", sessions.base_of, lambda place: alarms.watch(place)
    )
    notices = Notices(loop, enforcer, supervisor, hang_watchdog, recorder.add)
    alarms = Alarms(loop, tree, notices.alarm)
    migrator = Migrator(settings, loop, enforcer, identifier, hang_watchdog, notices.tell, notices.note, homes.of)
    reevaluator = Reevaluator(loop, enforcer, supervisor, broker_client, personas, migrator, sessions.rebase)
    enforcing = bool(facilities) and settings.mode is Mode.ENFORCE
    if enforcing:
        supervisor.place = enforcer.place
        sessions.lift = lambda uid: enforcer.attempt(
            cgroups.lift(uid), f"uid {uid}: the bound on their memory could not be taken off"
        )
        admissions.began = reevaluator.began

    def unbind() -> None:
        if net is not None:
            net.user_rules.release()
        enforcer.release()

    def release() -> None:
        log.warning("released: %d sessions go on ungated", len(supervisor.sessions))
        supervisor.released = True
        released.set()
        unbind()
        # nothing is decided for them any more, and by the end of the last of them nobody may be left to say so
        for gated in supervisor.sessions.values():
            broker_client.closed(gated.session)
        state_file.remove(settings)
        loop.call_every(1.0, lambda: None if supervisor.sessions else loop.stop())

    users = Users(agent, admissions, identifier, hang_watchdog, release, ResourceStatus(loop, enforcer), decider)
    sessions.restore(kept)
    if enforcing and net is not None:
        net.warm()
        net.resolvers.refresh()
        net.user_rules.restore({name: gated.session.uid for name, gated in supervisor.sessions.items()})
        sessions.user_rules = net.user_rules
        enforcer.restore(supervisor.sessions)
        loop.call_every(_LOOK_AFTER_S, enforcer.reconcile)
        net.watch(loop, enforcer.reconcile, notices.refused)
    elif facilities:
        unbind()  # what an enforcing agent before this one left
    supervisor.answer_left_over()
    keeping.repeat()

    def heard(event: Event) -> None:
        if isinstance(event, Connected):
            pool.reachable()
        before = leases.generation
        agent.event(event)
        if isinstance(event, Connected) and not supervisor.released:
            broker_client.have(admissions.all_sessions())
        if isinstance(event, Connected) or leases.generation != before:
            reevaluator.changed()

    stream = Stream(settings.broker, lambda event: loop.call_soon_threadsafe(lambda: heard(event)))
    ends.add("the broker's event stream", stream.close)
    health = Reporter(settings.broker, Watch(settings.gate.uid_min, agent.layers))
    ends.add("the reports of health", health.close)
    loop.call_every(1.0, lambda: identifier.refresh(time.monotonic()))
    loop.call_every(5.0, admissions.announce_again)
    loop.call_every(5.0, sessions.save_again)
    loop.call_every(10.0, kernel_layer.check)
    loop.call_every(1.0, dependencies.refresh)
    loop.call_every(0.25, lambda: pool.sweep(time.monotonic()))
    interval = systemd.watchdog_interval()
    if interval is not None:
        loop.call_every(interval, lambda: _alive())
    signal.signal(INTERRUPT, lambda _number, _frame: None)  # a system call that waits ends by it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: loop.call_soon_threadsafe(loop.stop))
    # not before all is there: who connects while nobody serves would wait in vain, root too
    try:
        pam = PamSocket(loop, state / "pam.sock", admissions, root=os.geteuid())
        ends.add("the PAM module's socket", pam.close)
        socket = UserSocket(loop, state / "agent.sock", users.handle, caller_of)
        ends.add("the users' socket", socket.close)
    except OSError as error:
        log.critical("cannot listen in %s: %s", state, error)
        return 1
    runtime_dir.keep_linked(loop, runtime, "pam.sock", "agent.sock")
    start.ready()
    keeping.ready()
    systemd.notify(f"READY=1\nSTATUS={settings.mode} mode, VM {settings.vm.name}")
    log.info("ready: %s mode, %d sessions taken up", settings.mode, len(supervisor.sessions))
    # what start-up made stays for good: the collector need not walk it again and again between two execs
    sys.setswitchinterval(0.0005)  # the recorder's thread must not keep a waiting exec for 5 ms
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    ends.add("the word to systemd", lambda: systemd.notify("STOPPING=1"))
    loop.run()
    return 0


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
