"""``make bench``: every figure beside its peer, a table and build/bench.json.  Needs root.

Arguments pick parts: ``gate``, ``decide``, ``net``, ``guest``.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.bench import decide, gate, guest, net

PARTS = {"gate": gate.rows, "decide": decide.rows, "net": net.rows, "guest": guest.rows}
OUTPUT = Path(__file__).parents[2] / "build" / "bench.json"


def main(words: list[str]) -> int:
    """Runs the parts and prints as they come."""
    rows = []
    print(f"{'name':<24}{'value':>12} {'unit':<5}{'peer':<20}{'peer value':>12}{'ratio':>8}  must")
    for name in words or list(PARTS):
        for row in PARTS[name]():
            rows.append(row)
            print(
                f"{row.name:<24}{row.value:>12.4g} {row.unit:<5}{row.peer:<20}{row.peer_value:>12.4g}"
                f"{row.ratio:>8.3f}  {row.target}",
                flush=True,
            )
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
