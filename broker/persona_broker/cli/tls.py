"""``tls``: the broker's certificate."""

import argparse
import os
import pwd
import shutil
import subprocess
import sys

from persona.problems import Fault, PersonaError
from persona_broker.cli.store import say
from persona_broker.settings import Settings

_SERVICE_USER = "persona-broker"  # of the package's unit


def init(arguments: argparse.Namespace, _settings: Settings) -> int:
    """``tls init``: a new authority each time, which guests must be given; one that is there is kept."""
    from persona_broker import pki

    there = [file for file in (arguments.dir / "ca.pem", arguments.dir / "ca.key") if file.exists()]
    if there and not arguments.force:
        effect = "guests that trust it would be cut off"
        raise PersonaError(Fault.CONFLICT, f"{there[0]}: is there already, {effect}; --force replaces it")
    try:
        pki.make(arguments.dir, arguments.host)
    except subprocess.CalledProcessError as error:
        raise PersonaError(Fault.INTERNAL, f"openssl: {error.stderr.decode(errors='replace')}") from error
    if os.geteuid() == 0 and (arguments.user or _SERVICE_USER in {entry.pw_name for entry in pwd.getpwall()}):
        try:
            shutil.chown(arguments.dir / "broker.key", user=arguments.user or _SERVICE_USER)
        except LookupError:
            raise PersonaError(Fault.BAD_REQUEST, f"--user: there is no user {arguments.user!r}") from None
    files = [str(arguments.dir / name) for name in ("ca.pem", "broker.crt", "broker.key")]
    say(arguments, files, "\n".join(files))
    if there:
        print("persona-broker: ca.pem is a new one; guests trust this broker again when they have it", file=sys.stderr)
    return 0
