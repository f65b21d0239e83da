"""Makes every part of the agent once, in the order in which they depend on each other; nothing begins to work yet.

Whether personas bind anything on this machine is decided here, and nowhere else.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from persona_guest.agent.ends import Ends
from persona_guest.agent.event_stream import EventStreamState
from persona_guest.agent.greeting import Greeting
from persona_guest.agent.layers import Layers
from persona_guest.agent.release import Release
from persona_guest.agent.requests import Users
from persona_guest.agent.resource_status import ResourceStatus
from persona_guest.agent.status import Status
from persona_guest.audit.denials import DenialFiles
from persona_guest.audit.journal import Journal
from persona_guest.audit.logins import Logins
from persona_guest.audit.spool import MIB, Spool
from persona_guest.audit.upload import Recorder
from persona_guest.broker.client import BrokerClient
from persona_guest.broker.documents import Personas
from persona_guest.broker.pool import Pool
from persona_guest.core.denials import Book
from persona_guest.core.leases import LeaseBook
from persona_guest.core.masks import Masks
from persona_guest.dependencies.check import DependencyCheck
from persona_guest.dependencies.dpkg import Dpkg
from persona_guest.dependencies.installer.client import Installation
from persona_guest.dependencies.resolve import Dependencies, DependencyChecker
from persona_guest.enforce.cgroups.facility import Cgroups
from persona_guest.enforce.cgroups.limit_events import Alarms
from persona_guest.enforce.enforcer import Enforcer, cgroups_of
from persona_guest.enforce.facility import Facility
from persona_guest.enforce.network.build import Net
from persona_guest.enforce.network.user_rules import NoUserRules, UserRules
from persona_guest.gate.decider import Decider
from persona_guest.gate.hang_watchdog import HangWatchdog
from persona_guest.gate.inflight import InFlight
from persona_guest.gate.kernel_stops import Stops
from persona_guest.gate.notes import Notes
from persona_guest.gate.parts import DecisionParts, RecordParts, StartParts, WaitingParts
from persona_guest.gate.placing import NoPlacing, Placing
from persona_guest.gate.supervisor import Supervisor
from persona_guest.gate.waiting import Waiting
from persona_guest.ipc.standby import Keeping
from persona_guest.kernel.cgroup import Hierarchy
from persona_guest.login.admission import Admission
from persona_guest.login.opening import Openings
from persona_guest.loop import Loop
from persona_guest.lsm.landlock_fallback import Fallback
from persona_guest.lsm.layer import KernelLayer
from persona_guest.program.identity import Identifier
from persona_guest.reassign.migrate import Migrator
from persona_guest.reassign.reevaluate import Reevaluator
from persona_guest.reassign.user_notices import Notices
from persona_guest.session.model import Login, State
from persona_guest.session.registry import Registry
from persona_guest.settings import Mode, Settings, WhenFull
from persona_guest.system import systemd
from persona_guest.system.homes import Homes
from persona_guest.system.units import Units

log = logging.getLogger("persona.agent")


class CannotServeError(Exception):
    """This machine lacks what enforce mode needs; the agent ends, and the standby then refuses every command."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that begin to work one after the other (``lifecycle``), and what they need of each other for it."""

    settings: Settings
    loop: Loop
    state: Path
    ends: Ends
    registry: Registry
    keeping: Keeping
    leases: LeaseBook
    pool: Pool
    broker_client: BrokerClient
    dependencies: Dependencies
    identifier: Identifier
    kernel_layer: KernelLayer
    recorder: Recorder
    supervisor: Supervisor
    enforcer: Enforcer
    net: Net | None
    enforcing: bool
    notices: Notices
    reevaluator: Reevaluator
    openings: Openings
    event_stream: EventStreamState
    layers: Layers
    users: Users
    release: Release


def build(
    settings: Settings,
    loop: Loop,
    state: Path,
    ends: Ends,
    keeping: Keeping,
    inflight: InFlight,
    released: threading.Event,
    hung: Callable[[], None],
) -> Parts:
    """Makes all parts of an agent; none of them has begun to work when this returns.

    ``released`` is set once root releases the gate; ``hung`` is called when the loop hangs for a user.  What must write
    something down at the end, or close a connection, registers that in ``ends``; other threads end with the process.
    Raises ``CannotServeError``.
    """
    registry = Registry(state / "sessions")
    leases = LeaseBook(settings.broker.grace_s)
    identifier = Identifier(settings.gate)
    tree = Hierarchy(settings.paths.cgroup_root)
    homes = Homes(loop.call_soon_threadsafe)
    hang_watchdog = HangWatchdog(hung, cgroups=partial(cgroups_of, registry, tree))

    # what goes to the broker and comes from it
    pool = Pool(settings.broker, loop.call_soon_threadsafe)
    ends.add("the link to the broker", pool.close)
    broker_client = BrokerClient(pool, leases, registry.subject_of)
    journal = Journal(systemd.journal)
    ends.add("the journal", journal.flush)
    spool = Spool(Path(settings.paths.state_dir) / "spool", state / "numbers", settings.audit.spool_mib * MIB)
    recorder = Recorder(settings.broker, journal.add, spool)
    ends.add("the recorder", recorder.close)
    personas = Personas(Path(settings.paths.state_dir) / "personas", broker_client.persona)

    # one decision: the broker's, its document, its dependencies
    waiting = Waiting(hang_watchdog)
    dpkg = Dpkg()
    dependencies = Dependencies(
        loop=loop,
        allowed=settings.dependencies,
        of=lambda ref: personas.get(ref).dependencies,
        checker=DependencyChecker(DependencyCheck(dpkg, Units()), loop.call_soon_threadsafe),
        installation=Installation(f"{settings.paths.runtime_dir}/installer.sock", loop.call_soon_threadsafe),
        stamp=dpkg.stamp,
        say=lambda request, line: waiting.tell(request.session, line),
        changed=leases.drop,
        install=settings.mode is Mode.ENFORCE,
    )
    decider = Decider(broker_client, personas, dependencies, settings.gate)

    # what binds a persona, in the order in which it is applied
    denials = Book()  # for their users; an exec that complain mode lets go on is none
    denial_files = DenialFiles(loop, state / "denials", denials)
    ends.add("what was denied to users", denial_files.write)
    net = _net(settings, state, tree, personas, registry)
    cgroups = Cgroups(tree)
    facilities: list[Facility] = [cgroups] if tree.root else []
    facilities += net.facilities if net is not None else ()
    enforcing = bool(facilities) and settings.mode is Mode.ENFORCE
    user_rules: UserRules | NoUserRules = net.user_rules if enforcing and net is not None else NoUserRules()
    masks = Masks(settings.audit.mask)
    notices = Notices(
        loop=loop,
        registry=registry,
        tree=tree,
        personas=personas,
        hang_watchdog=hang_watchdog,
        denials=denials,
        masks=masks,
        record=recorder.add,
    )
    alarms = Alarms(loop, tree, notices.alarm)
    enforcer = Enforcer(loop, registry, tree, facilities, personas, alarms.watch)
    placing: Placing = enforcer if enforcing else NoPlacing()

    # the gate
    kernel_layer = KernelLayer(settings, loop, Stops(recorder.add, registry, denials, identifier.where))
    fallback = Fallback(settings, kernel_layer)
    notes = Notes(loop, recorder.add, denials, masks, complain=settings.mode is Mode.COMPLAIN)
    ends.add("what was allowed since the last record", notes.flush)
    supervisor = Supervisor(
        settings,
        loop,
        registry,
        DecisionParts(identifier, leases, decider.decide, homes.of),
        WaitingParts(inflight, waiting, hang_watchdog),
        StartParts(placing, kernel_layer),
        RecordParts(notes, recorder.refusal if settings.audit.when_full is WhenFull.DENY else _always_room),
    )

    # what runs follows what holds
    migrator = Migrator(
        settings=settings,
        loop=loop,
        registry=registry,
        enforcer=enforcer,
        identifier=identifier,
        hang_watchdog=hang_watchdog,
        tell=notices.tell,
        note=notices.note,
        home_of=homes.of,
    )
    reevaluator = Reevaluator(loop, registry, broker_client, personas, migrator, user_rules)

    # logins
    greeting = Greeting(settings, registry, denials)
    note = Logins(recorder.add, complain=settings.mode is Mode.COMPLAIN)

    def exempted(uid: int) -> None:
        """Takes off what still bounds a user who logs in without being gated: their memory, and their network."""
        if enforcing:
            enforcer.attempt(cgroups.lift(uid), f"uid {uid}: the bound on their memory could not be taken off")
        user_rules.exempted(uid)

    admission = Admission(
        settings=settings,
        kernel_layer=kernel_layer,
        fallback=fallback,
        broker_client=broker_client,
        personas=personas,
        denials=denials,
        note=note,
        excluded_s=hang_watchdog.excluded_s,
        exempted=exempted,
    )
    openings = Openings(
        settings=settings,
        registry=registry,
        supervisor=supervisor,
        keeping=keeping,
        admission=admission,
        user_rules=user_rules,
        fallback=fallback,
        leases=leases,
        broker_client=broker_client,
        greeting=greeting.line,
        began=reevaluator.began if enforcing else _follow_nothing,
    )
    registry.at_end(user_rules.ended, partial(_forget, keeping), broker_client.ended, note.ended, enforcer.ended)

    release = Release(
        settings=settings,
        loop=loop,
        registry=registry,
        supervisor=supervisor,
        reevaluator=reevaluator,
        enforcer=enforcer,
        net=net,
        broker_client=broker_client,
        released=released,
    )

    # what users and operators ask
    event_stream = EventStreamState(leases, broker_client)
    layers = Layers(kernel_layer, fallback, binds=enforcing)
    status = Status(
        settings=settings,
        registry=registry,
        supervisor=supervisor,
        leases=leases,
        event_stream=event_stream,
        keeping=keeping,
        kernel_layer=kernel_layer,
        layers=layers,
        records=spool.status,
    )
    users = Users(
        settings=settings,
        registry=registry,
        supervisor=supervisor,
        openings=openings,
        identifier=identifier,
        hang_watchdog=hang_watchdog,
        decider=decider,
        broker_client=broker_client,
        denials=denials,
        greeting=greeting,
        status=status,
        resource_status=ResourceStatus(loop, registry, enforcer),
        release=release,
    )
    return Parts(
        settings=settings,
        loop=loop,
        state=state,
        ends=ends,
        registry=registry,
        keeping=keeping,
        leases=leases,
        pool=pool,
        broker_client=broker_client,
        dependencies=dependencies,
        identifier=identifier,
        kernel_layer=kernel_layer,
        recorder=recorder,
        supervisor=supervisor,
        enforcer=enforcer,
        net=net,
        enforcing=enforcing,
        notices=notices,
        reevaluator=reevaluator,
        openings=openings,
        event_stream=event_stream,
        layers=layers,
        users=users,
        release=release,
    )


def _net(settings: Settings, state: Path, tree: Hierarchy, personas: Personas, registry: Registry) -> Net | None:
    """``None`` where there are no cgroups to bind, or in complain mode no nftables.  Raises ``CannotServeError``."""
    if not tree.root:
        return None
    try:
        return Net(state, tree.root, personas.get, lambda session: registry.get(session) is not None)
    except OSError as error:
        if settings.mode is Mode.ENFORCE:
            raise CannotServeError(
                f"no nftables to bind anybody's network with: {error}; is nf_tables in this kernel?"
            ) from error
        log.warning("no nftables (%s): enforce mode would not start", error)
        return None


def _forget(keeping: Keeping, login: Login) -> None:
    if login.state is State.GATED:
        keeping.forget(login.session.id)


def _follow_nothing(_session: str) -> None:
    """In complain mode nothing follows."""


def _always_room(_user: str) -> None:
    """What cannot be recorded starts all the same; that it was not recorded, is."""
