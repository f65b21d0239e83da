"""One table of identities: who is gated and who never is, whichever of the four parts is asked.

The PAM module, the agent, the kernel layer and the VM's health figures each have the rule in a form of
their own (C in sshd, Python, BPF, Python over journal entries); tests/test_identities.py and
tests/guest_vm/test_identities.py run this table through all of them.
"""

from typing import NamedTuple

UID_MIN = 1000  # what the table is for
BREAK_GLASS, BREAK_GLASS_GID = "persona-break-glass", 45_000  # the last of a list: the kernel keeps it in order
_FIRST_GID = {6: 1_001, 60: 20_001, 250: 30_001, 300: 40_001}  # by the length of the names


class Identity(NamedTuple):
    """An account: its number, how many groups it is in and how long their names are, and whether it breaks glass."""

    uid: int
    groups: int = 0
    name_bytes: int = 6
    break_glass: bool = False

    def gids(self) -> list[int]:
        """The numbers of all groups but the primary one."""
        first = _FIRST_GID[self.name_bytes]
        return [*range(first, first + self.groups), *([BREAK_GLASS_GID] if self.break_glass else [])]

    def group_names(self) -> dict[int, str]:
        """Each of exactly ``name_bytes``, but the break-glass group's."""
        return {
            gid: BREAK_GLASS if gid == BREAK_GLASS_GID else f"g{gid}".ljust(self.name_bytes, "x") for gid in self.gids()
        }


# root; below login.defs' UID_MIN; Debian Policy 9.2.2 less what systemd-homed has; nobody; -1 of 16 bits
NEVER_GATED = (0, 1, 2, 5, 33, 65, 100, 998, 999, 60514, 60515, 61184, 64000, 64055, 64999, 65534, 65535)
# local people; systemd-homed (60001-60513); 65000-65533; containers' ranges; directory users, up to the last number
GATED = (
    1000, 1001, 1002, 59999, 60000, 60001, 60513, 65000, 65519, 65533, 65536, 65537, 100_000, 165_536, 524_288,
    1_879_048_192, 892_600_500, 2_147_483_646, 2_147_483_647, 2_147_483_648, 4_294_967_293, 4_294_967_294,
)  # fmt: skip

TABLE: tuple[tuple[Identity, bool], ...] = (
    *((Identity(uid), False) for uid in NEVER_GATED),
    *((Identity(uid), True) for uid in GATED),
    # however many groups, and however long their names are: root, system accounts and break-glass members pass
    *((Identity(uid, groups), False) for uid in (0, 33, 64055, 65534) for groups in (127, 131, 1000)),
    *((Identity(1001, groups, break_glass=True), False) for groups in (0, 1, 126, 127, 128, 129, 130, 131, 1000, 5000)),
    (Identity(892_600_500, 1000, 60, break_glass=True), False),
    (Identity(1001, 40, 250, break_glass=True), False),  # more than 8 KiB of names
    (Identity(1001, 3, 300, break_glass=True), False),  # names that no packet holds
    # everybody else is gated, and not refused for it
    *((Identity(1001, groups), True) for groups in (1, 127, 128, 129, 130, 131, 1000, 5000)),
    (Identity(892_600_500, 1000, 60), True),
    (Identity(1001, 40, 250), True),
    (Identity(1001, 3, 300), True),
)
