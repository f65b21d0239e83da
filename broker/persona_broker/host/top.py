"""What ``persona-host top`` shows of a host: its load as bars, and its domains, the busiest first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from persona.answers import iso
from persona.conditions import METRICS
from persona.shown import amount
from persona.shown import line as printable
from persona_broker.host.core.readings import Domain
from persona_broker.host.core.sample import HostSample
from persona_broker.policy.conditions import is_fresh

_BAR = 20  # characters of 100 %


@dataclass(frozen=True, slots=True)
class HostRow:
    """One host of the settings at ``now`` (Unix seconds); ``sample`` is ``None`` where there never was one."""

    name: str
    sample: HostSample | None
    now: float
    max_age_s: float

    @property
    def is_seen(self) -> bool:
        """Whether its load is known, and its domains are."""
        return self.sample is not None and self._is_fresh(self.sample.at) and self._is_fresh(self.sample.domains_at)

    def as_json(self) -> dict[str, Any]:
        """One of the ``items``."""
        sample = self.sample
        if sample is None:
            return {"host": self.name, "at": None, "load": {}, "domains_at": None, "domains": [], "problem": _NEVER}
        domains = [
            {"uuid": d.uuid, "name": d.name, "state": d.state, "figures": dict(d.figures), "problem": d.problem}
            for d in _busiest_first(sample.domains)
        ]
        return {
            "host": self.name,
            "at": iso(sample.at),
            "load": dict(sample.load) if self._is_fresh(sample.at) else {},
            "domains_at": None if sample.domains_at is None else iso(sample.domains_at),
            "domains": domains,
            "problem": sample.problem,
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        sample = self.sample
        if sample is None:
            yield f"{self.name}: {_NEVER}"
            return
        age_s = self.now - sample.at
        old = "" if self._is_fresh(sample.at) else ", too old to count"
        yield f"{self.name}  {age_s:.0f} s ago{old}"
        for metric in METRICS:
            percent = sample.load.get(metric)
            yield f"  {metric:9}" + ("unknown" if percent is None else f"{bar(percent)} {percent:3.0f} %")
        if not sample.problem and not self._is_fresh(sample.domains_at):
            yield "  ! its domains are not known: libvirt does not answer"
        if sample.problem:
            yield f"  ! {printable(sample.problem)}"
        for domain in _busiest_first(sample.domains):
            yield f"  {printable(domain.name):24} {domain.state:9} {_described(domain)}"

    def _is_fresh(self, at: float | None) -> bool:
        return is_fresh(at, self.now, self.max_age_s)


_NEVER = "no sample of it; is 'persona-host run' running, and can it reach the host?"


def bar(percent: float) -> str:
    """A share of 100 % as a bar of fixed width."""
    full = round(percent / 100 * _BAR)
    return "[" + "#" * full + "." * (_BAR - full) + "]"


def _busiest_first(domains: tuple[Domain, ...]) -> list[Domain]:
    return sorted(domains, key=lambda domain: (-domain.figures.get("cpu", -1.0), domain.name))


def _described(domain: Domain) -> str:
    if domain.problem:
        return f"! {printable(domain.problem)}"
    figures = domain.figures
    said = []
    if "cpu" in figures:
        said.append(f"cpu {figures['cpu']:.0f} %" + (f" of {figures['cpus'] * 100:.0f}" if "cpus" in figures else ""))
    if "memory" in figures:
        most = f" of {amount(figures['memory_max'])}" if "memory_max" in figures else ""
        said.append(f"memory {amount(figures['memory'])}{most}")
    for name in ("read", "write", "receive", "send"):
        if figures.get(name):
            said.append(f"{name} {figures[name] / 1e6:.1f} MB/s")
    return f"{', '.join(said)}  {domain.uuid}" if said else domain.uuid
