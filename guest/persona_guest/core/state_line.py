"""Parses gate.state, which says how logins go on while no agent runs.  The PAM module reads it too (parse_state_line).

docs/protocol.md has its form.  It is read by ``persona-shell`` in a user's login: this imports next to nothing.
"""

from dataclasses import dataclass

SIZE_MAX = 511


@dataclass(frozen=True, slots=True)
class GateFile:
    """Mode and exemptions; ``break_glass`` is a group's name, or empty."""

    enforce: bool
    uid_min: int
    break_glass: str = ""


def parse(text: str, uid_min: int) -> GateFile:
    """What cannot be understood enforces, and has no break-glass group; ``uid_min`` where it names none."""
    values = {}
    for line in text.removesuffix("\n").split("\n") if text else ():
        key, equals, value = line.partition("=")
        if not equals or key not in ("mode", "uid_min", "break_glass"):
            return GateFile(True, uid_min)
        values[key] = value
    number = values.get("uid_min", str(uid_min))
    understood = number.isascii() and number.isdigit() and int(number[:11]) <= 0x7FFFFFFF
    if values.get("mode") not in ("enforce", "complain") or not understood:
        return GateFile(True, uid_min)
    return GateFile(values["mode"] == "enforce", int(number), values.get("break_glass", ""))
