"""The network of personas on this machine's kernel: what a packet costs more, and what a change costs.

A thousand personas with ten rules each are bound, every one to a cgroup of its own; the measured program is
one of them, in a namespace that is joined to another by a cable.  ``python3 -m tests.bench.net ROUNDS`` prints the
rows as JSON: so it runs in a guest too.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from persona_guest.core.persona_cgroups import PersonaCgroup
from persona_guest.enforce import plan as plans
from persona_guest.enforce.network.facility import Network
from persona_guest.enforce.network.table import Table

from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.network import parse_rule
from persona.patterns import Whitelist
from tests.bench.row import Row, median, pairs
from tests.guest import netns
from tests.guest.netns import FAR4, World

PERSONAS = 1000
ROUNDS = 201  # short and in turn: the machine has other work
SETTLE_S = 0.01
GOES = 5
CHANGES = 50
RULES = [f"10.{number}.0.0/16:tcp/5432" for number in range(30, 36)] + ["dns", "icmp", "any:tcp/443-444", "any:udp/443"]

# All on one CPU: how soon another one wakes up would be measured otherwise, which varies by more than the rules cost.
SERVER = """
import os, socket, threading
os.sched_setaffinity(0, {0})
listening = socket.create_server(("0.0.0.0", 443), backlog=512)
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(("0.0.0.0", 443))
def echo():
    while True:
        datagrams.sendto(*datagrams.recvfrom(64))
threading.Thread(target=echo, daemon=True).start()
sink = socket.create_server(("0.0.0.0", 444))
def swallow():
    while True:
        with sink.accept()[0] as sock:
            while sock.recv(1 << 20):
                pass
            sock.send(b"x")
threading.Thread(target=swallow, daemon=True).start()
print("ready", flush=True)
while True:
    listening.accept()[0].close()
"""
CLIENT = f"""
import os, socket, struct, sys, time
os.sched_setaffinity(0, {{0}})
linger = struct.pack("ii", 1, 0)
def connects():
    for _ in range(20):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            sock.connect(("{FAR4}", 443))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.connect(("{FAR4}", 443))
def trips():
    for _ in range(50):
        datagrams.send(b"x")
        datagrams.recv(8)
def stream():
    with socket.create_connection(("{FAR4}", 444)) as sock:
        for _ in range(32):
            sock.sendall(bytes(65536))
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
print("ready", flush=True)
for line in sys.stdin:
    work = dict(connects=connects, trips=trips, stream=stream)[line.strip()]
    began = time.perf_counter()
    work()
    print(time.perf_counter() - began, flush=True)
"""


@contextmanager
def running(world: World, source: str, where: str, cgroup: str = "") -> Iterator[subprocess.Popen[str]]:
    """A Python program in one of the namespaces, in a cgroup, once it is ready."""
    enter = f'echo $$ > "{world.root / cgroup}/cgroup.procs"; ' if cgroup else ""
    argv = ["sh", "-c", f'{enter}exec nsenter --net=/run/netns/{where} python3 -c "$0"', source]
    process = subprocess.Popen(argv, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        answer(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen[str], word: str = "") -> str:
    """What it says next, to a word."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("no pipes")
    if word:
        process.stdin.write(word + "\n")
        process.stdin.flush()
    return process.stdout.readline()


def settled(client: subprocess.Popen[str], word: str) -> float:
    """The middle of a few goes, once the kernel has done with the change before."""
    time.sleep(SETTLE_S)
    answer(client, word)
    return median([float(answer(client, word)) for _ in range(GOES)])


def rows(rounds: int = ROUNDS) -> list[Row]:
    """net.*"""
    with netns.world("pbench") as world:
        table = world.in_near(lambda: Table(lambda _via: 1))
        network = Network(table, lambda _via: 1, str(world.root), {})
        wanted = {place(world, number): persona(number) for number in range(PERSONAS)}
        found = [update(world, network, wanted), *packets(world, rounds)]
        table.rebuild({})
        table.close()
    return found


def place(world: World, number: int) -> PersonaCgroup:
    """Of a session of its own."""
    return PersonaCgroup(f"s-{number}", PersonaRef(f"P{number}", 1), world.cgroup(f"P{number}"), 2000 + number)


def persona(number: int, *more: str) -> Persona:
    """One of many."""
    return Persona(f"P{number}", Whitelist(()), network_access=tuple(map(parse_rule, [*RULES, *more])))


def update(world: World, network: Network, wanted: dict[PersonaCgroup, Persona]) -> Row:
    """Another version of one persona, with all of them loaded and with it alone."""

    def changes() -> float:
        seconds = []
        for port in range(CHANGES):
            changed = persona(7, f"any:tcp/{port + 1}")
            began = time.perf_counter()
            plans.apply(network.enter(place(world, 7), changed))
            seconds.append(time.perf_counter() - began)
        return median(seconds) * 1e3

    plans.apply(network.reconcile({place(world, 7): wanted[place(world, 7)]}))
    alone = changes()
    plans.apply(network.reconcile(wanted))
    among = changes()
    return Row("net.update_ms", among, "ms", "one persona loaded", alone, among / alone, "< 50")


def packets(world: World, rounds: int) -> list[Row]:
    """Connections, round trips of a datagram and MiB of a stream, by a bound program: with the table and without."""
    found = []
    mine = place(world, 7).cgroup
    with running(world, SERVER, world.far), running(world, CLIENT, world.near, mine) as client:
        for name, word, unit, target in (
            ("net.packet_ratio", "connects", 20, "<= 1.05"),
            ("net.datagram_ratio", "trips", 50, ""),
            ("net.stream_ratio", "stream", 2, ""),
        ):

            def bound(word: str = word) -> float:
                world.near_run("nft", "add", "table", "inet", "persona", "{ }")
                return settled(client, word)

            def free(word: str = word) -> float:
                world.near_run("nft", "add", "table", "inet", "persona", "{ flags dormant; }")  # its hooks are gone
                return settled(client, word)

            ours, theirs, ratio = pairs(bound, free, rounds)
            found.append(Row(name, ours / unit * 1e6, "us", "table dormant", theirs / unit * 1e6, ratio, target))
    return found


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in rows(int(sys.argv[1]))]))
