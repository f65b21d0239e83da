"""The gate on this machine's kernel, through the agent's own code: what a program start costs."""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from persona_guest.shell import trial
from persona_guest.shell.client import Client
from persona_guest.shell.gate import install

from tests.bench.row import Row, pairs

SPAWNS = 300
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
def agent() -> Iterator[str]:
    """An embedded broker and agent with a persona for the benchmark; the path of the agent's socket."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-bench-")))
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


def in_child(work: Callable[[], float], socket: str | None) -> float:
    """Runs ``work`` in a child, gated where a socket is given; what it returned."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        if socket is not None:
            install(socket, "/bin/bash")
        os.write(writing, repr(work()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as result:
        text = result.read()
    os.waitpid(pid, 0)
    return float(text)


def script() -> float:
    """Seconds for SCRIPT."""
    began = time.perf_counter()
    subprocess.run(["/bin/sh", "-c", SCRIPT], check=True)
    return time.perf_counter() - began


def rows() -> list[Row]:
    """gate.*, agent.*"""
    found = []
    with tempfile.TemporaryDirectory() as scratch, agent() as socket:
        library(Path(scratch))
        spawns = library(Path(scratch)).spawn_many

        def spawn() -> float:
            return float(spawns(b"/bin/true", SPAWNS))

        gated, free, ratio = pairs(lambda: in_child(spawn, socket), lambda: in_child(spawn, None))
        found.append(Row("gate.spawn_ratio", gated * 1e6, "us", "ungated", free * 1e6, ratio, "< 1.35, target 1.10"))
        found.append(sudo(lambda: in_child(spawn, socket), Path(scratch) / "spawn.so"))
        gated, free, ratio = pairs(lambda: in_child(script, socket), lambda: in_child(script, None), 5)
        found.append(Row("gate.script_ratio", gated, "s", "ungated", free, ratio, "< 1.25, target 1.08"))
        with Client(socket) as client:
            status = client.call("status")
        times = status["notify_us"]
        if not isinstance(times, dict):
            raise TypeError("status: notify_us")
        found.append(
            Row(
                "gate.notify_us",
                times["p50"],
                "us",
                "p99",
                times["p99"],
                times["p50"] / times["p99"],
                "p50 < 100, target 30",
            )
        )
        found += at_rest(socket)
    return found


def sudo(gated: Callable[[], float], spawner: Path) -> Row:
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
        ours, theirs, ratio = pairs(gated, traced, 5)
    finally:
        SUDOERS.unlink()
    return Row("gate.vs_sudo_intercept", ours * 1e6, "us", "sudo intercept", theirs * 1e6, ratio, "< 0.95, target 0.80")


def at_rest(socket: str) -> list[Row]:
    """Ten sessions open, nothing happening: memory and CPU of the agent."""
    sessions = []
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            install(socket, "/bin/bash")
            os.execv("/bin/sleep", ["sleep", "60"])
        sessions.append(pid)
    time.sleep(2)
    agent_pid = peer(socket)
    rss = next(
        int(line.split()[1]) / 1024
        for line in Path(f"/proc/{agent_pid}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    bare = subprocess.run(
        [sys.executable, "-c", "print(open('/proc/self/status').read())"], capture_output=True, text=True, check=True
    ).stdout
    bare_rss = next(int(line.split()[1]) / 1024 for line in bare.splitlines() if line.startswith("VmRSS"))
    before = cpu(agent_pid)
    time.sleep(20)
    used = (cpu(agent_pid) - before) / 20 * 100
    for pid in sessions:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return [
        Row("agent.rss_mb", rss, "MB", "bare python3", bare_rss, rss / bare_rss, "< 60, target 35"),
        Row("agent.idle_cpu", used, "%", "none", 0, 0, "< 0.5, target 0.1"),
    ]


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


if __name__ == "__main__":
    print(json.dumps([row.name for row in rows()]))
