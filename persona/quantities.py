"""Amounts as people write them: ``150%``, ``2GiB``, ``50MB``."""

import re
from collections.abc import Callable
from typing import Any

from persona.parsing import Bad

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B|)", re.ASCII)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_BYTES_MAX = 1 << 60
_CORES_MAX = 64  # without a percent sign: more of them, and it was forgotten


def parse_bytes(value: Any) -> int:
    """Bytes: a number, or with a unit; KiB, MiB, ... and bare K, M, ... are powers of 1024, KB, MB, ... of 1000."""
    if type(value) is int and 0 < value < _BYTES_MAX:
        return value
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise Bad(f"expected an amount of bytes, not {value!r}", "like 2GiB, 512MiB or 50MB")
    amount, prefix, suffix = match.groups()
    size = int(float(amount) * (1000 if suffix == "B" and prefix else 1024) ** _POWER[prefix])
    if not 0 < size < _BYTES_MAX:
        raise Bad(f"{value!r} is out of range")
    return size


def bytes_from(least: int) -> Callable[[Any], int]:
    """``parse_bytes`` for what makes no sense below ``least``: most likely a unit was forgotten."""

    def parse(value: Any) -> int:
        size = parse_bytes(value)
        if size < least:
            raise Bad(f"{value!r} is out of range: at least {least} bytes", "write the unit: 512MiB, not 512")
        return size

    return parse


def parse_cpu(value: Any) -> float:
    """CPU in percent of one core: ``"150%"`` or cores, ``1.5`` and ``"1.5"``, both 150.0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", str(value).strip(), re.ASCII)
    if type(value) not in (int, float, str) or match is None:
        raise Bad(f"expected an amount of CPU, not {value!r}", 'like "150%" or 1.5 (cores)')
    if not match[2] and float(match[1]) > _CORES_MAX:
        raise Bad(f"{value!r} is out of range: at most {_CORES_MAX} cores", f'for percent of one core "{match[1]}%"')
    number = float(match[1]) * (1 if match[2] else 100)
    if not 1 <= number <= 102_400:
        raise Bad(f"{value!r} is out of range: 1 % of a core to 1024 cores")
    return number
