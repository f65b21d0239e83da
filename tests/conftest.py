"""For every test: what is left out of a normal run, what may be tried twice, and what each test cost.

With ``--junitxml X.xml`` the seconds of every set-up, test and tear-down lie beside it in ``X.durations.txt``,
and what was tried twice in ``X.retried.txt``; ``tests/report.py`` makes one report of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.retried import RETRIED

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# The tests of escapes and races, and what needs two CPUs: in the one guest that has Debian's own settings.
STOCK = {"test_escapes_stock.py", "test_kernel_races.py", "test_race.py", "test_race_others.py", "test_two_cpus.py"}

pytest_plugins = ["tests.leftovers"]


def pytest_configure(config: pytest.Config) -> None:
    """Keeps a report where one is asked for; of several processes, in the one that hears from all."""
    if config.option.xmlpath and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(Path(config.option.xmlpath)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves long runs to ``make soak``, and lets a test of ``retried.py`` be tried twice."""
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak and "soak" not in config.option.markexpr:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]
    if config.pluginmanager.hasplugin("rerunfailures"):
        for item in items:
            if item.nodeid in RETRIED:
                item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling | None:
    """``--dist loadfile``, but the files of the stock guest go to one worker, which alone boots it."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "stock" if Path(file).name in STOCK else file

    return Files(config, log)


class Report:
    """Collects what every phase of every test took, and what was tried twice."""

    def __init__(self, junit: Path) -> None:
        self._durations, self._retried = junit.with_suffix(".durations.txt"), junit.with_suffix(".retried.txt")
        junit.parent.mkdir(parents=True, exist_ok=True)
        self._phases: list[tuple[float, str, str, str]] = []
        self._again: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase ended."""
        worker = getattr(report, "worker_id", "main")
        self._phases.append((report.duration, str(report.when), worker, report.nodeid))
        if report.outcome == "rerun":  # type: ignore[comparison-overlap]
            self._again.append(f"{report.nodeid}\t{RETRIED.get(report.nodeid, 'for no named reason')}")

    def pytest_sessionfinish(self) -> None:
        """The run is over, however it ended."""
        slowest_first = sorted(self._phases, reverse=True)
        self._durations.write_text(
            "".join(f"{s:8.2f} {when:8} {who:5} {what}\n" for s, when, who, what in slowest_first)
        )
        self._retried.write_text("".join(f"{line}\n" for line in self._again))
