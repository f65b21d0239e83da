"""What a persona may reach from the real guest, over real ssh: by every road that a session has, both families."""

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest_vm.bound import USER, apply, bound, persona, policy
from tests.guest_vm.far import (
    FAR4,
    FAR6,
    NEAR4,
    NEAR6,
    OTHER4,
    OTHER6,
    PROGRAM,
    attempt,
    attempt_as_root,
    background,
    begin,
    from_outside,
)
from tests.guest_vm.machine import Machine, free_port
from tests.guest_vm.site import Broker, await_connected

REFUSED, CUT, REFUSED_ICMP6, PROHIBITED, PROHIBITED6 = "ECONNREFUSED", "EPERM", "EACCES", "EHOSTUNREACH", "EACCES"


@pytest.fixture(autouse=True)
def _world(guest: Machine) -> None:
    begin(guest, USER)


RULES = ["10.20.0.0/16:tcp/5432", "2001:db8:20::/48:tcp/5432,440-450", f"{FAR4}:udp/443", f"{FAR6}:udp/443", "icmp"]
UNDER_RULES = [
    ("tcp", OTHER4, 5432, "ok"),
    ("tcp", OTHER4, 5433, REFUSED),
    ("tcp", OTHER4, 443, REFUSED),
    ("tcp", OTHER4, 22, REFUSED),
    ("tcp", FAR4, 5432, REFUSED),
    ("tcp", FAR4, 443, REFUSED),
    ("tcp", OTHER6, 5432, "ok"),
    ("tcp", OTHER6, 443, "ok"),
    ("tcp", OTHER6, 5433, REFUSED),
    ("tcp", OTHER6, 22, REFUSED),
    ("tcp", FAR6, 5432, REFUSED),
    ("tcp", FAR6, 443, REFUSED),
    ("tcp_mapped", OTHER4, 5432, "ok"),
    ("tcp_mapped", OTHER4, 443, REFUSED),
    ("tcp_mapped", FAR4, 5432, REFUSED),
    ("udp", FAR4, 443, "ok"),
    ("udp", FAR4, 5432, CUT),
    ("udp", OTHER4, 443, CUT),
    ("udp", FAR6, 443, "ok"),
    ("udp", FAR6, 5432, CUT),
    ("udp", OTHER6, 443, CUT),
    ("udp_unconnected", FAR4, 443, "ok"),
    ("udp_unconnected", FAR6, 5433, CUT),
    ("udp_mapped", FAR4, 443, "ok"),
    ("udp_mapped", FAR4, 5433, CUT),
    ("dns", FAR4, 0, CUT),
    ("dns", FAR6, 0, CUT),
    ("dns", "127.0.0.53", 0, CUT),
    ("tcp", "127.0.0.53", 53, REFUSED),
    ("ping", FAR4, 0, "ok"),
    ("ping", FAR6, 0, "ok"),
    ("ping", OTHER4, 0, "ok"),
    ("raw_ping", FAR4, 0, "EPERM"),  # an ordinary user has no raw sockets
    ("packet", "", 0, "EPERM"),
]
UNDER_NOTHING = [
    ("tcp", FAR4, 443, REFUSED),
    ("tcp", FAR6, 443, REFUSED),
    ("tcp", OTHER4, 5432, REFUSED),
    ("tcp", OTHER6, 5432, REFUSED),
    ("tcp_mapped", FAR4, 443, REFUSED),
    ("udp", FAR4, 443, CUT),
    ("udp", FAR6, 443, CUT),
    ("udp_mapped", FAR4, 443, CUT),
    ("ping", FAR4, 0, CUT),
    ("ping", FAR6, 0, REFUSED_ICMP6),
    ("dns", FAR4, 0, CUT),
    ("dns", "127.0.0.53", 0, CUT),
    ("tcp", "127.0.0.1", 22, "no greeting"),  # sshd's own: loopback is always open
    ("tcp", "::1", 22, "no greeting"),
    ("tcp", NEAR4, 22, "no greeting"),
    ("ping", "127.0.0.1", 0, "ok"),
    ("ping", "::1", 0, "ok"),
]
UNDER_DNS = [
    ("dns", FAR4, 0, "ok"),
    ("tcp", FAR4, 53, "ok"),
    ("dns", FAR6, 0, "ok"),
    ("tcp", FAR6, 53, "ok"),
    ("dns", OTHER4, 0, CUT),
    ("tcp", OTHER4, 53, REFUSED),
    ("dns", OTHER6, 0, CUT),
    ("udp", FAR4, 443, CUT),
    ("tcp", FAR4, 443, REFUSED),
    ("dns", "127.0.0.53", 0, "ok"),
    ("tcp", "127.0.0.53", 53, "ok"),
    ("dns", "127.0.0.7", 0, CUT),
    ("ping", FAR4, 0, CUT),
]
FROM_OUTSIDE = [
    ("tcp", NEAR4, 8080, "ok"),
    ("tcp", NEAR6, 8080, "ok"),
    ("udp", NEAR4, 8081, "ok"),
    ("udp", NEAR6, 8082, "ok"),
    ("tcp", NEAR6, 8082, "ok"),
    ("tcp", NEAR4, 8081, PROHIBITED),
    ("tcp", NEAR4, 8082, PROHIBITED),
    ("udp", NEAR4, 8080, PROHIBITED),
    ("udp", NEAR4, 8082, PROHIBITED),
    ("tcp", NEAR6, 8081, "ok"),
]


def outcomes(table: list[tuple[str, str, int, str]], found: list[str]) -> list[tuple[str, str, int, str, str]]:
    """The rows that came out wrong."""
    return [(*row, was) for row, was in zip(table, found, strict=True) if row[3] != was]


def tries(table: list[tuple[str, str, int, str]]) -> list[tuple[str, str, int]]:
    return [row[:3] for row in table]


def test_there_are_enough_cases() -> None:
    assert len(UNDER_RULES) + len(UNDER_NOTHING) + len(UNDER_DNS) + len(FROM_OUTSIDE) >= 60


@pytest.mark.parametrize(("rules", "table"), [(RULES, UNDER_RULES), ([], UNDER_NOTHING)], ids=["rules", "nothing"])
def test_what_is_listed_is_reached_and_nothing_else(
    guest: Machine, broker: Broker, rules: list[str], table: list[tuple[str, str, int, str]]
) -> None:
    with bound(broker, {}, network_access=rules):
        assert outcomes(table, attempt(guest, USER, tries(table))) == []
    outside = [("tcp", FAR4, 443), ("tcp", FAR6, 22), ("udp", OTHER4, 443), ("ping", OTHER6, 0)]
    assert attempt_as_root(guest, outside) == ["ok"] * 4


def test_name_service_is_the_machines_own(guest: Machine, broker: Broker) -> None:
    stub = f"systemd-run -q --unit stub /usr/bin/python3 -I {PROGRAM} serve 53 127.0.0.53 127.0.0.7"
    ours = f"nameserver {FAR4}\\nnameserver {FAR6}\\n"
    guest.must(f"cp /etc/resolv.conf /root/; printf '{ours}' >/etc/resolv.conf; {stub}; sleep 3")
    try:
        with bound(broker, {}, network_access=["dns"]):
            assert outcomes(UNDER_DNS, attempt(guest, USER, tries(UNDER_DNS))) == []
    finally:
        guest.must("cp /root/resolv.conf /etc/; systemctl stop stub; sleep 3")


def test_listening_sockets_hear_only_whom_they_may(guest: Machine, broker: Broker) -> None:
    rules = ["in:any:tcp/8080", f"in:{FAR4}:udp/8081", f"in:{FAR6}"]
    with bound(broker, {}, network_access=rules), guest.session(USER) as session:
        session.ask(background("serve 8080 8081 8082", "ready"))
        assert outcomes(FROM_OUTSIDE, from_outside(guest, tries(FROM_OUTSIDE))) == []
        session.ask("kill %1")
        # to be let in is not to be let out
        assert attempt(guest, USER, [("tcp", FAR4, 443), ("udp", FAR4, 443)]) == [REFUSED, CUT]


@contextlib.contextmanager
def tunnel(guest: Machine, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``ssh -N``: a login that starts no program at all."""
    argv = [*guest.ssh_argv(USER, "-N", "-o", "ExitOnForwardFailure=yes", *options)]
    process = subprocess.Popen(argv, text=True, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()  # a SIGTERM just before its poll(2) would wait there with it
        process.communicate(timeout=20)


def greeted(port: int, request: bytes = b"", patience: float = 40) -> str:
    """What comes of a connection to this port of this host; waits until something listens there."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
                sock.sendall(request)
                if request:
                    head = sock.recv(2)
                    reply = sock.recv(10) if head == b"\5\0" else b""
                    if reply[1:2] != b"\0":
                        return "refused"
                return "ok" if sock.recv(16) == b"hello\n" else "closed"
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)
        except OSError:
            return "closed"


def test_sshs_forwards_go_where_the_persona_may(guest: Machine, broker: Broker) -> None:
    """-L and -D are made by sshd as the user, in a login that has no process of its own."""
    good, bad, good6, dynamic = free_port(), free_port(), free_port(), free_port()
    forwards = [
        "-L",
        f"{good}:{OTHER4}:5432",
        "-L",
        f"{bad}:{FAR4}:443",
        "-L",
        f"{good6}:[{OTHER6}]:5432",
        "-D",
        str(dynamic),
    ]
    with bound(broker, {}, network_access=RULES), tunnel(guest, *forwards):
        assert greeted(good) == "ok"
        assert greeted(good6) == "ok"
        assert greeted(bad) == "closed"
        for host, port, outcome in ((OTHER4, 5432, "ok"), (OTHER4, 443, "refused"), (FAR4, 5432, "refused")):
            request = b"\5\1\0" + b"\5\1\0\1" + socket.inet_aton(host) + port.to_bytes(2, "big")
            assert greeted(dynamic, request) == outcome


def test_a_remote_forward_and_what_uses_it_stay_on_loopback(guest: Machine, broker: Broker) -> None:
    """As X11 forwarding works: sshd listens on loopback, and what comes there goes back over the ssh connection."""
    with socket.create_server(("127.0.0.1", 0)) as display:
        threading.Thread(target=_greet, args=(display,), daemon=True).start()
        forward = f"6010:127.0.0.1:{display.getsockname()[1]}"
        with bound(broker, {}, network_access=[]), tunnel(guest, "-R", forward):
            deadline = time.monotonic() + 40
            found = [""]
            while found != ["ok"] and time.monotonic() < deadline:
                found = attempt(guest, USER, [("tcp", "127.0.0.1", 6010)])
            assert found == ["ok"]
            assert from_outside(guest, [("tcp", NEAR4, 6010)]) != ["ok"]


def _greet(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"hello\n")


def test_scp_in_is_sshs_and_scp_out_is_the_personas(guest: Machine, broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with bound(broker, {}, network_access=[f"{OTHER4}:tcp/22"]):
        argv = guest.ssh_argv(USER)
        argv[argv.index("-p")], argv[0] = "-P", "scp"
        target = argv.pop()
        subprocess.run(
            [*argv, "-q", str(tmp_path / "file"), f"{target}:file"], check=True, timeout=120, stdin=subprocess.DEVNULL
        )
        out = "timeout 20 scp -o StrictHostKeyChecking=no -o ConnectTimeout=10 file {}:"
        assert "refused" in guest.ssh(USER, out.format(FAR4)).text
        reached = guest.ssh(USER, out.format(OTHER4)).text
        assert "refused" not in reached  # what listens there is no sshd, but it is reached
        assert guest.ssh(USER, f"timeout 5 bash -c 'cat </dev/tcp/{OTHER4}/22'").out == "hello\n"


def test_a_network_namespace_of_ones_own_reaches_nothing(guest: Machine, broker: Broker) -> None:
    with bound(broker, {}, network_access=["any"]):
        alone = attempt(guest, USER, [("tcp", FAR4, 443), ("tcp", FAR6, 443), ("raw_ping", FAR4, 0)], "unshare -Urn")
        assert set(alone) <= {"ENETUNREACH", "EADDRNOTAVAIL", "EHOSTUNREACH"}


def test_user_services_and_jobs_are_under_their_users_persona(guest: Machine, broker: Broker) -> None:
    table = [
        ("tcp", OTHER4, 5432, "ok"),
        ("tcp", FAR4, 443, REFUSED),
        ("tcp", OTHER6, 5433, REFUSED),
        ("udp", FAR6, 443, "ok"),
    ]
    with bound(broker, {}, network_access=RULES):
        service = "XDG_RUNTIME_DIR=/run/user/$(id -u) systemd-run --user -q --pipe --wait"
        assert outcomes(table, attempt(guest, USER, tries(table), service)) == []
        job = f"python3 -I {PROGRAM} try <tries >out.new; mv out.new out"
        wait = "for i in $(seq 60); do [ -e out ] && break; sleep 1; done; cat out"
        done = guest.ssh(USER, f"rm -f out; cat >tries; echo '{job}' | at now; {wait}", stdin=json.dumps(tries(table)))
        assert outcomes(table, json.loads(done.out.strip().splitlines()[-1])) == []


def test_what_runs_as_the_user_elsewhere_is_known_by_its_owner(guest: Machine, broker: Broker) -> None:
    """In root's cgroups, with the user's uid: bound while he has a session."""
    table = [("tcp", OTHER4, 5432, "ok"), ("tcp", FAR4, 443, REFUSED), ("udp", FAR4, 5432, CUT)]
    with bound(broker, {}, network_access=RULES), guest.session(USER) as session:
        session.ask("true")
        found = attempt_as_root(guest, tries(table), f"setpriv --reuid $(id -u {USER}) --clear-groups")
        assert outcomes(table, found) == []


@pytest.mark.parametrize("how", ["narrowed", "revoked"])
def test_what_is_open_is_cut_within_a_second(guest: Machine, broker: Broker, how: str) -> None:
    with bound(broker, {}, network_access=["any:tcp/443"]), guest.session(USER) as session:
        session.ask(background(f"stream {FAR4} 443", "open"))
        began = time.monotonic()
        changed = float(guest.must("date +%s.%N"))
        if how == "narrowed":
            apply(broker, persona("Bound", {}, network_access=["any:tcp/5432"]), policy("bound", "Bound"))
        else:
            apply(broker, persona("Bound", {}), policy("bound", "Bound", users=("nobody",)))
        took = time.monotonic() - began  # the change is made somewhere within
        wait = f"for i in $(seq 100); do [ $(wc -l <~{USER}/probe.out) = 2 ] && break; sleep 0.1; done"
        cut, error = guest.must(f"{wait}; tail -n 1 ~{USER}/probe.out").split()
        assert error in ("ECONNRESET", "EPIPE")
        assert float(cut) - changed < took + 1


@pytest.fixture
def held(guest: Machine) -> Iterator[None]:
    """bob may sudo; what ``hold`` left running ends."""
    guest.must(f"echo '{USER} ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/{USER}; chmod 440 /etc/sudoers.d/{USER}")
    yield
    guest.must(f"rm -f /etc/sudoers.d/{USER}; pkill -f '[n]etprobe.py hold'; true")


def fares(guest: Machine) -> list[str]:
    """How the two flows of ``hold`` fare now."""
    answered = "for i in $(seq 100); do [ $(wc -l <held) -gt $n ] && break; sleep 0.1; done; tail -n 1 held"
    found: list[str] = json.loads(guest.must(f"cd ~{USER}; n=$(wc -l <held); echo >ask; {answered}"))
    return found


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("per", ["session", "persona"])
def test_sockets_of_sudo_in_a_session_without_a_scope_follow(guest: Machine, broker: Broker, per: str) -> None:
    """Its places lie outside of its user's slice, and these sockets are not its user's."""
    rules = ["any:tcp/443", "any:udp/443"]
    with bound(broker, {"per": per}, network_access=rules):
        hold = f"sudo -n python3 -Iu {PROGRAM} hold {FAR4} 443 0<>ask >held 2>&1 &"
        wait = "for i in $(seq 100); do grep -q open held && break; sleep 0.1; done"
        guest.must(f"su - {USER} -c 'rm -f ask held; mkfifo ask; {hold} {wait}'")
        where = "cat /proc/$(pgrep -f '^python3 .*[n]etprobe.py hold')/cgroup"
        assert "persona-sessions.service" in guest.must(where)
        assert fares(guest) == ["ok", "ok"]
        apply(broker, persona("Next", {"per": per}, network_access=rules), policy("bound", "Next"))
        deadline = time.monotonic() + 20
        while "Next" not in guest.must(where) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "Next" in guest.must(where)
        assert fares(guest) == ["ok", "ok"]  # made under Bound, they count as the user's now
        guest.must("systemctl restart persona-agent")
        await_connected(guest)
        assert fares(guest) == ["ok", "ok"]
        apply(broker, persona("Next", {"per": per}), policy("bound", "Next", users=("nobody",)))
        deadline = time.monotonic() + 20
        while (found := fares(guest)) == ["ok", "ok"] and time.monotonic() < deadline:
            time.sleep(0.2)
        assert found[1] in (CUT, "EHOSTUNREACH")
        assert fares(guest)[0] in ("ECONNRESET", "EPIPE")


def test_a_forward_of_a_login_without_a_program_follows_too(guest: Machine, broker: Broker) -> None:
    port = free_port()
    with bound(broker, {}, network_access=["any:tcp/443"]), tunnel(guest, "-L", f"{port}:{FAR4}:443"):
        assert greeted(port) == "ok"
        apply(broker, persona("Bound", {}, network_access=[]), policy("bound", "Bound"))
        time.sleep(1)
        assert greeted(port) == "closed"


def test_a_refusal_is_told_and_recorded(guest: Machine, broker: Broker) -> None:
    with bound(broker, {}, network_access=["any:tcp/443"]):
        done = guest.ssh(USER, f"python3 -I {PROGRAM} try; sleep 2", stdin=json.dumps([["tcp", FAR4, 22]]))
        assert f"persona: {FAR4}:tcp/22: denied, network_refused under persona Bound" in done.err
    journal = guest.must("journalctl -u persona-agent -n 200 -o cat PERSONA_EVENT=network")
    assert f"network: {USER}: denied, network_refused: {FAR4}:tcp/22" in journal
