"""What the machine itself takes, told beside every figure: the same kind of machine is twice as slow on another day."""

import os
import statistics
import time
from dataclasses import dataclass

from tests.bench.child import forked

SPAWNS, TRIPS, GOES = 60, 500, 3


@dataclass(frozen=True, slots=True)
class Pace:
    """Microseconds for a start of ``/bin/true``, and for a byte to another process and back."""

    spawn_us: float
    ping_pong_us: float

    def __str__(self) -> str:
        return f"{self.spawn_us:.0f} us a program start, {self.ping_pong_us:.0f} us to another process and back"


def pace() -> Pace:
    """Measured now; takes a tenth of a second."""
    return Pace(
        statistics.median(_spawn() for _ in range(GOES)) * 1e6,
        statistics.median(_ping_pong() for _ in range(GOES)) * 1e6,
    )


def _spawn() -> float:
    began = time.perf_counter()
    for _ in range(SPAWNS):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    return (time.perf_counter() - began) / SPAWNS


def _ping_pong() -> float:
    there, back = os.pipe(), os.pipe()

    def echo() -> None:
        os.close(there[1])
        while byte := os.read(there[0], 1):
            os.write(back[1], byte)

    try:
        with forked(echo):
            began = time.perf_counter()
            for _ in range(TRIPS):
                os.write(there[1], b"x")
                os.read(back[0], 1)
            return (time.perf_counter() - began) / TRIPS
    finally:
        for fd in (*there, *back):
            os.close(fd)
