#!/usr/bin/env python3
"""Draws docs/simulation-*.svg and .png: one day of 1,000 VMs under the arbiter, under Proxmox's rule and under none.

Needs matplotlib; 'make simulate' runs it.  The same code draws the same pictures.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "broker", "guest")]

from tests.simulation.fleet import DAY, PERSONAS, TICK, Fleet  # noqa: E402
from tests.simulation.rules import Arbiter, Nobody, Proxmox, Rule  # noqa: E402
from tests.simulation.run import Figures, simulate  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

RULES: Mapping[str, tuple[Callable[[], Rule], str]] = {
    "no arbiter": (Nobody, "#888888"),
    "Proxmox's rule": (Proxmox, "#d98c21"),
    "arbiter": (Arbiter, "#2166ac"),
}
STYLE = {"svg.hashsalt": "persona", "svg.fonttype": "none", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3}


def cpu(found: Mapping[str, Figures]) -> Figure:
    """By persona, how much of the CPU that it wanted it had while its host was short of it."""
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for at, (name, figures) in enumerate(found.items()):
        heights = [100 * figures.satisfied(persona.name) for persona in PERSONAS]
        places = [place + (at - 1) * 0.27 for place in range(len(PERSONAS))]
        bars = axes.bar(places, heights, 0.25, label=name, color=RULES[name][1])
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(PERSONAS)), [f"{persona.name}\npriority {persona.priority}" for persona in PERSONAS])
    axes.set(ylabel="% of the CPU that was wanted", ylim=(0, 115), title="CPU while a host has too little")
    axes.legend(ncols=3, loc="upper center", frameon=False)
    axes.grid(axis="x", visible=False)
    return figure


def memory(found: Mapping[str, Figures], fleet: Fleet) -> Figure:
    """By time of the day, how full hosts are, and how many of them use more than they have."""
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(3, 2))
    hours = [at * TICK / 3600 for at in range(DAY // TICK)]
    hosts = fleet.hosts * fleet.days * TICK
    for name, figures in found.items():
        upper.plot(
            hours, [100 * used / hosts / fleet.memory for used in figures.memory], label=name, color=RULES[name][1]
        )
        lower.plot(hours, [100 * seconds / hosts for seconds in figures.over], color=RULES[name][1])
    for percent in (80, 90, 100):
        upper.axhline(percent, color="black", linewidth=0.6, linestyle=":")
    upper.set(ylabel="% of a host's memory", ylim=(0, 110), title="Memory that is used, in the mean of all hosts")
    upper.legend(loc="lower center", ncols=3, frameon=False)
    lower.set(ylabel="% of the hosts", title="Hosts that use more than they have", xlabel="hour of the day")
    lower.set(xlim=(0, 24), xticks=range(0, 25, 3), ylim=(0, None))
    return figure


def changes(found: Mapping[str, Figures], fleet: Fleet) -> Figure:
    """How many of all hours of VMs saw at least so many changes."""
    figure, axes = pyplot.subplots(figsize=(8, 4))
    hours = fleet.hosts * len(fleet.sizes) * fleet.days * 24
    for name, figures in found.items():
        counts = sorted(figures.changes.values())
        if not counts:
            continue
        steps = sorted(set(counts))
        at_least = [100 * sum(count >= step for count in counts) / hours for step in steps]
        axes.step(steps, at_least, where="pre", label=name, color=RULES[name][1])
    axes.set(xlabel="changes of a VM in an hour", ylabel="% of hours with at least so many", yscale="log", xscale="log")
    axes.set_title("Changes (without an arbiter there are none)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Runs the day under each rule, prints its figures and writes the pictures."""
    fleet = Fleet()
    found = {name: simulate(fleet, rule) for name, (rule, _) in RULES.items()}
    days = fleet.hosts * fleet.days
    for name, figures in found.items():
        counts, hours = sorted(figures.changes.values()), days * 24 * len(fleet.sizes)
        print(
            name,
            "CPU " + ", ".join(f"{persona.name} {100 * figures.satisfied(persona.name):.1f} %" for persona in PERSONAS),
            f"too little CPU {figures.contended_s / 3600 / days:.2f} h a host",
            f"over its memory {sum(figures.over) / 3600 / days:.3f} h a host",
            f"guests short of memory {figures.short_s / 3600 / days:.3f} VM hours a host",
            f"changes {sum(counts) / hours:.2f} a VM and hour, most {max(counts, default=0)}",
            f"faults {len(figures.faults)}, looks {figures.looks}",
            sep="\n  ",
        )
    with pyplot.rc_context(STYLE):
        for part, figure in (("cpu", cpu(found)), ("memory", memory(found, fleet)), ("changes", changes(found, fleet))):
            figure.tight_layout()
            figure.savefig(ROOT / "docs" / f"simulation-{part}.svg", metadata={"Date": None, "Creator": None})
            figure.savefig(ROOT / "docs" / f"simulation-{part}.png", dpi=100, metadata={"Software": None})
            pyplot.close(figure)


if __name__ == "__main__":
    main()
