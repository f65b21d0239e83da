"""Checkpoints: what is signed of the chain, and how one travels as JSON."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KINDS = {"chain": str, "number": int, "hash": str, "at_us": int, "pruned_from": int, "key": str, "signature": str}
_HEX = {"hash": 64, "signature": 128, "key": 16, "chain": 32}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """At ``at_us`` (Unix microseconds) the record ``number`` had this hash.

    ``pruned_from``: it also stands for the records from there to ``number``, which an operator deleted; else 0.
    ``key`` is the id of the key, ``hash`` and ``signature`` are hexadecimal.
    """

    chain: str
    number: int
    hash: str
    at_us: int
    pruned_from: int
    key: str
    signature: str = ""

    def signed(self) -> bytes:
        """The bytes that the signature is over."""
        fields = (self.chain, self.number, self.hash, self.at_us, self.pruned_from, self.key)
        return "\n".join(("persona audit checkpoint 1", *map(str, fields), "")).encode()

    def to_mapping(self) -> dict[str, Any]:
        """CHECKPOINT of docs/audit.md."""
        return {name: getattr(self, name) for name in KINDS}


class CheckpointError(ValueError):
    """A text that cannot be read as a checkpoint; the message says what is wrong with it."""


def parse(value: object) -> Checkpoint:
    """Raises ``CheckpointError``."""
    if not isinstance(value, dict) or set(value) != set(KINDS):
        raise CheckpointError(f"expected an object with {', '.join(KINDS)}")
    for name, kind in KINDS.items():
        if type(value[name]) is not kind:
            raise CheckpointError(f"{name}: expected {kind.__name__}")
    for name, digits in _HEX.items():
        if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value[name]):
            raise CheckpointError(f"{name}: expected {digits} hexadecimal digits")
    if not 0 < value["number"] < 1 << 62 or not 0 <= value["pruned_from"] <= value["number"]:
        raise CheckpointError("number, pruned_from: not possible")
    return Checkpoint(**value)


def read_lines(text: str) -> Iterator[Checkpoint]:
    """The checkpoints in a file of JSON lines, also of one that a sink wrote: each is an object, or its ``checkpoint``.

    Raises ``CheckpointError`` for a line that is no JSON, or a checkpoint that cannot be read; other lines are skipped.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise CheckpointError(f"line {number}: not JSON") from None
        found = value.get("checkpoint", value) if isinstance(value, dict) else None
        if isinstance(found, dict) and "signature" in found:
            try:
                yield parse(found)
            except CheckpointError as error:
                raise CheckpointError(f"line {number}: {error}") from None
