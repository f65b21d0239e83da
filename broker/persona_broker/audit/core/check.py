"""Whether records are what their hashes say, in blocks that can be looked at apart from each other.

A record that is not is one finding, and the look goes on from the hash that is written there: so one change is found
once, and where it is; and a block needs only the hash that is written before it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from persona_broker.audit.core.format import SALT_BYTES
from persona_broker.audit.core.loss import EVENT

FINDINGS_MAX = 1000  # that are told one by one
_NEAR = 16  # records around one that is wrong, among which it is looked for
_MARKERS = ('"event":"lost"', '"conflict_with":')  # no text within a string reads so: its quotes are escaped
_LOSS = f'"event":"{EVENT}"'
_UNUSUAL = tuple(marker.encode() for marker in (*_MARKERS, _LOSS))

# number, at_us, guest, stream, counter, facts, person, salt, digest, hash: as the file has them, whatever that is
Link = tuple[int, Any, Any, Any, Any, Any, Any, Any, Any, Any]


# at_us, guest, stream, counter, facts, salt and person in one, digest, hash, in a row without gaps; text as bytes.
# The reader has checked that text is text, and that a record that is not erased has a salt of SALT_BYTES.
Bare = tuple[Any, Any, Any, Any, Any, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.  ``kind``: changed, reordered, cut, lost, conflict, checkpoint or broken."""

    kind: str
    text: str
    segment: str | None = None
    number: int | None = None
    vm: str | None = None


@dataclass(slots=True)
class Told:
    """Numbers ``first`` to ``last`` of a stream, which came one after the other.

    ``facts`` are of a record that says more of numbers (a marker, a conflict), ``number`` and ``guest`` its own.
    """

    stream: int
    first: int
    last: int
    number: int
    guest: str | None
    facts: str = ""


@dataclass(slots=True)
class Checked:
    """What is known of a block: ``number`` and ``hash`` are of its last record, ``wanted`` are hashes by number."""

    number: int
    hash: bytes
    records: int = 0
    erased: int = 0
    findings: list[Finding] = field(default_factory=list)
    unseen: int = 0  # findings beyond FINDINGS_MAX
    wanted: dict[int, bytes] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    first_facts: str = ""
    last_facts: str = ""
    losses: list[tuple[int, str]] = field(default_factory=list)  # number and facts of records that acknowledge one

    def note(self, kind: str, text: str, segment: str, number: int, guest: Any = None) -> None:
        """Adds a finding."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(kind, text, segment, number, guest if isinstance(guest, str) else None))
        else:
            self.unseen += 1


def check(
    where: str,
    links: Sequence[Link],
    streams: Mapping[Any, str],
    previous: bytes,
    number: int,
    wanted: frozenset[int] = frozenset(),
) -> Checked:
    """Looks at records that follow the one of this ``number``, whose hash is ``previous``.

    ``where`` is the file's name; ``streams`` has by the number of a stream its machine and boot, with a line break
    between them, and only a line break for ``None``.
    """
    found = Checked(number, previous, len(links))
    sha256 = hashlib.sha256
    runs: dict[Any, Told] = {}
    for index, (there, at_us, guest, stream, counter, facts, person, salt, digest, hashed) in enumerate(links):
        number += 1
        if there != number:
            gone = f"records {number} to {there - 1} are" if there > number + 1 else f"record {number} is"
            found.note("cut", f"{gone} not there", where, number)
            number = there
        try:
            counted = "" if counter is None else counter
            said = f"{number}\n{at_us}\n{guest or ''}\n{streams[stream]}\n{counted}\n{facts}".encode()
            inner = digest if person is None else _inner(salt, person)
            right = sha256(previous + inner + said).digest()
        except (TypeError, AttributeError, KeyError, ValueError):  # what no broker writes
            right = b""
        if right != hashed or guest == "" or (person is not None and digest is not None):
            _wrong(found, where, links, index, streams, previous)
        if person is None:
            found.erased += 1
        previous = hashed if isinstance(hashed, bytes) else b""
        if number in wanted:
            found.wanted[number] = previous
        if stream is not None and type(counter) is int and isinstance(facts, str):
            run = runs.get(stream)
            if run is not None and counter == run.last + 1 and _MARKERS[0] not in facts and _MARKERS[1] not in facts:
                run.last = counter
            else:
                run = Told(stream, counter, counter, number, guest if isinstance(guest, str) else None)
                if any(marker in facts for marker in _MARKERS):
                    run.facts = facts
                    runs.pop(stream, None)
                else:
                    runs[stream] = run
                found.told.append(run)
        elif guest is None and isinstance(facts, str) and _LOSS in facts:
            found.losses.append((number, facts))
    found.number, found.hash = number, previous
    if links:
        texts = [item[5] if isinstance(item[5], str) else "" for item in (links[0], links[-1])]
        found.first_facts, found.last_facts = texts
    return found


def check_quickly(
    rows: Sequence[Bare],
    streams: Mapping[Any, bytes],
    previous: bytes,
    number: int,
    wanted: frozenset[int] = frozenset(),
) -> Checked | None:
    """The same as ``check`` where nothing is wrong or unusual, for less time; ``None`` = only ``check`` can tell.

    Arguments as there, ``streams`` in bytes.  Each statement here costs, since it is run for every record.
    """
    try:
        return _check_quickly(rows, streams, previous, number, wanted)
    except (TypeError, KeyError, ValueError):  # what no broker writes
        return None


def _check_quickly(
    rows: Sequence[Bare], streams: Mapping[Any, bytes], previous: bytes, number: int, wanted: frozenset[int]
) -> Checked | None:
    found = Checked(number, previous, len(rows))
    sha256 = hashlib.sha256
    runs: dict[int, Told] = {}
    at = vm = of = None
    head, due = b"", 0  # what such records have in common, and the number that is the next of their stream
    first = number + 1
    for at_us, guest, stream, counter, facts, salted, digest, hashed in rows:
        number += 1
        if at_us != at or stream != of or guest != vm or not head:
            if type(at_us) is not int or guest == b"":
                return None
            if of is not None:
                runs[of].last = due - 1
            at, of, vm = at_us, stream, guest
            head = b"\n%d\n%b\n%b\n" % (at_us, guest or b"", streams[stream])
            if stream is not None:
                if stream not in runs:
                    if type(counter) is not int:
                        return None
                    runs[stream] = Told(stream, counter, counter - 1, number, guest.decode() if guest else None)
                due = runs[stream].last + 1
        if digest is None:
            digest = sha256(salted).digest()
        else:
            found.erased += 1
        if counter == due and stream is not None:
            previous = sha256(b"%b%b%d%b%d\n%b" % (previous, digest, number, head, counter, facts)).digest()
            due += 1
        elif counter is None and stream is None:
            previous = sha256(b"%b%b%d%b\n%b" % (previous, digest, number, head, facts)).digest()
        else:
            return None
        if previous != hashed:
            return None
    if of is not None:
        runs[of].last = due - 1
    every = b"\n".join([row[4] for row in rows])
    if any(marker in every for marker in _UNUSUAL):
        return None
    found.told = list(runs.values())
    found.number, found.hash = number, previous
    found.wanted = {one: rows[one - first][-1] for one in wanted if first <= one <= number}
    if rows:
        found.first_facts, found.last_facts = rows[0][4].decode(), rows[-1][4].decode()
    return found


def _wrong(
    found: Checked, where: str, links: Sequence[Link], index: int, streams: Mapping[Any, str], previous: bytes
) -> None:
    """One record is not what its hash says: another's, from near by, or changed."""
    number, _, guest, *_ = links[index]
    near = links[max(0, index - _NEAR) : index + _NEAR]
    for other in near if not _follows(links[index], number, previous, streams) else ():
        if other[0] != number and any(_follows(links[index], other[0], before[9], streams) for before in near):
            found.note("reordered", f"record {other[0]} stands in its place", where, number, guest)
            return
    found.note("changed", "it is not what its hash says", where, number, guest)


def _follows(link: Link, number: int, previous: Any, streams: Mapping[Any, str]) -> bool:
    """Whether a record would be right with this number, after this hash."""
    _, at_us, guest, stream, counter, facts, person, salt, digest, hashed = link
    try:
        counted = "" if counter is None else counter
        said = f"{number}\n{at_us}\n{guest or ''}\n{streams[stream]}\n{counted}\n{facts}".encode()
        inner = digest if person is None else _inner(salt, person)
        return bool(hashlib.sha256(previous + inner + said).digest() == hashed)
    except (TypeError, AttributeError, KeyError, ValueError):
        return False


def _inner(salt: bytes, person: str) -> bytes:
    """The digest of a person's part.  Raises ``ValueError`` for a salt of another length.

    The digest is over both in one: without a look at the length, text could be moved from the part into its salt.
    """
    if len(salt) != SALT_BYTES:
        raise ValueError("the salt has another length")
    return hashlib.sha256(salt + person.encode()).digest()


def read_facts(facts: str) -> dict[str, Any]:
    """The facts of a record, empty where they are none."""
    try:
        value = json.loads(facts)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
