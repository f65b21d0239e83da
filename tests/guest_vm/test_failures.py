"""Agent and broker killed, stopped, slow and lying, with sessions open."""

import contextlib
import http.server
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator

from tests.guest_vm.login import Session
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, await_connected, status
from tests.waiting import until


def kill_agent(guest: Machine) -> None:
    guest.must("systemctl kill -s KILL persona-agent")


def test_sessions_outlive_the_agent(guest: Machine) -> None:
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        before = re.search(r"s-[0-9a-f]+", session.ask("persona status"))
        for _ in range(3):
            kill_agent(guest)
            assert session.ask("ls -d /etc", timeout=60) == "/etc\n"
            assert "denied" in session.ask("nmap --version")
        await_connected(guest)
        after = re.search(r"s-[0-9a-f]+", session.ask("persona status"))
        assert before is not None and after is not None
        assert before[0] == after[0]


def test_an_exec_in_flight_when_the_agent_dies_is_answered_by_the_next(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        for _ in range(3):
            session.write("for i in $(seq 60); do ls -d /etc || echo BAD; done | sort | uniq -c")
            time.sleep(0.3)
            kill_agent(guest)
            assert session.read(timeout=90).split() == ["60", "/etc"]


def test_nothing_new_runs_while_the_agent_is_stopped(guest: Machine) -> None:
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        guest.must("systemctl stop persona-agent")
        try:
            text = session.ask("ls -d /etc; nmap --version", timeout=30)
            assert "/etc\n" not in text
            assert "Nmap version" not in text
            refused = guest.ssh("alice", "true", timeout=60)
            assert refused.code == 255
            assert "persona-agent" in refused.err
            assert guest.ssh("root", "echo in").out == "in\n"
        finally:
            guest.must("systemctl start persona-agent")
            await_connected(guest)
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"


def test_broker_away_then_back(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        broker.stop()
        try:
            assert session.ask("ls -d /etc") == "/etc\n"  # its lease still holds
            started = time.monotonic()
            text = session.ask("wc -l /etc/hosts")  # never asked before
            assert "broker_unreachable" in text
            assert time.monotonic() - started < 10
            deadline = time.monotonic() + 60
            while "/etc" in session.ask("ls -d /etc 2>/dev/null") and time.monotonic() < deadline:
                time.sleep(1)
            assert "broker_unreachable" in session.ask("ls -d /etc")
            assert "broker_unreachable" in guest.ssh("alice", "true").err
        finally:
            broker.start()
            await_connected(guest)
        assert session.ask("ls -d /etc") == "/etc\n"


def test_a_power_cut_takes_at_most_the_last_second_of_the_records(guest: Machine, broker: Broker) -> None:
    began = guest.moment()
    told: list[tuple[float, int]] = []  # when each denial was over, and its number
    loop = "i=0; while :; do i=$((i+1)); nmap -p $i localhost 2>/dev/null; echo $i; done"
    argv = [*guest.ssh_argv("alice"), "--", loop]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as login:
        if login.stdout is None:
            raise RuntimeError("no pipe")
        try:
            login.stdout.readline()
            broker.stop()
            for line in login.stdout:
                told.append((time.monotonic(), int(line)))
                if told[-1][0] - told[0][0] > 6:
                    break
            cut = time.monotonic()
            guest.cut_power()
        finally:
            login.kill()
            broker.start()
    await_connected(guest)
    until(lambda: status(guest)["records"]["waiting"] == 0, seconds=60, every=0.5)
    kept = [one["argv"] for one in broker.records(began, "--user", "alice") if one["event"] == "exec"]
    numbers = [int(argv[2]) for argv in kept if argv[0] == "nmap"]
    durable = {number for at, number in told if at < cut - 1}
    assert len(durable) > 10, told
    assert durable <= set(numbers), sorted(durable - set(numbers))
    assert len(numbers) == len(set(numbers)), "each one once"


class _Liar(http.server.BaseHTTPRequestHandler):
    delay = 0.0
    answer = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.delay)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def liar(broker: Broker, delay: float, answer: bytes) -> Iterator[None]:
    """In place of the broker, one that is slow or answers garbage; a fake, on the real one's port."""
    broker.stop()
    handler = type("Handler", (_Liar,), {"delay": delay, "answer": answer})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", broker.port), handler)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(broker.directory / "broker.crt", broker.directory / "broker.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        broker.start()


def ask_anew(session: Session, number: int) -> tuple[str, float]:
    started = time.monotonic()
    text = session.ask(f"{('head', 'tail', 'sort', 'uniq', 'tac')[number]} -n 0 /dev/null")
    return text, time.monotonic() - started


def test_a_slow_broker_is_a_denial_within_the_deadline(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        session.ask("true")
        with liar(broker, 5, b"{}"):
            text, seconds = ask_anew(session, 0)
            assert "broker_unreachable" in text
            assert seconds < 8
        await_connected(guest)
        assert "denied" not in ask_anew(session, 0)[0]


def test_garbage_is_a_denial(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        session.ask("true")
        for answer in (b"garbage", b"[]", b'{"decision": "granted"}', b"{" * 5000, b"x" * 2_000_000):
            with liar(broker, 0, answer):
                told = ""
                for _ in range(10):  # the agent's own question may meet the liar first: then it is unreachable a while
                    told = ask_anew(session, 1)[0]
                    assert "denied" in told, answer[:30]
                    if "broker_misbehaved" in told:
                        break
                    time.sleep(1)
                assert "broker_misbehaved" in told, answer[:30]
        await_connected(guest)
        assert "denied" not in ask_anew(session, 1)[0]


def test_the_socket_survives_garbage(guest: Machine) -> None:
    script = r"""
import json, os, socket, sys
def talk(path, data, wait=True):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(9)
    try:
        s.connect(path); s.send(data); return s.recv(300000) if wait else s
    except OSError as e:
        return str(e).encode()
user = "/run/persona/agent.sock"
for data in (b"x", b"{}", b"[]", b'{"op": 7}', b'{"op": "nothing"}', b'{"op": "status", "x": 1}', b"[" * 60000,
             os.urandom(60000), b'{"op": "listener"}', b'{"op": "explain", "argv": []}', b'{"op": "release"}'):
    answer = talk(user, data)
    print(json.loads(answer)["ok"] if answer.startswith(b"{") else answer)
held = [talk(user, b'{"op": "status"}', False) for _ in range(40)]
print(talk("/run/persona/pam.sock", b"x"))
"""
    done = guest.ssh("carol", "python3 -", stdin=script)
    assert done.code == 0, done.text
    assert "True" not in done.out
    assert "Permission denied" in done.out.splitlines()[-1]
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
    garbage = script.replace('user = "/run/persona/agent.sock"', 'user = "/run/persona/pam.sock"')
    guest.must("python3 -", stdin=garbage.replace("json.loads(answer)", "{}"))
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
