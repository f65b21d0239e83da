"""The end of ``scripts/test``: what each part took, the slowest tests, what was tried twice, and what failed.

``python3 -m tests.report DIRECTORY`` reads what the parts left there: ``parts.tsv`` (name, budget and seconds,
exit code), and for each part that ran tests pytest's NAME.xml and NAME.retried.txt.  Exits with 1 where more
was tried twice than may be.  Standard library only.
"""

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from tests.bench.machine import pace

BUDGET_S, LIMIT_S = 20 * 60, 25 * 60  # of the whole run, on a quiet machine of two cores
SLOWEST = 10
RETRIES_MAX = 3
REASON_LINES = 6  # of a failure: the rest is in the junit file


@dataclass(frozen=True, slots=True)
class Part:
    """A step of the run; ``tests`` is empty for one that runs none."""

    name: str
    budget: float
    seconds: float
    code: int
    tests: tuple[tuple[float, str], ...]  # seconds with set-up and tear-down, and the test
    retried: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]  # the test, and what pytest says in the end


def read(directory: Path) -> list[Part]:
    """The parts in the order in which they ended."""
    return [_part(directory, *line.split("\t")) for line in (directory / "parts.tsv").read_text().splitlines()]


def _part(directory: Path, name: str, budget: str, seconds: str, code: str) -> Part:
    tests, retried, failures = [], [], []
    if (junit := directory / f"{name}.xml").exists():
        for case in ElementTree.parse(junit).iter("testcase"):  # noqa: S314 # pytest's own
            where = case.get("classname", "").removeprefix("tests.").replace(".", "/")
            test = f"{where}.py::{case.get('name')}"
            tests.append((float(case.get("time", 0)), test))
            failures += [(test, end.get("message", "")) for end in case if end.tag in ("failure", "error")]
    if (again := directory / f"{name}.retried.txt").exists():
        retried = again.read_text().splitlines()
    return Part(name, float(budget), float(seconds), int(code), tuple(tests), tuple(retried), tuple(failures))


def lines(parts: list[Part], whole: float) -> list[str]:
    """What is printed."""
    found = [f"{'part':<28}{'tests':>6}{'seconds':>9}{'budget':>8}"]
    for part in parts:
        remark = "  FAILED" if part.code else "  over its budget" if part.seconds > part.budget else ""
        count = str(len(part.tests)) if part.tests else "-"
        found.append(f"{part.name:<28}{count:>6}{part.seconds:>9.0f}{part.budget:>8.0f}{remark}")
    remark = "  OVER ITS LIMIT" if whole > LIMIT_S else "  over its budget" if whole > BUDGET_S else ""
    found.append(f"{'the whole run':<28}{sum(len(part.tests) for part in parts):>6}{whole:>9.0f}{BUDGET_S:>8}{remark}")
    found.append(
        f"The budget is for a quiet machine of two cores ({BUDGET_S // 60} minutes, {LIMIT_S // 60} at most;"
        " some 400 us a program start).  Parts may run beside each other."
    )
    slowest = sorted((test for part in parts for test in part.tests), reverse=True)[:SLOWEST]
    found += ["", "the slowest tests, with what was set up for them:"]
    found += [f"{seconds:>8.1f} s  {name}" for seconds, name in slowest]
    if again := [line for part in parts for line in part.retried]:
        found += ["", f"tried a second time ({len(again)}, at most {RETRIES_MAX} may be):"]
        found += ["  " + line.replace("\t", ": ") for line in again]
    for test, reason in (failure for part in parts for failure in part.failures):
        found += ["", f"failed: {test}", *(f"    {line}" for line in reason.splitlines()[:REASON_LINES])]
    return found


def main(words: list[str]) -> int:
    """Prints the report; the exit code."""
    directory, whole = Path(words[0]), float(words[1])
    parts = read(directory)
    text = "\n".join([*lines(parts, whole), "", f"this machine now: {pace()}"])
    print(text)
    (directory / "report.txt").write_text(text + "\n")
    if sum(len(part.retried) for part in parts) > RETRIES_MAX:
        print(f"more than {RETRIES_MAX} tests were tried a second time: the run fails")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
