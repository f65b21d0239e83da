"""The gate on this machine's kernel, through the agent's own code: what a program start costs."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from persona_guest.shell import trial
from persona_guest.shell.client import Client
from persona_guest.shell.gate import install

from tests.bench.child import fork, in_child
from tests.bench.row import Missing, Row, measured, pairs

SPAWNS = 300
SESSIONS = 10
PERSONA = (
    "kind: Persona\nname: Bench\ncommand_whitelist: [sh, dash, bash, 'true', expr, sed, grep, cat, sleep, tr, cut]\n"
)
SUDOERS = Path("/etc/sudoers.d/zz-persona-bench")

# What a configure script does most: small programs, one after the other.
SCRIPT = """
i=0
while [ $i -lt 400 ]; do
    i=$(/usr/bin/expr $i + 1)
    /usr/bin/sed -n 1p /etc/hostname >/dev/null
    /usr/bin/grep -q root /etc/passwd
    /usr/bin/cat /etc/hostname >/dev/null
    /usr/bin/tr a b </etc/hostname >/dev/null
done
"""


@contextlib.contextmanager
def agent(*, spool: bool = True) -> Iterator[str]:
    """An embedded broker and agent with a persona for the benchmark; the path of the agent's socket.

    Without a ``spool`` records wait in memory: in its place there is a file system that cannot be written.
    """
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-bench-")))
        if not spool:
            place = home / "state" / "spool"
            place.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(place)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(place)], check=True)
        (home / "bench.yaml").write_text(PERSONA)
        trial.start(stack, home, [str(home / "bench.yaml")])
        yield str(home / "run" / "agent.sock")


def library(directory: Path) -> ctypes.CDLL:
    """spawn.c, compiled."""
    target = directory / "spawn.so"
    source = Path(__file__).with_name("spawn.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(target), str(source)], check=True, timeout=60)
    found = ctypes.CDLL(str(target))
    found.spawn_many.restype = ctypes.c_double
    return found


def gated(work: Callable[[], float], socket: str) -> float:
    """What the work returns, done in a child that is gated."""

    def inside() -> float:
        install(socket, "/bin/bash")
        return work()

    return in_child(inside)


def script() -> float:
    """Seconds for SCRIPT."""
    began = time.perf_counter()
    subprocess.run(["/bin/sh", "-c", SCRIPT], check=True)
    return time.perf_counter() - began


def rows() -> Iterator[Row | Missing]:
    """gate.*, agent.*"""
    with tempfile.TemporaryDirectory() as scratch, agent() as socket:
        spawns = library(Path(scratch)).spawn_many

        def spawn() -> float:
            seconds = float(spawns(b"/bin/true", SPAWNS))
            if seconds < 0:
                raise RuntimeError("/bin/true did not start")
            return seconds

        def ratio() -> Row:
            ours, free, ratio = pairs(lambda: gated(spawn, socket), lambda: in_child(spawn))
            return Row("gate.spawn_ratio", ours * 1e6, "us", "ungated", free * 1e6, ratio, "< 1.35, target 1.10")

        def spool_ratio() -> Row:
            with agent(spool=False) as without:
                ours, free, ratio = pairs(lambda: gated(spawn, socket), lambda: gated(spawn, without))
            return Row("gate.spool_ratio", ours * 1e6, "us", "without spool", free * 1e6, ratio, "< 1.01")

        def script_ratio() -> Row:
            ours, free, ratio = pairs(lambda: gated(script, socket), lambda: in_child(script), 5)
            return Row("gate.script_ratio", ours, "s", "ungated", free, ratio, "< 1.25, target 1.08")

        yield from measured(
            ("gate.spawn_ratio", ratio),
            ("gate.spool_ratio", spool_ratio),
            ("gate.vs_sudo_intercept", lambda: sudo(lambda: gated(spawn, socket), Path(scratch) / "spawn.so")),
            ("gate.script_ratio", script_ratio),
            ("gate.notify_us", lambda: notify(socket)),
            ("agent.*", lambda: at_rest(socket)),
        )


def notify(socket: str) -> Row:
    """The agent's own measure of what was asked so far."""
    times = status(socket)["notify_us"]
    if not isinstance(times, dict):
        raise TypeError("status: notify_us")
    p50, p99 = times["p50"], times["p99"]
    return Row("gate.notify_us", p50, "us", "p99", p99, p50 / p99, "p50 < 100, target 30")


def status(socket: str) -> dict[str, Any]:
    """What the agent says of itself."""
    with Client(socket) as client:
        return client.call("status")


def sudo(ours: Callable[[], float], spawner: Path) -> Row:
    """The same spawns below sudo, which traces every exec of its command with ptrace(2)."""
    program = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).spawn_many; f.restype = ctypes.c_double;"
        f" print(f(b'/bin/true', {SPAWNS}))"
    )
    SUDOERS.write_text(
        "Defaults:root intercept, intercept_type=trace, !log_allowed\nroot ALL=(ALL:ALL) NOPASSWD: ALL\n"
    )
    SUDOERS.chmod(0o440)
    spawner.chmod(0o644)

    def traced() -> float:
        argv = [shutil.which("sudo") or "sudo", "-n", "/usr/bin/python3", "-c", program, str(spawner)]
        return float(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120).stdout)

    try:
        mine, theirs, ratio = pairs(ours, traced, 5)
    finally:
        SUDOERS.unlink()
    return Row("gate.vs_sudo_intercept", mine * 1e6, "us", "sudo intercept", theirs * 1e6, ratio, "< 0.95, target 0.80")


def at_rest(socket: str) -> list[Row]:
    """``SESSIONS`` open, nothing happening: memory and CPU of the agent."""

    def rests() -> None:
        install(socket, "/bin/bash")
        os.execv("/bin/sleep", ["sleep", "600"])

    with contextlib.ExitStack() as stack:
        for _ in range(SESSIONS):
            stack.callback(_end, fork(rests))
        deadline = time.monotonic() + 20
        while (there := status(socket)["sessions"]) != SESSIONS:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{there} sessions are open and not {SESSIONS}")
            time.sleep(0.1)
        time.sleep(2)
        agent_pid = peer(socket)
        lines = Path(f"/proc/{agent_pid}/status").read_text().splitlines()
        rss = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
        bare = subprocess.run(
            [sys.executable, "-c", "print(open('/proc/self/status').read())"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        bare_rss = next(int(line.split()[1]) / 1024 for line in bare.splitlines() if line.startswith("VmRSS"))
        before = cpu(agent_pid)
        time.sleep(20)
        used = (cpu(agent_pid) - before) / 20 * 100
        if (there := status(socket)["sessions"]) != SESSIONS:
            raise RuntimeError(f"{there} sessions were open at the end and not {SESSIONS}")
    return [
        Row("agent.rss_mb", rss, "MB", "bare python3", bare_rss, rss / bare_rss, "< 60, target 35"),
        Row("agent.idle_cpu", used, "%", "none", 0, 0, "< 0.5, target 0.1"),
    ]


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def cpu(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peer(path: str) -> int:
    """The process that listens at a socket's path, by its command line's configuration directory."""
    home = str(Path(path).parents[1])
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"persona_guest" in words and any(word.startswith(home.encode()) for word in words):
                return int(entry.parent.name)
    raise LookupError("no agent")
