"""Whether the chain is whole: the order of its segments, the numbers of guests, and what checkpoints say.

It is told of segments one after the other, and of what ``check`` found in their records.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from persona_broker.audit.core.check import FINDINGS_MAX, Checked, Finding, Told, read_facts
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.core.format import Stream, genesis
from persona_broker.audit.core.loss import Loss
from persona_broker.audit.core.loss import read as read_loss
from persona_broker.audit.core.streams import Gap, Received


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
    """``begin`` and ``take`` for each segment in order, then ``finish``."""

    findings: list[Finding] = field(default_factory=list)
    records: int = 0
    erased: int = 0
    number: int = 0  # of the last record
    hash: bytes = b""
    chain: str = ""
    received: dict[tuple[str, Stream], Received] = field(default_factory=lambda: defaultdict(Received))
    unseen: int = 0  # findings beyond FINDINGS_MAX
    losses: list[Loss] = field(default_factory=list)  # as records say, whether or not their signatures are right
    acknowledged: dict[Loss, int] = field(default_factory=dict)  # how many checkpoints each explains
    _before: str = ""  # the segment before
    _last: str = ""  # what its last record says
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
        sealed = read_facts(self._last)
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
        self._before, self._last = opening.name, ""

    def _skip(self, opening: Opening, first: int, pruned: Iterable[Checkpoint], name: str) -> None:
        """Records are missing before a segment: deleted by an operator, as a signed checkpoint says, or lost."""
        if first <= self.number:
            self.note("reordered", f"it begins with record {first}, and {self.number} was there before it", name, first)
            return
        needed = self.number + 1
        for checkpoint in sorted(pruned, key=lambda item: item.number):
            if checkpoint.chain == self.chain and checkpoint.pruned_from <= needed <= checkpoint.number < first:
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

    def take(self, opening: Opening, checked: Checked) -> None:
        """The next records of the segment, in order, which ``check`` has looked at."""
        if not self._last:
            self._opened(opening, checked)
        for finding in checked.findings:
            self.note(finding.kind, finding.text, finding.segment, finding.number, finding.vm)
        self.unseen += checked.unseen
        self.erased += checked.erased
        self.records += checked.records
        self._found |= checked.wanted
        self._spans.append((self.number + 1, checked.number))
        for number, facts in checked.losses:
            loss = read_loss(number, read_facts(facts))
            if loss is not None:
                self.losses.append(loss)
            else:
                text = "it acknowledges a loss, and cannot be read"
                self.note("changed", text, f"{opening.name}.db", number)
        for told in checked.told:
            key = opening.streams.get(told.stream)
            if key is not None:  # else each of its records was found already
                self._count(f"{opening.name}.db", self.received[key], told)
        self.number, self.hash, self._last = checked.number, checked.hash, checked.last_facts

    def _opened(self, opening: Opening, checked: Checked) -> None:
        """The first record of a segment says what its file must say."""
        said = read_facts(checked.first_facts)
        known = hashlib.sha256(opening.carried.encode("utf-8", "surrogatepass")).hexdigest()
        right = {"event": "segment_opened", "segment": opening.name, "chain": opening.chain, "carried": known}
        wrong = [name for name, value in right.items() if said.get(name) != value]
        if wrong:
            text = f"its first record says another {', '.join(wrong)} than the file"
            self.note("changed", text, f"{opening.name}.db", self.number + 1)

    def _count(self, where: str, received: Received, told: Told) -> None:
        if told.first == received.last + 1 and not told.facts:
            received.last = told.last
            return
        facts = read_facts(told.facts) if told.facts else {}
        if "conflict_with" in facts:
            text = f"number {told.first} came with two contents, also as record {facts['conflict_with']}"
            self.note("conflict", text, where, told.number, told.guest)
            return
        for counter in range(told.first, told.last + 1):
            if not received.add(counter):
                self.note("changed", f"number {counter} of its stream is there twice", where, told.number, told.guest)
        marker = facts.get("lost") if facts.get("event") == "lost" else None
        if isinstance(marker, dict) and type(marker.get("first")) is type(marker.get("last")) is int:
            received.explain(marker["first"], marker["last"], str(marker.get("why")))

    def finish(self, checkpoints: Iterable[Checkpoint], losses: Iterable[Loss] = ()) -> None:
        """All segments were told; ``checkpoints`` and ``losses`` are those whose signatures are right."""
        self.acknowledged = dict.fromkeys(losses, 0)
        sealed = read_facts(self._last)
        if sealed.get("event") == "segment_sealed":
            why = "no broker has begun it yet, or it was removed"
            text = f"the chain goes on in {sealed.get('next')}.db, which is not there: {why}"
            self.note("cut", text, f"{self._before}.db", self.number)
        hashes: dict[tuple[str, int], str] = {}
        for checkpoint in sorted(set(checkpoints), key=lambda item: (item.number, item.at_us)):
            self._compare(checkpoint)
            number = checkpoint.number
            first = hashes.setdefault((checkpoint.chain, number), checkpoint.hash)
            if first != checkpoint.hash and not (checkpoint.chain == self.chain and number in self._found):
                text = f"two checkpoints say different hashes of record {number}, which is not there to tell"
                self.note("changed", text, None, number)
        for (guest, stream), received in sorted(self.received.items(), key=lambda item: item[0][0]):
            for gap in received.gaps:
                if not gap.why:
                    numbers = f"numbers {gap.first} to {gap.last}" if gap.count > 1 else f"number {gap.first}"
                    text = f"{numbers} of boot {stream.boot} of machine {stream.machine} never came"
                    self.note("lost", text, None, None, guest)

    def _compare(self, checkpoint: Checkpoint) -> None:
        number = checkpoint.number
        explains = [loss for loss in self.acknowledged if loss.covers(checkpoint.chain, number)]
        if checkpoint.chain != self.chain and explains:
            self.acknowledged[explains[0]] += 1
        elif checkpoint.chain != self.chain:
            self.note("checkpoint", f"a checkpoint is of another chain, {checkpoint.chain}", None, number)
        elif number > self.number:
            text = f"the chain ends with record {self.number}, and a checkpoint proves that there was a record {number}"
            self.note("cut", text, None, number)
        elif number in self._found:
            if self._found[number].hex() != checkpoint.hash:
                self.note("changed", f"record {number} had another hash when a checkpoint was made of it", None, number)
        elif any(first <= number <= last for first, last in self._spans):
            self.note("cut", f"a checkpoint proves that there was a record {number}", None, number)
