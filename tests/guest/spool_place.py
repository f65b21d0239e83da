"""The spool of one machine, over agents and boots, and what comes out of it."""

from pathlib import Path
from typing import Any

from persona_guest.audit.spool import MIB, Spool

from persona.record_codec import Record

BOOT = "b" * 32


def record(at: float, user: str = "u", *, granted: bool = False, text: str = "") -> Record:
    decision = "granted" if granted else "denied"
    return Record(at, "s", user, "/bin/x", (text,), decision, None, None, None, None, "exec", False, False)


class Place:
    """Where the spool of one machine is; ``begin`` is what a new agent does."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.counter = directory / "spool", directory / "run" / "numbers"
        self.machine_id = directory / "machine-id"
        self.machine_id.write_text("0" * 31 + "1\n")
        self.clock = 0.0
        self._open: list[Spool] = []

    def begin(self, bound: int = 4 * MIB, boot: str = BOOT) -> Spool:
        spool = Spool(
            self.directory, self.counter, bound, machine_id=self.machine_id, boot=boot, clock=lambda: self.clock
        )
        spool.open()
        self._open.append(spool)
        return spool

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def segment(self) -> Path:
        """The only file with records, or the newest."""
        return sorted(self.directory.glob("*.records"))[-1]

    def close(self) -> None:
        for spool in self._open:
            spool.close()


def take(spool: Spool) -> list[dict[str, Any]]:
    """All that waits, as the broker gets it, in order."""
    found: list[dict[str, Any]] = []
    while (batch := spool.batch(7, 100_000)) is not None:
        found += [{**entry.value, "stream": batch.stream} for entry in batch.entries]
        spool.sent(batch)
    return found


def numbers(found: list[dict[str, Any]]) -> list[int]:
    return [one["number"] for one in found]


def whole(found: list[dict[str, Any]]) -> set[int]:
    """The numbers that are there or that a marker explains; each number once, and markers of nothing that is there."""
    there = numbers(found)
    assert len(set(there)) == len(there)
    explained = [n for one in found if "lost" in one for n in range(one["lost"]["first"], one["lost"]["last"] + 1)]
    assert len(set(explained)) == len(explained)
    assert not set(explained) & set(there)
    return {*there, *explained}
