"""An acknowledged loss: an operator says that an earlier chain is gone, as a signed record of the chain that follows.

Without it every checkpoint of the earlier chain contradicts this one for ever, and hides what is new among them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EVENT = "audit_loss_acknowledged"


@dataclass(frozen=True, slots=True)
class Loss:
    """The chain ``lost`` is gone, up to the record ``through``, which had this hash; checkpoints beyond still count.

    ``at`` in Unix seconds; ``number`` is that of the record which says so, 0 where it is not known yet.
    """

    lost: str
    through: int
    hash: str
    at: float
    author: str
    key: str
    signature: str = ""
    number: int = 0

    def signed(self, chain: str) -> bytes:
        """The bytes that the signature is over, for a record of this chain."""
        fields = (chain, self.lost, self.through, self.hash, f"{self.at:.6f}", self.author, self.key)
        return "\n".join(("persona audit loss 1", *map(str, fields), "")).encode("utf-8", "surrogatepass")

    def covers(self, chain: str, number: int) -> bool:
        """Whether a checkpoint of that chain and number is among what was acknowledged."""
        return chain == self.lost and number <= self.through

    def members(self) -> dict[str, Any]:
        """What the record has besides ``event``, ``at`` and the message."""
        return {
            "author": self.author,
            "lost_chain": self.lost,
            "through": self.through,
            "hash": self.hash,
            "key": self.key,
            "signature": self.signature,
        }


def read(number: int, facts: Mapping[str, Any]) -> Loss | None:
    """The loss that a record tells of; ``None`` where it cannot be read as one."""
    kinds = {"lost_chain": str, "through": int, "hash": str, "author": str, "key": str, "signature": str, "at": float}
    if any(type(facts.get(name)) is not kind for name, kind in kinds.items()):
        return None
    if not re.fullmatch("[0-9a-f]{128}", facts["signature"]):
        return None
    values = (facts["lost_chain"], facts["through"], facts["hash"], facts["at"], facts["author"], facts["key"])
    return Loss(*values, facts["signature"], number)
