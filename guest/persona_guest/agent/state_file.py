"""gate.state: the file by which the PAM module and the standby go while there is no agent: mode and exemptions.

A missing file is a fresh installation, or a gate that was released, and counts as complain mode.  docs/protocol.md has
its form.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from persona_guest import files
from persona_guest.settings import Settings

log = logging.getLogger("persona.agent")

_AGAIN_S = 5.0

Later = Callable[[float, Callable[[], None]], object]


def path_of(settings: Settings) -> Path:
    """The path of gate.state."""
    return Path(settings.paths.state_dir) / "gate.state"


def write(settings: Settings) -> None:
    """Writes gate.state, unless it says the same already: a full disk stops nothing then.  Raises ``OSError``."""
    path = path_of(settings)
    gate = settings.gate
    text = f"mode={settings.mode}\nuid_min={gate.uid_min}\nbreak_glass={gate.break_glass_group}\n"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text("ascii") == text and path.stat().st_mode & 0o777 == 0o644:
            return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    files.write(path, text, mode=0o644)


def keep_writing(settings: Settings, later: Later, wanted: Callable[[], bool]) -> None:
    """Writes gate.state, and tries again every few seconds while that fails and ``wanted()``.

    An agent that did not start for want of space on a disk would refuse everybody everything.
    """
    if not wanted():
        return
    try:
        write(settings)
    except OSError as error:
        log.critical("%s; while no agent runs, logins and commands meet what guest.toml said before", error)
        later(_AGAIN_S, lambda: keep_writing(settings, later, wanted))


def remove(settings: Settings) -> None:
    """Removes gate.state, once the gate is released."""
    path_of(settings).unlink(missing_ok=True)
