"""Who is gated, in a real guest: the table of identities in the kernel layer, and logins of the odd ones."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.guest_vm.bound import DOCUMENTS
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, await_connected, configure
from tests.identities import BREAK_GLASS, BREAK_GLASS_GID, TABLE

# Each row as a process with that login uid and those groups, and no gate of its own: what does an exec say?
EXECS = """
import json, os, sys
found = []
for uid, gids in json.load(sys.stdin):
    pid = os.fork()
    if pid == 0:
        try:
            with open("/proc/self/loginuid", "w") as file:
                file.write(str(uid))
            os.setgroups(gids)
            os.setresgid(65533, 65533, 65533)
            os.setresuid(uid, uid, uid)
            os.execv("/bin/true", ["true"])
        except OSError as error:
            os._exit(100 + error.errno)
    found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(found))
"""
RAN, EACCES = 0, 113


def test_the_kernel_layer(guest: Machine) -> None:
    guest.must(f"groupmod -g {BREAK_GLASS_GID} {BREAK_GLASS} && systemctl restart persona-agent")
    await_connected(guest)
    guest.must("cat > /root/execs.py", stdin=EXECS)
    rows = json.dumps([(who.uid, who.gids()) for who, _ in TABLE])
    found = json.loads(guest.must("python3 /root/execs.py", stdin=rows, timeout=120))
    said = [(who, code) for (who, _), code in zip(TABLE, found, strict=True)]
    assert [row for row, (_, gated) in zip(said, TABLE, strict=True) if row[1] != (EACCES if gated else RAN)] == []


# 131 groups with the user's own, and 2,001; the second's number is one of a directory's.  Both groups files are in
# the order in which a script appends to them.
ACCOUNTS = """
for user in many:1999:130 very:892600500:2000; do
    IFS=: read name uid count <<< "$user"
    useradd -m -s /bin/bash -u $uid $name
    install -d -o $name -m 700 /home/$name/.ssh
    install -o $name -m 600 /root/.ssh/authorized_keys /home/$name/.ssh/
done
for number in $(seq 1 2000); do
    [ $number -le 130 ] && members=many,very || members=very
    printf 'grp%04d:x:%d:%s\\n' $number $((31000 + number)) $members
done >> /etc/group
"""


def documents(directory: Path, *policies: tuple[str, str]) -> Path:
    """A policy of one group each, with a persona that may run one program more than a shell needs."""
    found: list[dict[str, Any]] = []
    for group, program in policies:
        found.append({"kind": "Persona", "name": f"P-{group}", "command_whitelist": ["bash", "true", program]})
        found.append({"kind": "Policy", "name": group, "subjects": {"groups": [group]}, "persona": f"P-{group}"})
    path = directory / "groups.yaml"
    path.write_text(yaml.safe_dump_all(found))
    return path


@pytest.fixture
def crowd(guest: Machine, broker: Broker) -> Iterator[Machine]:
    """``many`` and ``very`` are there; the policies are put back afterwards."""
    guest.must("getent passwd many >/dev/null || bash -s", stdin=ACCOUNTS, timeout=120)
    yield guest
    broker.documents(*DOCUMENTS)


def test_a_user_in_very_many_groups_is_gated_like_any(crowd: Machine, broker: Broker, tmp_path: Path) -> None:
    assert crowd.ssh("many", "true").code == 255  # no policy names them
    broker.documents(*DOCUMENTS, documents(tmp_path, ("grp0130", "id"), ("grp2000", "id")))
    for user in ("many", "very"):
        done = crowd.ssh(user, "id -un; nmap --version")
        assert (done.out, done.code) == (f"{user}\n", 126), done.text
    with crowd.session("very") as session:
        assert "no_matching_policy" in session.ask("hostname")
        more = (("grp0130", "id"), ("grp2000", "id"), ("grp1777", "hostname"))
        broker.documents(*DOCUMENTS, documents(tmp_path, *more))
        time.sleep(2)
        assert session.ask("hostname").strip() == crowd.must("hostname").strip()


def test_neither_complain_mode_nor_the_break_glass_group_refuses_them(crowd: Machine, broker: Broker) -> None:
    try:
        crowd.must(f"gpasswd -a very {BREAK_GLASS} && gpasswd -a many {BREAK_GLASS}")
        for user in ("many", "very"):  # no policy names them
            assert "Nmap version" in crowd.ssh(user, "nmap --version").out
        assert "BREAK GLASS: very" in crowd.must("journalctl -b --no-pager -u persona-agent")
        crowd.must(f"gpasswd -d very {BREAK_GLASS} && gpasswd -d many {BREAK_GLASS}")
        assert crowd.ssh("many", "true").code == 255
        configure(crowd, broker, mode="complain")
        for user in ("many", "very"):
            assert "Nmap version" in crowd.ssh(user, "nmap --version").out
    finally:
        configure(crowd, broker)


def test_nobody_is_a_system_account(guest: Machine) -> None:
    assert "uid=65534" in guest.must("su -s /bin/sh nobody -c id")
    guest.must("rm -f /tmp/cron-nobody; echo '* * * * * nobody /usr/bin/touch /tmp/cron-nobody' > /etc/cron.d/nobody")
    try:
        guest.must("for i in $(seq 90); do [ -e /tmp/cron-nobody ] && exit 0; sleep 1; done; exit 1", timeout=200)
    finally:
        guest.must("rm -f /etc/cron.d/nobody")
