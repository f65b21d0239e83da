"""Whether the chain is whole: each record's hash, the order, the numbers of guests, and what checkpoints say.

It is told of segments one after the other.  A record that is not what its hash says is one finding, and the walk goes
on from the hash that is written there: so one change is found once, and where it is.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.format import Stream, genesis
from persona_broker.audit.core.streams import Gap, Received

FINDINGS_MAX = 1000  # that are told one by one
_NEAR = 16  # records around one that is wrong, among which it is looked for
_MARKER = b'"event":"lost"'

# number, hash, salt and person's part, digest, what else is covered, guest, the stream's number there, counter
Link = tuple[int, bytes, bytes | None, bytes | None, bytes, str | None, int | None, int | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.  ``kind``: changed, reordered, cut, lost, conflict, checkpoint or broken."""

    kind: str
    text: str
    segment: str | None = None
    number: int | None = None
    vm: str | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """What a segment's file says of itself."""

    name: str
    chain: str
    previous: bytes  # the hash that its first record follows
    carried: str
    streams: dict[int, tuple[str, Stream]]


@dataclass(slots=True)
class Verification:
    """Tell it the segments in order, then ``finish``."""

    findings: list[Finding] = field(default_factory=list)
    records: int = 0
    erased: int = 0
    number: int = 0  # of the last record
    hash: bytes = b""
    chain: str = ""
    received: dict[tuple[str, Stream], Received] = field(default_factory=lambda: defaultdict(Received))
    wanted: dict[int, bytes] = field(default_factory=dict)  # what checkpoints say of numbers
    unseen: int = 0  # findings beyond FINDINGS_MAX
    _before: str = ""  # the segment before
    _last: bytes = b""  # what its last record says
    _found: dict[int, bytes] = field(default_factory=dict)
    _spans: list[tuple[int, int]] = field(default_factory=list)  # numbers that were looked at

    def note(
        self, kind: str, text: str, segment: str | None = None, number: int | None = None, vm: str | None = None
    ) -> None:
        """Adds a finding."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(kind, text, segment, number, vm))
        else:
            self.unseen += 1

    def begin(self, opening: Opening, first: int, pruned: Iterable[Checkpoint]) -> None:
        """A segment begins with the record ``first``; ``pruned`` are the checkpoints that stand for deleted ones."""
        name = f"{opening.name}.db"
        if not self.chain:
            self.chain = opening.chain
        elif opening.chain != self.chain:
            self.note("changed", f"it is of another chain, {opening.chain[:32]}", name)
        sealed = _facts(self._last)
        if self._before and sealed.get("event") != "segment_sealed":
            self.note("cut", "it is not sealed, and another segment follows", f"{self._before}.db", self.number)
        follows = self.number == first - 1 and bool(self._before or first == 1)
        if follows and self._before and sealed.get("next") != opening.name:
            self.note("reordered", f"{self._before}.db says that {sealed.get('next')}.db follows it", name)
        if follows:
            right = self.hash if self._before else genesis(opening.chain)
            if opening.previous != right:
                self.note("changed", "it does not follow the record before it", name, first)
        else:
            self._skip(opening, first, pruned, name)
        self._carry(opening, follows)
        self.number, self.hash = first - 1, opening.previous
        self._before, self._last = opening.name, b""

    def _skip(self, opening: Opening, first: int, pruned: Iterable[Checkpoint], name: str) -> None:
        """Records are missing before a segment: deleted by an operator, as a signed checkpoint says, or lost."""
        if first <= self.number:
            self.note("reordered", f"it begins with record {first}, and {self.number} was there before it", name, first)
            return
        needed = self.number + 1
        for checkpoint in sorted(pruned, key=lambda item: item.number):
            if checkpoint.pruned_from <= needed <= checkpoint.number < first:
                needed = checkpoint.number + 1
                if needed == first and bytes.fromhex(checkpoint.hash) != opening.previous:
                    self.note("changed", "it does not follow what was pruned before it", name, first)
        if needed < first:
            where = f"before {name}" if not self._before else f"between {self._before}.db and {name}"
            fact = "no signed checkpoint says that they were pruned"
            text = f"records {needed} to {first - 1} are not there, {where}; {fact}"
            self.note("cut", text, name, first)

    def _carry(self, opening: Opening, follows: bool) -> None:
        """What the file says that is known of streams counts where the chain before it is not there to tell."""
        try:
            known = json.loads(opening.carried)
            for guest, machine, boot, last, _conflicts, gaps in known:
                key = (str(guest), Stream(str(machine), str(boot)))
                if key not in self.received or not follows:
                    self.received[key] = Received(int(last), [Gap(int(a), int(b), str(why)) for a, b, why in gaps])
        except (ValueError, TypeError, RecursionError):
            self.note("changed", "what it says of streams cannot be read", f"{opening.name}.db")

    def walk(self, opening: Opening, links: Sequence[Link]) -> None:
        """The next records of the segment, in order."""
        if links and not self._last:
            self._opened(opening, links[0])
        sha256, wanted = hashlib.sha256, self.wanted
        previous, number = self.hash, self.number
        streams = {ident: self.received[key] for ident, key in opening.streams.items()}
        for index, (found, hashed, salted, digest, said, guest, stream, counter) in enumerate(links):
            number += 1
            if found != number:
                self._jump(opening, found, number)
                number = found
            try:
                inner = digest if salted is None else sha256(salted).digest()
                right = sha256(previous + inner + said).digest()  # type: ignore[operator]  # None: it is caught
            except TypeError:
                right = b""
            if right != hashed or (salted is not None and digest is not None):
                self._wrong(opening, links, index, previous)
            if salted is None:
                self.erased += 1
            previous = hashed if isinstance(hashed, bytes) else b""
            if number in wanted:
                self._found[number] = previous
            if stream is not None:
                received = streams.get(stream)
                if received is not None and counter == received.last + 1 and _MARKER not in said:
                    received.last = counter
                else:
                    self._count(opening, received, counter, said, number, guest)
        if links:
            self._spans.append((self.number + 1, number))
            self.records += len(links)
            self.number, self.hash, self._last = number, previous, links[-1][4]

    def _opened(self, opening: Opening, link: Link) -> None:
        """The first record of a segment says what its file must say."""
        said = _facts(link[4])
        known = hashlib.sha256(opening.carried.encode("utf-8", "surrogatepass")).hexdigest()
        right = {"event": "segment_opened", "segment": opening.name, "chain": opening.chain, "carried": known}
        wrong = [name for name, value in right.items() if said.get(name) != value]
        if wrong:
            text = f"its first record says another {', '.join(wrong)} than the file"
            self.note("changed", text, f"{opening.name}.db", link[0])

    def _jump(self, opening: Opening, found: int, number: int) -> None:
        text = (
            f"records {number} to {found - 1} are not there" if found > number + 1 else f"record {number} is not there"
        )
        self.note("cut", text, f"{opening.name}.db", number)

    def _wrong(self, opening: Opening, links: Sequence[Link], index: int, previous: bytes) -> None:
        """One record is not what its hash says: another's, from near by, or changed."""
        number, *_, said, guest, _stream, _counter = links[index]
        where = f"{opening.name}.db"
        if index and not _follows(links[index], links[index - 1][1]) and isinstance(said, bytes):
            tail = said.partition(b"\n")[2]
            near = links[max(0, index - _NEAR) : index + _NEAR]
            for other in near:
                moved = (*links[index][:4], b"%d\n%b" % (other[0], tail), *links[index][5:])
                if other[0] != number and any(_follows(moved, before[1]) for before in near):
                    self.note("reordered", f"record {other[0]} stands in its place", where, number, guest)
                    return
        self.note("changed", "it is not what its hash says", where, number, guest)

    def _count(
        self,
        opening: Opening,
        received: Received | None,
        counter: int | None,
        said: bytes,
        number: int,
        guest: str | None,
    ) -> None:
        if received is None or counter is None:
            self.note("changed", "it is of a stream that is not there", f"{opening.name}.db", number, guest)
            return
        facts = _facts(said)
        if "conflict_with" in facts:
            text = f"number {counter} came with two contents, also as record {facts['conflict_with']}"
            self.note("conflict", text, f"{opening.name}.db", number, guest)
            return
        if not received.add(counter):
            self.note("changed", f"number {counter} of its stream is there twice", f"{opening.name}.db", number, guest)
        marker = facts.get("lost") if facts.get("event") == "lost" else None
        if isinstance(marker, dict) and type(marker.get("first")) is type(marker.get("last")) is int:
            received.explain(marker["first"], marker["last"], str(marker.get("why")))

    def finish(self, checkpoints: Iterable[Checkpoint]) -> None:
        """All segments were told; ``checkpoints`` are those whose signatures are right."""
        sealed = _facts(self._last)
        if sealed.get("event") == "segment_sealed":
            why = "no broker has begun it yet, or it was removed"
            text = f"the chain goes on in {sealed.get('next')}.db, which is not there: {why}"
            self.note("cut", text, f"{self._before}.db", self.number)
        for checkpoint in sorted(set(checkpoints), key=lambda item: (item.number, item.at_us)):
            self._compare(checkpoint)
        for (guest, stream), received in sorted(self.received.items(), key=lambda item: item[0][0]):
            for gap in received.gaps:
                if not gap.why:
                    numbers = f"numbers {gap.first} to {gap.last}" if gap.count > 1 else f"number {gap.first}"
                    text = f"{numbers} of boot {stream.boot} of machine {stream.machine} never came"
                    self.note("lost", text, None, None, guest)

    def _compare(self, checkpoint: Checkpoint) -> None:
        number = checkpoint.number
        if checkpoint.chain != self.chain:
            self.note("checkpoint", f"a checkpoint is of another chain, {checkpoint.chain}", None, number)
        elif number > self.number:
            text = f"the chain ends with record {self.number}, and a checkpoint proves that there was a record {number}"
            self.note("cut", text, None, number)
        elif number in self._found:
            if self._found[number].hex() != checkpoint.hash:
                self.note("changed", f"record {number} had another hash when a checkpoint was made of it", None, number)
        elif any(first <= number <= last for first, last in self._spans):
            self.note("cut", f"a checkpoint proves that there was a record {number}", None, number)


def _follows(one: Link | tuple[Any, ...], previous: bytes) -> bool:
    _, hashed, salted, digest, said, *_ = one
    try:
        inner: Any = digest if salted is None else hashlib.sha256(salted).digest()
        return bool(hashlib.sha256(previous + inner + said).digest() == hashed)
    except TypeError:
        return False


def _facts(said: bytes) -> dict[str, Any]:
    try:
        value = json.loads(said.split(b"\n", 6)[6])
    except (ValueError, RecursionError, IndexError):
        return {}
    return value if isinstance(value, dict) else {}
