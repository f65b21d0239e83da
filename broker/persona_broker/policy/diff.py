"""What applying a set of documents would change: the same answer for a dry run and for the real one."""

from collections.abc import Sequence
from dataclasses import dataclass

Identity = tuple[str, str, str]  # kind, name, digest of the content


@dataclass(frozen=True, slots=True)
class Changes:
    """By kind and name; ``reordered`` where policies that stay come in another order.  False where nothing changes."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    reordered: bool

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed or self.reordered)


def compare(before: Sequence[Identity], after: Sequence[Identity]) -> Changes:
    """From one set to another."""
    old, new = ({f"{kind} {name}": key for kind, name, key in items} for items in (before, after))
    return Changes(
        tuple(name for name in new if name not in old),
        tuple(name for name in new if name in old and old[name] != new[name]),
        tuple(name for name in old if name not in new),
        reordered=in_another_order(*([name for name in side if name.startswith("Policy ")] for side in (old, new))),
    )


def in_another_order(before: Sequence[str], after: Sequence[str]) -> bool:
    """Whether those names that are in both come in another order."""
    first, second = set(before), set(after)
    return [name for name in before if name in second] != [name for name in after if name in first]
