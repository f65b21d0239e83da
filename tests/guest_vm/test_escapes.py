"""No program that may start programs starts one that may not be started."""

import shlex
from collections.abc import Iterable

from tests.guest_vm.escapes import ROUTES, command
from tests.guest_vm.machine import Machine

NUMBERED = {route: str(number) for number, route in enumerate(ROUTES)}


def arrived(guest: Machine, program: str, word: str, routes: Iterable[str] = ROUTES) -> set[str]:
    """The routes that led to the program, which creates the file that it is given; all in one login."""
    lines = ["cd; export TERM=dumb"]
    for route in routes:
        number = NUMBERED[route]
        line = shlex.quote(command(route, program, f"/tmp/{word}-{number}"))
        lines.append(f"timeout -k 1 30 sh -c {line} 2>&1 </dev/null | cat >/dev/null")
    guest.ssh("carol", "bash -s", stdin="\n".join(lines) + "\n", timeout=600)
    found = set(guest.must(f"cd /tmp; ls -d {word}-* 2>/dev/null || true").split())
    guest.must(f"rm -f /tmp/{word}-*")
    return {route for route, number in NUMBERED.items() if f"{word}-{number}" in found}


def test_at_least_forty_programs() -> None:
    assert len({route.split()[0] for route in ROUTES}) >= 40


def test_no_route_leads_to_a_program_that_is_not_allowed(guest: Machine) -> None:
    # 'forbidden' is a copy of 'touch': the same routes with an allowed program must all arrive, or
    # their failure with the forbidden one would say nothing
    assert set(ROUTES) - arrived(guest, "/usr/bin/touch", "worked") == set()
    assert arrived(guest, "/usr/local/bin/forbidden", "escaped") == set()
