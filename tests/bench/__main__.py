"""``make bench``: every figure beside its peer, a table and build/bench.json.  Needs root.

Arguments pick parts: ``gate``, ``decide``, ``store``, ``audit``, ``host``, ``net``, ``guest``.  Beside each figure
stands what the machine itself took just then (``machine.Pace``).  A figure that could not be measured is named with the
reason, and the exit code is 1.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from tests.bench import audit, decide, gate, guest, host, net, store
from tests.bench.machine import pace
from tests.bench.row import Missing, Row, measured

PARTS: dict[str, Callable[[], Iterator[Row | Missing]]] = {
    "gate": gate.rows,
    "decide": decide.rows,
    "store": store.rows,
    "audit": audit.rows,
    "host": host.rows,
    "net": lambda: measured(("net.*", net.rows)),
    "guest": guest.rows,
}
OUTPUT = Path(__file__).parents[2] / "build" / "bench.json"


def main(words: list[str]) -> int:
    """Runs the parts and prints as they come."""
    figures: list[dict[str, object]] = []
    missing: list[Missing] = []
    print(
        f"{'name':<24}{'value':>12} {'unit':<5}{'peer':<20}{'peer value':>12}{'ratio':>8}"
        f"{'spawn us':>10}{'ping us':>9}  must"
    )
    for name in words or list(PARTS):
        for row in _until_broken(name):
            if isinstance(row, Missing):
                missing.append(row)
                print(f"{row.names}: not measured: {row.why}", flush=True)
                continue
            now = pace()
            figures.append({**asdict(row), **asdict(now)})
            print(
                f"{row.name:<24}{row.value:>12.4g} {row.unit:<5}{row.peer:<20}{row.peer_value:>12.4g}"
                f"{row.ratio:>8.3f}{now.spawn_us:>10.0f}{now.ping_pong_us:>9.1f}  {row.target}",
                flush=True,
            )
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if missing else 0


def _until_broken(name: str) -> Iterator[Row | Missing]:
    """A part's rows; where what they all need fails, the rest of them is missing."""
    try:
        yield from PARTS[name]()
    except Exception as error:
        yield Missing(f"the rest of {name}", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
