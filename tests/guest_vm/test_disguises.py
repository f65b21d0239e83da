"""No disguise makes a program start that is not on the whitelist."""

import re
import shlex

import pytest

from tests.guest_vm.conftest import Compiler
from tests.guest_vm.disguises import CLOSED, HELPERS, OPEN, PRELOAD, C
from tests.guest_vm.machine import Machine

ALL = {**OPEN, **CLOSED}
NUMBERED = {way: str(number) for number, way in enumerate(ALL)}
ALLOWED, FORBIDDEN = "/usr/bin/touch", "/usr/local/bin/forbidden"


@pytest.fixture
def disguised(guest: Machine, static_c: Compiler) -> Machine:
    """The guest with every helper in it, root's own, so that a whitelist can name them."""
    if guest.root("test -e /usr/local/lib/preload.so").code == 0:
        return guest
    programs = [static_c.compile(name, source, *flags) for name, (source, flags) in C.items()]
    guest.put(*programs, to="/usr/local/bin/")
    guest.put(static_c.shared("preload.so", PRELOAD), to="/usr/local/lib/")
    guest.put(HELPERS / "namespace.py", to="/usr/local/share/")
    guest.must(
        f"mkdir -p /usr/local/share/links; cd /usr/local/share/links; ln {ALLOWED} touch; ln {FORBIDDEN} forbidden; "
        f"chmod 755 /usr/local/bin/*; chmod 644 /usr/local/lib/preload.so; sleep 2"  # the agent's next look
    )
    return guest


def run(guest: Machine, user: str, program: str, word: str) -> tuple[set[str], dict[str, str]]:
    """The ways on which the program arrived and created its file, and what each said; all in one login."""
    lines = ["cd $(mktemp -d)"]
    for way, number in NUMBERED.items():
        line = shlex.quote(ALL[way].format(program=program, file=f"/tmp/{word}-{number}"))
        inside = f"mkdir {number}; cd {number}; timeout -k 1 30 bash -c {line} 2>&1 </dev/null | cat; cd .."
        lines.append(f"echo @{number}; {inside}")
    done = guest.ssh(user, "bash -s", stdin="\n".join(lines) + "\n", timeout=600)
    said = dict(re.findall(r"@(\d+)\n(.*?)(?=@\d+\n|\Z)", done.out, re.DOTALL))
    assert set(said) == set(NUMBERED.values()), done.text
    found = set(guest.must(f"cd /tmp; ls -d {word}-* 2>/dev/null || true").split())
    guest.must(f"rm -rf /tmp/{word}-* /tmp/root-*")
    arrived = {way for way, number in NUMBERED.items() if f"{word}-{number}" in found}
    return arrived, {way: said[number] for way, number in NUMBERED.items()}


def test_every_way_leads_somewhere_without_a_gate(disguised: Machine) -> None:
    arrived, said = run(disguised, "root", FORBIDDEN, "free")
    assert {way: said[way] for way in set(ALL) - arrived} == {}


def test_the_open_ways_lead_to_a_program_that_is_allowed(disguised: Machine) -> None:
    arrived, said = run(disguised, "alice", ALLOWED, "allowed")
    assert {way: said[way] for way in set(OPEN) - arrived} == {}
    assert arrived & set(CLOSED) == set()


def test_no_way_leads_to_a_program_that_is_not(disguised: Machine) -> None:
    arrived, said = run(disguised, "alice", FORBIDDEN, "forbidden")
    assert arrived == set()
    silent = {way: text for way, text in said.items() if not re.search(r"persona: .*denied|denied", text)}
    assert silent == {}
