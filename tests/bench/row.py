"""One line of the benchmark: a figure beside its peer of the same run."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """``ratio`` is value over peer value, for figures that are no ratio themselves 0; ``target`` is for people."""

    name: str
    value: float
    unit: str
    peer: str
    peer_value: float
    ratio: float
    target: str


@dataclass(frozen=True, slots=True)
class Missing:
    """Figures that could not be measured, and why: nothing is printed in their place."""

    names: str
    why: str


Figure = Callable[[], Row | Iterable[Row]]


def measured(*figures: tuple[str, Figure]) -> Iterator[Row | Missing]:
    """The rows of each figure; where one fails the others go on."""
    for names, figure in figures:
        try:
            found = figure()
            rows = [found] if isinstance(found, Row) else list(found)
        except Exception as error:
            yield Missing(names, f"{type(error).__name__}: {error}")
        else:
            yield from rows


def median(values: Sequence[float]) -> float:
    """The middle."""
    return statistics.median(values)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed."""
    return sorted(values)[(len(values) - 1) * percent // 100]


def pairs(one: Callable[[], float], other: Callable[[], float], rounds: int = 7) -> tuple[float, float, float]:
    """Medians of both, measured in turn, and the median of the ratios pair by pair; a first round is not counted."""
    one(), other()
    measured = [(one(), other()) for _ in range(rounds)]
    return (
        median([a for a, _ in measured]),
        median([b for _, b in measured]),
        median([a / b for a, b in measured]),
    )
