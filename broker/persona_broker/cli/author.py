"""Who gives a command, as far as this machine knows: a name for the history, no proof."""

import os
import pwd

from persona_broker.store.interface import Author

_NAME_MAX = 64


def author(message: str) -> Author:
    """The account that runs the command; behind sudo, the one that called it."""
    name = os.environ.get("SUDO_USER", "") if os.getuid() == 0 else ""
    if not name:
        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            name = f"uid {os.getuid()}"
    return Author("".join(char if char.isprintable() else "?" for char in name)[:_NAME_MAX], message)
