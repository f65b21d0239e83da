"""What agent and standby keep while the machine runs, and their sockets: on a file system of their own.

``/run/persona/state`` is a small tmpfs (run-persona-state.mount): whoever fills /run stops nobody's login.
The sockets have their well-known names in ``/run/persona``, as symbolic links that are made once and stay: a restart
needs no room there.  A trial has a plain directory in its place.
"""

import logging
import os
from pathlib import Path

from persona_guest import files
from persona_guest.loop import Loop

log = logging.getLogger("persona.agent")

_STATE = "state"
_RELINK_S = 5.0
_BEFORE = ("sessions", "places", "bases.json", "ways.json", "outside.json")  # where an agent of 0.1.0 kept them


def prepare(runtime: Path) -> Path:
    """The directory below ``runtime`` where everything is kept, made where it is not there.  Raises ``OSError``."""
    runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
    state = runtime / _STATE
    state.mkdir(mode=0o755, exist_ok=True)
    return state


def is_apart(state: Path) -> bool:
    """Whether the state directory is a file system of its own.  Raises ``OSError``."""
    return state.stat().st_dev != state.parent.stat().st_dev


def take_over(runtime: Path, state: Path) -> None:
    """Moves what an agent of version 0.1.0 kept in ``runtime`` itself.  Raises nothing.

    What is there is newer than what is in ``state``: moved once, only an agent of that version puts it there again.
    """
    for name in _BEFORE:
        path = runtime / name
        moved = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.exists() else []
        for old in moved:
            try:
                files.write(state / old.relative_to(runtime), old.read_text("utf-8"))
                old.unlink()
            except (OSError, UnicodeDecodeError) as error:
                log.error("%s cannot be taken over: %s", old, error)


def link(runtime: Path, name: str) -> None:
    """Makes ``runtime/NAME`` a link to the socket of that name.  Raises ``OSError``.

    Who connects meets the old one or the new one, unless there is no room left for a second name.
    """
    path, target = runtime / name, f"{_STATE}/{name}"
    if path.is_symlink() and os.readlink(path) == target:
        return
    new = runtime / (name + files.NEW)
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(path)
    except OSError:
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def keep_linked(loop: Loop, runtime: Path, *names: str) -> None:
    """Makes the links of these sockets, and again where somebody took them away, or where there was no room."""
    said: set[str] = set()

    def link_all() -> None:
        for name in names:
            try:
                link(runtime, name)
                said.discard(name)
            except OSError as error:
                if name not in said:
                    log.critical(
                        "%s: %s; clients cannot connect by this link, which is tried again every 5 s",
                        runtime / name,
                        error,
                    )
                said.add(name)

    link_all()
    loop.call_every(_RELINK_S, link_all)
