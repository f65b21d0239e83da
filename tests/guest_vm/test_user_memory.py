"""What logins leave in memory, in the real guest: it counts for the next ones, whatever ended in between."""

import shlex
import time
from collections.abc import Iterator

import pytest

from tests.guest_vm.bound import CGROUPS, USER, bound, cgroup
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, await_connected

MIB = 1 << 20
LIMIT = "128MiB"
TMPFS = "/mnt/scratch"  # as /tmp is on Debian 13: nobody cleans it when a user is gone
# A persona's limit of 128 MiB, what a login gets in any case (32 MiB), and the allowance above (64 + 16 MiB).
AT_MOST = (128 + 32 + 64 + 16) * MIB

# Makes a memfd of 90 MiB and hands it to a service of the user's manager, which keeps it.
KEEPER = """
import array, os, socket, sys
path = f"/run/user/{os.getuid()}/keeper"
if sys.argv[1] == "keep":
    server, kept = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), []
    server.bind(path)
    server.listen()
    while True:
        kept.append(socket.recv_fds(server.accept()[0], 1, 1))
fd = os.memfd_create("left")
client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect(path)
socket.send_fds(client, [b"x"], [fd])
for _ in range(90):
    os.write(fd, bytes(1 << 20))
"""


@pytest.fixture(autouse=True)
def scratch(guest: Machine) -> Iterator[None]:
    """A tmpfs for everybody, users who go a second after their last session, and nothing left afterwards."""
    guest.must(
        f"mkdir -p {TMPFS} /run/systemd/logind.conf.d; mount -t tmpfs -o mode=1777,size=900M tmpfs {TMPFS};"
        " printf '[Login]\\nUserStopDelaySec=1\\n' > /run/systemd/logind.conf.d/quick.conf;"
        " systemctl restart systemd-logind"
    )
    yield
    guest.must(
        f"loginctl terminate-user {USER}; umount -l {TMPFS}; rm -rf /dev/shm/left* /run/systemd/logind.conf.d;"
        " systemctl restart systemd-logind"
    )


def left(guest: Machine) -> int:
    """Bytes of shared memory and files in tmpfs on the whole machine."""
    fields = dict(line.split(":") for line in guest.must("cat /proc/meminfo").splitlines())
    return int(fields["Shmem"].split()[0]) * 1024


def leave(directory: str, number: int) -> str:
    """Fills a file with 90 MiB, or with as much as there is; a shell command line.

    By a program that is larger than the shell: it is the largest that the kernel kills.
    """
    fill = f"f = open('{directory}/left{number}', 'wb', 0)\nfor _ in range(90): f.write(bytes(1 << 20))"
    return f"python3 -c {shlex.quote(fill)}; echo still here"


def await_ended(guest: Machine, but: int = 0) -> None:
    """Until they have so many sessions: those that run at once may leave as much as their limits together."""
    slices = f"{CGROUPS}user.slice/user-1001.slice {CGROUPS}user.slice/persona-sessions.service/user-1001"
    living = f"find {slices} -mindepth 1 -maxdepth 1 -type d ! -name '*.service' ! -name '*.slice' 2>/dev/null"
    wait = f"for i in $(seq 100); do [ $({living} | wc -l) -le {but} ] && exit 0; sleep 0.1; done; {living}; exit 1"
    guest.must(wait, timeout=60)


def await_gone(guest: Machine) -> None:
    """Until logind has forgotten the user."""
    deadline = time.monotonic() + 60
    while guest.root(f"loginctl show-user {USER}").code == 0:
        if time.monotonic() > deadline:
            raise TimeoutError(guest.must("loginctl; systemctl list-jobs"))
        time.sleep(0.5)


@pytest.mark.parametrize("away", [False, True], ids=["at once", "after the user was gone"])
def test_four_logins_leave_no_more_than_one_may_use(guest: Machine, broker: Broker, away: bool) -> None:
    before = left(guest)
    with bound(broker, {"memory": LIMIT}):
        for number in range(4):
            with guest.session(USER) as session:
                assert "still here\n" in session.ask(leave(TMPFS, number))
            await_ended(guest)
            if away:
                await_gone(guest)
        grown = left(guest) - before
        assert 90 * MIB <= grown < AT_MOST
        with guest.session(USER) as session:  # and they can put it right
            assert session.ask(f"rm {TMPFS}/left*; ls {TMPFS}") == ""
        with guest.session(USER) as session:
            place = cgroup(session.ask("cat /proc/self/cgroup"))
            assert guest.must(f"cat {CGROUPS}{place}/memory.max") == f"{128 * MIB}\n"
            session.ask(leave(TMPFS, 9))
            assert guest.must(f"stat -c %s {TMPFS}/left9") == f"{90 * MIB}\n"


def test_jobs_without_a_login_leave_no_more_either(guest: Machine, broker: Broker) -> None:
    before = left(guest)
    with bound(broker, {"memory": LIMIT}):
        for number in range(4):
            guest.root(f"su - {USER} -c {shlex.quote(leave('/dev/shm', number))}")
            await_ended(guest)
        grown = left(guest) - before
        assert 90 * MIB <= grown < AT_MOST
        assert cgroup(guest.must(f"su - {USER} -c 'cat /proc/self/cgroup'")).startswith("user.slice/persona-sessions")


def test_what_a_service_keeps_for_sessions_that_ended_is_theirs(guest: Machine, broker: Broker) -> None:
    before = left(guest)
    guest.must("cat > /usr/local/lib/keeper.py", stdin=KEEPER)
    with bound(broker, {"memory": LIMIT}), guest.session(USER) as first:
        first.ask("systemd-run --user -q python3 /usr/local/lib/keeper.py keep; sleep 3")
        for _ in range(3):
            with guest.session(USER) as session:
                session.ask("python3 /usr/local/lib/keeper.py hand; echo done")
            await_ended(guest, but=1)
        grown = left(guest) - before
        assert 90 * MIB <= grown < AT_MOST


def test_a_new_agent_and_a_reload_of_systemd_know_what_was_left(guest: Machine, broker: Broker) -> None:
    slice_ = f"{CGROUPS}user.slice/user-1001.slice"
    with bound(broker, {"memory": LIMIT}):
        with guest.session(USER) as session:
            session.ask(leave(TMPFS, 0))
        await_gone(guest)
        guest.must("systemctl kill -s KILL persona-agent; systemctl daemon-reload; sleep 1")
        await_connected(guest)
        with guest.session(USER) as session:
            place = cgroup(session.ask("cat /proc/self/cgroup"))
            assert int(guest.must(f"cat {CGROUPS}{place}/memory.max")) <= 40 * MIB
            assert "of the memory is what your earlier sessions left there" in session.ask("persona status")
            assert int(guest.must(f"cat {slice_}/memory.max")) <= AT_MOST + 128 * MIB  # the service manager's beside
        guest.must(f"rm {TMPFS}/left*")
        await_gone(guest)
        guest.must("persona-agent plan >/dev/null; sleep 32")
        assert guest.must(f"cat {slice_}/memory.max") == "max\n"
        assert guest.must("persona-agent plan") == "nothing to change\n"
