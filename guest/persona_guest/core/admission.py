"""Who is gated at all, before any policy is asked."""

from enum import StrEnum

from persona_guest.settings import Gate


class Exemption(StrEnum):
    """Why a login is never gated."""

    ROOT = "root"
    SYSTEM_USER = "system_user"
    BREAK_GLASS = "break_glass"


def exemption(uid: int, groups: tuple[str, ...], gate: Gate) -> Exemption | None:
    """root's own logins, system users and the break-glass group; ``None`` = gated like anyone."""
    if uid == 0 and gate.never_gate_root:
        return Exemption.ROOT
    if uid != 0 and uid < gate.uid_min:
        return Exemption.SYSTEM_USER
    if gate.break_glass_group in groups:
        return Exemption.BREAK_GLASS
    return None
