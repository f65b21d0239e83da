"""Whatever files a task sees, only the machine's own start: every view x every file of the chain x every allowance.

Twice: what the agent answers, and what the kernel layer does where the agent was shown something else.  The table
of docs/security.md has the same rows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.guest_vm.bound import bound
from tests.guest_vm.conftest import Compiler
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker, configure

HERE = Path(__file__).parent
WHO, UID = "bob", 1001
LOCAL, SHARE = "/usr/local/bin", "/usr/local/share"
LOADER = "/lib64/ld-linux-x86-64.so.2"
REPLACED = f"{LOCAL}/replaced"
RAN = "/tmp/ran"  # the numbers of the cases in which it started
TOOL, SCRIPT, SHELL = f"{LOCAL}/tool", f"{LOCAL}/script", f"{LOCAL}/shell"
MACHINERY, MACHINERY_SCRIPT = f"{LOCAL}/machinery", f"{LOCAL}/machinery-script"
LOGIN_SHELL, PERSONA_SHELL = f"{LOCAL}/loginsh", "/usr/bin/persona-shell"

VIEWS = ["bind", "pid_namespace", "chroot", "pivot_root", "plain_chroot", "overlay", "tmpfs", "fuse"]
STARTS_NOTHING_ITSELF = [view for view in VIEWS if view not in ("pid_namespace", "fuse")]


class Case(NamedTuple):
    """``target`` is what leads elsewhere when ``command`` is started, which ``reason`` allows."""

    reason: str
    file: str
    target: str
    command: str


CASES = [
    Case("whitelist", "program", TOOL, TOOL),
    Case("whitelist", "loader", LOADER, TOOL),
    Case("whitelist", "script", SCRIPT, SCRIPT),
    Case("whitelist", "interpreter", SHELL, SCRIPT),
    Case("whitelist", "interpreter's loader", LOADER, SCRIPT),
    Case("machinery", "program", MACHINERY, MACHINERY),
    Case("machinery", "loader", LOADER, MACHINERY),
    Case("machinery", "script", MACHINERY_SCRIPT, MACHINERY_SCRIPT),
    Case("machinery", "interpreter", SHELL, MACHINERY_SCRIPT),
    Case("login shell", "program", LOGIN_SHELL, LOGIN_SHELL),
    Case("login shell", "loader", LOADER, LOGIN_SHELL),
    Case("login shell", "script", PERSONA_SHELL, PERSONA_SHELL),
    Case("login shell", "interpreter", "/usr/bin/python3", PERSONA_SHELL),
]
NEEDED = ":".join(
    [TOOL, SCRIPT, SHELL, MACHINERY, MACHINERY_SCRIPT, LOGIN_SHELL, PERSONA_SHELL, LOADER]
    + [f"/lib/x86_64-linux-gnu/{name}" for name in ("libc.so.6", "libtinfo.so.6")]
)
EVERY = [(view, case) for view in VIEWS for case in CASES]


@pytest.fixture
def viewer(guest: Machine, broker: Broker, static_c: Compiler) -> Iterator[Machine]:
    """bob's persona has a tool and a script, root's own; the script's interpreter is on no list."""
    source = (HERE / "programs" / "replaced.c").read_text()
    guest.put(static_c.freestanding("replaced", source), to=LOCAL)
    guest.put(HERE / "helpers" / "views.py", to=SHARE)
    guest.must(
        f"cp /usr/bin/true {TOOL}; cp /usr/bin/true {MACHINERY}; cp /usr/bin/dash {SHELL}; cp /usr/bin/bash"
        f" {LOGIN_SHELL}; printf '#!{SHELL}\\n' | tee {SCRIPT} > {MACHINERY_SCRIPT}; chmod 755 {LOCAL}/*;"
        f"mkdir -p /root/content; cp {REPLACED} /root/content/; modprobe fuse; modprobe overlay;"
        f"mksquashfs /root/content /home/{WHO}/image -all-root -noappend -quiet >/dev/null;"
        f"chmod 644 /home/{WHO}/image; echo '{WHO} {LOGIN_SHELL}' > /etc/persona/shells;"
        f"usermod -s {PERSONA_SHELL} {WHO}"
    )
    whitelist = ["python3 **", "sh", "squashfuse", "fusermount3", TOOL, SCRIPT]
    with bound(broker, {}, whitelist=whitelist):
        yield guest
    guest.must(f"usermod -s /bin/bash {WHO}; rm -f /etc/persona/shells {LOGIN_SHELL}")


def gate(guest: Machine, broker: Broker, mode: str) -> None:
    extra = f'[gate]\nplumbing = ["{MACHINERY}", "{MACHINERY_SCRIPT}", "/usr/lib/systemd/**"]\n'
    configure(guest, broker, mode, extra)


def start(guest: Machine, cases: list[tuple[str, Case]]) -> dict[tuple[str, str, str], int]:
    """What became of each as bob: an exit code, or 100 and an errno; by view, reason and file."""
    lines = "".join(f"{view} {case.target} {REPLACED} {case.command} {case.command}\n" for view, case in cases)
    words = f"export RAN={RAN} SCRATCH=/tmp/views NEEDED={NEEDED} IMAGE=$HOME/image; python3 {SHARE}/views.py"
    guest.must(f"rm -rf {RAN} /tmp/views; mkdir -p -m 777 /tmp/views")
    done = guest.ssh(WHO, words, stdin=lines, timeout=600)
    codes = [int(word) for word in done.out.split()]
    assert len(codes) == len(cases), done.text
    return {(view, case.reason, case.file): code for (view, case), code in zip(cases, codes, strict=True)}


def ran(guest: Machine, cases: list[tuple[str, Case]]) -> set[tuple[str, str, str]]:
    """Those in which the other file started."""
    numbers = set(map(int, guest.must(f"cat {RAN}").split()))
    return {(view, case.reason, case.file) for number, (view, case) in enumerate(cases) if number in numbers}


def test_each_view_leads_to_the_other_file_where_nothing_is_stopped(viewer: Machine, broker: Broker) -> None:
    gate(viewer, broker, "complain")
    codes = start(viewer, EVERY)
    assert {key: codes[key] for key in codes.keys() - ran(viewer, EVERY)} == {}


def test_the_agent_lets_nothing_but_the_machine_s_own_files_start(viewer: Machine, broker: Broker) -> None:
    gate(viewer, broker, "enforce")
    plain = [("none", case) for case in CASES]
    assert {key: code for key, code in start(viewer, plain).items() if code} == {}
    codes = start(viewer, EVERY)
    assert ran(viewer, EVERY) == set()
    # EACCES, or the way there was closed already: a program that it takes was refused
    assert {key: code for key, code in codes.items() if code != 113} == {}


def test_the_kernel_layer_does_not_either(viewer: Machine, broker: Broker) -> None:
    gate(viewer, broker, "enforce")
    cases = [(view, case) for view in ("none", *STARTS_NOTHING_ITSELF) for case in CASES]
    lines = "".join(f"{view} {case.target} {REPLACED} {case.command} {case.command}\n" for view, case in cases)
    viewer.must(f"rm -rf {RAN} /tmp/views; mkdir -p -m 777 /tmp/views; ln -sf {SCRIPT} /tmp/link")
    lines += f"none - - /tmp/link {SCRIPT}\n"  # the interpreter would open the user's own link
    words = f"cd {SHARE}; RAN={RAN} SCRATCH=/tmp/views NEEDED={NEEDED} /usr/bin/python3 {SHARE}/views.py {UID}"
    *codes, by_link = (int(word) for word in viewer.must(words, stdin=lines, timeout=600).split())
    found = {(view, case.reason, case.file): code for (view, case), code in zip(cases, codes, strict=True)}
    assert {key: code for key, code in found.items() if code != (0 if key[0] == "none" else 113)} == {}
    assert by_link == 113
    assert ran(viewer, cases) == set()


def test_the_table_of_the_documentation_has_these_rows() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    table = text[text.index("| what the task sees |") :].split("\n\n")[0]
    assert [line.split("|")[1].strip(" `") for line in table.splitlines()[2:]] == VIEWS
