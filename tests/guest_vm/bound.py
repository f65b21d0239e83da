"""A persona with the numbers of one test, handed to bob, whom no other policy names."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.guest_vm.site import ROOT, Broker

DOCUMENTS = [ROOT / "examples", Path(__file__).parent / "documents"]
USER = "bob"
CGROUPS = "/sys/fs/cgroup/"


def cgroup(text: str) -> str:
    """The cgroup in what /proc/PID/cgroup says."""
    found = re.search(r"^0::/(.*)$", text, re.MULTILINE)
    assert found is not None, text
    return found[1]


def persona(name: str, limits: dict[str, Any], whitelist: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A persona that may run anything, or the whitelist."""
    return {
        "kind": "Persona",
        "name": name,
        "command_whitelist": whitelist or ["**"],
        "resource_limits": limits,
        "network_access": ["any"],
        **more,
    }


def policy(name: str, persona_name: str, users: tuple[str, ...] = (USER,), **more: Any) -> dict[str, Any]:
    """In the order in which they are given."""
    return {"kind": "Policy", "name": name, "subjects": {"users": list(users)}, "persona": persona_name, **more}


def apply(broker: Broker, *documents: dict[str, Any]) -> None:
    """The documents of all tests, and these."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump_all(documents, file)
        file.flush()
        broker.documents(*DOCUMENTS, Path(file.name))


@contextlib.contextmanager
def bound(broker: Broker, limits: dict[str, Any], **more: Any) -> Iterator[None]:
    """bob under a persona of these limits for the block."""
    apply(broker, persona("Bound", limits, **more), policy("bound", "Bound"))
    try:
        yield
    finally:
        broker.documents(*DOCUMENTS)
