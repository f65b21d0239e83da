"""Which accounts are root's and the system's, by their number alone: those are never gated.

The mirror of guest/include/accounts.h, by which the PAM module and the kernel layer go.
"""

import re

UID_MIN = 1000  # of login.defs(5) on Debian; settings.load() reads what the machine's own file says
NO_LOGIN = 0xFFFFFFFF  # the audit login uid of what no login started; no account has this number

# Debian Policy 9.2.2, "globally allocated by the Debian project", less what systemd-homed has for people
_SYSTEM = range(60514, 64999 + 1)
_NOBODY = (65534, 65535)  # 65535 is what -1 was when a uid had 16 bits


def is_root_or_system(uid: int, uid_min: int) -> bool:
    """Whether the account is root or a system account; every other number is a person's, however large."""
    return uid == 0 or uid < uid_min or uid in _SYSTEM or uid in _NOBODY


def is_person(uid: int | None, uid_min: int) -> bool:
    """Whether ``uid`` is an account that can log in and would be gated; ``None`` and ``NO_LOGIN`` are nobody's."""
    return uid is not None and 0 <= uid < NO_LOGIN and not is_root_or_system(uid, uid_min)


def uid_min_of(login_defs: bytes) -> int:
    """``UID_MIN`` of the text of login.defs(5); ``UID_MIN`` where it says nothing that can be used."""
    found = UID_MIN
    for line in login_defs.split(b"\n"):
        words = line.split()
        if len(words) >= 2 and words[0] == b"UID_MIN":
            found = _number(words[1])
    return found


_NUMBER = re.compile(rb"\+?(?:0[xX]([0-9a-fA-F]{1,16})|0([0-7]{1,24})|([0-9]|[1-9][0-9]{1,20}))")


def _number(text: bytes) -> int:
    """As strtoul(3) with base 0 reads it, which is what shadow uses; Python knows more ways to write a number."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return UID_MIN
    value = next(int(digits, base) for digits, base in zip(match.groups(), (16, 8, 10), strict=True) if digits)
    return value if value <= 0x7FFFFFFF else UID_MIN
