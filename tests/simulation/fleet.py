"""What happens on a fleet whoever shapes its VMs: who logs in where, what they do, what it wants of the host.

Nothing here depends on a rule, so that each rule gets the same days.  Units: cores, bytes, whole seconds of simulated
time since the first midnight.  Everything follows from the seed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from persona_broker.host.core.arbiter import LiveSession, Rules

GIB = 1 << 30
DAY = 86_400
TICK = 600  # in which what guests and host use of their memory moves
_SIZES = ((1, 2 * GIB),) * 7 + ((2, 4 * GIB),) * 8 + ((4, 8 * GIB),) * 5  # of a host's VMs: 43 vCPUs, 86 GiB
_LOGINS = (2, 2, 2, 2, 2, 4, 10, 30, 60, 80, 85, 75, 50, 70, 80, 75, 65, 45, 25, 16, 12, 8, 6, 4)  # by hour, of 100
_BACKGROUND = 0.05  # cores of a VM outside of sessions
_BASE = 0.12  # of a VM's memory, for its system
_FULL = 0.9  # of a VM's memory: a guest that uses more kills what uses it


@dataclass(frozen=True, slots=True)
class Persona:
    """What the sessions of a persona may use, and how many of 100 VMs are theirs."""

    name: str
    priority: int
    cpus: float | None
    memory: int | None
    percent: int


PERSONAS = (
    Persona("intern", 20, 0.5, GIB, 30),
    Persona("analyst", 50, 2.0, 2 * GIB, 35),
    Persona("engineer", 60, 4.0, 4 * GIB, 25),
    Persona("on-call", 90, None, None, 10),
)


@dataclass(frozen=True, slots=True)
class Doing:
    """What one VM does from some moment on.

    ``cpus`` is what it would use if it had the host alone, ``used`` the memory that its agent would report, ``cache``
    what it would like to keep of files beside it.  ``persona`` is that of its busiest priority, "" where none is busy.
    """

    sessions: tuple[LiveSession, ...]
    cpus: float
    used: int
    cache: int
    persona: str


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM; ``follows`` says whether its balloon does what it is told, ``leak`` is bytes a second that it loses."""

    name: str
    cpus: int
    memory: int
    follows: bool = True
    leak: float = 0.0


@dataclass(frozen=True, slots=True)
class Own:
    """What the host uses itself, from some moment on."""

    memory: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One host and all that happens on it, in order: when, to which of its machines (-1: itself), what."""

    cores: int
    memory: int
    machines: tuple[Machine, ...]
    events: tuple[tuple[int, int, Doing | Own], ...]


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a fleet is made of; with ``leaks`` one VM in ten and each host itself lose memory for days."""

    seed: int = 1
    hosts: int = 50
    days: float = 1.0
    cores: int = 12
    memory: int = 54 * GIB
    sizes: tuple[tuple[int, int], ...] = _SIZES
    leaks: bool = False

    @property
    def until(self) -> int:
        """The second in which it ends."""
        return int(self.days * DAY)

    def plans(self) -> Iterator[Plan]:
        """Each host, which does not depend on how many there are."""
        for number in range(self.hosts):
            yield self._plan(Random(f"{self.seed}/{number}"))  # noqa: S311 - a simulation

    def _plan(self, random: Random) -> Plan:
        machines = tuple(
            Machine(
                f"vm-{at}",
                cpus,
                memory,
                follows=random.random() > 0.05,
                leak=memory * random.uniform(0.03, 0.06) / DAY if random.random() < 0.1 and self.leaks else 0.0,
            )
            for at, (cpus, memory) in enumerate(self.sizes)
        )
        events: list[tuple[int, int, Doing | Own]] = [(at, -1, own) for at, own in self._own(random)]
        for at, machine in enumerate(machines):
            events += [(when, at, doing) for when, doing in _guest(random, machine, self.until)]
        return Plan(self.cores, self.memory, machines, tuple(sorted(events, key=lambda event: event[:2])))

    def _own(self, random: Random) -> Iterator[tuple[int, Own]]:
        walk = 0.0
        for at in range(0, self.until, TICK):
            walk = min(1.0, max(0.0, walk + random.gauss(0, 0.1)))
            leaked = 0.25 * GIB * at / DAY if self.leaks else 0
            yield at, Own(int((2 + walk) * GIB + leaked))


@dataclass(slots=True)
class _Session:
    """One session while it is made up: ``want`` of its CPU is 0 while it is idle."""

    persona: Persona
    begin: int
    end: int
    phases: list[tuple[int, float]]
    memory: float = 0.2  # of what it may use
    want: float = 0.0
    idle_since: int = 0


def _some(random: Random, median_s: float, sigma: float, least_s: int, most_s: int) -> int:
    return min(most_s, max(least_s, int(random.lognormvariate(math.log(median_s), sigma))))


def _sessions(random: Random, until: int) -> list[_Session]:
    """Of one VM: mostly those of one persona, most of them by day."""
    weights = [persona.percent for persona in PERSONAS]
    (main,) = random.choices(PERSONAS, weights)
    found = []
    for hour in range(math.ceil(until / 3600)):
        if random.random() >= _LOGINS[hour % 24] / 100:
            continue
        persona = main if random.random() < 0.85 else random.choices(PERSONAS, weights)[0]
        begin = hour * 3600 + random.randrange(3600)
        end = begin + _some(random, 3000, 0.9, 60, 8 * 3600)
        phases, at = [], begin
        while at < end:
            phases.append((at, random.uniform(0.4, 1.0)))
            at += _some(random, 500, 0.8, 20, 7200)
            phases.append((at, 0.0))
            at += _some(random, 400, 1.1, 20, 7200)
        found.append(_Session(persona, begin, end, [phase for phase in phases if phase[0] < end]))
    return found


def _guest(random: Random, machine: Machine, until: int) -> Iterator[tuple[int, Doing]]:
    """What one VM does, whenever that changes."""
    idle_s = int(Rules().idle_s)
    sessions = _sessions(random, until)
    changes: dict[int, list[tuple[_Session, float]]] = {}
    moments = {0}
    for session in sessions:
        for at, want in session.phases:
            changes.setdefault(at, []).append((session, want))
        starts = [at for at, _ in session.phases[1:]] + [session.end]
        moments |= {at + idle_s for (at, want), end in zip(session.phases, starts, strict=True)
                    if want == 0 and at + idle_s < end}  # fmt: skip
        moments |= {session.begin, session.end}
    moments |= set(changes) | set(range(0, until, TICK))
    cache, last = 0.1, None
    live: list[_Session] = []
    waiting = sorted(sessions, key=lambda session: session.begin, reverse=True)
    for now in sorted(moment for moment in moments if moment < until):
        while waiting and waiting[-1].begin <= now:
            live.append(waiting.pop())
        live = [session for session in live if session.end > now]
        for session, want in changes.get(now, ()):
            session.want = want
            session.idle_since = now
        if now % TICK == 0:
            goal = 0.5 if any(session.want for session in live) else 0.1
            cache += (goal - cache) * random.uniform(0.0, 0.3)
            for session in live:
                session.memory = min(1.0, max(0.05, session.memory + random.gauss(0.03, 0.12)))
        doing = _doing(machine, live, cache, now)
        if doing != last:
            yield now, doing
            last = doing


def _doing(machine: Machine, live: list[_Session], cache: float, now: int) -> Doing:
    cpus, used, top, name = _BACKGROUND, machine.memory * _BASE + machine.leak * (now - now % TICK), -1, ""
    for session in live:
        persona = session.persona
        cpus += session.want * (machine.cpus if persona.cpus is None else min(persona.cpus, machine.cpus))
        used += session.memory * min(persona.memory or machine.memory, 0.7 * machine.memory)
        if session.want and persona.priority > top:
            top, name = persona.priority, persona.name
    return Doing(
        tuple(
            LiveSession(
                session.persona.priority, session.persona.cpus, session.persona.memory,
                0.0 if session.want else float(now - session.idle_since),
            )
            for session in live
        ),
        min(cpus, machine.cpus),
        min(int(used), int(_FULL * machine.memory)),
        int(cache * machine.memory),
        name,
    )  # fmt: skip
