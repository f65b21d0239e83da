"""The fields of JSON values that come from outside: right in type and size, or refused with the field's path.

``json.loads`` and the bound of bytes before it are the caller's.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from persona.problems import AnyReason, Fault, PersonaError, Reason, UnknownReason

NAME_MAX, PATH_MAX, HELP_MAX, TAG_MAX = 256, 4096, 2000, 64  # characters
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

T = TypeVar("T")


class CodecError(PersonaError):
    """A value that is not what the protocol says; the message begins with the field's path."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(Fault.BAD_REQUEST, f"{path or 'body'}: {message}")


def mapping(value: object, path: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """A JSON object with these fields and no others.  Raises ``CodecError``."""
    if not isinstance(value, dict):
        raise CodecError(path, "expected an object")
    for name in required:
        if name not in value:
            raise CodecError(join(path, name), "missing")
    for name in value:
        if name not in required and name not in optional:
            raise CodecError(join(path, str(name)[:64]), "unknown field")
    return value


def known(value: object, path: str, required: tuple[str, ...]) -> Mapping[str, Any]:
    """A JSON object with at least these fields; a newer sender may say more.  Raises ``CodecError``."""
    if not isinstance(value, dict):
        raise CodecError(path, "expected an object")
    return mapping({name: value[name] for name in required if name in value}, path, required)


def string(value: object, path: str, limit: int = NAME_MAX) -> str:
    """A string of at most ``limit`` characters.  Raises ``CodecError``."""
    if not isinstance(value, str) or len(value) > limit:
        raise CodecError(path, f"expected a string of at most {limit} characters")
    return value


def uuid(value: object, path: str) -> str:
    """A UUID in small letters, with its hyphens.  Raises ``CodecError``."""
    if not isinstance(value, str) or not _UUID.fullmatch(value):
        raise CodecError(path, "expected a UUID in small letters, with its hyphens")
    return value


def strings(value: object, path: str, count: int, limit: int = NAME_MAX) -> tuple[str, ...]:
    """A list of strings.  Raises ``CodecError``."""
    if not isinstance(value, list) or len(value) > count:
        raise CodecError(path, f"expected a list of at most {count} strings")
    for index, item in enumerate(value):
        if not isinstance(item, str) or len(item) > limit:
            raise CodecError(f"{path}[{index}]", f"expected a string of at most {limit} characters")
    return tuple(value)


def integer(value: object, path: str) -> int:
    """A whole number that is not negative.  Raises ``CodecError``."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise CodecError(path, "expected a whole number")
    return value


def boolean(value: object, path: str) -> bool:
    """true or false.  Raises ``CodecError``."""
    if not isinstance(value, bool):
        raise CodecError(path, "expected true or false")
    return value


def number(value: object, path: str) -> float:
    """A finite number that is not negative.  Raises ``CodecError``."""
    if type(value) not in (int, float) or not 0 <= value < 1e12:  # type: ignore[operator]  # narrowed by type()
        raise CodecError(path, "expected a number")
    return float(value)  # type: ignore[arg-type]  # narrowed by type()


def optional(value: object, path: str, parse: Callable[[object, str], T]) -> T | None:
    """null, or what ``parse`` says."""
    return None if value is None else parse(value, path)


def join(path: str, name: str) -> str:
    """The path of a field of an object that has this path."""
    return f"{path}.{name}" if path else name


def reason(value: object, path: str) -> AnyReason:
    """A reason, also one that only a newer version knows.  Raises ``CodecError`` for what cannot be a code."""
    found = code(value, path)
    return Reason(found) if found in list(Reason) else UnknownReason(found)


def code(value: object, path: str) -> str:
    """A word that programs compare.  Raises ``CodecError``."""
    if not isinstance(value, str) or not _CODE.fullmatch(value):
        raise CodecError(path, "expected a code: small letters, digits and '_'")
    return value
