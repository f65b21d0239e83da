"""Amounts as people write them: ``150%``, ``2GiB``, ``50MB``."""

import re
from collections.abc import Callable
from typing import Any

from persona.guesses import bytes_meant, cpu_meant
from persona.parsing import Bad, shown

# No leading zero: some languages read 0256 as octal, and nobody can tell what its writer meant.
NUMBER = r"(?:0|[1-9]\d{0,29})(?:\.\d{1,30})?"
_BYTES = re.compile(rf"({NUMBER})\s*([KMGT]?)(i?B|)", re.ASCII)
_CPU = re.compile(rf"({NUMBER})\s*(%?)", re.ASCII)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_BYTES_MAX = 1 << 60
_CORES_MAX = 64  # without a percent sign: more of them, and it was forgotten


def parse_bytes(value: Any) -> int:
    """Bytes: a number, or with a unit; KiB, MiB, ... and bare K, M, ... are powers of 1024, KB, MB, ... of 1000."""
    if type(value) is int and 0 < value < _BYTES_MAX:
        return value
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise Bad(f"expected an amount of bytes, not {shown(value)}", bytes_meant(value))
    amount, prefix, suffix = match.groups()
    size = float(amount) * (1000 if suffix == "B" and prefix else 1024) ** _POWER[prefix]
    if not 1 <= size < _BYTES_MAX:  # before int(): enough digits are infinity
        raise Bad(f"{shown(value)} is out of range", bytes_meant(value))
    return int(size)


def bytes_from(least: int) -> Callable[[Any], int]:
    """``parse_bytes`` for what makes no sense below ``least``: most likely a unit was forgotten."""

    def parse(value: Any) -> int:
        size = parse_bytes(value)
        if size < least:
            raise Bad(f"{shown(value)} is out of range: at least {least} bytes", "write the unit: 512MiB, not 512")
        return size

    return parse


def parse_cpu(value: Any) -> float:
    """CPU in percent of one core: ``"150%"`` or cores, ``1.5`` and ``"1.5"``, both 150.0."""
    plain = type(value) is str or (type(value) in (int, float) and 0 <= value < 1e15)
    match = _CPU.fullmatch(str(value).strip()) if plain else None
    if match is None:
        raise Bad(f"expected an amount of CPU, not {shown(value)}", cpu_meant(value))
    if not match[2] and float(match[1]) > _CORES_MAX:
        fix = f'for percent of one core "{match[1]}%"'
        raise Bad(f"{shown(value)} is out of range: at most {_CORES_MAX} cores", fix)
    number = float(match[1]) * (1 if match[2] else 100)
    if not 1 <= number <= 102_400:
        fix = "" if number else "for no limit leave the field away"
        raise Bad(f"{shown(value)} is out of range: 1 % of a core to 1024 cores", fix)
    return number
